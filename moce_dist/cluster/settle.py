"""Labels of the wanted sizes at the least cost, from the centroids of k-means.

    prices of the sample -> prices of all rows -> exact sizes (exact.py) -> a bound on the cost

Only rows between two clusters decide. Of more than `cluster.border_rows` rows a search returns
candidates of those alone (`candidates.py`, Border): a sample of that size finds prices, and tells
how far apart the two best clusters of such a row are; then prices move in steps that leave all
others where they are, with a search of all rows after each, until few rows are beyond the sizes.
The exact finish moves these; where its prices go too far for the others, it goes on from another
search. So what the calling process holds are labels of all rows and candidates of so many.

What is not a sweep happens in the calling process on one thread, so no result depends on the number
of workers.

Letters: n rows, D width, K clusters, m candidates.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moce_dist.cluster.balance import Others, allowed_sizes, ascend
from moce_dist.cluster.blocks import Float64
from moce_dist.cluster.candidates import Border, Candidates, Int32, Int64, margins_of
from moce_dist.cluster.exact import Finish, dual_bound, finish
from moce_dist.cluster.kmeans import Matrix
from moce_dist.cluster.lloyd import PRICE_ROUNDS, Lloyd, State
from moce_dist.cluster.nearest import measure_index

_log = logging.getLogger(__name__)
_SEARCHES, _BORDER_SEARCHES = 4, 16
"""Searches of all rows for prices at most, and of rows between clusters."""
_FINISHES, _WIDER = 4, 8
"""Searches after a finish whose prices went too far for the rows that a border left out; how many
times its reach where no way leads on.
"""
_FINEST, _CURRENT, _FEW = 0.0001, 0.01, 0.001
"""Shares of rows beyond the sizes: at which prices are not improved any more; under the prices of
the search, at which its lists are up to date; which the exact finish moves soon.
"""
_TIE = 1e-6
"""Distance between the two best clusters of a row, in mean squared ones, that is none."""
_ROWS_PER_CLUSTER = 64
"""Rows between clusters that are held, at least."""
_MEASURED_ROWS = 4096
"""Rows that tell what an index misses."""
_TIGHT = 1e-6
"""Distance of a bound from the cost, over the cost, below which no better one is looked for."""


@dataclass(frozen=True)
class Settled:
    """Final labels (n,), prices (K,) where there are any, and figures on how they came about."""

    labels: Int32
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
    balance = _Balance(lloyd, centroids)
    prices = balance.find_prices(state.prices)
    labels, done = balance.finish()
    cost = matrix.objective(matrix.sums(centroids, prices, labels), centroids)
    index = matrix.sweep(centroids, done.prices).index
    figures = {
        "cost": cost / matrix.files.num_rows,
        "num_moves": done.num_moves,
        "sizes_without_balance": free.astype(int).tolist(),
        **_index_figures(matrix, centroids, done.prices, index),
    }
    # an index may miss the best cluster, and then there is no bound
    if config.balance != "exact" or index is not None:
        return Settled(labels, done.prices, figures)
    bound, best = _lower_bound(matrix, centroids, done.prices), done.prices
    # a bound holds at any prices; where candidates were too few the first ones may be better
    if bound < (1 - _TIGHT) * cost and (other := _lower_bound(matrix, centroids, prices)) > bound:
        bound, best = other, prices
    figures["cost_lower_bound"] = bound / matrix.files.num_rows
    return Settled(labels, best, figures)


class _Balance:
    """Prices of all rows and what the last search under them has found."""

    def __init__(self, lloyd: Lloyd, centroids: Float64) -> None:
        config = lloyd.config
        self._lloyd, self._matrix, self._centroids = lloyd, lloyd.matrix, centroids
        self._num = min(config.num_candidates, config.num_clusters)
        self._sizes = allowed_sizes(lloyd.matrix.files.num_rows, config.num_clusters, config)

    def _search(self, prices: Float64, reach: float) -> Border:
        return self._matrix.border(self._centroids, prices, self._num, reach)

    def find_prices(self, first: Float64) -> Float64:
        """Find prices (K,) that balance all rows nearly, from those of the last iteration on."""
        prices, reach = self._lloyd.prices(self._centroids, first), np.inf
        num_rows = self._matrix.files.num_rows
        most = max(self._lloyd.config.border_rows, _ROWS_PER_CLUSTER * len(prices))
        if num_rows > most:
            prices, reach = self._of_some(prices, most)
        for attempt in range(_SEARCHES if reach == np.inf else _BORDER_SEARCHES):
            self._border = self._search(prices, reach)
            others = Others(self._border.settled, reach)
            done = ascend(
                self._border.found,
                prices,
                self._sizes,
                rounds=PRICE_ROUNDS,
                close=_FINEST,
                others=others,
            )
            prices = done.prices
            _log.info(
                "prices of all rows, search %d: %d rows beyond the sizes, then %d; %d rows between "
                "clusters",
                attempt + 1,
                done.excess_before,
                done.excess,
                len(self._border.rows),
            )
            if done.excess_before <= _CURRENT * num_rows and done.excess <= _FEW * num_rows:
                break
        self._prices = prices
        return prices

    def _of_some(self, prices: Float64, num: int) -> tuple[Float64, float]:
        """Balance `num` rows spread over all; tell how far apart the two best of as many are."""
        num_rows, config = self._matrix.files.num_rows, self._lloyd.config
        parts = np.random.default_rng(len(prices)).random(num) + np.arange(num)
        rows = np.unique((parts * (num_rows / num)).astype(np.int64))
        sizes = allowed_sizes(len(rows), len(prices), config)
        for _ in range(_SEARCHES):
            found = self._matrix.candidates(self._centroids, prices, self._num, rows)
            done = ascend(found, prices, sizes, rounds=PRICE_ROUNDS, close=_FINEST)
            prices = done.prices
            if done.excess_before <= _CURRENT * len(rows):
                break
        margins = margins_of(found, prices)
        # a mass of one point is divided between clusters, whatever the reach
        margins = margins[margins > _TIE * found.distances.mean()]
        return prices, float(np.quantile(margins, num / num_rows)) if len(margins) else np.inf

    def finish(self) -> tuple[Int32, Finish]:
        """Return labels (n,) of the wanted sizes at the least cost, and how they came about."""
        num_searches, reach, prices = 0, self._border.reach, self._prices
        while True:
            border = self._border

            def nearest(charged: Float64, rows: Int64 = border.rows) -> Candidates:
                return self._matrix.candidates(self._centroids, charged, self._num, rows)

            done = finish(border.found, prices, nearest, self._sizes, border.settled)
            if done is None:
                reach *= _WIDER
            elif num_searches == _FINISHES or np.ptp(done.prices - border.prices) <= reach:
                border.labels[border.rows] = done.labels
                return border.labels, done
            else:
                prices = done.prices
            self._border = self._search(prices, reach)
            num_searches += 1


def _index_figures(
    matrix: Matrix, centroids: Float64, prices: Float64, index: NDArray[np.uint8] | None
) -> dict[str, Any]:
    """Measure on some rows what the index misses; nothing where none is used."""
    if index is None:
        return {}
    missed = measure_index(matrix.spread_rows(_MEASURED_ROWS), index, centroids, prices)
    return {"index_recall": missed.recall, "index_excess": missed.excess}


def _lower_bound(matrix: Matrix, centroids: Float64, prices: Float64) -> float:
    best = matrix.sums(centroids, prices)
    priced = matrix.objective(best, centroids) - float((best.counts * prices).sum())
    return dual_bound(prices, priced, matrix.files.num_rows)
