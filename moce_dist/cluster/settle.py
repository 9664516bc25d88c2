"""Find labels of the wanted sizes at the least cost, from the centroids of k-means.

    prices of the sample -> prices of all rows -> exact sizes (exact.py) -> a bound on the cost

The balance is decided by the rows between two clusters (`candidates.py`, Border). With more than
`cluster.border_rows` rows, the calling process holds the candidates of these rows only:

1. A sample of that size gives first prices, and the reach: the margin between the two best clusters
   up to which a row counts as between clusters. The sizes that all rows have under these prices
   correct those of the sample.
2. The prices then move in steps that change the cluster of no other row, with a search of all rows
   after each step, until few rows are beyond the sizes.
3. The exact finish moves the remaining rows. Where the border has too few rows for that, or the
   prices move so far that other rows could change clusters, another search follows, with a greater
   reach unless the prices are already close.
4. The prices of the finish give a lower bound on the cost of any balanced labels. Many near
   duplicates drive prices so far that the best clusters of a row are no longer among its
   candidates; then the cost is above the bound. In that case step 3 is repeated from these prices,
   with twice as many candidates.

So memory holds the labels of all rows and the candidates of about `cluster.border_rows` rows, in
step 4 up to 8 times as many candidates.

Everything but the sweeps happens in the calling process on one thread, so no result depends on the
number of workers.

Letters: n rows, D width, K clusters, m candidates.
"""

import logging
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moce_dist.arrays import Float64, Int32, Int64
from moce_dist.cluster.balance import (
    Ascended,
    FixedRows,
    Sizes,
    allowed_sizes,
    ascend,
    fitted,
    misfits,
)
from moce_dist.cluster.candidates import Border, Candidates, margins_of
from moce_dist.cluster.exact import dual_bound, finish
from moce_dist.cluster.kmeans import PRICE_ROUNDS, Lloyd, State
from moce_dist.cluster.matrix import Matrix
from moce_dist.cluster.nearest import measure_index
from moce_dist.cluster.sweeps import Sums

_log = logging.getLogger(__name__)
_SEARCHES, _BORDER_SEARCHES = 4, 16
"""Most searches for prices: with a sample or with all rows at hand; with a border at hand."""
_WIDER = 8
"""Factor on the reach of a border that was too narrow for an exact finish."""
_FINEST, _CURRENT, _FEW = 0.0001, 0.01, 0.001
"""Shares of rows beyond the sizes: below which prices are good enough; below which, under the
prices of the search, its candidates are up to date; which the exact finish moves quickly.
"""
_TIE = 1e-6
"""Margin between a row's two best clusters, over the mean squared distance, that counts as 0."""
_ROWS_PER_CLUSTER = 64
"""Rows between clusters per cluster that are held at least."""
_MEASURED_ROWS = 4096
"""Rows on which the misses of an index are measured."""
_TIGHT, _CLOSE = 1e-6, 1e-4
"""Relative gaps between cost and bound: below which no better bound is computed; below which no
better labels are searched for.
"""
_REPEATS = 3
"""Most repetitions of the exact finish, each with twice the candidates of the one before."""


@dataclass(frozen=True)
class Settled:
    """Final labels (n,), prices (K,) under balance, and figures for the summary."""

    labels: Int32
    prices: Float64 | None
    figures: dict[str, Any]
    sums: Sums | None = None
    """Sums and counts per cluster under these labels, if they are known."""


def settle(lloyd: Lloyd, state: State) -> Settled:
    """Turn the centroids of k-means into labels of the wanted sizes at the least cost.

    Raises:
        RuntimeError: no finite prices balance the rows.
    """
    matrix, config, centroids = lloyd.matrix, lloyd.config, state.centroids
    if config.balance == "off":
        index = matrix.sweep(centroids, state.prices).index
        figures = _index_figures(matrix, centroids, state.prices, index)
        return Settled(matrix.labels(centroids, state.prices), None, figures)
    free = matrix.sums(centroids, np.zeros(len(centroids))).counts
    balance = _Balance(lloyd, centroids)
    prices = balance.find_prices(state.prices)
    best = balance.finish()
    index = matrix.sweep(centroids, best.prices).index
    final, bounds = best.prices, {}
    # an index may miss the best cluster, and then the dual value is no bound
    if config.balance == "exact" and index is None:
        best, bound, final = _tighten(balance, best, prices)
        bounds = {"cost_lower_bound": bound / matrix.files.num_rows}
    figures = {
        "cost": best.cost / matrix.files.num_rows,
        "num_moves": best.num_moves,
        "sizes_without_balance": free.astype(int).tolist(),
        **_index_figures(matrix, centroids, best.prices, index),
        **bounds,
    }
    return Settled(best.labels, final, figures, best.sums)


