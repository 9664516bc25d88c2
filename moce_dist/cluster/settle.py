"""Labels of the wanted sizes at the least cost, from the centroids of k-means.

    prices of the sample -> prices of all rows -> exact sizes (exact.py) -> a bound on the cost

What is not a sweep happens in the calling process on one thread, so no result depends on the number
of workers.

Letters: n rows, D width, K clusters, m candidates.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moce_dist.cluster.balance import Sizes, allowed_sizes, ascend
from moce_dist.cluster.blocks import Float64
from moce_dist.cluster.candidates import Candidates, Int64
from moce_dist.cluster.exact import Search, dual_bound, finish
from moce_dist.cluster.kmeans import Matrix
from moce_dist.cluster.lloyd import FINAL_EXCESS, PRICE_ROUNDS, Lloyd, State
from moce_dist.cluster.nearest import measure_index

_log = logging.getLogger(__name__)
_SEARCHES = 4
"""Searches of all rows for prices, at most."""
_MEASURED_ROWS = 4096
"""Rows that tell what an index misses."""
_TIGHT = 1e-6
"""Distance of a bound from the cost, over the cost, below which no better one is looked for."""


@dataclass(frozen=True)
class Settled:
    """Final labels (n,), prices (K,) where there are any, and figures on how they came about."""

    labels: Int64
    prices: Float64 | None
    figures: dict[str, Any]


def settle(lloyd: Lloyd, state: State) -> Settled:
    """Turn the centroids of k-means into labels of the wanted sizes at the least cost."""
    matrix, config, centroids = lloyd.matrix, lloyd.config, state.centroids
    if config.balance == "off":
        index = matrix.sweep(centroids, state.prices).index
        figures = _index_figures(matrix, centroids, state.prices, index)
        return Settled(matrix.labels(centroids, state.prices), None, figures)
    free = matrix.sums(centroids, np.zeros(len(centroids))).counts
    sizes = allowed_sizes(matrix.files.num_rows, config.num_clusters, config)

    def nearest(charged: Float64) -> Candidates:
        return matrix.candidates(
            centroids, charged, min(config.num_candidates, config.num_clusters)
        )

    prices, found = _balance_all(lloyd, state, nearest, sizes)
    done = finish(found, prices, nearest, sizes)
    cost = matrix.objective(matrix.sums(centroids, prices, done.labels), centroids)
    index = matrix.sweep(centroids, done.prices).index
    figures = {
        "cost": cost / matrix.files.num_rows,
        "num_moves": done.num_moves,
        "sizes_without_balance": free.astype(int).tolist(),
        **_index_figures(matrix, centroids, done.prices, index),
    }
    # an index may miss the best cluster, and then there is no bound
    if config.balance != "exact" or index is not None:
        return Settled(done.labels, done.prices, figures)
    bound, best = _lower_bound(matrix, centroids, done.prices), done.prices
    # a bound holds at any prices; where candidates were too few the first ones may be better
    if bound < (1 - _TIGHT) * cost and (other := _lower_bound(matrix, centroids, prices)) > bound:
        bound, best = other, prices
    figures["cost_lower_bound"] = bound / matrix.files.num_rows
    return Settled(done.labels, best, figures)


def _index_figures(
    matrix: Matrix, centroids: Float64, prices: Float64, index: NDArray[np.uint8] | None
) -> dict[str, Any]:
    """Measure on some rows what the index misses; nothing where none is used."""
    if index is None:
        return {}
    missed = measure_index(matrix.spread_rows(_MEASURED_ROWS), index, centroids, prices)
    return {"index_recall": missed.recall, "index_excess": missed.excess}


def _balance_all(
    lloyd: Lloyd, state: State, nearest: Search, sizes: Sizes
) -> tuple[Float64, Candidates]:
    """Find prices that balance all rows nearly, and the candidates of all rows under them."""
    prices = lloyd.prices(state.centroids, state.prices)
    for attempt in range(_SEARCHES):
        found = nearest(prices)
        done = ascend(found, prices, sizes, rounds=PRICE_ROUNDS, close=FINAL_EXCESS)
        prices = done.prices
        _log.info(
            "prices of all rows, search %d: %d rows beyond the sizes, then %d",
            attempt + 1,
            done.excess_before,
            done.excess,
        )
        if done.excess <= 2 * FINAL_EXCESS * len(found.ids):
            break
    return prices, found


def _lower_bound(matrix: Matrix, centroids: Float64, prices: Float64) -> float:
    best = matrix.sums(centroids, prices)
    priced = matrix.objective(best, centroids) - float((best.counts * prices).sum())
    return dual_bound(prices, priced, matrix.files.num_rows)
