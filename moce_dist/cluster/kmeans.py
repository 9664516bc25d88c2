"""Sweeps of balanced k-means over a matrix of features: nearest clusters, sums, distances.

A sweep gives every row to its nearest cluster under prices (`nearest.py`). K centroids and K prices
are all that couples the rows: a sweep returns sums and counts per cluster, from which the objective
and the means follow.

The unit of work is a fixed block of rows on one thread, and sums are float64 in block order
(`blocks.py`), so a result has the same bits on any number of workers.

Letters: n rows, D width, K clusters, m candidates.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from moce_dist.cluster.blocks import (
    CACHED_ROWS,
    Block,
    FeatureFiles,
    Float32,
    Float64,
    View,
    group_blocks,
    read_block,
)
from moce_dist.cluster.candidates import Candidates
from moce_dist.cluster.nearest import (
    Int64,
    Nearest,
    build_index,
    candidate_distances,
    make_base,
    open_index,
    search,
    search_index,
    squared_distances,
)
from moce_dist.mapping import MapTasks

_TRIAL_ROWS = 512
"""Rows, spread over all files, that an index is tried on."""


class Sums(NamedTuple):
    """What a sweep knows of the clusters: member sums (K, D) and counts (K,)."""

    sums: Float64
    counts: Float64

    def __add__(self, other: "Sums") -> "Sums":  # type: ignore[override]
        """Add the parts of two sets of rows."""
        return Sums(self.sums + other.sums, self.counts + other.counts)

    def objective(self, centroids: Float64, squares: float) -> float:
        """Return the sum over the rows of |x - c|^2; `squares` is their sum of |x|^2."""
        cross = np.einsum("kd,kd->", centroids, self.sums)
        own = np.einsum("k,kd,kd->", self.counts, centroids, centroids)
        return float(squares - 2 * cross + own)

    def means(self, empty: Float64) -> Float64:
        """Return the mean of every cluster's members; the row of `empty` where there is none."""
        divisor = np.maximum(self.counts, 1)[:, None]
        return np.where(self.counts[:, None] > 0, self.sums / divisor, empty)


def _add_rows(total: Float64, augmented: Float32, labels: Int64) -> None:
    """Add rows with their column of ones to `total` (K, D + 1), one after the other."""
    sums, rows, clusters = (torch.from_numpy(each) for each in (total, augmented, labels))
    for start in range(0, len(rows), CACHED_ROWS):
        part = slice(start, start + CACHED_ROWS)
        sums.index_add_(0, clusters[part], rows[part].double())


@dataclass(frozen=True)
class Sweep:
    """What all tasks of a sweep share: the view, centroids (K, D), candidates m.

    A sweep that searches has either the base of its search or an index.
    """

    view: View
    centroids: Float64
    num: int = 1
    base: Float32 | None = None
    index: NDArray[np.uint8] | None = None

    @cached_property
    def _opened(self) -> Any:
        assert self.index is not None
        return open_index(self.index)

    def search(self, augmented: Float32) -> Nearest:
        """Find the best clusters of some rows."""
        if self.index is not None:
            return search_index(augmented, self._opened, num=self.num)
        assert self.base is not None
        return search(augmented, self.base, num=self.num)


@dataclass(frozen=True)
class Task:
    """A group of blocks, and the labels of their rows where these are fixed."""

    blocks: tuple[Block, ...]
    labels: Int64 | None = None

    def read(self, view: View) -> Iterator[tuple[Float32, Int64 | None]]:
        """Yield the augmented rows and the fixed labels of every block."""
        first = self.blocks[0].row
        for block in self.blocks:
            stop = block.row + block.stop - block.start - first
            labels = None if self.labels is None else self.labels[block.row - first : stop]
            yield read_block(block, view), labels


def sum_group(sweep: Sweep, task: Task) -> Sums:
    """Sum up a group's clusters, under its fixed labels or the best ones."""
    num_clusters, dim = sweep.centroids.shape
    total = np.zeros((num_clusters, dim + 1))
    for rows, fixed in task.read(sweep.view):
        _add_rows(total, rows, sweep.search(rows).ids[:, 0] if fixed is None else fixed)
    return Sums(total[:, :-1], total[:, -1])


def candidates_of_group(sweep: Sweep, task: Task) -> Candidates:
    """Find the best clusters of a group's rows and their squared distances."""
    ids, distances = [], []
    centroids = sweep.centroids.astype(np.float32)
    for rows, _ in task.read(sweep.view):
        best = sweep.search(rows).ids
        ids.append(best.astype(np.int32))
        distances.append(candidate_distances(rows[:, :-1], centroids, best))
    return Candidates(np.concatenate(ids), np.concatenate(distances))


def nearest_of_group(sweep: Sweep, task: Task) -> Candidates:
    """Find the best clusters of a group's rows and what the search compares them by."""
    found = [sweep.search(rows) for rows, _ in task.read(sweep.view)]
    ids = np.concatenate([each.ids for each in found])
    return Candidates(ids.astype(np.int32), np.concatenate([each.priced for each in found]))


