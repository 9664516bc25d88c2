"""Prices that keep clusters from growing beyond their size.

The assignment argmin_k |x - c_k|^2 - g_k is the best one among those with its own sizes, whatever
the prices g are; prices at which no cluster is too large give the best assignment within the sizes.
They maximise a concave dual, here one price at a time: row i takes cluster k when g_k exceeds

    limit_ik = d_ik - min over the other clusters j of (d_ij - g_j),

so with the others fixed the best g_k lies just above the s-th smallest limit, s being the largest
size, but at 0 where there is room. Prices are only ever charged: a cluster never draws rows that
are nearer to another one at no charge, which keeps the search stable far from balance. Clusters
that share the same rows underbid each other in small steps; a line search along the change of a
whole round takes many of those steps at once.

Every row brings its m best clusters only. What it would pay for any other is at least what it pays
for the last of these, at the prices of the search that found them; that value stands for all others
as a cluster of its own, number K, which is never full. Rows that end there wait for a next search.

Letters: s rows, K clusters, m candidates of a row.

Source: dual coordinate ascent for assignment, Bertsekas, "Network Optimization" (1998), chapter 7;
pattern moves: Hooke and Jeeves 1961.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moce_dist.cluster.edges import Candidates
from moce_dist.config import ClusterConfig

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
_CACHED_ROWS = 16_384
"""Rows whose candidates stay in the processor's cache."""
_LONGEST = 2**20
"""Longest step of the line search, in changes of a round."""


def largest_size(num_rows: int, num_clusters: int, config: ClusterConfig) -> int:
    """Return the greatest size that a cluster may have under `config.balance`."""
    fair = -(-num_rows // num_clusters)
    if config.balance == "soft":
        return min(max(fair, int(config.soft_bound * num_rows / num_clusters)), num_rows)
    return fair if config.balance == "exact" else num_rows


class Ascended(NamedTuple):
    """Prices (K,), none above 0, and how many rows are still beyond the sizes or wait."""

    prices: Float64
    excess: int


def ascend(
    found: Candidates, prices: Float64, *, largest: int, rounds: int, close: float = 0.01
) -> Ascended:
    """Improve the prices (K,) under which rows found their candidates. The dual never falls.

    Distances need only be right up to a constant per row. Stops when the share of rows beyond the
    sizes is at most `close`.
    """
    num_clusters, num_rows = len(prices), len(found.ids)
    if num_clusters == 1 or largest >= num_rows:
        return Ascended(np.zeros(num_clusters), 0)
    ascent = _Ascent(_with_outside(found, prices), prices - prices.max(), largest)
    for _ in range(rounds):
        if ascent.excess() <= close * num_rows:
            break
        before = ascent.prices.copy()
        for cluster in range(num_clusters):
            ascent.reprice(cluster)
        ascent.follow(ascent.prices - before)
    return Ascended(ascent.prices[:-1].astype(np.float64), ascent.excess())


def _with_outside(found: Candidates, prices: Float64) -> Candidates:
    num_rows, num = found.ids.shape
    if num == len(prices):
        return found
    paid = found.distances - (prices - prices.max()).astype(np.float32)[found.ids]
    outside = np.full((num_rows, 1), len(prices), np.int32)
    return Candidates(
        np.hstack([found.ids, outside]), np.hstack([found.distances, paid.max(1, keepdims=True)])
    )


class _Ascent:
    """Prices, the last one that of the outside, and every row's best and second best cluster."""

    def __init__(self, found: Candidates, prices: Float64, largest: int) -> None:
        self.prices = np.append(prices, 0).astype(np.float32)
        self._ids, self._distances = found
        self._largest = largest
        num_rows, num = found.ids.shape
        entries = np.argsort(found.ids, axis=None, kind="stable")
        bounds = np.searchsorted(found.ids.ravel()[entries], np.arange(len(prices) + 1))
        self._bounds = bounds.tolist()
        self._rows = (entries // num).astype(np.int32)
        self._of_cluster = found.distances.ravel()[entries]
        self._best = np.zeros((2, num_rows), np.int32)
        self._values = np.zeros((2, num_rows), np.float32)
        self._rank(np.arange(num_rows))

    def excess(self) -> int:
        """Count the rows beyond the largest size, and those that wait outside."""
        *counts, outside = np.bincount(self._best[0], minlength=len(self.prices))
        return int(np.maximum(np.array(counts) - self._largest, 0).sum() + outside)

    def _dual(self, prices: Float32) -> float:
        total = self._largest * prices.sum(dtype=np.float64)
        for start in range(0, len(self._ids), _CACHED_ROWS):
            part = slice(start, start + _CACHED_ROWS)
            priced = self._distances[part] - prices[self._ids[part]]
            total += priced.min(axis=1).sum(dtype=np.float64)
        return float(total)

    def follow(self, change: Float32) -> None:
        """Go on along the change of a round while the dual rises, doubling the step."""
        best, taken, step = self._dual(self.prices), self.prices, 1
        while step <= _LONGEST:
            prices = np.minimum(self.prices + step * change, np.float32(0))
            dual = self._dual(prices)
            if dual <= best:
                break
            best, taken, step = dual, prices, 2 * step
        if step > 1:
            self.prices = taken
            self._rank(np.arange(len(self._ids)))

    def reprice(self, cluster: int) -> None:
        """Set one price to the level at which `largest` rows take the cluster, or to 0."""
        entries = slice(self._bounds[cluster], self._bounds[cluster + 1])
        rows, distances, size = self._rows[entries], self._of_cluster[entries], self._largest
        best, second = self._best[:, rows]
        price = np.float32(0)
        if len(rows) > size:
            others = np.where(best == cluster, self._values[1, rows], self._values[0, rows])
            low, high = np.partition(distances - others, (size - 1, size))[size - 1 : size + 1]
            price = np.minimum((low + high) / 2, price)
        if price == self.prices[cluster]:
            return
        self.prices[cluster] = price
        is_ranked = (best == cluster) | (second == cluster)
        self._rank(rows[is_ranked])
        priced = distances - price
        is_better = ~is_ranked & (priced < self._values[1, rows])
        self._insert(rows[is_better], cluster, priced[is_better])

    def _rank(self, rows: NDArray[np.integer[Any]]) -> None:
        for start in range(0, len(rows), _CACHED_ROWS):
            part = rows[start : start + _CACHED_ROWS]
            ids = self._ids[part]
            priced = self._distances[part] - self.prices[ids]
            at = np.arange(len(part))
            for place in (0, 1):
                column = priced.argmin(axis=1)
                self._best[place, part] = ids[at, column]
                self._values[place, part] = priced[at, column]
                priced[at, column] = np.inf

    def _insert(self, rows: NDArray[np.int32], cluster: int, priced: Float32) -> None:
        # the cluster is better than the second of these rows, for some better than the first
        is_first = priced < self._values[0, rows]
        firsts, seconds = rows[is_first], rows[~is_first]
        self._best[1, firsts], self._values[1, firsts] = (
            self._best[0, firsts],
            self._values[0, firsts],
        )
        self._best[0, firsts], self._values[0, firsts] = cluster, priced[is_first]
        self._best[1, seconds], self._values[1, seconds] = cluster, priced[~is_first]
