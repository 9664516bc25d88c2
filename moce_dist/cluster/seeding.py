"""First centroids: k-means++ on a sample, for many clusters part by part.

Its time grows with the clusters times the rows that they are chosen from. So from 1,024 clusters on
they are chosen from parts of the sample, each of which gives as many: a task of a worker, as a part
depends on nothing else. Very many centroids are drawn once each, not the best of some trials.

Letters: s rows, K clusters.

Source: seeding by parts, Ailon, Jaiswal, Monteleoni, "Streaming k-means approximation" (2009).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from moce_dist.cluster.blocks import Float64, open_array
from moce_dist.mapping import MapTasks

_ROWS_PER_CLUSTER, _FEWEST_ROWS = 64, 16_384
"""Rows that centroids are chosen from, where the sample has more: for each, and in all."""
_OF_PART, _TRIED_CLUSTERS = 1024, 4096
"""How many a part gives at most; most clusters whose first centroids are the best of trials."""


class Seeding(NamedTuple):
    """A request for K centroids: the sample's file, of which each part takes every so many rows."""

    file: Path
    num_clusters: int
    seed: int
    stride: int
    num_parts: int


def choose_centroids(file: Path, num_clusters: int, seed: int, map_tasks: MapTasks) -> Float64:
    """Choose first centroids, (K, D), among the rows (s, D) of a sample."""
    num_rows = max(_ROWS_PER_CLUSTER * num_clusters, _FEWEST_ROWS)
    stride = max(len(open_array(file)) // num_rows, 1)
    num_parts = -(-num_clusters // _OF_PART)
    seeding = Seeding(file, num_clusters, seed, stride, num_parts)
    return np.concatenate(list(map_tasks(choose_part, seeding, range(num_parts))))


def choose_part(seeding: Seeding, part: int) -> Float64:
    """Choose a part's centroids among its rows: k-means++, on one thread."""
    # a second to import, and training only reads clusters
    from sklearn.cluster import kmeans_plusplus

    rows = open_array(seeding.file)[:: seeding.stride][part :: seeding.num_parts]
    shares = np.array_split(np.arange(seeding.num_clusters), seeding.num_parts)
    with threadpool_limits(1):
        chosen, _ = kmeans_plusplus(
            rows,
            len(shares[part]),
            random_state=seeding.seed % 2**32,
            n_local_trials=1 if seeding.num_clusters > _TRIED_CLUSTERS else None,
        )
    return np.asarray(chosen, np.float64)
