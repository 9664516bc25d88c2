"""What a placement costs: images that leave their group, predicted by the plan and counted after.

Both are in the same terms, so that one can be held against the other. They differ where a
step is not an epoch: a step's images are levelled over the groups, gate noise changes the table.
Groups count, not ranks: where a rank hosts several groups, images between those do not travel.

Letters: L MoE layers, K clusters, E experts per layer, G expert groups.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moce_dist.config import Config
from moce_dist.cost.sizes import TRANSFERS, image_bytes
from moce_dist.parallel.placement import Placement
from moce_dist.parallel.transport import Floats, Ints


@dataclass
class Traffic:
    """Images seen by groups and experts, and how many had to leave their group."""

    images_per_group: Floats
    """(G,), padding left out."""
    images_per_expert: Floats
    """(L, E)."""
    images_exchanged: float = 0.0
    """Summed over the layers."""

    def to_dict(self, config: Config) -> dict[str, Any]:
        """Return what a placement file says about it."""
        images = float(self.images_per_group.sum())
        crossings = images * len(self.images_per_expert)
        return {
            "images": images,
            "images_exchanged": self.images_exchanged,
            "bytes_exchanged": self.images_exchanged * image_bytes(config) * TRANSFERS,
            "local_fraction": 1 - self.images_exchanged / crossings if crossings else 1.0,
            "images_per_group": self.images_per_group.tolist(),
            "images_per_expert": self.images_per_expert.tolist(),
        }

    def count(self, clusters: Ints, routing: Ints, placement: Placement) -> None:
        """Add a step: `clusters` (G, b) that the groups read (-1 is padding), `routing` (L, K)."""
        is_planned = clusters >= 0
        self.images_per_group += is_planned.sum(axis=1)
        readers = np.nonzero(is_planned)[0]
        experts = routing[:, clusters[is_planned]]
        homes = np.take_along_axis(placement.expert_group, experts, axis=1)
        self.images_exchanged += int((homes != readers).sum())
        np.add.at(self.images_per_expert, (np.arange(len(routing))[:, None], experts), 1)


def no_traffic(placement: Placement) -> Traffic:
    """Return zeros to count from."""
    return Traffic(np.zeros(placement.num_groups), np.zeros(placement.expert_group.shape))


def predict_traffic(placement: Placement, routing: Ints, cluster_sizes: Ints) -> Traffic:
    """Predict an epoch under a routing table (L, K)."""
    traffic = no_traffic(placement)
    traffic.images_per_group += cluster_sizes @ placement.shares
    np.add.at(traffic.images_per_expert, (np.arange(len(routing))[:, None], routing), cluster_sizes)
    traffic.images_exchanged = placement.images_exchanged(routing, cluster_sizes)
    return traffic
