"""Rank arithmetic, spelt out."""

import numpy as np

from moce_dist.parallel.groups import Station, Topology, expert_map, rank_order


def test_more_ranks_than_groups():
    topology = Topology(num_ranks=8, num_groups=4)
    assert (topology.ep_size, topology.num_replicas) == (4, 2)
    assert [topology.place(r) for r in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert topology.expert_parallel_ranks(0) == topology.expert_parallel_ranks(6) == [0, 2, 4, 6]
    assert topology.expert_parallel_ranks(3) == [1, 3, 5, 7]
    assert topology.replica_ranks(5) == [4, 5]
    assert list(topology.hosted_groups(2)) == [2]


def test_fewer_ranks_than_groups():
    topology = Topology(num_ranks=2, num_groups=4)
    assert (topology.ep_size, topology.num_replicas) == (2, 1)
    assert list(topology.hosted_groups(0)) == [0, 1] and list(topology.hosted_groups(1)) == [2, 3]
    assert topology.place_of_group(np.arange(4)).tolist() == [0, 0, 1, 1]


def test_experts_are_numbered_by_group_then_id():
    expert_group = np.array([[0, 1, 0, 1], [1, 1, 0, 0]])
    two = expert_map(expert_group, Topology(2, 2))
    assert two.place.tolist() == [[0, 1, 0, 1], [1, 1, 0, 0]]
    assert two.slot.tolist() == [[0, 0, 1, 1], [0, 1, 0, 1]]
    assert two.residents(0) == [[0, 2], [2, 3]] and two.residents(1) == [[1, 3], [0, 1]]
    one = expert_map(expert_group, Topology(1, 2))
    assert one.residents(0) == [[0, 2, 1, 3], [2, 3, 0, 1]]


def test_mixed_up_workers_are_ordered_by_group_node_and_local_rank():
    stations = [
        Station("g10", "b", 0), Station("g2", "c", 1),
        Station("g2", "c", 0), Station("g10", "a", 0),
    ]  # fmt: skip
    assert rank_order(stations) == [2, 1, 3, 0]
    assert rank_order([Station("", "n", 1), Station("", "n", 0)]) == [1, 0]
