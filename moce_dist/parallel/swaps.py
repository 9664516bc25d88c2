"""Improve a small plan by swapping two experts of a layer, exactly judged, until no swap helps.

Most swaps need no new readers to be judged. At any prices p the units that can be gained are at
most sum_k size_k max_g (a_kg - p_g) + sum_g p_g quota_g (weak duality of the transport problem),
so at the plan's own prices all swaps get a bound in one sweep; only those whose bound is below
the plan's cost are solved.

Letters: L MoE layers, K clusters, E experts per layer, G expert groups, S swaps.
"""

import numpy as np

from moce_dist.parallel.problem import Plan, Problem, read
from moce_dist.parallel.transport import Floats, Ints

_MAX_CELLS = 50_000
"""S x K x G up to which a plan counts as small."""


def improve_by_swaps(problem: Problem, plan: Plan) -> Plan:
    """Return a plan that no swap makes cheaper; a problem that is not small is left as it is."""
    num_layers, num_experts = plan.experts.shape
    swaps = num_layers * num_experts * (num_experts - 1) // 2
    if swaps * len(problem.sizes) * problem.num_groups > _MAX_CELLS:
        return plan
    while (better := _first_better(problem, plan)) is not None:
        plan = better
    return plan


def _first_better(problem: Problem, plan: Plan) -> Plan | None:
    swapped = _swapped(plan.experts)
    bounds = _bounds(problem, plan, swapped)
    for i in np.argsort(bounds, kind="stable"):
        if bounds[i] >= plan.cost:
            return None
        candidate = read(problem, swapped[i], plan.prices)
        if candidate.cost < plan.cost:
            return candidate
    return None


def _swapped(experts: Ints) -> Ints:
    # (S, L, E): experts after every swap that changes anything
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


def _bounds(problem: Problem, plan: Plan, swapped: Ints) -> Floats:
    # (S,): no plan with these experts costs less
    num_layers, num_clusters = problem.routing.shape
    gains = np.zeros((len(swapped), num_clusters, problem.num_groups), np.int32)
    at = np.arange(len(swapped))[:, None], np.arange(num_clusters)[None]
    for layer, table in enumerate(problem.routing):
        gains[*at, swapped[:, layer, table]] += 1  # a layer adds to a cell once at most
    most = (gains - plan.prices).max(axis=2) @ problem.sizes + plan.prices @ problem.quotas
    moves = np.array([problem.cost_of_moves(experts) for experts in swapped])
    bounds: Floats = num_layers * problem.sizes.sum() - most + moves
    return bounds
