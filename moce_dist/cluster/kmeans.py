"""Distributed balanced k-means: K centroids and K prices are all that couples the images.

One sweep gives every image to argmin_k |x - c_k|^2 - g_k. Since |x - c|^2 - g = |x|^2 - <(x, 1), (2c, g - |c|^2)>
that is a search for the greatest inner product in D + 1 dimensions, which FAISS answers. A sweep returns
sums, counts and squares per cluster; from them follow the objective, the next centroids (means) and, under
balance, the next prices (`balance.py`).

The unit of work is a fixed block of rows on one thread, and sums are float64 in block order (`blocks.py`), so the
result has the same bits on any number of workers. After every iteration the state is on disk; a start
that finds the state of the same request continues from it, bit for bit.

Letters: n rows, D width, K clusters, m candidates.

Source: balanced assignment as a transport problem and its dual, Bertsekas, "Network Optimization" (1998),
chapter 7; splitting of empty clusters as in facebookresearch/faiss Clustering.cpp (split_clusters).
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.cluster import kmeans_plusplus
from threadpoolctl import threadpool_limits

from moce_dist.cluster.balance import largest_size, tune_prices
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
from moce_dist.cluster.exact import UnreachableError, finish
from moce_dist.config import ClusterConfig
from moce_dist.run import fingerprint

Int64 = NDArray[np.int64]
_log = logging.getLogger(__name__)
_SAMPLE_PER_CLUSTER, _MIN_SAMPLE, _MAX_SAMPLE = 256, 16_384, 65_536
_PRICE_ROUNDS = 5
_SPLIT = 1 / 1024


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
    """|x_i - c_{labels_i}|^2 without cancellation, (n,) float64."""
    distances = np.empty(len(rows))
    for start in range(0, len(rows), 1024):
        part = slice(start, start + 1024)
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
        """Sum over the rows of |x - c|^2."""
        cross = np.einsum("kd,kd->", centroids, self.sums)
        own = np.einsum("k,kd,kd->", self.counts, centroids, centroids)
        return float(self.squares - 2 * cross + own)

    def means(self, empty: Float64) -> Float64:
        """Mean of every cluster's members; the row of `empty` where there is none."""
        divisor = np.maximum(self.counts, 1)[:, None]
        return np.where(self.counts[:, None] > 0, self.sums / divisor, empty)


def _sum_rows(augmented: Float32, labels: Int64, num_clusters: int) -> Sums:
    # a thousand rows at a time stay in the cache as float64
    total, squares = np.zeros((num_clusters, augmented.shape[1])), 0.0
    for start in range(0, len(labels), 1024):
        rows = augmented[start : start + 1024].astype(np.float64)
        ends = np.arange(len(rows) + 1)
        hits = (np.ones(len(rows)), labels[start : start + 1024], ends)
        total += sparse.csr_matrix(hits, shape=(len(rows), num_clusters)).T @ rows
        squares += float(np.einsum("nd,nd->", rows[:, :-1], rows[:, :-1]))
    return Sums(total[:, :-1], total[:, -1], squares)


@dataclass(frozen=True)
class Task:
    """A group of blocks and what is asked of it; `labels` are the rows' clusters where they are fixed."""

    blocks: tuple[Block, ...]
    view: View
    centroids: Float64
    prices: Float64
    num: int = 1
    labels: Int64 | None = None

    def read(self) -> Iterator[tuple[Float32, Int64 | None]]:
        """Augmented rows and fixed labels of every block."""
        first = self.blocks[0].row
        for block in self.blocks:
            stop = block.row + block.stop - block.start - first
            labels = None if self.labels is None else self.labels[block.row - first : stop]
            yield read_block(block, self.view), labels


def sum_group(task: Task) -> Sums:
    """Sums of a group's clusters, under its fixed labels or the best ones."""
    parts = []
    for rows, fixed in task.read():
        best = search(rows, task.centroids, task.prices, num=1).ids[:, 0] if fixed is None else fixed
        parts.append(_sum_rows(rows, best, len(task.centroids)))
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


class Candidates(NamedTuple):
    """The m best clusters of every row, int32, and the squared distances to them, float64: (n, m)."""

    ids: NDArray[np.int32]
    distances: Float64


def candidates_of_group(task: Task) -> Candidates:
    """Best `task.num` clusters of every row under the prices."""
    ids, distances = [], []
    for rows, _ in task.read():
        best = search(rows, task.centroids, task.prices, num=task.num).ids
        columns = [squared_distances(rows[:, :-1], task.centroids, column) for column in best.T]
        ids.append(best.astype(np.int32))
        distances.append(np.stack(columns, axis=1))
    return Candidates(np.concatenate(ids), np.concatenate(distances))


def distances_of_group(task: Task) -> Float64:
    """Squared distances of the rows to the centroids of their fixed labels."""
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
        """Sums over all rows, in block order."""
        tasks = self._tasks(centroids, prices, labels)
        total: Sums | None = None
        for part in self.map_blocks(sum_group, tasks):
            total = part if total is None else total + part
        assert total is not None
        return total

    def candidates(self, centroids: Float64, prices: Float64, num: int) -> Candidates:
        """Best `num` clusters of all rows."""
        tasks = [replace(task, num=num) for task in self._tasks(centroids, prices, None)]
        parts = list(self.map_blocks(candidates_of_group, tasks))
        return Candidates(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.distances for part in parts]),
        )

    def distances(self, centroids: Float64, labels: Int64) -> Float64:
        """Squared distances of all rows to the centroids of their labels, (n,)."""
        tasks = self._tasks(centroids, np.zeros(len(centroids)), labels)
        return np.concatenate(list(self.map_blocks(distances_of_group, tasks)))


