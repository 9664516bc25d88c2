"""How far apart the clusters lie: the distance of every centroid to the nearest other one.

Two centroids that nearly touch share what one cluster could hold; a median far above the spread
inside of the clusters says that they are things apart.

Letters: K clusters, D width.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moce_dist.cluster.arrays import Float64

_BLOCK = 512
_LOOKED_AT = 4096


def nearest_others(centroids: NDArray[Any], some: NDArray[np.int64] | None = None) -> Float64:
    """Distance of centroids (K, D) to the nearest other of all, (K,), or of `some` (k,) ids, (k,).

    Raises:
        ValueError: there is no other one.
    """
    if len(centroids) < 2:
        raise ValueError("one centroid has no other")
    exact = np.asarray(centroids, np.float64)
    # float32 finds the neighbour, fast; near the mean it loses no digits to a far origin
    centred = (exact - exact.mean(axis=0)).astype(np.float32)
    squares = np.einsum("kd,kd->k", centred, centred)
    ids = np.arange(len(exact)) if some is None else some
    distances = np.empty(len(ids))
    for start in range(0, len(ids), _BLOCK):
        rows = ids[start : start + _BLOCK]
        to_all = squares - 2 * (centred[rows] @ centred.T)
        to_all[np.arange(len(rows)), rows] = np.inf
        neighbours = to_all.argmin(axis=1)
        apart = exact[rows] - exact[neighbours]
        distances[start : start + _BLOCK] = np.sqrt(np.einsum("kd,kd->k", apart, apart))
    return distances


def centroid_figures(centroids: NDArray[Any]) -> dict[str, float]:
    """Figures for summary.json: least and median distance of a centroid (K, D) to the nearest.

    Of very many clusters some, spread over all of them, are looked at. None for one cluster.
    """
    if len(centroids) < 2:
        return {}
    some = np.linspace(0, len(centroids) - 1, min(len(centroids), _LOOKED_AT)).astype(np.int64)
    distances = nearest_others(centroids, some)
    return {
        "centroid_distance_min": float(distances.min()),
        "centroid_distance_median": float(np.median(distances)),
    }
