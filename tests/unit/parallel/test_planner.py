"""The planner against the exact optimum of the joint problem, and properties of any plan."""

from functools import cache

import numpy as np
import pytest
from benches.placement import gated_table
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from moce_dist.parallel import problem
from moce_dist.parallel.placement import contiguous_placement, plan_placement
from moce_dist.parallel.transport import Pairs, transport

SIZES = [  # layers, clusters, experts, groups
    (1, 12, 4, 2),
    (2, 12, 4, 2),
    (3, 12, 4, 4),
    (2, 15, 6, 3),
    pytest.param((2, 16, 8, 4), marks=pytest.mark.long),
]
SEEDS = range(6)


def case(shape, seed):
    """Even seeds: independent layers; odd ones: gates over centroids. Sizes differ for half."""
    layers, clusters, experts, _ = shape
    draws = np.random.default_rng(seed)
    routing = draws.integers(0, experts, (layers, clusters))
    if seed % 2:
        routing = gated_table(layers, clusters, experts, width=8, seed=seed)
    sizes = draws.integers(5, 30, clusters) if seed % 3 else np.full(clusters, 12)
    return routing, sizes


def optimum(routing, sizes, num_experts, num_groups):
    """Fewest images exchanged, by mixed integer programming.

    Binary h[l, e, g] (expert on group) and shares x[k, g], both exact; z[l, k, g] is at most both
    of x[k, g] and h[l, routing[l, k], g], so at its greatest it is their product.
    """
    (layers, clusters), total = routing.shape, sizes.sum()
    h = np.arange(layers * num_experts * num_groups).reshape(layers, num_experts, num_groups)
    x = h.size + np.arange(clusters * num_groups).reshape(clusters, num_groups)
    z = h.size + x.size + np.arange(layers * x.size).reshape(layers, *x.shape)
    rows = [(dict.fromkeys(h[layer, e], 1), 1, 1) for layer, e in np.ndindex(h.shape[:2])]
    slots = num_experts // num_groups
    rows += [
        (dict.fromkeys(h[layer, :, g], 1), slots, slots)
        for layer, g in np.ndindex(layers, num_groups)
    ]
    rows += [(dict.fromkeys(x[k], 1), 1, 1) for k in range(clusters)]
    share = total / num_groups
    rows += [(dict(zip(x[:, g], sizes, strict=True)), share, share) for g in range(num_groups)]
    for layer, k, g in np.ndindex(z.shape):
        home = h[layer, routing[layer, k], g]
        rows += [({z[layer, k, g]: 1, other: -1}, -np.inf, 0) for other in (x[k, g], home)]
    entries = [(i, j, v) for i, (row, _, _) in enumerate(rows) for j, v in row.items()]
    i, j, v = (np.array(column) for column in zip(*entries, strict=True))
    count = h.size + x.size + z.size
    gain = np.zeros(count)
    gain[z] = -sizes[None, :, None]
    result = milp(
        gain,
        constraints=LinearConstraint(
            coo_array((v, (i, j)), shape=(len(rows), count)).tocsr(),
            [low for _, low, _ in rows],
            [high for _, _, high in rows],
        ),
        integrality=np.arange(count) < h.size,
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-6},
    )
    assert result.status == 0, result.message
    return layers * total + result.fun


def is_near_optimum(cost, best):
    return cost <= best * 1.05 + 1e-6


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_within_5_percent_of_the_optimum(shape):
    _, _, experts, groups = shape
    naive_misses = 0
    for seed in SEEDS:
        routing, sizes = case(shape, seed)
        best = optimum(routing, sizes, experts, groups)
        plan = plan_placement(routing, sizes, num_experts=experts, num_groups=groups)
        cost = plan.images_exchanged(routing, sizes)
        assert best - 1e-6 <= cost and is_near_optimum(cost, best), (seed, cost, best)
        naive = contiguous_placement(len(routing), experts, len(sizes), groups)
        naive_misses += not is_near_optimum(naive.images_exchanged(routing, sizes), best)
    # planted mistake: a judge that lets the plan without a scheduler pass would judge nothing
    assert naive_misses == len(SEEDS)


def assert_legal(plan, sizes, num_experts, num_groups):
    assert plan.shares.min() >= 0
    np.testing.assert_allclose(plan.shares.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(sizes @ plan.shares, sizes.sum() / num_groups, rtol=1e-9)
    for layer in plan.expert_group:
        assert np.bincount(layer, minlength=num_groups).tolist() == (
            [num_experts // num_groups] * num_groups
        )


@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(6, 12))]
)
def test_plans_are_legal_repeatable_and_blind_to_labels(seed):
    draws = np.random.default_rng(seed)
    groups = int(draws.integers(1, 6))
    experts, layers = groups * int(draws.integers(1, 4)), int(draws.integers(1, 5))
    sizes = draws.integers(0, 40, 30)  # empty clusters among them
    routing = draws.integers(0, experts, (layers, 30)) // int(draws.integers(1, 3))
    plan = plan_placement(routing, sizes, num_experts=experts, num_groups=groups)
    assert_legal(plan, sizes, experts, groups)
    again = plan_placement(routing, sizes, num_experts=experts, num_groups=groups)
    assert (again.expert_group == plan.expert_group).all() and (again.shares == plan.shares).all()
    labels = np.stack([draws.permutation(experts) for _ in range(layers)])
    renamed = np.take_along_axis(labels, routing, axis=1)
    other = plan_placement(renamed, sizes, num_experts=experts, num_groups=groups)
    costs = plan.images_exchanged(routing, sizes), other.images_exchanged(renamed, sizes)
    assert costs[0] == pytest.approx(costs[1])