class _Finished(NamedTuple):
    """Labels (n,) of the wanted sizes, prices (K,) of the finish, rows moved; sums and cost."""

    labels: Int32
    prices: Float64
    num_moves: int
    sums: Sums
    cost: float


def _tighten(
    balance: "_Balance", best: _Finished, first: Float64
) -> tuple[_Finished, float, Float64]:
    """Repeat the finish while the cost is above the bound.

    `first` are the prices before the first finish. Returns the cheapest labels, the greatest lower
    bound on the cost and its prices (K,).
    """
    bound, prices = balance.lower_bound(best.prices), best.prices
    # any prices give a bound; where candidates were too few, those before the finish may be better
    if bound < (1 - _TIGHT) * best.cost and (other := balance.lower_bound(first)) > bound:
        bound, prices = other, first
    for _ in range(_REPEATS):
        if bound >= (1 - _CLOSE) * best.cost:
            break
        _log.info("cost %.3g above its bound: repeat the exact finish", best.cost / bound - 1)
        again = balance.finish_again()
        if (other := balance.lower_bound(again.prices)) > bound:
            bound, prices = other, again.prices
        best = min(best, again, key=attrgetter("cost"))
    return best, bound, prices


class _Balance:
    """The search for prices of all rows, with the border that the last sweep returned.

    `_border` is a border found under the current prices, `_last` the one that they came from.
    """

    def __init__(self, lloyd: Lloyd, centroids: Float64) -> None:
        config = lloyd.config
        self._lloyd, self._matrix, self._centroids = lloyd, lloyd.matrix, centroids
        self._num = min(config.num_candidates, config.num_clusters)
        self._num_rows, num_clusters = lloyd.matrix.files.num_rows, config.num_clusters
        self._sizes = allowed_sizes(self._num_rows, num_clusters, config)
        most = max(config.border_rows, _ROWS_PER_CLUSTER * num_clusters)
        # one cluster has no border
        self._num_held = self._num_rows if num_clusters == 1 else min(most, self._num_rows)
        self._border: Border | None = None
        self._last: Border | None = None

    def find_prices(self, first: Float64) -> Float64:
        """Find prices (K,) that nearly balance all rows, starting at `first`."""
        self._prices, self._reach = self._lloyd.prices(self._centroids, first), np.inf
        if self._num_held < self._num_rows:
            self._balance_sample()
        for _ in range(_SEARCHES if self._reach == np.inf else _BORDER_SEARCHES):
            if self._improve():
                break
        return self._prices

    def _search(self) -> Border:
        # release the old border first: memory holds one of them
        self._border = self._last = None
        border = self._matrix.border(self._centroids, self._prices, self._num, self._reach)
        # widen the next border if this one has fewer rows than may be held
        self._reach *= min(max(self._num_held / max(len(border.rows), 1), 1), _WIDER)
        self._border = border
        return border

    def _improve(self) -> bool:
        """Improve the prices with the rows at hand; tell whether little is left to the finish."""
        border = self._border or self._search()
        fixed = FixedRows(border.settled, border.reach)
        done = self._ascend(border.found, self._sizes, fixed)
        _log.info(
            "prices of all rows: %d rows beyond the sizes, then %d; %d rows between clusters",
            done.excess_before,
            done.excess,
            len(border.rows),
        )
        # the prices have moved on from those of the search
        self._border, self._last = None, border
        is_current = done.excess_before <= _CURRENT * self._num_rows
        return is_current and done.excess <= _FEW * self._num_rows

    def _ascend(self, found: Candidates, sizes: Sizes, fixed: FixedRows) -> Ascended:
        done = ascend(found, self._prices, sizes, rounds=PRICE_ROUNDS, close=_FINEST, fixed=fixed)
        self._prices = done.prices
        return done

    def _balance_sample(self) -> None:
        """Find prices and the reach from a sample, corrected by the true sizes of all clusters."""
        num_rows, num_held = self._num_rows, self._num_held
        parts = np.random.default_rng(0).random(num_held) + np.arange(num_held)
        rows = np.unique((parts * (num_rows / num_held)).astype(np.int64))
        missing = np.zeros(len(self._prices), np.int64)
        for _ in range(_SEARCHES):
            found = self._balance_some(rows, missing)
            margins = margins_of(found, self._prices)
            # rows tied within rounding (many equal ones) are between clusters at any reach: the
            # quantile is over the others
            margins = margins[margins > _TIE * found.distances.mean()]
            self._reach = np.inf
            if len(margins):
                self._reach = float(np.quantile(margins, num_held / num_rows))
            border = self._search()
            between, sampled = (
                np.bincount(border.labels[each], minlength=len(missing))
                for each in (border.rows, rows)
            )
            counts = border.settled + between
            smallest, largest = self._sizes
            wrong = misfits(counts, self._prices, smallest or None, largest)
            excess = max(each.sum() for each in wrong)
            _log.info("prices of a sample: %d of all rows beyond the sizes", excess)
            if excess <= _CURRENT * num_rows:
                break
            missing = np.rint(counts * (len(rows) / num_rows)).astype(np.int64) - sampled
            missing[counts.argmax()] -= missing.sum()

    def _balance_some(self, rows: Int64, missing: Int64) -> Candidates:
        sizes = allowed_sizes(len(rows), len(missing), self._lloyd.config)
        for _ in range(_SEARCHES):
            found = self._matrix.candidates(self._centroids, self._prices, self._num, rows)
            fixed = FixedRows(fitted(missing, sizes.largest), np.inf)
            done = self._ascend(found, sizes, fixed)
            if done.excess_before <= _CURRENT * len(rows):
                break
        return found

    def finish_again(self) -> _Finished:
        """Repeat `finish` from its last prices, with twice as many candidates."""
        self._prices, self._num = self._ended, min(2 * self._num, len(self._prices))
        self._improve()
        return self.finish()

    def finish(self) -> _Finished:
        """Move rows at the least cost until all sizes are as wanted."""
        num_tried = 0
        while True:
            border, num_tried = self._last, num_tried + 1
            assert border is not None

            def nearest(charged: Float64, rows: Int64 = border.rows) -> Candidates:
                return self._matrix.candidates(self._centroids, charged, self._num, rows)

            done = finish(border.found, self._prices, nearest, self._sizes, border.settled)
            went = np.inf if done is None else float(np.ptp(done.prices - border.prices))
            if len(border.rows) == self._num_rows and not np.isfinite(went):
                raise RuntimeError("no finite prices balance the clusters")
            if done is not None and went <= border.reach:
                labels, self._ended = border.labels, done.prices
                labels[border.rows] = done.labels
                sums = self._matrix.sums(self._centroids, done.prices, labels)
                cost = self._matrix.objective(sums, self._centroids)
                return _Finished(labels, done.prices, done.num_moves, sums, cost)
            # Search again. Prices that moved a little beyond the reach are closer to the optimum
            # and mostly suffice. Prices that moved far are void, as the border's counts of the
            # other rows do not hold for them. The loop ends at the latest when all rows are held.
            is_near = done is not None and went <= _WIDER * border.reach
            if done is not None and is_near:
                self._prices = done.prices
            self._reach *= min(num_tried, 2) if is_near else _WIDER
            del border
            self._improve()

    def lower_bound(self, prices: Float64) -> float:
        """Return a lower bound on the cost of any labels whose sizes differ by at most one."""
        best = self._matrix.sums(self._centroids, prices)
        cost = self._matrix.objective(best, self._centroids)
        return dual_bound(prices, cost - float((best.counts * prices).sum()), self._num_rows)


def _index_figures(
    matrix: Matrix, centroids: Float64, prices: Float64, index: NDArray[np.uint8] | None
) -> dict[str, Any]:
    """Measure on some rows what the index misses; nothing without an index."""
    if index is None:
        return {}
    missed = measure_index(matrix.spread_rows(_MEASURED_ROWS), index, centroids, prices)
    return {"index_recall": missed.recall, "index_excess": missed.excess}
