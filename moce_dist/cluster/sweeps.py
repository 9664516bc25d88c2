"""A worker's part of a sweep over a matrix of features: nearest clusters, sums, distances.

A sweep assigns every row to its nearest cluster under prices (`nearest.py`). The unit of work is a
fixed block of rows on one thread, and sums are float64 in block order (`blocks.py`), so a result
has the same bits on any number of workers of one kind. A GPU searches rows and sums them up in its
own memory, the rows of a cluster in order.

Letters: n rows, D width, K clusters, m candidates.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moce_dist.arrays import Float32, Float64, Int32, Int64
from moce_dist.cluster.blocks import CACHED_ROWS, Block, View, read_block
from moce_dist.cluster.candidates import Candidates
from moce_dist.cluster.nearest import (
    Nearest,
    candidate_distances,
    open_index,
    search,
    search_index,
    squared_distances,
)


class Sums(NamedTuple):
    """What a sweep returns of the clusters: sums of their rows (K, D) and counts (K,)."""

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
        """Return the mean of every cluster's rows; of an empty cluster its row of `empty`."""
        divisor = np.maximum(self.counts, 1)[:, None]
        return np.where(self.counts[:, None] > 0, self.sums / divisor, empty)


@dataclass(frozen=True)
class Sweep:
    """What all tasks of a sweep share: the view, centroids (K, D), candidates m, the device.

    A sweep that searches has either the base of its search or an index. One that looks for rows
    between clusters also has prices (K,) and `reach`, the greatest margin between their two best
    clusters. A worker receives the sweep once and caches what it derives from it for all tasks.
    """

    view: View
    centroids: Float64
    num: int = 1
    base: Float32 | None = None
    index: NDArray[np.uint8] | None = None
    device: str = "cpu"
    prices: Float64 | None = None
    reach: float = float("inf")

    @cached_property
    def _opened(self) -> Any:
        assert self.index is not None
        return open_index(self.index)

    @cached_property
    def _base(self) -> Tensor:
        assert self.base is not None
        return as_tensor(self.base, self.device)

    @cached_property
    def points(self) -> Tensor:
        """The centroids, (K, D) float64."""
        return as_tensor(self.centroids, self.device)

    @cached_property
    def narrow_points(self) -> Tensor:
        """The centroids, (K, D) float32."""
        return self.points.float()

    def search(self, augmented: Tensor) -> Nearest:
        """Find the best clusters of some rows."""
        if self.index is not None:
            return search_index(augmented, self._opened, num=self.num)
        return search(augmented, self._base, num=self.num)

    def assign(self, augmented: Tensor) -> tuple[Int64, Float64]:
        """Return the best cluster of some rows and the squared distance to it, (n,) each."""
        labels = self.search(augmented).ids[:, 0]
        distances = squared_distances(augmented[:, :-1], self.points, labels)
        return labels.cpu().numpy(), distances.cpu().numpy()


def as_tensor(array: NDArray[Any], device: str = "cpu") -> Tensor:
    """Bring an array to a device; on the CPU a contiguous, writable array is not copied."""
    # an array from another process may be read-only, about which torch warns
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device)


