"""Nearest clusters under prices: the search that takes nearly all of the clustering time.

A row goes to argmin_k |x - c_k|^2 - g_k (prices g, see `balance.py`). Since

    |x - c|^2 - g = |x|^2 - <(x, 1), (2 c, g - |c|^2)>

this is a search for the greatest inner product in D + 1 dimensions, which FAISS runs on CPU and
GPU. With very many clusters an inverted file over them replaces the comparison with all. The prices
become one more coordinate, because with G = max g

    |x - c|^2 + (G - g) = |(x, 0) - (c, sqrt(G - g))|^2.

How many lists of the inverted file a search must probe depends on the features and the prices, so
every index is first tried on some rows. If it needs so many probes that comparing with all clusters
takes no longer, no index is used.

Searches run on one thread, so that the result of a block depends on the block alone.

Letters: n rows, D width, K clusters, m candidates.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moce_dist.arrays import Float32, Float64
from moce_dist.compiled import compiled_sums

_DEVICE_ROWS = 65_536
"""Rows whose candidate distances a GPU computes at a time."""
_LIST_ITERATIONS, _LISTS_PER_ROOT = 4, 2
_FEWEST_PROBES, _MOST_PROBED = 16, 1 / 4
"""Lists that a search probes at least; the share of all lists above which no index is used."""
_TIE = 1e-6
"""Loss, over the mean squared distance, up to which two clusters are equally good."""


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


@lru_cache(maxsize=1)
def gpu_resources() -> Any:
    """FAISS's memory and handles on the GPU, kept until the cache is cleared."""
    # this module makes FAISS accept tensors, on torch's stream
    import_module("faiss.contrib.torch_utils")
    return faiss.StandardGpuResources()


class Nearest(NamedTuple):
    """Best clusters of rows, best first, and their |x - c|^2 - g, float32: (n, m) each.

    `priced` is right up to a constant per row: -|x|^2, or the greatest price from an index.
    """

    ids: Tensor
    priced: Tensor


def make_base(centroids: Float64, prices: Float64) -> Float32:
    """Return the rows (2 c, g - |c|^2), (K, D + 1), whose products with (x, 1) are compared."""
    bias = prices - np.square(centroids).sum(axis=1)
    return np.hstack([2 * centroids, bias[:, None]]).astype(np.float32)


def search(augmented: Tensor, base: Tensor, *, num: int) -> Nearest:
    """Find the `num` clusters of least |x - c|^2 - g for rows (x, 1) of `augmented` (n, D + 1).

    The search runs on the device of both tensors, where the result stays.

    Raises:
        RuntimeError: a product is beyond float32, so that a row has no nearest cluster.
    """
    metric = faiss.METRIC_INNER_PRODUCT
    if augmented.is_cuda:
        # must come first: the import inside replaces faiss.knn_gpu
        resources = gpu_resources()
        found, ids = faiss.knn_gpu(resources, augmented, base, num, metric=metric)
    else:
        with _one_thread():
            arrays = faiss.knn(augmented.numpy(), base.numpy(), num, metric=metric)
        found, ids = map(torch.from_numpy, arrays)
    # compiled code takes the ids as places of arrays, unchecked
    if bool((ids < 0).any()):
        raise RuntimeError("features, centroids or prices are too large for a search in float32")
    return Nearest(ids, found.neg_())


def build_index(
    trial: Tensor, centroids: Float64, prices: Float64, *, num: int, recall: float
) -> NDArray[np.uint8] | None:
    """Return an inverted file over the priced clusters as bytes, for `open_index`.

    It probes as many lists as are needed to find the share `recall` of the `num` best clusters of
    the rows (x, 1) of `trial`; None where these are so many that an index gains nothing.
    """
    last = np.sqrt(prices.max() - prices)
    base = np.hstack([centroids, last[:, None]]).astype(np.float32)
    width, num_lists = base.shape[1], int(_LISTS_PER_ROOT * np.sqrt(len(base)))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(width), width, num_lists)
    index.cp.niter, index.cp.min_points_per_centroid = _LIST_ITERATIONS, 1
    with _one_thread():
        index.train(base)
        index.add(base)
    best = search(trial, torch.from_numpy(make_base(centroids, prices)), num=num).ids
    index.nprobe = _FEWEST_PROBES
    while index.nprobe <= _MOST_PROBED * num_lists:
        theirs = search_index(trial, index, num=num).ids
        # compare sorted values, not ids: balancing prices leave rows tied between two clusters
        rows, points = trial[:, :-1], torch.from_numpy(centroids).float()
        charged = torch.from_numpy(prices)
        distances = candidate_distances(rows, points, best)
        expected = (distances - charged[best]).sort(dim=1).values
        values = (candidate_distances(rows, points, theirs) - charged[theirs]).sort(dim=1).values
        is_found = (values - expected).abs() <= _TIE * distances.mean()
        if float(is_found.double().mean()) >= recall:
            return np.asarray(faiss.serialize_index(index))
        index.nprobe *= 2
    return None


