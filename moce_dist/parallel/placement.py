"""The gating scheduler: which experts live on which group, and which group reads which cluster.

Input: a routing table, images per cluster, G. Output: a `Placement`. An image that is read by the
group of its expert never leaves it, so the objective is the fewest images that must travel,
summed over the layers, under equally many images per group. Two linear problems are solved in
turn until neither helps:

    experts, given readers   per layer, assign experts to group slots (linear sum assignment)
    readers, given experts   clusters to groups by regret, splitting a cluster where a group is full

Letters: L MoE layers, K clusters, E experts per layer, G expert groups, B images of a step.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_ROUNDS = 8


@dataclass(frozen=True)
class Placement:
    """Home of every expert, and of every cluster's images."""

    expert_group: Ints
    """(L, E): the group on which an expert lives."""
    shares: Floats
    """(K, G): which part of a cluster a group reads; rows sum to 1."""

    @property
    def num_groups(self) -> int:
        """Expert groups, G."""
        return self.shares.shape[1]

    def readers(self, clusters: Ints) -> Ints:
        """Give every slot of a step, (B,) cluster ids, the group that reads it: B / G each.

        Padding (cluster -1) fills up what is left.
        """
        groups = np.full(len(clusters), -1)
        bounds = self.shares.cumsum(axis=1)
        for cluster in np.unique(clusters[clusters >= 0]):
            slots = np.flatnonzero(clusters == cluster)
            at = (np.arange(len(slots)) + 0.5) / len(slots) * bounds[cluster, -1]
            groups[slots] = np.searchsorted(bounds[cluster], at, side="right")
        return _level(groups, self.num_groups)

    def images_exchanged(self, routing: Ints, cluster_sizes: Ints) -> float:
        """Predict the images that travel in an epoch, summed over the layers."""
        homes = np.take_along_axis(self.expert_group, routing, axis=1)
        local = sum(self.shares[np.arange(len(home)), home] @ cluster_sizes for home in homes)
        return float(routing.shape[0] * cluster_sizes.sum() - local)

    def to_json(self) -> str:
        """Write as JSON."""
        document = {"expert_group": self.expert_group.tolist(), "shares": self.shares.tolist()}
        return json.dumps(document)

    @staticmethod
    def from_json(text: str) -> "Placement":
        """Read what `to_json` wrote."""
        document: dict[str, Any] = json.loads(text)
        return Placement(np.array(document["expert_group"]), np.array(document["shares"]))


def _level(groups: Ints, num_groups: int) -> Ints:
    # equal sizes: the last slots of groups that have too many go to groups that have too few
    room = len(groups) // num_groups - np.bincount(groups[groups >= 0], minlength=num_groups)
    for group in np.flatnonzero(room < 0):
        groups[np.flatnonzero(groups == group)[room[group] :]] = -1
    groups[groups < 0] = np.repeat(np.arange(num_groups), room.clip(min=0))
    return groups


def contiguous_placement(
    num_layers: int, num_experts: int, num_clusters: int, groups: int
) -> Placement:
    """Place experts and clusters by number alone: what a system without a scheduler does."""
    expert_group = np.tile(np.arange(num_experts) * groups // num_experts, (num_layers, 1))
    shares = np.eye(groups)[np.arange(num_clusters) * groups // num_clusters]
    return Placement(expert_group, shares)


def plan_placement(
    routing: Ints,
    cluster_sizes: Ints,
    *,
    num_experts: int,
    num_groups: int,
    expert_group: Ints | None = None,
) -> Placement:
    """Plan experts and readers for a routing table (L, K); `expert_group` (L, E) keeps experts put.

    Deterministic. With no MoE layer (L = 0) clusters are only spread evenly.
    """
    num_layers, num_clusters = routing.shape
    start = contiguous_placement(num_layers, num_experts, num_clusters, num_groups)
    if expert_group is not None or num_layers == 0:
        kept = start if expert_group is None else Placement(expert_group, start.shares)
        return Placement(kept.expert_group, _assign_readers(routing, cluster_sizes, kept))
    # every layer in turn says how clusters start together; the others fall in with it
    plans = [
        _improve(routing, cluster_sizes, _anchor(routing[[layer]], cluster_sizes, start))
        for layer in range(num_layers)
    ]
    return min(plans, key=lambda plan: plan.images_exchanged(routing, cluster_sizes))


def _anchor(routing: Ints, sizes: Ints, start: Placement) -> Placement:
    # readers that suit one layer, (1, K), its experts spread by load: the fullest first, each to
    # the group with the least load and a free slot
    num_experts = start.expert_group.shape[1]
    loads = np.bincount(routing[0], sizes, num_experts)
    group_loads, slots = np.zeros(start.num_groups), np.zeros(start.num_groups, np.int64)
    groups = np.empty((1, num_experts), np.int64)
    for expert in np.argsort(-loads, kind="stable"):
        is_free = slots < num_experts // start.num_groups
        group = int(np.where(is_free, group_loads, np.inf).argmin())
        groups[0, expert] = group
        group_loads[group] += loads[expert]
        slots[group] += 1
    shares = _assign_readers(routing, sizes, Placement(groups, start.shares))
    return Placement(start.expert_group, shares)


def _improve(routing: Ints, sizes: Ints, start: Placement) -> Placement:
    best, cost = start, np.inf
    for _ in range(_ROUNDS):
        moved = Placement(_assign_experts(routing, sizes, best), best.shares)
        moved = Placement(moved.expert_group, _assign_readers(routing, sizes, moved))
        new_cost = moved.images_exchanged(routing, sizes)
        if new_cost >= cost:
            break
        best, cost = moved, new_cost
    return best


def _assign_experts(routing: Ints, sizes: Ints, placement: Placement) -> Ints:
    # per layer: maximise the images that find their expert in the group that reads them
    num_layers, num_experts = placement.expert_group.shape
    # a group is as many columns as it has slots, so the assignment keeps groups equally full
    slots = np.repeat(np.arange(placement.num_groups), num_experts // placement.num_groups)
    result = np.empty((num_layers, num_experts), np.int64)
    for layer in range(num_layers):
        gain = np.zeros((num_experts, placement.num_groups))
        np.add.at(gain, routing[layer], placement.shares * sizes[:, None])
        experts, columns = linear_sum_assignment(gain[:, slots], maximize=True)
        result[layer, experts] = slots[columns]
    return result


def _assign_readers(routing: Ints, sizes: Ints, placement: Placement) -> Floats:
    # clusters with the most to lose choose first; what does not fit goes to the next best group
    num_layers, num_clusters = routing.shape
    gain = np.zeros((num_clusters, placement.num_groups))
    for layer in range(num_layers):
        gain[np.arange(num_clusters), placement.expert_group[layer, routing[layer]]] += 1
    ranked = np.sort(gain, axis=1)
    regret = (ranked[:, -1] - ranked[:, :-1].max(axis=1, initial=0)) * sizes
    room = np.full(placement.num_groups, sizes.sum() / placement.num_groups)
    shares = np.zeros_like(gain)
    for cluster in np.lexsort((np.arange(num_clusters), -regret)):
        # among equally good groups the emptiest; empty clusters stand where they like best
        left = max(float(sizes[cluster]), 1e-9)
        for group in np.lexsort((-room, -gain[cluster])):
            part = min(left, room[group]) if sizes[cluster] else left
            shares[cluster, group], left = part, left - part
            room[group] -= part
            if left <= 0:
                break
    return shares / shares.sum(axis=1, keepdims=True)
