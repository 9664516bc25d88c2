"""First centroids: k-means++ on a sample, for many clusters among rows that k-means|| has drawn.

The time of k-means++ grows with the clusters times the rows that they are chosen from. For over
1,024 clusters some rounds draw four times as many rows as are wanted, all of a round at once, with
chances that grow with the squared distance to the nearest one of the rounds before: searches, which
workers do. K of these are chosen by k-means++, each weighing as much as rows are nearest to it.
Very many stay as they were drawn.

Letters: s rows of the sample, D width, K clusters.

Source: k-means||, Bahmani et al., "Scalable k-means++" (2012).
"""

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from moce_dist.cluster.arrays import Float64, Int64
from moce_dist.cluster.blocks import open_array
from moce_dist.cluster.matrix import Matrix

_ROWS_PER_CLUSTER, _FEWEST_ROWS = 64, 16_384
"""Rows that centroids are chosen from, where the sample has more: for each, and in all."""
_FEW, _MANY = 1024, 8192
"""Most clusters that are chosen from all rows, and from rows drawn before."""
_ROUNDS, _OVERSAMPLED = 5, 4
"""Rounds of drawing; rows that they draw, over the clusters, where these are chosen from them."""


def choose_centroids(sample: Matrix, num_clusters: int, seed: int) -> Float64:
    """Choose first centroids, (K, D), among the rows of a sample, which lie in one file."""
    rows = open_array(sample.files.paths[0])
    if num_clusters <= _FEW:
        rows = rows[:: max(len(rows) // max(_ROWS_PER_CLUSTER * num_clusters, _FEWEST_ROWS), 1)]
        return _plus_plus(rows, num_clusters, seed)
    times = _OVERSAMPLED if num_clusters <= _MANY else 1
    num = min(times * num_clusters, len(rows))
    drawn = np.asarray(rows[draw_rows(sample, num, seed)], np.float64)
    if num == num_clusters:
        return drawn
    weights = np.bincount(sample.labels(drawn, np.zeros(num)), minlength=num)
    return _plus_plus(drawn, num_clusters, seed, weights.astype(np.float64))


def draw_rows(sample: Matrix, num: int, seed: int) -> Int64:
    """Draw the numbers of `num` rows, far from each other rather than near, in some rounds."""
    rows, draws = open_array(sample.files.paths[0]), np.random.default_rng(seed)
    everyone = np.arange(len(rows))
    drawn = draws.integers(len(rows), size=1)
    squares = _squares(sample, rows[drawn])
    for share in np.array_split(np.arange(num - 1), _ROUNDS):
        left = np.setdiff1d(np.flatnonzero(squares), drawn)
        if not len(left) or not len(share):
            break
        chances = squares[left] / squares[left].sum()
        new = draws.choice(left, min(len(share), len(left)), replace=False, p=chances)
        drawn = np.append(drawn, new)
        squares = np.minimum(squares, _squares(sample, rows[new]))
    # where nearly all rows are alike
    rest = draws.permutation(np.setdiff1d(everyone, drawn))[: num - len(drawn)]
    return np.append(drawn, rest)


def _squares(sample: Matrix, points: NDArray[np.float32]) -> Float64:
    centroids = points.astype(np.float64)
    everyone = np.arange(sample.files.num_rows)
    found = sample.candidates(centroids, np.zeros(len(points)), 1, everyone)
    return found.distances[:, 0].astype(np.float64)


def _plus_plus(
    rows: NDArray[np.float32] | Float64, num: int, seed: int, weights: Float64 | None = None
) -> Float64:
    # a second to import, and training only reads clusters
    from sklearn.cluster import kmeans_plusplus

    with threadpool_limits(1):
        chosen, _ = kmeans_plusplus(rows, num, sample_weight=weights, random_state=seed % 2**32)
    return np.asarray(chosen, np.float64)
