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

Letters: s sampled rows, K clusters.

Source: dual coordinate ascent for assignment, Bertsekas, "Network Optimization" (1998), chapter 7;
pattern moves: Hooke and Jeeves 1961.
"""

import numpy as np
from numpy.typing import NDArray

from moce_dist.config import ClusterConfig

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
_CLOSE = 0.01
"""Share of rows beyond the sizes at which prices are good enough."""
_LONGEST = 2**20
"""Longest step of the line search, in changes of a round."""


def largest_size(num_rows: int, num_clusters: int, config: ClusterConfig) -> int:
    """Return the greatest size that a cluster may have under `config.balance`."""
    fair = -(-num_rows // num_clusters)
    if config.balance == "soft":
        return min(max(fair, int(config.soft_bound * num_rows / num_clusters)), num_rows)
    return fair if config.balance == "exact" else num_rows


def ascend(distances: Float32, prices: Float64, *, largest: int, rounds: int) -> Float64:
    """Improve prices (K,), none above 0, on the squared distances (K, s) of a sample.

    Distances need only be right up to a constant per row (column). The dual never falls.
    """
    num_clusters, num_rows = distances.shape
    if num_clusters == 1 or largest >= num_rows:
        return np.zeros(num_clusters)
    ascent = _Ascent(distances, prices - prices.max(), largest)
    for _ in range(rounds):
        if ascent.overflow() <= _CLOSE * num_rows:
            break
        before = ascent.prices.copy()
        for cluster in range(num_clusters):
            ascent.reprice(cluster)
        ascent.follow(ascent.prices - before)
    return ascent.prices.astype(np.float64)


class _Ascent:
    """Prices, and for every row its best and second best cluster under them.

    Axes: clusters first, (K, s), so that one cluster's distances lie together.
    """

    def __init__(self, distances: Float32, prices: Float64, largest: int) -> None:
        self.prices = prices.astype(np.float32)
        self._distances, self._largest = distances, largest
        num_rows = distances.shape[1]
        self._ids = np.zeros((2, num_rows), np.int64)
        self._values = np.zeros((2, num_rows), np.float32)
        self._rank(np.arange(num_rows))

    def overflow(self) -> int:
        """Count the rows beyond the largest size."""
        counts = np.bincount(self._ids[0], minlength=len(self.prices))
        return int(np.maximum(counts - self._largest, 0).sum())

    def _dual(self, prices: Float32) -> float:
        best = (self._distances - prices[:, None]).min(axis=0)
        return float(best.sum(dtype=np.float64) + self._largest * prices.sum(dtype=np.float64))

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
            self._rank(np.arange(len(self._ids[0])))

    def reprice(self, cluster: int) -> None:
        """Set one price to the level at which `largest` rows take the cluster, or to 0."""
        distances, size = self._distances[cluster], self._largest
        others = np.where(self._ids[0] == cluster, self._values[1], self._values[0])
        low, high = np.partition(distances - others, (size - 1, size))[size - 1 : size + 1]
        price = np.minimum((low + high) / 2, np.float32(0))
        if price == self.prices[cluster]:
            return
        self.prices[cluster] = price
        is_ranked = (self._ids == cluster).any(axis=0)
        self._rank(np.flatnonzero(is_ranked))
        priced = distances - price
        rows = np.flatnonzero(~is_ranked & (priced < self._values[1]))
        self._insert(rows, cluster, priced[rows])

    def _rank(self, rows: NDArray[np.int64]) -> None:
        priced = self._distances[:, rows] - self.prices[:, None]
        at = np.arange(len(rows))
        for place in (0, 1):
            best = priced.argmin(axis=0)
            self._ids[place, rows], self._values[place, rows] = best, priced[best, at]
            priced[best, at] = np.inf

    def _insert(self, rows: NDArray[np.int64], cluster: int, priced: Float32) -> None:
        # the cluster is better than the second of these rows, for some better than the first
        is_first = priced < self._values[0, rows]
        firsts = rows[is_first]
        self._ids[1, firsts], self._values[1, firsts] = (
            self._ids[0, firsts],
            self._values[0, firsts],
        )
        self._ids[0, firsts], self._values[0, firsts] = cluster, priced[is_first]
        seconds = rows[~is_first]
        self._ids[1, seconds], self._values[1, seconds] = cluster, priced[~is_first]