@dataclass(frozen=True)
class SweepTask:
    """A group of blocks, and the labels of their rows where these are fixed.

    `chosen` are the sorted numbers of the rows to read, counted from the first row of the group;
    None: all rows.
    """

    blocks: tuple[Block, ...]
    labels: Int32 | None = None
    chosen: Int64 | None = None

    def read(self, view: View, device: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the augmented rows and the fixed labels of every block."""
        first = self.blocks[0].row
        for block in self.blocks:
            start = block.row - first
            stop = start + block.stop - block.start
            if self.chosen is not None:
                low, high = np.searchsorted(self.chosen, (start, stop))
                if low < high:
                    yield read_block(block, view, device, self.chosen[low:high] - start), None
            elif self.labels is not None:
                labels = as_tensor(self.labels[start:stop].astype(np.int64), device)
                yield read_block(block, view, device), labels
            else:
                yield read_block(block, view, device), None


def add_rows(total: Tensor, augmented: Tensor, labels: Tensor) -> None:
    """Add rows (n, D + 1) in order to the rows of `total` (K, D + 1) float64 given by `labels`."""
    if not total.is_cuda:
        for start in range(0, len(augmented), CACHED_ROWS):
            part = slice(start, start + CACHED_ROWS)
            total.index_add_(0, labels[part], augmented[part].double())
        return
    add_sorted_rows(total, augmented, labels)


def add_sorted_rows(total: Tensor, augmented: Tensor, labels: Tensor) -> None:
    """Do the same with one GPU thread per cluster and column, which fixes the order of the sums."""
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels, minlength=len(total))
    rows = augmented[order].double()
    total += torch.segment_reduce(rows, "sum", lengths=counts, axis=0, unsafe=True)


def sum_group(sweep: Sweep, task: SweepTask) -> Sums:
    """Sum up a group's rows per cluster, under its fixed labels or the best ones."""
    num_clusters, dim = sweep.centroids.shape
    total = torch.zeros(num_clusters, dim + 1, dtype=torch.float64, device=sweep.device)
    for rows, fixed in task.read(sweep.view, sweep.device):
        add_rows(total, rows, sweep.search(rows).ids[:, 0] if fixed is None else fixed)
    sums = total.cpu().numpy()
    return Sums(sums[:, :-1], sums[:, -1])


def candidates_of_group(sweep: Sweep, task: SweepTask) -> Candidates:
    """Find the best clusters of a group's rows and their squared distances."""
    ids, distances = [], []
    for rows, _ in task.read(sweep.view, sweep.device):
        best = sweep.search(rows).ids
        ids.append(best)
        distances.append(candidate_distances(rows[:, :-1], sweep.narrow_points, best))
    return _candidates(ids, distances)


class GroupBorder(NamedTuple):
    """What a group adds to a border: labels (n,), rows between clusters (b,), their candidates."""

    labels: Int32
    rows: Int64
    found: Candidates


def border_of_group(sweep: Sweep, task: SweepTask) -> GroupBorder:
    """Find the best cluster of a group's rows, and the candidates of those between clusters."""
    assert sweep.prices is not None
    prices, labels, numbers, first = as_tensor(sweep.prices, sweep.device), [], [], 0
    ids, distances = [], []
    for rows, _ in task.read(sweep.view, sweep.device):
        best = sweep.search(rows).ids
        squares = candidate_distances(rows[:, :-1], sweep.narrow_points, best)
        two, places = (squares - prices[best]).topk(min(2, sweep.num), dim=1, largest=False)
        between = (two[:, -1] - two[:, 0] <= sweep.reach).nonzero()[:, 0]
        labels.append(best.gather(1, places[:, :1])[:, 0])
        numbers.append(between + first)
        ids.append(best[between])
        distances.append(squares[between])
        first += len(rows)
    chosen = torch.cat(numbers).cpu().numpy()
    return GroupBorder(torch.cat(labels).int().cpu().numpy(), chosen, _candidates(ids, distances))


def nearest_of_group(sweep: Sweep, task: SweepTask) -> Candidates:
    """Find the best clusters of a group's rows and the values that the search compares."""
    found = [sweep.search(rows) for rows, _ in task.read(sweep.view, sweep.device)]
    return _candidates([each.ids for each in found], [each.priced for each in found])


def _candidates(ids: list[Tensor], distances: list[Tensor]) -> Candidates:
    return Candidates(torch.cat(ids).int().cpu().numpy(), torch.cat(distances).cpu().numpy())


def distances_of_group(sweep: Sweep, task: SweepTask) -> Float64:
    """Return the squared distances of the rows to the centroids of their fixed labels."""
    parts = []
    for rows, labels in task.read(sweep.view, sweep.device):
        assert labels is not None
        parts.append(squared_distances(rows[:, :-1], sweep.points, labels))
    return torch.cat(parts).cpu().numpy()


def squares_of_group(sweep: Sweep, task: SweepTask) -> float:
    """Return the sum of |x|^2 over a group's rows, in their order."""
    total = 0.0
    for rows, _ in task.read(sweep.view, sweep.device):
        total += float(torch.linalg.vector_norm(rows[:, :-1], dtype=torch.float64).square())
    return total
