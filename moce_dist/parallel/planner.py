"""Heuristics of the gating scheduler: experts to groups, readers to clusters, at cluster scale.

An image that is read by the group of its expert stays there; a plan is judged by the images that
leave, summed over the layers. With readers fixed, every layer is a linear assignment of experts
to slots; with experts fixed, readers are a transport problem (transport.py). The two in turn find
a local optimum, so much depends on where they start:

    start     one layer's experts say how clusters start together; every layer in turn
    anneal    soft readers, shares ~ exp((gain - price) / T), and experts in turn while T falls
    polish    exact readers and experts in turn until nothing improves
    kick      some experts of the best plan change places; polish; keep what is better

Effort is counted beforehand from the sizes, never by a clock, so a plan is a function of its
input. Only (cluster, useful group) pairs are held, at most L a cluster, never K x G x L.

Letters: L MoE layers, K clusters, E experts per layer, G expert groups.

Source: Rose 1998, Proc. IEEE 86(11) (deterministic annealing of a clustering).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from moce_dist.parallel.transport import Floats, Ints, Pairs, transport

_TEMPERATURES = (1.0, 0.7, 0.5, 0.35, 0.25)
_PRICE_ROUNDS = 4
_POLISH_ROUNDS = 12
_MAX_KICKS = 48
# a unit of effort is about a nanosecond; a round places all experts and finds all readers once
_EFFORT = 600_000_000
_ROUND_EFFORT, _PAIR_EFFORT, _SLOT_EFFORT = 1_000_000, 150, 10
_START_ROUNDS, _KICK_ROUNDS = 10, 3


@dataclass(frozen=True)
class Problem:
    """What is to be placed; images are counted in whole units."""

    routing: Ints
    """(L, K)."""
    sizes: Ints
    """(K,) units per cluster."""
    num_experts: int
    num_groups: int
    current: Ints | None = None
    """(L, E): where experts live now; None when they are free."""
    move_cost: float = 0.0
    """Units exchanged that it is worth to leave one expert where it is."""

    @property
    def quotas(self) -> Ints:
        """Units that every group reads, (G,), equal within one unit."""
        return (int(self.sizes.sum()) + np.arange(self.num_groups)) // self.num_groups

    @property
    def slots(self) -> Ints:
        """Group of every slot for an expert, (E,)."""
        return np.repeat(np.arange(self.num_groups), self.num_experts // self.num_groups)


class Plan(NamedTuple):
    """Experts' groups (L, E), units that groups read, groups' prices (G,), and the cost."""

    experts: Ints
    readers: Pairs
    prices: Ints
    cost: float
    """Units exchanged, and `move_cost` for every expert that moved."""


def solve(problem: Problem) -> Plan:
    """Plan experts and readers; deterministic, and blind to the labels of experts.

    With `current`, experts move only where the units saved outweigh `move_cost` each.
    """
    canonical, order = _canonical(problem)
    plan = _search(canonical)
    if canonical.current is not None:
        # groups are interchangeable: call the new ones like the old ones that they resemble
        aligned = _align(plan.experts, canonical.current, problem.num_groups)
        starts = [read(canonical, start) for start in (canonical.current, aligned)]
        plan = min([starts[0], *(_polish(canonical, start) for start in starts)], key=_cost)
    experts = np.empty_like(plan.experts)
    np.put_along_axis(experts, order, plan.experts, axis=1)
    return plan._replace(experts=experts)


def read(problem: Problem, experts: Ints, prices: Ints | None = None) -> Plan:
    """Plan the best readers for experts (L, E); `prices` (G,) of a similar plan save time."""
    if prices is None:
        prices = np.zeros(problem.num_groups, np.int64)
    gains = _gains(problem.routing, experts)
    readers, prices = transport(gains, problem.sizes, problem.quotas, prices)
    moves = 0 if problem.current is None else int((experts != problem.current).sum())
    cost = problem.routing.shape[0] * problem.sizes.sum() - _gained(gains, readers, problem)
    return Plan(experts, readers, prices, float(cost) + problem.move_cost * moves)


def _gained(gains: Pairs, readers: Pairs, problem: Problem) -> float:
    keys, wanted = (p.cluster * problem.num_groups + p.group for p in (gains, readers))
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return float(np.where(keys[at] == wanted, gains.value[at], 0) @ readers.value)


def _cost(plan: Plan) -> float:
    return plan.cost


def _canonical(problem: Problem) -> tuple[Problem, Ints]:
    # experts by load, then by their first cluster; order (L, E) gives their labels
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


def _search(problem: Problem) -> Plan:
    free = replace(problem, current=None)
    (num_layers, num_clusters), num_experts = problem.routing.shape, problem.num_experts
    effort = num_layers * (_PAIR_EFFORT * num_clusters + _SLOT_EFFORT * num_experts**2)
    rounds = _EFFORT // (_ROUND_EFFORT + effort)
    starts = max(1, min(num_layers, rounds // (2 * _START_ROUNDS)))
    anchors = np.linspace(0, num_layers - 1, starts).round().astype(int)
    best = min((_polish(free, _anneal(free, anchor)) for anchor in anchors), key=_cost)
    draws = np.random.default_rng(0)
    for _ in range(min(_MAX_KICKS, (rounds - starts * _START_ROUNDS) // _KICK_ROUNDS)):
        if best.cost == 0:
            break
        kicked = read(free, _kick(best.experts, draws), best.prices)
        best = min(best, _polish(free, kicked), key=_cost)
    return best


def _gains(routing: Ints, experts: Ints) -> Pairs:
    # a cluster's homes over the layers, sorted: how often a group stands there is its gain
    homes = np.sort(np.take_along_axis(experts, routing, axis=1).T.astype(np.int32), axis=1)
    is_first = np.ones(homes.shape, bool)
    is_first[:, 1:] = homes[:, 1:] != homes[:, :-1]
    at = np.flatnonzero(is_first)
    gain = np.diff(at, append=homes.size).astype(float)
    return Pairs(at // homes.shape[1], homes.ravel()[at].astype(np.int64), gain)


def _anneal(problem: Problem, anchor: int) -> Plan:
    # the anchor layer's experts are dealt to the groups by load; all layers fall in with that
    prices = np.zeros(problem.num_groups)
    dealt = np.arange(problem.num_experts)[None] % problem.num_groups
    readers = _soft_readers(problem, _gains(problem.routing[[anchor]], dealt), prices, 1.0)[0]
    for temperature in _TEMPERATURES:
        gains = _gains(problem.routing, _place(problem, readers))
        readers, prices = _soft_readers(problem, gains, prices, temperature)
    return read(problem, _place(problem, readers), prices.round().astype(np.int64))


def _soft_readers(
    problem: Problem, gains: Pairs, prices: Floats, temperature: float
) -> tuple[Pairs, Floats]:
    first = gains.first
    for _ in range(_PRICE_ROUNDS):
        z = (gains.value - prices[gains.group]) / temperature
        z = np.exp(z - np.maximum.reduceat(z, first)[gains.cluster])
        z *= (problem.sizes / np.add.reduceat(z, first))[gains.cluster]
        loads = np.bincount(gains.group, z, problem.num_groups) / problem.quotas.clip(min=1)
        # a group that nobody wants must not become infinitely cheap
        prices = prices + temperature * np.log(loads.clip(0.1, 10))
    return gains._replace(value=z), prices


def _place(problem: Problem, readers: Pairs) -> Ints:
    # per layer: keep most units in the group that reads them; a group is as many columns as slots
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


def _polish(problem: Problem, best: Plan) -> Plan:
    for _ in range(_POLISH_ROUNDS):
        plan = read(problem, _place(problem, best.readers), best.prices)
        if plan.cost >= best.cost:
            break
        best = plan
    return best


def _kick(experts: Ints, draws: np.random.Generator) -> Ints:
    # in one layer or more, two or more experts change places in a circle
    experts = experts.copy()
    num_layers, num_experts = experts.shape
    for layer in draws.permutation(num_layers)[: draws.integers(1, num_layers + 1)]:
        count = min(num_experts, int(draws.integers(2, 5)))
        chosen = draws.permutation(num_experts)[:count]
        experts[layer, chosen] = experts[layer, np.roll(chosen, 1)]
    return experts


def _align(experts: Ints, current: Ints, num_groups: int) -> Ints:
    same = np.zeros((num_groups, num_groups))
    np.add.at(same, (experts, current), 1)
    _, old = linear_sum_assignment(same, maximize=True)
    return old[experts]
