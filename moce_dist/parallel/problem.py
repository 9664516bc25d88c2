"""The placement problem of the gating scheduler, and the cost of a plan.

Letters: L MoE layers, K clusters, E experts per layer, G expert groups, n pairs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moce_dist.arrays import Int64
from moce_dist.parallel.transport import Pairs, transport


@dataclass(frozen=True)
class PlacementProblem:
    """The input of the planner; images are counted in integer units."""

    routing: Int64
    """(L, K)."""
    sizes: Int64
    """(K,) units per cluster."""
    num_experts: int
    num_groups: int
    current: Int64 | None = None
    """(L, E): the current group of every expert; None when experts are free."""
    move_cost: float = 0.0
    """Exchanged units that the move of one expert must save at least."""

    @property
    def quotas(self) -> Int64:
        """Units that every group reads, (G,), equal within one unit."""
        return (int(self.sizes.sum()) + np.arange(self.num_groups)) // self.num_groups

    @property
    def slots(self) -> Int64:
        """Group of every slot for an expert, (E,)."""
        return np.repeat(np.arange(self.num_groups), self.num_experts // self.num_groups)

    def cost_of_moves(self, experts: Int64) -> float:
        """Return `move_cost` times the number of experts that `experts` (L, E) moves."""
        moves = 0 if self.current is None else int((experts != self.current).sum())
        return self.move_cost * moves


class Solution(NamedTuple):
    """Experts' groups (L, E), units that groups read, groups' prices (G,), and the cost."""

    experts: Int64
    readers: Pairs
    prices: Int64
    cost: float
    """Exchanged units plus `move_cost` for every expert that moved."""


def read(problem: PlacementProblem, experts: Int64, prices: Int64 | None = None) -> Solution:
    """Find the best readers for experts (L, E); `prices` (G,) of a similar plan save time."""
    if prices is None:
        prices = np.zeros(problem.num_groups, np.int64)
    gains = gains_of(problem.routing, experts)
    readers, prices = transport(gains, problem.sizes, problem.quotas, prices)
    keys, wanted = (p.cluster * problem.num_groups + p.group for p in (gains, readers))
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    local = float(np.where(keys[at] == wanted, gains.value[at], 0) @ readers.value)
    cost = len(experts) * int(problem.sizes.sum()) - local
    return Solution(experts, readers, prices, cost + problem.cost_of_moves(experts))


def gains_of(routing: Int64, experts: Int64) -> Pairs:
    """List the gain of every cluster in the groups of its experts.

    `routing` (L, K) gives the experts of the clusters, `experts` (L, E) the groups of the experts.
    """
    # the gain of a group is the number of layers in which it has the cluster's expert: count equal
    # neighbours in the sorted groups
    homes = np.sort(np.take_along_axis(experts, routing, axis=1).T.astype(np.int32), axis=1)
    is_first = np.ones(homes.shape, bool)
    is_first[:, 1:] = homes[:, 1:] != homes[:, :-1]
    at = np.flatnonzero(is_first)
    gain = np.diff(at, append=homes.size).astype(float)
    return Pairs(at // homes.shape[1], homes.ravel()[at].astype(np.int64), gain)
