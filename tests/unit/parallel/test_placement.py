"""The gating scheduler on small cases, spelt out, and against brute force."""

import itertools
import json

import numpy as np
import pytest

from moce_dist.parallel.placement import Placement, contiguous_placement, plan_placement


def test_perfect_case_is_found():
    # experts 0 and 3 serve the same clusters in both layers under different labels
    routing = np.array([[0, 0, 1, 1], [3, 3, 2, 2]])
    sizes = np.full(4, 10)
    placement = plan_placement(routing, sizes, num_experts=4, num_groups=2)
    assert placement.images_exchanged(routing, sizes) == 0
    assert np.bincount(placement.expert_group[0]).tolist() == [2, 2]
    homes = placement.shares.argmax(axis=1)
    assert homes[0] == homes[1] != homes[2] == homes[3]
    assert placement.expert_group[0, 0] == placement.expert_group[1, 3] == homes[0]


def test_groups_read_equally_many_images():
    draws = np.random.default_rng(0)
    sizes = draws.integers(1, 50, 40)
    routing = draws.integers(0, 8, (3, 40))
    placement = plan_placement(routing, sizes, num_experts=8, num_groups=4)
    assert placement.shares.sum(axis=1) == pytest.approx(1)
    assert placement.shares.T @ sizes == pytest.approx(sizes.sum() / 4)
    for layer in placement.expert_group:
        assert np.bincount(layer, minlength=4).tolist() == [2] * 4


@pytest.mark.parametrize("seed", range(6))
def test_near_the_best_of_all_placements(seed):
    draws = np.random.default_rng(seed)
    clusters, experts, groups, layers = 6, 4, 2, 2
    routing = draws.integers(0, experts, (layers, clusters))
    sizes = np.full(clusters, 10)
    ours = plan_placement(routing, sizes, num_experts=experts, num_groups=groups)
    homes = [g for g in itertools.product(range(groups), repeat=clusters) if sum(g) == 3]
    tables = [g for g in itertools.product(range(groups), repeat=experts) if sum(g) == 2]
    best = min(
        Placement(np.array(pair), np.eye(groups)[list(home)]).images_exchanged(routing, sizes)
        for home in homes
        for pair in itertools.product(tables, repeat=layers)
    )
    assert ours.images_exchanged(routing, sizes) <= best + 20
    naive = contiguous_placement(layers, experts, clusters, groups)
    assert ours.images_exchanged(routing, sizes) <= naive.images_exchanged(routing, sizes)


def test_experts_stay_when_they_are_given():
    routing = np.array([[0, 0, 1, 1]])
    fixed = np.array([[1, 0]])
    placement = plan_placement(
        routing, np.full(4, 5), num_experts=2, num_groups=2, expert_group=fixed
    )
    assert (placement.expert_group == fixed).all()
    assert placement.shares.argmax(axis=1).tolist() == [1, 1, 0, 0]


def test_readers_are_level_and_padding_fills_up():
    placement = Placement(np.zeros((0, 2), np.int64), np.eye(2)[[0, 0, 0, 1]])
    clusters = np.array([0, 1, 2, 0, 3, 2, -1, -1])
    readers = placement.readers(clusters)
    assert np.bincount(readers).tolist() == [4, 4]
    # five images want group 0, which has room for four: the last of them moves
    assert readers.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_shares_split_a_cluster():
    placement = Placement(np.zeros((0, 2), np.int64), np.array([[0.5, 0.5]]))
    assert placement.readers(np.zeros(6, np.int64)).tolist() == [0, 0, 0, 1, 1, 1]


def test_prediction_counts_what_leaves():
    placement = Placement(np.array([[0, 1]]), np.array([[1.0, 0], [0.25, 0.75]]))
    routing = np.array([[0, 1]])
    assert placement.images_exchanged(routing, np.array([8, 8])) == pytest.approx(2)
    routing = np.array([[1, 1]])
    assert placement.images_exchanged(routing, np.array([8, 8])) == pytest.approx(10)


def test_json_round_trip():
    placement = plan_placement(
        np.array([[0, 1, 1]]), np.array([3, 4, 5]), num_experts=2, num_groups=2
    )
    again = Placement.from_dict(json.loads(json.dumps(placement.to_dict())))
    assert (again.expert_group == placement.expert_group).all()
    assert (again.shares == placement.shares).all()