def distances_of_group(sweep: Sweep, task: Task) -> Float64:
    """Return the squared distances of the rows to the centroids of their fixed labels."""
    parts = []
    for rows, labels in task.read(sweep.view):
        assert labels is not None
        parts.append(squared_distances(rows[:, :-1], sweep.centroids, labels))
    return np.concatenate(parts)


def squares_of_group(view: View, task: Task) -> float:
    """Return the sum of |x|^2 over a group's rows, in their order."""
    total = 0.0
    for rows, _ in task.read(view):
        total += float(np.einsum("nd,nd->", rows[:, :-1], rows[:, :-1], dtype=np.float64))
    return total


@dataclass(frozen=True)
class Matrix:
    """The features of a request, cut into groups of blocks, and who computes on them.

    From `index_from` clusters on, a search may use an index that finds the share `index_recall` of
    the best clusters.
    """

    files: FeatureFiles
    view: View
    block_rows: int
    map_blocks: MapTasks
    index_from: int = 2**31
    index_recall: float = 1.0

    def _tasks(self, labels: Int64 | None = None, result_bytes: int = 0) -> list[Task]:
        groups = group_blocks(self.files.blocks(self.block_rows), result_bytes)
        if labels is None:
            return [Task(group) for group in groups]
        firsts = [group[0].row for group in groups] + [self.files.num_rows]
        return [
            Task(group, labels[first:end])
            for group, (first, end) in zip(groups, pairwise(firsts), strict=True)
        ]

    def sweep(self, centroids: Float64, prices: Float64, num: int = 1) -> Sweep:
        """Prepare a search for the best `num` clusters."""
        if len(centroids) >= self.index_from:
            index = build_index(self._trial, centroids, prices, num=num, recall=self.index_recall)
            if index is not None:
                return Sweep(self.view, centroids, num, index=index)
        return Sweep(self.view, centroids, num, base=make_base(centroids, prices))

    @cached_property
    def _trial(self) -> Float32:
        return self.spread_rows(_TRIAL_ROWS)

    def spread_rows(self, num: int) -> Float32:
        """Read at most `num` rows, spread over all files, with a column of ones, (num, D + 1)."""
        last = self.files.num_rows - 1
        rows = np.linspace(0, last, min(num, last + 1)).astype(int)
        return self.files.take(rows, self.view)

    @cached_property
    def squares(self) -> float:
        """Sum of |x|^2 over all rows."""
        return sum(self.map_blocks(squares_of_group, self.view, self._tasks()))

    def sums(self, centroids: Float64, prices: Float64, labels: Int64 | None = None) -> Sums:
        """Add up all rows per cluster, in block order."""
        fixed = Sweep(self.view, centroids)
        sweep = self.sweep(centroids, prices) if labels is None else fixed
        tasks = self._tasks(labels, centroids.nbytes)
        total: Sums | None = None
        for part in self.map_blocks(sum_group, sweep, tasks):
            total = part if total is None else total + part
        assert total is not None
        return total

    def objective(self, sums: Sums, centroids: Float64) -> float:
        """Return the sum of |x - c|^2 over all rows, from a sweep's sums."""
        return sums.objective(centroids, self.squares)

    def labels(self, centroids: Float64, prices: Float64) -> Int64:
        """Find the best cluster of all rows, (n,)."""
        return self.nearest(centroids, prices, 1).ids[:, 0].astype(np.int64)

    def nearest(self, centroids: Float64, prices: Float64, num: int) -> Candidates:
        """Find the best `num` clusters of all rows; distances as searched, less |x|^2 or so."""
        found = self._collect(nearest_of_group, self.sweep(centroids, prices, num))
        found.distances[...] += prices.astype(np.float32)[found.ids]
        return found

    def candidates(self, centroids: Float64, prices: Float64, num: int) -> Candidates:
        """Find the best `num` clusters of all rows and the distances to them, in all digits."""
        return self._collect(candidates_of_group, self.sweep(centroids, prices, num))

    def _collect(self, find: Callable[[Sweep, Task], Candidates], sweep: Sweep) -> Candidates:
        shape, first = (self.files.num_rows, sweep.num), 0
        found = Candidates(np.empty(shape, np.int32), np.empty(shape, np.float32))
        for part in self.map_blocks(find, sweep, self._tasks()):
            rows = slice(first, first + len(part.ids))
            found.ids[rows], found.distances[rows] = part
            first = rows.stop
        return found

    def distances(self, centroids: Float64, labels: Int64) -> Float64:
        """Return the squared distances of all rows to the centroids of their labels, (n,)."""
        sweep = Sweep(self.view, centroids)
        return np.concatenate(list(self.map_blocks(distances_of_group, sweep, self._tasks(labels))))
