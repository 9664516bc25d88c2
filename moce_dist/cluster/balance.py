"""Prices that make clusters equally large.

The assignment argmin_k |x - c_k|^2 - g_k is the best one among those with its own sizes, whatever
the prices g are; prices at which the sizes are the wanted ones give the best balanced assignment.
They maximise a concave dual, one price at a time: image i takes cluster k when g_k exceeds

    limit_ik = d_ik - min over the other clusters j of (d_ij - g_j),

so the best g_k, all others fixed, lies just above the s-th smallest limit, s being the wanted size. Only
candidates (the m nearest clusters of an image under the current prices) enter.

Letters: n rows, m candidates per row, K clusters.

Source: dual coordinate ascent for assignment, Bertsekas, "Network Optimization" (1998), chapter 7.
"""

import numpy as np
from numpy.typing import NDArray

from moce_dist.config import ClusterConfig

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]


def largest_size(num_rows: int, num_clusters: int, config: ClusterConfig) -> int:
    """Return the greatest size that a cluster may have under `config.balance`."""
    fair = -(-num_rows // num_clusters)
    if config.balance == "soft":
        return max(fair, int(config.soft_bound * num_rows / num_clusters))
    return fair if config.balance == "exact" else num_rows


def choose(ids: Int32, distances: Float64, prices: Float64) -> Int64:
    """Return the cluster of least distance - price among the candidates (n, m) of every row, (n,)."""
    columns = (distances - prices[ids]).argmin(axis=1)
    return np.take_along_axis(ids, columns[:, None], axis=1)[:, 0].astype(np.int64)


def overflow(labels: Int64, num_clusters: int, largest: int) -> int:
    """Count the images beyond the largest size."""
    counts = np.bincount(labels, minlength=num_clusters)
    return int(np.maximum(counts - largest, 0).sum())


def tune_prices(
    ids: Int32, distances: Float64, prices: Float64, config: ClusterConfig, *, rounds: int
) -> Float64:
    """Move prices (K,) until sizes over the candidates (n, m) fit, or `rounds` are used up.

    Distances need only be right up to a constant per row. Under `soft` only clusters at their bound are
    charged: no price is above 0. Returns the prices of the least overflow.
    """
    num_clusters, num_rows = len(prices), len(ids)
    if ids.shape[1] < 2:
        return prices
    largest = largest_size(num_rows, num_clusters, config)
    size = largest if config.balance == "soft" else round(num_rows / num_clusters)
    columns = _Columns(ids, distances, prices)
    best, least = prices, num_rows + 1
    for _ in range(rounds + 1):
        excess = overflow(choose(ids, distances, columns.prices), num_clusters, largest)
        if excess < least:
            best, least = columns.prices.copy(), excess
        if excess <= num_rows // 1000:
            break
        for cluster in range(num_clusters):
            columns.reprice(cluster, size, 0.0 if config.balance == "soft" else np.inf)
    return best


class _Columns:
    """Candidates grouped by cluster, with every candidate's distance - price at hand."""

    def __init__(self, ids: Int32, distances: Float64, prices: Float64) -> None:
        self.prices = prices.copy()
        self._distances, self._priced = distances, distances - prices[ids]
        order = np.argsort(ids, axis=None, kind="stable")
        self._rows, self._columns = np.unravel_index(order, ids.shape)
        self._bounds = np.searchsorted(ids.flat[order], np.arange(len(prices) + 1))

    def reprice(self, cluster: int, size: int, greatest: float) -> None:
        """Set the price at which `size` rows take the cluster, but at most `greatest`."""
        own = slice(self._bounds[cluster], self._bounds[cluster + 1])
        rows, columns = self._rows[own], self._columns[own]
        if not len(rows):
            return
        others = self._priced[rows]
        others[np.arange(len(rows)), columns] = np.inf
        distances = self._distances[rows, columns]
        self.prices[cluster] = min(_level(distances - others.min(axis=1), size), greatest)
        self._priced[rows, columns] = distances - self.prices[cluster]


def _level(limits: Float64, size: int) -> float:
    if len(limits) <= size:
        return float(limits.max())
    low, high = np.partition(limits, (size - 1, size))[size - 1 : size + 1]
    return float(low + high) / 2