def test_uneven_loads_are_cut_so_that_all_read_equally_much():
    # one expert has nearly everything: three of four groups must read its clusters from afar
    routing = np.array([[0] * 18 + [1, 2]])
    plan = plan_placement(routing, np.full(20, 7), num_experts=4, num_groups=4)
    assert_legal(plan, np.full(20, 7), 4, 4)
    assert plan.images_exchanged(routing, np.full(20, 7)) == pytest.approx(140 - 35 - 14)


@cache
def replanned(seed):
    """A new routing, the groups of an old one, and the plan that keeps them."""
    routing, sizes = case((2, 16, 8, 4), seed)
    old, _ = case((2, 16, 8, 4), seed + 10)
    now = plan_placement(old, sizes, num_experts=8, num_groups=4).expert_group
    stay = plan_placement(routing, sizes, num_experts=8, num_groups=4, expert_group=now)
    assert (stay.expert_group == now).all()
    return routing, sizes, now, stay


@pytest.mark.parametrize("move_cost", [0.0, 1.0, 5.0, 1e6])
def test_experts_move_only_for_what_it_saves(move_cost):
    for seed in range(4):
        routing, sizes, now, stay = replanned(seed)
        fixed = {"num_experts": 8, "num_groups": 4}
        plan = plan_placement(routing, sizes, **fixed, expert_group=now, move_cost=move_cost)
        assert_legal(plan, sizes, 8, 4)
        moves = (plan.expert_group != now).sum()
        saved = stay.images_exchanged(routing, sizes) - plan.images_exchanged(routing, sizes)
        assert saved >= moves * move_cost - 1e-6
        assert (moves > 0) == (move_cost < 1e6)


def test_groups_keep_their_experts_when_only_their_numbers_would_change():
    routing, sizes = case((2, 16, 8, 4), 1)
    fixed = {"num_experts": 8, "num_groups": 4}
    plan = plan_placement(routing, sizes, **fixed)
    renumbered = np.array([2, 3, 1, 0])[plan.expert_group]
    again = plan_placement(routing, sizes, **fixed, expert_group=renumbered, move_cost=1e-3)
    assert (again.expert_group == renumbered).all()


@pytest.mark.parametrize("seed", range(10))
def test_readers_are_the_best_there_are(seed):
    # the same transport problem as a linear programme
    draws = np.random.default_rng(seed)
    clusters, groups = 20, 4
    sizes = draws.integers(0, 9, clusters) * groups
    gain = draws.integers(0, 4, (clusters, groups)) * (draws.random((clusters, groups)) < 0.6)
    gain[:, 0] = gain[:, 0].clip(min=1)  # a pair for every cluster
    cluster, group = np.nonzero(gain)
    pairs = Pairs(cluster, group, gain[cluster, group].astype(float))
    quotas = np.full(groups, sizes.sum() // groups)
    readers, _ = transport(pairs, sizes, quotas, draws.integers(0, 3, groups))
    amounts = np.zeros(gain.shape)
    amounts[readers.cluster, readers.group] = readers.value
    assert (amounts.sum(axis=1) == sizes).all() and (amounts.sum(axis=0) == quotas).all()
    ones = np.kron(np.eye(clusters), np.ones(groups)), np.kron(np.ones(clusters), np.eye(groups))
    limits = np.concatenate([sizes, quotas])
    best = milp(-gain.ravel(), constraints=LinearConstraint(np.vstack(ones), limits, limits))
    assert (amounts * gain).sum() == pytest.approx(-best.fun)


@pytest.mark.parametrize("seed", range(5))
def test_readers_of_a_step_follow_the_shares(seed):
    draws = np.random.default_rng(seed)
    routing, sizes = draws.integers(0, 6, (2, 9)), draws.integers(1, 20, 9)
    plan = plan_placement(routing, sizes, num_experts=6, num_groups=3)
    clusters = draws.permutation(np.repeat(np.arange(9), sizes * 30))
    readers = plan.readers(clusters)
    counts = np.zeros((9, 3))
    np.add.at(counts, (clusters, readers), 1)
    assert np.abs(counts - plan.shares * (sizes * 30)[:, None]).max() <= 3


@pytest.mark.parametrize("seed", range(2))
def test_uneven_clusters_take_no_longer_to_plan(monkeypatch, seed):
    # with uneven clusters nearly every swap looks promising: solving all takes thousands of solves
    solves = []

    def counted(*arguments):
        solves.append(arguments)
        return transport(*arguments)

    monkeypatch.setattr(problem, "transport", counted)
    draws = np.random.default_rng(seed)
    routing, sizes = draws.integers(0, 8, (4, 32)), (draws.pareto(1.5, 32) * 1000 + 10).astype(int)
    plan = plan_placement(routing, sizes, num_experts=8, num_groups=8)
    assert_legal(plan, sizes, 8, 8)
    assert 0 < len(solves) < 600


def test_plan_at_the_size_of_hundreds_of_gpus():
    # the aim of 1 s is the benchmark's business; here the plan is legal, and far from naive
    routing, sizes = gated_table(4, 1024, 32, seed=0), np.full(1024, 313)
    plan = plan_placement(routing, sizes, num_experts=32, num_groups=32)
    assert_legal(plan, sizes, 32, 32)
    naive = contiguous_placement(4, 32, 1024, 32)
    local, local_naive = (
        1 - p.images_exchanged(routing, sizes) / (4 * sizes.sum()) for p in (plan, naive)
    )
    assert local > 10 * local_naive
