"""Sweeps of balanced k-means over a matrix of features that lies in files.

Only the K centroids and K prices couple the rows. So a sweep over all rows returns either the best
clusters of each row, or sums and counts per cluster, from which the objective and the means follow.
`sweeps.py` has a worker's part of a sweep; this module hands out tasks and merges the results.

Letters: n rows, D width, K clusters, m candidates.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from moce_dist.arrays import Float64, Int32, Int64
from moce_dist.cluster.blocks import Block, FeatureFiles, View, group_blocks
from moce_dist.cluster.candidates import Border, Candidates
from moce_dist.cluster.nearest import build_index, make_base
from moce_dist.cluster.sweeps import (
    Sums,
    Sweep,
    SweepTask,
    border_of_group,
    candidates_of_group,
    distances_of_group,
    nearest_of_group,
    squares_of_group,
    sum_group,
)
from moce_dist.run.tasks import MapTasks

_Bounds = tuple[tuple[Block, ...], int, int]
_TRIAL_ROWS = 512
"""Rows, spread over all files, on which an index is tried."""


@dataclass(frozen=True)
class Matrix:
    """The features of a request, in groups of blocks, and the workers that compute on them.

    From `index_from` clusters on, a search on CPUs may use an index that finds the share
    `index_recall` of the best clusters. `device` is that of the workers: cpu or cuda. `content` is
    the sha256 of rows and keys (`blocks.Scan`), if it is known.
    """

    files: FeatureFiles
    view: View
    block_rows: int
    map_blocks: MapTasks
    index_from: int = 2**31
    index_recall: float = 1.0
    device: str = "cpu"
    content: str | None = None

    def _tasks(self, labels: Int32 | None = None, result_bytes: int = 0) -> list[SweepTask]:
        groups = group_blocks(self.files.blocks(self.block_rows), result_bytes)
        if labels is None:
            return [SweepTask(group) for group in groups]
        return [SweepTask(group, labels[first:end]) for group, first, end in self._bounds(groups)]

    def _bounds(self, groups: Sequence[tuple[Block, ...]]) -> Iterator[_Bounds]:
        firsts = [group[0].row for group in groups] + [self.files.num_rows]
        for group, (first, end) in zip(groups, pairwise(firsts), strict=True):
            yield group, first, end

    def sweep(self, centroids: Float64, prices: Float64, num: int = 1) -> Sweep:
        """Prepare a search for the best `num` clusters."""
        if len(centroids) >= self.index_from and self.device == "cpu":
            index = build_index(self._trial, centroids, prices, num=num, recall=self.index_recall)
            if index is not None:
                return Sweep(self.view, centroids, num, index=index)
        base = make_base(centroids, prices)
        return Sweep(self.view, centroids, num, base=base, device=self.device)

    @cached_property
    def _trial(self) -> Tensor:
        return self.spread_rows(_TRIAL_ROWS)

    def spread_rows(self, num: int) -> Tensor:
        """Read at most `num` rows, spread over all files, with a column of ones, (num, D + 1)."""
        last = self.files.num_rows - 1
        rows = np.linspace(0, last, min(num, last + 1)).astype(int)
        return torch.from_numpy(self.files.take(rows, self.view))

    @cached_property
    def squares(self) -> float:
        """Sum of |x|^2 over all rows."""
        sweep = Sweep(self.view, np.zeros((0, self.files.dim)), device=self.device)
        return sum(self.map_blocks(squares_of_group, sweep, self._tasks()))

    def sums(self, centroids: Float64, prices: Float64, labels: Int32 | None = None) -> Sums:
        """Add up all rows per cluster in block order: under fixed `labels`, else the best ones.

        Many clusters leave few tasks, because each returns a sum for every cluster. Then the best
        clusters are found first, in as many tasks as there are without sums.
        """
        if labels is None and len(self._tasks(None, centroids.nbytes)) < len(self._tasks()):
            labels = self.labels(centroids, prices)
        fixed = Sweep(self.view, centroids, device=self.device)
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

    def labels(self, centroids: Float64, prices: Float64) -> Int32:
        """Find the best cluster of all rows, (n,)."""
        return self.nearest(centroids, prices, 1).ids[:, 0]

    def nearest(self, centroids: Float64, prices: Float64, num: int) -> Candidates:
        """Find the best `num` clusters of all rows; distances are up to a constant per row."""
        parts = self.map_blocks(nearest_of_group, self.sweep(centroids, prices, num), self._tasks())
        found = _collect(parts, self.files.num_rows, num)
        found.distances[...] += prices.astype(np.float32)[found.ids]
        return found

    def candidates(self, centroids: Float64, prices: Float64, num: int, rows: Int64) -> Candidates:
        """Find the best `num` clusters of sorted `rows`, and accurate squared distances to them."""
        sweep = self.sweep(centroids, prices, num)
        tasks = []
        for group, first, end in self._bounds(group_blocks(self.files.blocks(self.block_rows))):
            low, high = np.searchsorted(rows, (first, end))
            if low < high:
                tasks.append(SweepTask(group, chosen=rows[low:high] - first))
        parts = self.map_blocks(candidates_of_group, sweep, tasks)
        return _collect(parts, len(rows), num)

    def border(self, centroids: Float64, prices: Float64, num: int, reach: float) -> Border:
        """Find the best cluster of all rows, and `num` candidates of those between clusters.

        A row is between clusters where its second best one is worse by at most `reach`.
        """
        sweep = replace(self.sweep(centroids, prices, num), prices=prices, reach=reach)
        labels, first = np.empty(self.files.num_rows, np.int32), 0
        settled = np.zeros(len(prices), np.int64)
        rows, ids, distances = [], [], []
        for part in self.map_blocks(border_of_group, sweep, self._tasks()):
            labels[first : first + len(part.labels)] = part.labels
            settled += np.bincount(part.labels, minlength=len(settled))
            settled -= np.bincount(part.labels[part.rows], minlength=len(settled))
            rows.append(part.rows + first)
            ids.append(part.found.ids)
            distances.append(part.found.distances)
            first += len(part.labels)
        found = Candidates(np.concatenate(ids), np.concatenate(distances))
        return Border(labels, np.concatenate(rows), found, settled, prices, reach)

    def distances(self, centroids: Float64, labels: Int32) -> Iterator[tuple[int, Float64]]:
        """Yield the squared distances of all rows to the centroids of their labels, in parts.

        Every part comes with the number of its first row.
        """
        sweep, first = Sweep(self.view, centroids, device=self.device), 0
        for part in self.map_blocks(distances_of_group, sweep, self._tasks(labels)):
            yield first, part
            first += len(part)


def _collect(parts: Iterable[Candidates], num_rows: int, num: int) -> Candidates:
    shape, first = (num_rows, num), 0
    found = Candidates(np.empty(shape, np.int32), np.empty(shape, np.float32))
    for part in parts:
        rows = slice(first, first + len(part.ids))
        found.ids[rows], found.distances[rows] = part
        first = rows.stop
    return found
