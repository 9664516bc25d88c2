"""Heuristics of the gating scheduler: experts to groups, readers to clusters, at cluster scale.

An image that is read by the group of its expert stays there. The cost of a plan is the number of
images that leave their group, summed over the layers. With the readers fixed, every layer is a
linear assignment of experts to slots. With the experts fixed, the readers are a transport problem
(transport.py). Alternating the two finds a local optimum, so the starts matter:

    start     deal one layer's experts to the groups; they decide which clusters are read together
    anneal    alternate soft readers, shares ~ exp((gain - price) / T), and experts while T falls
    polish    alternate exact readers and experts until nothing improves; then swaps, if small
    kick      exchange some experts of the best plan, or redeal three groups' all; polish again

The effort is computed beforehand from the sizes, never measured by a clock, so a plan depends on
its input alone. Only (cluster, useful group) pairs are stored, at most L per cluster, never
K x G x L.

Most swaps can be judged without solving for new readers. At any prices p the units gained are at
most sum_k size_k max_g (a_kg - p_g) + sum_g p_g quota_g (weak duality of the transport problem). So
the plan's own prices give a lower bound on the cost of every swap in one sweep. Only swaps whose
bound is below the plan's cost are solved, the lowest bounds first, and a few per polish: where
clusters are uneven, the bounds are loose and nearly all swaps look promising.

Letters: L MoE layers, K clusters, E experts per layer, G expert groups, S swaps.

Source: Rose 1998, Proc. IEEE 86(11) (deterministic annealing of a clustering).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moce_dist.arrays import Float64, Int64
from moce_dist.parallel.problem import PlacementProblem, Solution, gains_of, read
from moce_dist.parallel.transport import Pairs

_TEMPERATURES = (2.0, 1.4, 1.0, 0.7, 0.5, 0.35)
_WARM = _TEMPERATURES[2:]
_POLISH_ROUNDS, _POLISH_SWEEPS = 12, 3
_MAX_KICKS = 40
_SWAP_SOLVES = 8
"""Swaps that a polish solves at most."""
_MAX_CELLS = 50_000
"""S x K x G up to which swaps are tried."""
# estimated times on a 2020s core: a layer of a sweep has a fixed part, one per (cluster, group)
# pair, and one per E x E
_BUDGET_NS = 500_000_000
_LAYER_NS, _PAIR_NS, _SLOT_NS = 200_000, 35, 30


def solve(problem: PlacementProblem) -> Solution:
    """Plan experts and readers; deterministic, and independent of the numbering of experts.

    With `current`, an expert moves only where that saves more than `move_cost` units.
    """
    canonical, order = _canonical(problem)
    plan = _search(canonical)
    if canonical.current is not None:
        from scipy.optimize import linear_sum_assignment

        # groups are interchangeable, so number the new ones like the current ones that they
        # resemble: that saves moves
        same = np.zeros((problem.num_groups, problem.num_groups))
        np.add.at(same, (plan.experts, canonical.current), 1)
        _, old = linear_sum_assignment(same, maximize=True)
        aligned = old[plan.experts]
        starts = [read(canonical, start) for start in (canonical.current, aligned)]
        plan = min([starts[0], *(_polish(canonical, start) for start in starts)], key=_cost)
    experts = np.empty_like(plan.experts)
    np.put_along_axis(experts, order, plan.experts, axis=1)
    return plan._replace(experts=experts)


def _cost(plan: Solution) -> float:
    return plan.cost


def _canonical(problem: PlacementProblem) -> tuple[PlacementProblem, Int64]:
    # renumbers experts by load, then by first cluster, so that a plan does not depend on their
    # numbers; order (L, E) has the original ones
    order = np.empty((len(problem.routing), problem.num_experts), np.int64)
    for layer, table in enumerate(problem.routing):
        loads = np.bincount(table, problem.sizes, problem.num_experts)
        firsts = np.full(problem.num_experts, len(table))
        seen, first = np.unique(table, return_index=True)
        firsts[seen] = first
        order[layer] = np.lexsort((firsts, -loads))
    current = problem.current
    if current is not None:
        current = np.take_along_axis(current, order, axis=1)
    routing = np.take_along_axis(np.argsort(order, axis=1), problem.routing, axis=1)
    return replace(problem, routing=routing, current=current), order


def _search(problem: PlacementProblem) -> Solution:
    free = replace(problem, current=None)
    # the number of annealed starts, at most one per layer, and of kicks, from the time budget
    num_layers, num_clusters = problem.routing.shape
    layer = _LAYER_NS + _PAIR_NS * num_clusters * num_layers + _SLOT_NS * problem.num_experts**2
    # solving a swap takes as long as a sweep
    polish = _POLISH_SWEEPS + _swap_solves(problem)
    start = (len(_TEMPERATURES) + polish) * num_layers * layer
    kick = (len(_WARM) + polish) * num_layers * layer
    num_starts = max(1, min(num_layers, _BUDGET_NS // start))
    num_kicks = max(0, min(_MAX_KICKS, (_BUDGET_NS - num_starts * start) // kick))
    anchors = np.linspace(0, len(problem.routing) - 1, num_starts).round().astype(int)
    starts = (_anneal(free, _start(free, anchor), _TEMPERATURES) for anchor in anchors)
    best = min((_polish(free, plan) for plan in starts), key=_cost)
    for turn in range(num_kicks):
        if best.cost == 0:
            break
        best = min(best, _polish(free, _kicked(free, best, turn)), key=_cost)
    return best


def _start(problem: PlacementProblem, anchor: int) -> Int64:
    # deal the anchor layer's experts, sorted by load, to the groups in turn: clusters start where
    # their anchor expert is, and every layer's experts follow most of their units
    dealt = np.arange(problem.num_experts)[None] % problem.num_groups
    votes = gains_of(problem.routing[[anchor]], dealt)
    return _place(problem, votes._replace(value=problem.sizes.astype(float)))


def _anneal(problem: PlacementProblem, experts: Int64, temperatures: Sequence[float]) -> Solution:
    if len(experts) == 1:
        return read(problem, experts)  # a single layer has no other to agree with
    experts, prices = experts.copy(), np.zeros(problem.num_groups)
    layers = np.arange(len(experts))
    for temperature in temperatures:
        for layer in layers:
            # only the other layers vote: the layer's own vote would keep its experts in place
            others = layers != layer
            votes = gains_of(problem.routing[others], experts[others])
            readers, prices = _soft_readers(problem, votes, prices, temperature)
            only = replace(problem, routing=problem.routing[[layer]])
            experts[layer] = _place(only, readers)[0]
    return read(problem, experts, prices.round().astype(np.int64))


def _soft_readers(
    problem: PlacementProblem, gains: Pairs, prices: Float64, temperature: float
) -> tuple[Pairs, Float64]:
    # softmax of (gain - price) / T over the groups of a cluster; then each price rises by
    # T log(load / quota), which alone would scale the group's load to its quota (a Sinkhorn step)
    first = gains.first
    z = (gains.value - prices[gains.group]) / temperature
    z = np.exp(z - np.maximum.reduceat(z, first)[gains.cluster])
    z *= (problem.sizes / np.add.reduceat(z, first))[gains.cluster]
    loads = np.bincount(gains.group, z, problem.num_groups) / problem.quotas.clip(min=1)
    # clipped, so that a group without load does not become infinitely cheap
    prices = prices + temperature * np.log(loads.clip(0.1, 10))
    return gains._replace(value=z), prices


def _place(problem: PlacementProblem, readers: Pairs) -> Int64:
    # per layer, a linear assignment that keeps most units in the group that reads them; every slot
    # of a group is a column. Imported late: SciPy is slow to import, and stage mae plans nothing.
    from scipy.optimize import linear_sum_assignment

    num_experts, num_groups, slots = problem.num_experts, problem.num_groups, problem.slots
    experts = np.empty((len(problem.routing), num_experts), np.int64)
    for layer, table in enumerate(problem.routing):
        keys = table[readers.cluster] * num_groups + readers.group
        gain = np.bincount(keys, readers.value, num_experts * num_groups)
        gain = gain.reshape(num_experts, num_groups)
        if problem.current is not None:
            gain[np.arange(num_experts), problem.current[layer]] += problem.move_cost
        rows, columns = linear_sum_assignment(gain[:, slots], maximize=True)
        experts[layer, rows] = slots[columns]
    return experts


def _polish(problem: PlacementProblem, best: Solution) -> Solution:
    for _ in range(_POLISH_ROUNDS):
        plan = read(problem, _place(problem, best.readers), best.prices)
        if plan.cost >= best.cost:
            break
        best = plan
    return improve_by_swaps(problem, best)


def _kicked(problem: PlacementProblem, best: Solution, turn: int) -> Solution:
    draws = np.random.default_rng(turn)
    experts = best.experts.copy()
    if turn % 3:
        # rotate two to four experts in each of one or more layers
        num_layers, num_experts = experts.shape
        for layer in draws.permutation(num_layers)[: draws.integers(1, num_layers + 1)]:
            chosen = draws.permutation(num_experts)[: draws.integers(2, 5)]
            experts[layer, chosen] = experts[layer, np.roll(chosen, 1)]
        return read(problem, experts, best.prices)
    # pool the experts of three groups and deal them anew
    chosen = draws.permutation(problem.num_groups)[:3]
    for row in experts:
        members = np.flatnonzero(np.isin(row, chosen))
        row[members] = draws.permutation(row[members])
    return _anneal(problem, experts, _WARM)


def improve_by_swaps(problem: PlacementProblem, plan: Solution) -> Solution:
    """Try the most promising swaps, and return the plan after those that made it cheaper."""
    left = _swap_solves(problem)
    while left:
        swapped = _swapped(plan.experts)
        bounds = _bounds(problem, plan, swapped)
        promising = np.argsort(bounds, kind="stable")[:left]
        for i in promising[bounds[promising] < plan.cost]:
            left -= 1
            candidate = read(problem, swapped[i], plan.prices)
            if candidate.cost < plan.cost:
                plan = candidate
                break
        else:
            break
    return plan


def _swap_solves(problem: PlacementProblem) -> int:
    # of one polish; none for a large problem, whose bounds alone take long
    num_layers, num_clusters = problem.routing.shape
    swaps = num_layers * problem.num_experts * (problem.num_experts - 1) // 2
    return _SWAP_SOLVES if swaps * num_clusters * problem.num_groups <= _MAX_CELLS else 0


def _swapped(experts: Int64) -> Int64:
    # (S, L, E): the experts after each swap of two experts of a layer that are in different groups
    num_layers, num_experts = experts.shape
    first, second = (np.tile(i, num_layers) for i in np.triu_indices(num_experts, 1))
    layer = np.repeat(np.arange(num_layers), len(first) // num_layers)
    differs = experts[layer, first] != experts[layer, second]
    layer, first, second = layer[differs], first[differs], second[differs]
    result = np.repeat(experts[None], len(layer), axis=0)
    at = np.arange(len(layer))
    result[at, layer, first] = experts[layer, second]
    result[at, layer, second] = experts[layer, first]
    return result


def _bounds(problem: PlacementProblem, plan: Solution, swapped: Int64) -> Float64:
    # (S,): lower bounds by weak duality at the plan's prices: no plan with these experts costs less
    num_layers, num_clusters = problem.routing.shape
    gains = np.zeros((len(swapped), num_clusters, problem.num_groups), np.int32)
    at = np.arange(len(swapped))[:, None], np.arange(num_clusters)[None]
    for layer, table in enumerate(problem.routing):
        gains[*at, swapped[:, layer, table]] += 1  # safe: a layer hits each cell at most once
    most = (gains - plan.prices).max(axis=2) @ problem.sizes + plan.prices @ problem.quotas
    moves = np.array([problem.cost_of_moves(experts) for experts in swapped])
    bounds: Float64 = num_layers * problem.sizes.sum() - most + moves
    return bounds
