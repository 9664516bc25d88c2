"""Prices that keep the sizes of clusters between bounds.

The assignment argmin_k |x - c_k|^2 - g_k is the best one among those with its own sizes, whatever
the prices g are; prices at which all sizes are within the bounds give the best such assignment.
They maximise a concave dual, here one price at a time: row i takes cluster k when g_k exceeds

    limit_ik = d_ik - min over the other clusters j of (d_ij - g_j),

so with the others fixed the best g_k lies just above the s-th smallest limit: s is the largest size
where g_k is negative (the cluster charges), the smallest size where g_k is positive (it pays), and
where neither is needed g_k = 0. Clusters that share the same rows underbid each other in small
steps; a line search along the change of a whole round takes many of those steps at once.

Every row brings its m best clusters only. What it would pay for any other is at least what it pays
for the last of these, at the prices of the search that found them; that value stands for all others
as a cluster of its own, number K, which is never full. Rows that end there wait for a next search.
A cluster that pays draws rows that do not list it, too. So its price rises no further in one call
than lets nearly all lists stand, and whether sizes are right only a next search tells.

Of very many rows only those between clusters are here (`candidates.py`, Border). The others count
as places that are taken, and no price moves further than lets them stay: what is said of the dual
holds for all rows.

Letters: s rows, K clusters, m candidates of a row.

Source: dual coordinate ascent for assignment, Bertsekas, "Network Optimization" (1998), chapter 7;
pattern moves: Hooke and Jeeves 1961.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moce_dist.cluster.arrays import Float32, Float64, Int64
from moce_dist.cluster.ascent import Bounds, Ranks, dual, make_lists, rank_rows, reprice
from moce_dist.cluster.candidates import Candidates
from moce_dist.config import ClusterConfig

_LONGEST = 2**20
"""Longest step of the line search, in changes of a round."""
_OUTDATED = 0.1
"""Share of rows whose lists may miss a cluster that pays as much as one call allows."""
_GAIN = 0.05
"""Rows beyond the sizes, over those at first, below which lists are out of date."""
_STEP = 0.45
"""Most that a price moves, over how far two may part; what is left is for the exact finish."""


class Sizes(NamedTuple):
    """Least and greatest number of rows that a cluster may have."""

    smallest: int
    largest: int


def allowed_sizes(num_rows: int, num_clusters: int, config: ClusterConfig) -> Sizes:
    """Return the bounds of `config.balance`: sizes that differ by at most 1, a largest, none."""
    fair = -(-num_rows // num_clusters)
    if config.balance == "exact":
        return Sizes(num_rows // num_clusters, fair)
    if config.balance == "soft":
        largest = max(fair, int(config.soft_bound * num_rows / num_clusters))
        return Sizes(0, min(largest, num_rows))
    return Sizes(0, num_rows)


def misfits(
    counts: Int64, prices: NDArray[Any], smallest: Int64 | int | None, largest: Int64 | int
) -> tuple[Int64, Int64]:
    """Return how many rows clusters have too many and too few, (K,) each.

    Without a smallest size only a cluster that is full has reason to charge.
    """
    least = np.where(prices < 0, largest, counts) if smallest is None else smallest
    return np.maximum(counts - largest, 0), np.maximum(least - counts, 0)


class Ascended(NamedTuple):
    """Prices (K,), how many rows were beyond the sizes at first and are in the end, the least size.

    Rows that wait count; so do those that too small clusters lack, where they are more, and those
    that clusters lack which charge and are not full.
    """

    prices: Float64
    excess_before: int
    excess: int
    least: int


class Others(NamedTuple):
    """Rows besides those at hand: how many each cluster has, (K,), and how far prices may part."""

    counts: Int64
    reach: float


def ascend(
    found: Candidates,
    prices: Float64,
    sizes: Sizes,
    *,
    rounds: int,
    close: float = 0.01,
    others: Others | None = None,
) -> Ascended:
    """Improve the prices (K,) under which rows found their candidates. The dual never falls.

    Distances need only be right up to a constant per row. Stops when the share of rows beyond the
    sizes, less those for which lists know no way, is at most `close`, or so much smaller than at
    first that a next search helps more than further rounds do. Prices mean the same when all
    of them move alike: here at least one is 0, and none is above where there is no smallest size,
    unless `others` hold it back.
    """
    others = others or Others(np.zeros(len(prices), np.int64), np.inf)
    num_clusters, num_rows = len(prices), len(found.ids) + int(others.counts.sum())
    if num_clusters == 1 or sizes.largest >= num_rows:
        return Ascended(np.zeros(num_clusters), 0, 0, num_rows // num_clusters)
    # with a smallest size q, n - q K clusters have room for one more and may charge
    num_charging = num_rows - sizes.smallest * num_clusters
    free = np.sort(prices)[num_charging] if sizes.smallest else prices.max()
    ascent = _Ascent(found, prices - free, sizes, others)
    excess_before = ascent.excess()
    # lists of all clusters are never out of date
    gain = 0 if ascent.lists_all else _GAIN
    enough = max(close * num_rows, gain * excess_before)
    for _ in range(rounds):
        if ascent.open_excess() <= enough:
            break
        ascent.step()
    done = ascent.prices[:-1].astype(np.float64)
    return Ascended(done, excess_before, ascent.excess(), ascent.least())


class _Ascent:
    """Prices, the last one that of the outside, and every row's best and second best cluster."""

    def __init__(self, found: Candidates, prices: Float64, sizes: Sizes, others: Others) -> None:
        self.prices = np.append(prices, 0).astype(np.float32)
        self._pays = sizes.smallest > 0
        self._taken, step = others.counts, np.float32(_STEP * others.reach)
        self.lists_all = found.ids.shape[1] == len(prices)
        if not self.lists_all:
            # the outside, of the last price, is as far as the worst candidate
            paid = (found.distances - prices.astype(np.float32)[found.ids]).max(1, keepdims=True)
            outside = np.full((len(paid), 1), len(prices), np.int32)
            found = Candidates(*map(np.hstack, ((found.ids, outside), (found.distances, paid))))
        # rows of a cluster stand together in memory
        order = np.argsort(found.ids[:, 0], kind="stable")
        found = Candidates(*(part[order] for part in found))
        highest = self._highest_prices(found)
        self._bounds = Bounds(
            sizes.smallest - self._taken,
            sizes.largest - self._taken,
            self.prices - step,
            np.minimum(highest, self.prices + step),
        )
        self._lists = make_lists(found, len(self.prices))
        pair = (len(found.ids), 2)
        self._ranks = Ranks(np.zeros(pair, np.int32), np.zeros(pair, np.float32))
        rank_rows(self._lists, self.prices, self._ranks)

    def _highest_prices(self, found: Candidates) -> Float32:
        highest = np.zeros(len(self.prices), np.float32)
        if self._pays and (self.lists_all or not len(found.ids)):
            highest[:-1] = np.inf
        elif self._pays:
            paid = found.distances - self.prices[found.ids]
            reach = np.quantile(paid.max(axis=1) - paid.min(axis=1), _OUTDATED)
            highest[:-1] = np.maximum(self.prices[:-1], 0) + reach
        return highest

    def excess(self) -> int:
        """Count the rows beyond the largest size and those that wait, or those that are lacking."""
        beyond, lacking, num_waiting = self._misfits()
        return int(max(beyond.sum() + num_waiting, lacking.sum()))

    def open_excess(self) -> int:
        """Count the same less that of clusters whose prices have moved as far as they may.

        What those lack is with the others or waits, and what is too much of them the others lack.
        """
        beyond, lacking, num_waiting = self._misfits()
        is_highest = (self.prices >= self._bounds.highest)[:-1]
        is_lowest = (self.prices <= self._bounds.lowest)[:-1]
        too_much = beyond[~is_lowest].sum() + num_waiting - lacking[is_highest].sum()
        return int(max(too_much, lacking[~is_highest].sum() - beyond[is_lowest].sum()))

    def least(self) -> int:
        """Return the size of the smallest cluster."""
        return int((self._sizes()[0] + self._taken).min())

    def _misfits(self) -> tuple[Int64, Int64, int]:
        counts, num_waiting = self._sizes()
        least = self._bounds.smallest if self._pays else None
        return *misfits(counts, self.prices[:-1], least, self._bounds.largest), num_waiting

    def _sizes(self) -> tuple[Int64, int]:
        *sizes, outside = np.bincount(self._ranks.ids[:, 0], minlength=len(self.prices))
        return np.array(sizes), int(outside)

    def step(self) -> None:
        """Set the prices one after the other, then go on along their change while the dual rises.

        The step doubles as long as it does.
        """
        before = self.prices.copy()
        reprice(self._lists, self.prices, self._ranks, self._bounds)
        change = self.prices - before
        best, taken, step = self._dual(self.prices), self.prices, 1
        while step <= _LONGEST:
            prices = np.clip(self.prices + step * change, self._bounds.lowest, self._bounds.highest)
            value = self._dual(prices)
            if value <= best:
                break
            best, taken, step = value, prices, 2 * step
        if step > 1:
            self.prices = taken
            rank_rows(self._lists, self.prices, self._ranks)

    def _dual(self, prices: Float32) -> float:
        return float(dual(self._lists, prices, self._bounds))