def open_index(index: NDArray[np.uint8]) -> Any:
    """Turn the bytes of an index, which hold a copy of all clusters, into one to search."""
    return faiss.deserialize_index(index)


def search_index(augmented: Tensor, index: Any, *, num: int) -> Nearest:
    """Find clusters like `search`, but only in the lists nearest to a row.

    Where these lists hold fewer than `num` clusters, the best one is repeated.
    """
    queries = augmented.numpy().copy()
    queries[:, -1] = 0
    with _one_thread():
        found, ids = map(torch.from_numpy, index.search(queries, num))
    is_missing = ids < 0
    ids = torch.where(is_missing, ids[:, :1], ids)
    return Nearest(ids, torch.where(is_missing, found[:, :1], found))


class Missed(NamedTuple):
    """What an index costs: the share of rows that get a best cluster, and the loss of the others.

    `excess` is the sum of the losses in |x - c|^2 - g over the sum of all squared distances.
    """

    recall: float
    excess: float


def measure_index(
    augmented: Tensor, index: NDArray[np.uint8], centroids: Float64, prices: Float64
) -> Missed:
    """Compare, on rows (x, 1), the results of an index with those of a search of all clusters."""
    rows, points, charged = augmented[:, :-1], *map(torch.from_numpy, (centroids, prices))
    theirs = search_index(augmented, open_index(index), num=1).ids[:, 0]
    base = torch.from_numpy(make_base(centroids, prices))
    best = search(augmented, base, num=1).ids[:, 0]
    squares = squared_distances(rows, points, best)
    losses = squared_distances(rows, points, theirs) - charged[theirs] - squares + charged[best]
    # balancing prices leave rows tied between two clusters, and either one is right
    is_found = losses <= _TIE * squares.mean()
    return Missed(float(is_found.double().mean()), float(losses.sum() / squares.sum()))


def squared_distances(rows: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """Compute |x_i - c_{labels_i}|^2, (n,), as `candidate_distances` does."""
    return candidate_distances(rows, centroids, labels[:, None])[:, 0]


def candidate_distances(rows: Tensor, centroids: Tensor, ids: Tensor) -> Tensor:
    """Compute |x_i - c_{ids_ij}|^2, (n, m), without cancellation.

    The result has the type of `centroids`, float32 or float64.
    """
    distances = torch.empty(ids.shape, dtype=centroids.dtype, device=rows.device)
    if not rows.is_cuda:
        arrays = (each.contiguous().numpy() for each in (rows, centroids, ids, distances))
        _measure(*arrays)
        return distances
    for start in range(0, len(rows), _DEVICE_ROWS):
        part = slice(start, start + _DEVICE_ROWS)
        for place in range(ids.shape[1]):
            differences = centroids[ids[part, place]].sub_(rows[part])
            torch.sum(differences.square_(), dim=1, out=distances[part, place])
    return distances


@compiled_sums
def _measure(rows: Any, centroids: Any, ids: Any, distances: Any) -> None:
    # a loop, because torch would write the difference vector of every candidate to memory
    for row in range(len(ids)):
        for place in range(ids.shape[1]):
            cluster = ids[row, place]
            total = distances.dtype.type(0)
            for column in range(centroids.shape[1]):
                difference = rows[row, column] - centroids[cluster, column]
                total += difference * difference
            distances[row, place] = total
