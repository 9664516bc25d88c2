"""What a run costs: images seen, and floating-point operations by the formulas of cost/sizes.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moce_dist.config import Config
from moce_dist.cost.sizes import clustering_flop, features_flop, training_flop


@dataclass(frozen=True)
class Cost:
    """Images seen in the stages, and floating-point operations."""

    mae_images: int = 0
    moce_images: int = 0
    training: int = 0
    clustering: int = 0
    """Of the features and of k-means."""

    @property
    def flop(self) -> int:
        """All of them."""
        return self.training + self.clustering


def run_cost(config: Config, images: Mapping[Any, int], iterations: int | None = None) -> Cost:
    """Cost of a run's stages, given the `images` that each of them sees.

    `iterations` of k-means that were run; by default the most that may be.
    """
    mae, moce = images.get("mae", 0), images.get("moce", 0) + images.get("control", 0)
    rounds = config.cluster.iterations if iterations is None else iterations
    clustering = images.get("features", 0) * features_flop(config)
    clustering += clustering_flop(config, images.get("cluster", 0), rounds)
    return Cost(mae, moce, (mae + moce) * training_flop(config), clustering)
