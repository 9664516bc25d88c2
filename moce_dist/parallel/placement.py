"""The gating scheduler: which experts live on which group, and which group reads which cluster.

Input: a routing table, images per cluster, G. Output: a `Placement`. An image that is read by the
group of its expert never leaves it. So the objective is to minimise the images that must travel,
summed over the layers, with equally many images per group. planner.py solves it.

The plan predicts the cost of a placement, the images that leave their group, and `Traffic` counts
it afterwards in the same terms. The two differ because the plan is for an epoch: within a step the
images are levelled over the groups, and gate noise changes the routing table. Both count between
groups, not ranks: where a rank hosts several groups, images between these do not really travel.

Letters: L MoE layers, K clusters, E experts per layer, G expert groups, B images of a step.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moce_dist.arrays import Float64, Int64
from moce_dist.config import Config
from moce_dist.cost.sizes import exchange_bytes
from moce_dist.parallel.planner import solve
from moce_dist.parallel.problem import PlacementProblem, Solution, read
from moce_dist.parallel.transport import MAX_UNITS


@dataclass(frozen=True)
class Placement:
    """The group of every expert, and the groups that read every cluster's images."""

    expert_group: Int64
    """(L, E): the group on which an expert lives."""
    shares: Float64
    """(K, G): the share of a cluster that a group reads; rows sum to 1."""

    @property
    def num_groups(self) -> int:
        """Number of expert groups, G."""
        return self.shares.shape[1]

    @cached_property
    def _parts(self) -> tuple[Int64, Int64, Float64]:
        # cluster, group and share of every nonzero share; nearly every cluster has just one
        cluster, group = np.nonzero(self.shares)
        return cluster, group, self.shares[cluster, group]

    @cached_property
    def _bounds(self) -> Float64:
        # cluster id + the cumulative share up to and including a part: these are sorted, so one
        # search finds the part of any slot
        cluster, _, share = self._parts
        total = np.cumsum(share)
        before = np.concatenate([[0.0], total])[np.searchsorted(cluster, cluster)]
        bounds = (total - before) / self.shares.sum(axis=1)[cluster]
        is_last = np.diff(cluster, append=-1) != 0
        upper: Float64 = np.where(is_last, 1.0, bounds) + cluster.astype(np.float64)
        return upper

    def readers(self, clusters: Int64) -> Int64:
        """Give every slot of a step, (B,) cluster ids, the group that reads it: B / G each.

        Padding (cluster -1) fills the remaining slots of the groups.
        """
        groups = np.full(len(clusters), -1)
        slots = np.argsort(clusters, kind="stable")
        slots = slots[np.searchsorted(clusters[slots], 0) :]
        ids = clusters[slots]
        # the j-th of a cluster's n slots goes to the part that covers (j + 1/2) / n of its shares
        first = np.searchsorted(ids, ids)
        count = np.searchsorted(ids, ids, side="right") - first
        at = ids + (np.arange(len(ids)) - first + 0.5) / count
        groups[slots] = self._parts[1][np.searchsorted(self._bounds, at, side="right")]
        return _level(groups, self.num_groups)

    def images_exchanged(self, routing: Int64, cluster_sizes: Int64) -> float:
        """Predict how many images travel in an epoch, summed over the layers."""
        cluster, group, share = self._parts
        homes = np.take_along_axis(self.expert_group, routing, axis=1)
        stays = (homes[:, cluster] == group).sum(axis=0)
        local = stays @ (share * cluster_sizes[cluster])
        return float(routing.shape[0] * cluster_sizes.sum() - local)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold, with the nonzero shares only."""
        cluster, group, share = (part.tolist() for part in self._parts)
        return {
            "expert_group": self.expert_group.tolist(),
            "shape": [*self.expert_group.shape, *self.shares.shape],
            "shares": {"cluster": cluster, "group": group, "share": share},
        }

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> "Placement":
        """Read what `to_dict` returned."""
        layers, experts, clusters, groups = document["shape"]
        shares, parts = np.zeros((clusters, groups)), document["shares"]
        shares[parts["cluster"], parts["group"]] = parts["share"]
        homes = np.array(document["expert_group"], np.int64).reshape(layers, experts)
        return Placement(homes, shares)


def _level(groups: Int64, num_groups: int) -> Int64:
    # makes the groups equal: the last slots of those that are too large go to those too small
    room = len(groups) // num_groups - np.bincount(groups[groups >= 0], minlength=num_groups)
    for group in np.flatnonzero(room < 0):
        groups[np.flatnonzero(groups == group)[room[group] :]] = -1
    groups[groups < 0] = np.repeat(np.arange(num_groups), room.clip(min=0))
    return groups


def contiguous_placement(
    num_layers: int, num_experts: int, num_clusters: int, groups: int
) -> Placement:
    """Place experts and clusters by number alone, as a system without a scheduler does."""
    expert_group = np.tile(np.arange(num_experts) * groups // num_experts, (num_layers, 1))
    shares = np.eye(groups)[np.arange(num_clusters) * groups // num_clusters]
    return Placement(expert_group, shares)


def plan_placement(
    routing: Int64,
    cluster_sizes: Int64,
    *,
    num_experts: int,
    num_groups: int,
    expert_group: Int64 | None = None,
    move_cost: float = math.inf,
) -> Placement:
    """Plan experts and readers for a routing table (L, K); deterministic.

    Without `expert_group` (L, E) experts are placed freely. With it an expert stays, unless moving
    it saves more than `move_cost` exchanged images per epoch. With no MoE layer (L = 0) clusters
    are only spread evenly.
    """
    units, scale = _units(cluster_sizes, num_groups)
    if len(routing) == 0:
        nowhere = PlacementProblem(np.zeros((1, len(units)), np.int64), units, 1, num_groups)
        plan = read(nowhere, np.zeros((1, 1), np.int64))
        return Placement(np.zeros((0, num_experts), np.int64), _shares(plan, nowhere))
    cost = 0.0 if math.isinf(move_cost) else move_cost * scale
    problem = PlacementProblem(routing, units, num_experts, num_groups, expert_group, cost)
    if expert_group is not None and math.isinf(move_cost):
        plan = read(problem, expert_group)
    else:
        plan = solve(problem)
    return Placement(plan.experts, _shares(plan, problem))


def _units(cluster_sizes: Int64, num_groups: int) -> tuple[Int64, float]:
    # integer units that divide evenly among the groups, unless there would be more than MAX_UNITS:
    # then sizes are scaled down. Returns units per cluster, and units per image.
    total = max(1, int(cluster_sizes.sum()))
    whole = num_groups // math.gcd(total, num_groups)
    if total * whole <= MAX_UNITS:
        return cluster_sizes * whole, whole
    scale = min(1.0, MAX_UNITS / 2 / total)
    return np.floor(cluster_sizes * scale).astype(np.int64), scale


def _shares(plan: Solution, problem: PlacementProblem) -> Float64:
    shares = np.zeros((len(problem.sizes), problem.num_groups))
    # an empty cluster also has a reader, of 0 units
    shares[plan.readers.cluster, plan.readers.group] = plan.readers.value.clip(min=1)
    return shares / shares.sum(axis=1, keepdims=True)


@dataclass
class Traffic:
    """Images seen by groups and experts, and how many had to leave their group."""

    images_per_group: Float64
    """(G,), without padding."""
    images_per_expert: Float64
    """(L, E)."""
    images_exchanged: float = 0.0
    """Summed over the layers."""

    def to_dict(self, config: Config) -> dict[str, Any]:
        """Return the entries of a placement file."""
        images = float(self.images_per_group.sum())
        crossings = images * len(self.images_per_expert)
        return {
            "images": images,
            "images_exchanged": self.images_exchanged,
            "bytes_exchanged": self.images_exchanged * exchange_bytes(config),
            "local_fraction": 1 - self.images_exchanged / crossings if crossings else 1.0,
            "images_per_group": self.images_per_group.tolist(),
            "images_per_expert": self.images_per_expert.tolist(),
        }

    def count(self, clusters: Int64, routing: Int64, placement: Placement) -> None:
        """Add a step: `clusters` (G, b) that the groups read (-1 is padding), `routing` (L, K)."""
        is_planned = clusters >= 0
        self.images_per_group += is_planned.sum(axis=1)
        readers = np.nonzero(is_planned)[0]
        experts = routing[:, clusters[is_planned]]
        homes = np.take_along_axis(placement.expert_group, experts, axis=1)
        self.images_exchanged += int((homes != readers).sum())
        # np.add.at over all images would be slow
        counts = np.bincount(clusters[is_planned], minlength=routing.shape[1])
        num_experts = self.images_per_expert.shape[1]
        self.images_per_expert += [np.bincount(row, counts, num_experts) for row in routing]


def no_traffic(placement: Placement) -> Traffic:
    """Return a `Traffic` of zeros, for counting."""
    return Traffic(np.zeros(placement.num_groups), np.zeros(placement.expert_group.shape))


def predict_traffic(placement: Placement, routing: Int64, cluster_sizes: Int64) -> Traffic:
    """Predict the traffic of an epoch under a routing table (L, K)."""
    traffic = no_traffic(placement)
    traffic.images_per_group += cluster_sizes @ placement.shares
    np.add.at(traffic.images_per_expert, (np.arange(len(routing))[:, None], routing), cluster_sizes)
    traffic.images_exchanged = placement.images_exchanged(routing, cluster_sizes)
    return traffic
