"""The best clusters of every row, rows with equal candidates (twins), and rows between clusters.

A row is between clusters when its two best clusters are nearly equally good under the prices.

Letters: n rows, b rows between clusters, m candidates per row, K clusters.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moce_dist.arrays import Float64, Int32, Int64


class Candidates(NamedTuple):
    """The m best clusters of every row, int32, and the squared distances to them: (n, m)."""

    ids: Int32
    distances: NDArray[Any]


class Border(NamedTuple):
    """The result of a search of all rows: the rows between clusters, and the counts of the others.

    `labels` (n,) are the best clusters under the search's `prices` (K,). A row whose second best is
    worse by more than `reach` keeps its cluster while no two prices move apart by more than
    `reach`; `settled` (K,) counts such rows. The remaining rows are `rows` (b,), sorted, with their
    candidates `found`.
    """

    labels: Int32
    rows: Int64
    found: Candidates
    settled: Int64
    prices: Float64
    reach: float


def margins_of(found: Candidates, prices: Float64) -> Float64:
    """Return how much worse every row's second best cluster is than its best one, (n,)."""
    if found.ids.shape[1] == 1:
        return np.full(len(found.ids), np.inf)
    paid = found.distances - prices[found.ids]
    paid.partition(1, axis=1)
    return np.asarray(paid[:, 1] - paid[:, 0])


def choose(found: Candidates, prices: Float64) -> Int64:
    """Return the cluster of least distance - price among the candidates of every row, (n,)."""
    columns = (found.distances - prices[found.ids]).argmin(axis=1)
    return np.take_along_axis(found.ids, columns[:, None], axis=1)[:, 0].astype(np.int64)


def find_twins(found: Candidates, among: Int64 | None = None) -> Int64:
    """Return, for every row, the lowest row with equal candidates at equal distances, (n,).

    With `among`, the twins by an earlier set of candidates, rows must have been twins there too.
    """
    distances = np.ascontiguousarray(found.distances)
    columns = [*found.ids.T, *distances.view(np.int32).reshape(len(distances), -1).T]
    if among is not None:
        columns.append(among)
    factors = np.random.default_rng(0).integers(1, 2**63, len(columns), np.uint64) | 1
    hashed = np.zeros(len(distances), np.uint64)
    for column, factor in zip(columns, factors, strict=True):
        hashed += column.astype(np.uint64) * factor
    _, firsts, groups = np.unique(hashed, return_index=True, return_inverse=True)
    twins = firsts[groups]
    others = np.flatnonzero(twins != np.arange(len(twins)))
    likes = twins[others]
    is_like = (found.ids[others] == found.ids[likes]) & (distances[others] == distances[likes])
    is_like = is_like.all(axis=1)
    if among is not None:
        is_like &= among[others] == among[likes]
    # rows that only share a hash have no twin
    unlike = others[~is_like]
    twins[unlike] = unlike
    return twins