@dataclass(frozen=True)
class State:
    """All that a next iteration depends on: centroids (K, D), prices (K,), and where k-means stands."""

    centroids: Float64
    prices: Float64
    iteration: int = 0
    objective: float = float("inf")
    is_done: bool = False


def state_request(matrix: Matrix, config: ClusterConfig, seed: int) -> str:
    """Fingerprint what decides a result: features (by their mean), their view, config, seed."""
    files, view = matrix.files, matrix.view
    names = [path.name for path in files.paths]
    return fingerprint(
        {
            "files": list(zip(names, files.rows, strict=True)),
            "mean": view.mean.tobytes().hex(),
            "normalise": view.normalise,
            "config": config.model_dump(),
            "seed": seed,
        }
    )


def save_state(path: Path, state: State, request: str) -> None:
    """Write the state of `request` so that a reader sees all of it or the one before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(
            file,
            allow_pickle=False,
            request=request,
            centroids=state.centroids,
            prices=state.prices,
            scalars=np.array([state.iteration, state.objective, state.is_done]),
        )
    temporary.replace(path)


def load_state(path: Path, request: str) -> State | None:
    """Read the state of `request`; None where there is none or it belongs to another request."""
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as stored:
        if str(stored["request"]) != request:
            return None
        iteration, objective, is_done = stored["scalars"]
        return State(
            stored["centroids"],
            stored["prices"],
            int(iteration),
            float(objective),
            bool(is_done),
        )


def draw_sample(matrix: Matrix, num_clusters: int, seed: int) -> Float32:
    """Seeded sample of the rows with a last column of ones, (s, D + 1); all rows when they are few."""
    num_rows = matrix.files.num_rows
    wanted = np.clip(_SAMPLE_PER_CLUSTER * num_clusters, _MIN_SAMPLE, _MAX_SAMPLE)
    size = min(num_rows, max(int(wanted), num_clusters))
    rows = np.random.default_rng(seed).choice(num_rows, size, replace=False)
    return matrix.files.take(np.sort(rows), matrix.view)


def first_state(sample: Float32, num_clusters: int, seed: int) -> State:
    """Choose k-means++ centroids from the sample; prices are 0."""
    with threadpool_limits(1):
        chosen, _ = kmeans_plusplus(sample[:, :-1], num_clusters, random_state=seed % 2**32)
    return State(chosen.astype(np.float64), np.zeros(num_clusters))


def split_empty(centroids: Float64, counts: Float64) -> Float64:
    """Give every empty cluster half of the largest one: two centroids a little to either side."""
    centroids, counts = centroids.copy(), counts.copy()
    sides = np.where(np.arange(centroids.shape[1]) % 2, -_SPLIT, _SPLIT)
    sides *= np.sqrt(np.square(centroids).mean())
    for empty in np.flatnonzero(counts == 0):
        largest = int(counts.argmax())
        centroids[empty] = centroids[largest] + sides
        centroids[largest] = centroids[largest] - sides
        counts[empty] = counts[largest] = counts[largest] / 2
    return centroids


def balanced_prices(
    sample: Float32, centroids: Float64, prices: Float64, config: ClusterConfig
) -> Float64:
    """Find prices (K,) that balance the sample between the centroids, starting from `prices`."""
    num = min(config.num_candidates, len(centroids))
    found, priced = search(sample, centroids, prices, num=num)
    ids, distances = found.astype(np.int32), priced + prices[found]
    prices = tune_prices(ids, distances, prices, config, rounds=_PRICE_ROUNDS)
    largest = largest_size(len(sample), len(centroids), config)
    try:
        return finish(
            ids, distances, prices, largest=largest, is_exact=config.balance == "exact"
        ).prices
    except UnreachableError:
        # the candidates of the next iteration are drawn under better prices
        return prices


def iterate(matrix: Matrix, sample: Float32, state: State, config: ClusterConfig) -> State:
    """Run one iteration: prices for the centroids, a sweep over all rows, means (and splits)."""
    prices = state.prices
    if config.balance != "off":
        prices = balanced_prices(sample, state.centroids, prices, config)
    sums = matrix.sums(state.centroids, prices)
    objective = sums.objective(state.centroids)
    centroids = sums.means(state.centroids)
    if config.balance == "off":
        centroids = split_empty(centroids, sums.counts)
    _log.info(
        "k-means iteration %d: mean squared distance %.6g, largest over mean size %.3f",
        state.iteration + 1,
        objective / matrix.files.num_rows,
        sums.counts.max() / sums.counts.mean(),
    )
    is_done = abs(state.objective - objective) <= config.tolerance * abs(objective)
    return State(centroids, prices, state.iteration + 1, objective, is_done)


def kmeans(matrix: Matrix, config: ClusterConfig, *, seed: int, state_file: Path) -> State:
    """Iterate until the objective settles or the iterations are used up.

    A state of the same request in `state_file` is continued; it is written after every iteration.
    """
    request = state_request(matrix, config, seed)
    sample = draw_sample(matrix, config.num_clusters, seed)
    state = load_state(state_file, request) or first_state(sample, config.num_clusters, seed)
    while not state.is_done and state.iteration < config.iterations:
        state = iterate(matrix, sample, state, config)
        save_state(state_file, state, request)
    return state
