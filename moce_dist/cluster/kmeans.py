"""Sweeps of balanced k-means over a matrix of features: nearest clusters, sums, distances.

A sweep gives every row to argmin_k |x - c_k|^2 - g_k (prices g, see `balance.py`). Since

    |x - c|^2 - g = |x|^2 - <(x, 1), (2 c, g - |c|^2)>

that is a search for the greatest inner product in D + 1 dimensions, which FAISS answers on CPU and
GPU. K centroids and K prices are all that couples the rows: a sweep returns sums, counts and
squares per cluster, from which the objective and the means follow.

The unit of work is a fixed block of rows on one thread, and sums are float64 in block order
(`blocks.py`), so a result has the same bits on any number of workers.

Letters: n rows, D width, K clusters, m candidates.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from moce_dist.cluster.blocks import (
    Block,
    FeatureFiles,
    Float32,
    Float64,
    MapBlocks,
    View,
    group_blocks,
    read_block,
)
from moce_dist.cluster.exact import Candidates

Int64 = NDArray[np.int64]
_CACHED_ROWS = 1024
"""Rows that stay in the processor's cache as float64."""


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


@lru_cache(maxsize=1)
def _gpu_resources() -> Any:
    return faiss.StandardGpuResources()


class Nearest(NamedTuple):
    """Best clusters of rows, best first, and |x - c|^2 - g - |x|^2 (float32): (n, m) each."""

    ids: Int64
    priced: Float32


def search(augmented: Float32, centroids: Float64, prices: Float64, *, num: int) -> Nearest:
    """Find the `num` clusters of least |x - c|^2 - g for rows (x, 1) of `augmented` (n, D + 1)."""
    bias = prices - np.square(centroids).sum(axis=1)
    base = np.hstack([2 * centroids, bias[:, None]]).astype(np.float32)
    if faiss.get_num_gpus():
        found, ids = faiss.knn_gpu(
            _gpu_resources(), augmented, base, num, metric=faiss.METRIC_INNER_PRODUCT
        )
    else:
        with _one_thread():
            found, ids = faiss.knn(augmented, base, num, metric=faiss.METRIC_INNER_PRODUCT)
    return Nearest(ids, -found)


def squared_distances(rows: NDArray[Any], centroids: Float64, labels: Int64) -> Float64:
    """Compute |x_i - c_{labels_i}|^2 without cancellation, (n,) float64."""
    distances = np.empty(len(rows))
    for start in range(0, len(rows), _CACHED_ROWS):
        part = slice(start, start + _CACHED_ROWS)
        difference = rows[part].astype(np.float64) - centroids[labels[part]]
        distances[part] = np.einsum("nd,nd->n", difference, difference)
    return distances


class Sums(NamedTuple):
    """What a sweep knows of the clusters: member sums (K, D), counts (K,), and sum |x|^2."""

    sums: Float64
    counts: Float64
    squares: float

    def __add__(self, other: "Sums") -> "Sums":  # type: ignore[override]
        """Add the parts of two sets of rows."""
        return Sums(
            self.sums + other.sums, self.counts + other.counts, self.squares + other.squares
        )

    def objective(self, centroids: Float64) -> float:
        """Return the sum over the rows of |x - c|^2."""
        cross = np.einsum("kd,kd->", centroids, self.sums)
        own = np.einsum("k,kd,kd->", self.counts, centroids, centroids)
        return float(self.squares - 2 * cross + own)

    def means(self, empty: Float64) -> Float64:
        """Return the mean of every cluster's members; the row of `empty` where there is none."""
        divisor = np.maximum(self.counts, 1)[:, None]
        return np.where(self.counts[:, None] > 0, self.sums / divisor, empty)


