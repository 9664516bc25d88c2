"""Ranks, expert groups and the process groups that follow from them.

A run has a fixed number G of logical expert groups, hosted by R ranks; R is a multiple or a divisor
of G. A place is a set of neighbouring ranks that hold the same experts (replicas): the ranks of one
group, or a single rank that hosts several groups. An expert-parallel group has one rank of every
place.

    8 ranks, G = 4:   rank    0 1   2 3   4 5   6 7
                      place    0     1     2     3      replicas of an expert: one place
    expert-parallel groups: {0, 2, 4, 6} and {1, 3, 5, 7}
    2 ranks, G = 4:   rank 0 hosts groups 0 and 1, rank 1 hosts 2 and 3; each rank is a place

Letters: R ranks, G expert groups, E experts per layer, L MoE layers.
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moce_dist.arrays import Int64


class Station(NamedTuple):
    """Where a worker process runs: its node's expert-group label ("" without), node, local rank."""

    group: str
    node: str
    local_rank: int


def rank_order(stations: Sequence[Station]) -> list[int]:
    """Order workers by (group, node, local rank): entry r is the index of the worker of rank r.

    Groups with numbers in their names sort by number (g2 before g10). A launcher may start the
    workers in any order, but expert-parallel groups are computed from ranks, so ranks must be
    assigned in this order.
    """
    return sorted(range(len(stations)), key=lambda i: (natural_key(stations[i].group), stations[i]))


def natural_key(name: str) -> tuple[int, str]:
    """Return the sort key under which g2 comes before g10."""
    digits = "".join(character for character in name if character.isdigit())
    return (int(digits) if digits else -1, name)


def free_port() -> int:
    """Find a free TCP port of this host for the rendezvous of the ranks."""
    with socket.socket() as server:
        server.bind(("", 0))
        return int(server.getsockname()[1])


@dataclass(frozen=True)
class Topology:
    """Where R ranks stand among G groups."""

    num_ranks: int
    num_groups: int

    @property
    def ep_size(self) -> int:
        """Number of places, which is the number of ranks in an expert-parallel group."""
        return min(self.num_ranks, self.num_groups)

    @property
    def num_replicas(self) -> int:
        """Number of ranks of a place."""
        return self.num_ranks // self.ep_size

    def place(self, rank: int) -> int:
        """Return the place of a rank."""
        return rank // self.num_replicas

    def expert_parallel_ranks(self, rank: int) -> list[int]:
        """Return the ranks that `rank` exchanges images with, itself included, in place order."""
        replica = rank % self.num_replicas
        return [place * self.num_replicas + replica for place in range(self.ep_size)]

    def replica_ranks(self, rank: int) -> list[int]:
        """Return the ranks that hold the same experts as `rank`, itself included."""
        first = self.place(rank) * self.num_replicas
        return list(range(first, first + self.num_replicas))

    def hosted_groups(self, place: int) -> range:
        """Return the expert groups that a place hosts."""
        count = self.num_groups // self.ep_size
        return range(place * count, (place + 1) * count)

    def place_of_group(self, group: Int64) -> Int64:
        """Map expert groups to the places that host them."""
        return group // (self.num_groups // self.ep_size)


@dataclass(frozen=True)
class ExpertMap:
    """Where every expert of every layer lives: place (L, E) and slot within the place (L, E)."""

    place: Int64
    slot: Int64

    @property
    def num_local_experts(self) -> int:
        """Number of experts of a layer in one place."""
        return int(self.slot.max()) + 1

    def residents(self, place: int) -> list[list[int]]:
        """Return the ids of a place's experts per MoE layer, in the order of their slots."""
        return [
            sorted(np.flatnonzero(places == place).tolist(), key=lambda e: int(slots[e]))
            for places, slots in zip(self.place, self.slot, strict=True)
        ]


def expert_map(expert_group: Int64, topology: Topology) -> ExpertMap:
    """Locate the experts from the group of every expert, (L, E); slots sort by (group, id)."""
    # stable, so that equal placements give equal slots on any number of ranks
    order = np.argsort(expert_group, axis=1, kind="stable")
    rank_in_order = np.argsort(order, axis=1, kind="stable")
    num_local = expert_group.shape[1] // topology.ep_size
    return ExpertMap(place=topology.place_of_group(expert_group), slot=rank_in_order % num_local)
