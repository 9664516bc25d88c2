"""Prices that keep the sizes of clusters between bounds.

For any prices g, the assignment argmin_k |x - c_k|^2 - g_k is the cheapest one with its sizes. So
prices at which all sizes are within the bounds give the cheapest balanced assignment. These prices
maximise a concave dual, here one price at a time: row i takes cluster k when g_k exceeds

    limit_ik = d_ik - min over the other clusters j of (d_ij - g_j),

so with the other prices fixed, the best g_k lies just above the t-th smallest limit. For a negative
g_k (the cluster charges) t is the largest allowed size, for a positive g_k (the cluster pays) it is
the smallest allowed size; where neither is needed, g_k = 0. Clusters that compete for the same rows
change their prices in small steps; a line search along the change of a whole round takes many of
those steps at once.

A row lists only its m best clusters. Under the prices of the search that found them, every other
cluster costs the row at least as much as the worst one listed. That value is the distance to an
extra cluster with id K, the outside, which is never full and stands for all clusters not listed.
Rows that end there wait for the next search. A cluster that pays also attracts rows that do not
list it. So one call raises a price only as far as nearly all lists stay valid, and only the next
search shows whether the sizes are right.

With very many rows, only those between clusters are here (`candidates.py`, Border). The other rows
count as occupied places, and no price moves so far that one of them would change its cluster. So
what is said of the dual holds for all rows.

Letters: s rows, K clusters, m candidates per row.

Source: dual coordinate ascent for assignment, Bertsekas, "Network Optimization" (1998), chapter 7;
pattern moves: Hooke and Jeeves 1961.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moce_dist.arrays import Float32, Float64, Int64
from moce_dist.cluster.ascent import Bounds, Ranks, dual, make_lists, rank_rows, reprice
from moce_dist.cluster.candidates import Candidates
from moce_dist.config import ClusterConfig

_LONGEST = 2**20
"""Longest step of the line search, in multiples of a round's change."""
_OUTDATED = 0.1
"""Share of rows whose lists may become invalid when a price rises as far as one call allows."""
_GAIN = 0.05
"""Ratio of the remaining to the initial excess below which a new search helps more than rounds."""
_STEP = 0.45
"""Largest move of a price in units of `FixedRows.reach`. Below 1/2, so that two prices never part
by more than the reach; the rest is left for the exact finish."""


class Sizes(NamedTuple):
    """Least and greatest number of rows that a cluster may have."""

    smallest: int
    largest: int


def allowed_sizes(num_rows: int, num_clusters: int, config: ClusterConfig) -> Sizes:
    """Return the bounds of `config.balance`: equal within 1, at most a largest size, or none."""
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
    """Return by how many rows every cluster is too large and too small, (K,) each.

    Without a smallest size, a cluster that charges (price < 0) counts as too small until it is full
    (complementary slackness).
    """
    least = np.where(prices < 0, largest, counts) if smallest is None else smallest
    return np.maximum(counts - largest, 0), np.maximum(least - counts, 0)


class Ascended(NamedTuple):
    """Prices (K,), rows beyond the size bounds before and after, size of the smallest cluster.

    The excess is the greater of two counts: rows above the largest sizes plus waiting rows, and
    rows missing from clusters that are too small (see `misfits`).
    """

    prices: Float64
    excess_before: int
    excess: int
    least: int


class FixedRows(NamedTuple):
    """Fixed rows outside the problem: their number per cluster, (K,).

    None of them changes its cluster while no two prices move further apart than `reach`.
    """

    counts: Int64
    reach: float


def fitted(counts: Int64, largest: int) -> Int64:
    """Cut numbers of fixed rows (K,) to a largest size; return them with the same sum.

    What is cut goes to the other clusters in proportion to their room. A cluster with more fixed
    rows than it may have would have no finite price without a reach.

    Raises:
        ValueError: the sum exceeds K times the largest size.
    """
    cut = np.minimum(counts, largest)
    room, over = largest - cut, int((counts - cut).sum())
    if over > room.sum():
        raise ValueError(f"{counts.sum()} fixed rows do not fit {len(counts)} x {largest} places")
    return cut + np.diff(np.cumsum(room) * over // max(int(room.sum()), 1), prepend=0)


def ascend(
    found: Candidates,
    prices: Float64,
    sizes: Sizes,
    *,
    rounds: int,
    close: float = 0.01,
    fixed: FixedRows | None = None,
) -> Ascended:
    """Improve the prices (K,) under which rows found their candidates; the dual never falls.

    Distances need only be right up to a constant per row. The rounds stop when the share of rows
    beyond the sizes, except those that the candidates cannot fix, is at most `close`, or so much
    smaller than at first that a new search helps more than further rounds. Adding a constant to all
    prices changes nothing. Unless `fixed` holds prices back, at least one returned price is 0, and
    none is positive if there is no smallest size.
    """
    fixed = fixed or FixedRows(np.zeros(len(prices), np.int64), np.inf)
    num_clusters, num_rows = len(prices), len(found.ids) + int(fixed.counts.sum())
    if num_clusters == 1 or sizes.largest >= num_rows:
        return Ascended(np.zeros(num_clusters), 0, 0, num_rows // num_clusters)
    # with a smallest size q, n - q K clusters can hold one more row and may charge: shift the
    # prices so that as many are below 0
    num_charging = num_rows - sizes.smallest * num_clusters
    free = np.sort(prices)[num_charging] if sizes.smallest else prices.max()
    ascent = Ascent(found, prices - free, sizes, fixed)
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


class Ascent:
    """Prices (K + 1,), the outside's last, and every row's best and second best cluster."""

    def __init__(self, found: Candidates, prices: Float64, sizes: Sizes, fixed: FixedRows) -> None:
        self.prices = np.append(prices, 0).astype(np.float32)
        self._pays = sizes.smallest > 0
        self._taken, step = fixed.counts, np.float32(_STEP * fixed.reach)
        self.lists_all = found.ids.shape[1] == len(prices)
        if not self.lists_all:
            # the outside (cluster K, price 0) is as far away as the worst priced candidate
            paid = (found.distances - prices.astype(np.float32)[found.ids]).max(1, keepdims=True)
            outside = np.full((len(paid), 1), len(prices), np.int32)
            found = Candidates(*map(np.hstack, ((found.ids, outside), (found.distances, paid))))
        # keep the rows of a cluster together in memory
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
        """Count rows above the largest size and waiting rows, or missing rows if these are more."""
        beyond, lacking, num_waiting = self._misfits()
        return int(max(beyond.sum() + num_waiting, lacking.sum()))

    def open_excess(self) -> int:
        """Count the excess that this call can still remove.

        Leaves out clusters whose prices have reached their bounds. What those lack is surplus of
        other clusters or waits; what those have too much is missing from other clusters.
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
        """Set the prices one after the other, then extrapolate their change while the dual rises.

        The step length doubles as long as it does.
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