def _sum_rows(augmented: Float32, labels: Int64, num_clusters: int) -> Sums:
    total, squares = np.zeros((num_clusters, augmented.shape[1])), 0.0
    for start in range(0, len(labels), _CACHED_ROWS):
        rows = augmented[start : start + _CACHED_ROWS].astype(np.float64)
        ends = np.arange(len(rows) + 1)
        hits = (np.ones(len(rows)), labels[start : start + _CACHED_ROWS], ends)
        total += sparse.csr_matrix(hits, shape=(len(rows), num_clusters)).T @ rows
        squares += float(np.einsum("nd,nd->", rows[:, :-1], rows[:, :-1]))
    return Sums(total[:, :-1], total[:, -1], squares)


@dataclass(frozen=True)
class Task:
    """A group of blocks and what is asked of it; `labels` are given where they are fixed."""

    blocks: tuple[Block, ...]
    view: View
    centroids: Float64
    prices: Float64
    num: int = 1
    labels: Int64 | None = None

    def read(self) -> Iterator[tuple[Float32, Int64 | None]]:
        """Yield the augmented rows and the fixed labels of every block."""
        first = self.blocks[0].row
        for block in self.blocks:
            stop = block.row + block.stop - block.start - first
            labels = None if self.labels is None else self.labels[block.row - first : stop]
            yield read_block(block, self.view), labels


def sum_group(task: Task) -> Sums:
    """Sum up a group's clusters, under its fixed labels or the best ones."""
    parts = []
    for rows, fixed in task.read():
        best = (
            search(rows, task.centroids, task.prices, num=1).ids[:, 0] if fixed is None else fixed
        )
        parts.append(_sum_rows(rows, best, len(task.centroids)))
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def candidates_of_group(task: Task) -> Candidates:
    """Find the best `task.num` clusters of every row under the prices."""
    ids, distances = [], []
    for rows, _ in task.read():
        best = search(rows, task.centroids, task.prices, num=task.num).ids
        columns = [squared_distances(rows[:, :-1], task.centroids, column) for column in best.T]
        ids.append(best.astype(np.int32))
        distances.append(np.stack(columns, axis=1))
    return Candidates(np.concatenate(ids), np.concatenate(distances))


def distances_of_group(task: Task) -> Float64:
    """Return the squared distances of the rows to the centroids of their fixed labels."""
    parts = []
    for rows, labels in task.read():
        assert labels is not None
        parts.append(squared_distances(rows[:, :-1], task.centroids, labels))
    return np.concatenate(parts)


@dataclass(frozen=True)
class Matrix:
    """The features of a request, cut into groups of blocks, and who computes on them."""

    files: FeatureFiles
    view: View
    block_rows: int
    map_blocks: MapBlocks

    def _tasks(self, centroids: Float64, prices: Float64, labels: Int64 | None) -> list[Task]:
        groups = group_blocks(self.files.blocks(self.block_rows))
        firsts = [group[0].row for group in groups] + [self.files.num_rows]
        return [
            Task(
                group,
                self.view,
                centroids,
                prices,
                labels=None if labels is None else labels[first:end],
            )
            for group, (first, end) in zip(groups, pairwise(firsts), strict=True)
        ]

    def sums(self, centroids: Float64, prices: Float64, labels: Int64 | None = None) -> Sums:
        """Add up all rows per cluster, in block order."""
        tasks = self._tasks(centroids, prices, labels)
        total: Sums | None = None
        for part in self.map_blocks(sum_group, tasks):
            total = part if total is None else total + part
        assert total is not None
        return total

    def candidates(self, centroids: Float64, prices: Float64, num: int) -> Candidates:
        """Find the best `num` clusters of all rows."""
        tasks = [replace(task, num=num) for task in self._tasks(centroids, prices, None)]
        parts = list(self.map_blocks(candidates_of_group, tasks))
        return Candidates(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.distances for part in parts]),
        )

    def distances(self, centroids: Float64, labels: Int64) -> Float64:
        """Return the squared distances of all rows to the centroids of their labels, (n,)."""
        tasks = self._tasks(centroids, np.zeros(len(centroids)), labels)
        return np.concatenate(list(self.map_blocks(distances_of_group, tasks)))
