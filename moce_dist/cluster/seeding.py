"""First centroids: k-means++ on a sample, for many clusters in two steps.

The time of k-means++ grows with the clusters times the rows that they are chosen from. For over
1,024 clusters parts of the sample give four times as many centroids as are wanted, drawn once each,
with the number of rows that are nearest to them; a part is a task of a worker, as it depends on
nothing else. K of these are chosen by k-means++ with such weights. Very many stay as drawn.

Letters: s rows, K clusters.

Source: Ailon, Jaiswal, Monteleoni, "Streaming k-means approximation" (2009), algorithm 3.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from moce_dist.cluster.blocks import Float32, Float64, open_array
from moce_dist.cluster.nearest import make_base, search
from moce_dist.mapping import MapTasks

_ROWS_PER_CLUSTER, _FEWEST_ROWS = 64, 16_384
"""Rows that centroids are chosen from, where the sample has more: for each, and in all."""
_AT_ONCE, _OVERSAMPLED, _CHOSEN_AGAIN = 1024, 4, 8192
"""Clusters that are chosen in one step, or by a part; how many times as many parts draw; most
clusters that are chosen from these.
"""


class Seeding(NamedTuple):
    """What parts share: the sample's file, of which each takes every so many rows, and their size.

    A part draws `num` centroids.
    """

    file: Path
    num: int
    seed: int
    stride: int
    num_parts: int


class Drawn(NamedTuple):
    """Rows of the sample, (k, D), and how many rows are nearest to each, (k,)."""

    rows: Float32
    weights: Float64


def choose_centroids(file: Path, num_clusters: int, seed: int, map_tasks: MapTasks) -> Float64:
    """Choose first centroids, (K, D), among the rows (s, D) of a sample."""
    num_rows = max(_ROWS_PER_CLUSTER * num_clusters, _FEWEST_ROWS)
    stride = max(len(open_array(file)) // num_rows, 1)
    if num_clusters <= _AT_ONCE:
        rows = open_array(file)[::stride]
        chosen = _plus_plus(rows, num_clusters, seed, weights=None, trials=None)
        return rows[chosen].astype(np.float64)
    num_parts, times = -(-num_clusters // _AT_ONCE), _OVERSAMPLED
    if num_clusters > _CHOSEN_AGAIN:
        times = 1
    num = -(-times * num_clusters // num_parts)
    seeding = Seeding(file, num, seed, stride, num_parts)
    parts = map_tasks(draw_part, seeding, range(num_parts))
    drawn = Drawn(*map(np.concatenate, zip(*parts, strict=True)))
    if times == 1:
        return drawn.rows[:num_clusters].astype(np.float64)
    chosen = _plus_plus(drawn.rows, num_clusters, seed, weights=drawn.weights, trials=None)
    return drawn.rows[chosen].astype(np.float64)


def draw_part(seeding: Seeding, part: int) -> Drawn:
    """Draw a part's centroids among its rows, and count the rows that are nearest to each."""
    rows = open_array(seeding.file)[:: seeding.stride][part :: seeding.num_parts]
    chosen = _plus_plus(rows, min(seeding.num, len(rows)), seeding.seed, weights=None, trials=1)
    drawn = np.array(rows[chosen])
    base = torch.from_numpy(make_base(drawn.astype(np.float64), np.zeros(len(drawn))))
    augmented = torch.ones(len(rows), rows.shape[1] + 1)
    augmented[:, :-1] = torch.from_numpy(rows)
    nearest = search(augmented, base, num=1).ids[:, 0].numpy()
    return Drawn(drawn, np.bincount(nearest, minlength=len(drawn)).astype(np.float64))


def _plus_plus(
    rows: Float32, num: int, seed: int, *, weights: Float64 | None, trials: int | None
) -> np.ndarray:
    # a second to import, and training only reads clusters
    from sklearn.cluster import kmeans_plusplus

    with threadpool_limits(1):
        _, chosen = kmeans_plusplus(
            rows,
            num,
            sample_weight=weights,
            random_state=seed % 2**32,
            n_local_trials=trials,
        )
    return np.asarray(chosen)
