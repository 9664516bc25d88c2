"""Rows to cluster, in files, and all their distances."""

import numpy as np

from moce_dist.cluster.blocks import View, open_features, scan_files
from moce_dist.cluster.matrix import Matrix
from moce_dist.run.tasks import map_here


def mixture(num_rows, dim, num_groups, seed=0, spread=1.0):
    draws = np.random.default_rng(seed)
    weights = draws.dirichlet(np.ones(num_groups))
    groups = draws.choice(num_groups, num_rows, p=weights)
    rows = draws.standard_normal((num_groups, dim))[groups] * 2
    return (rows + spread * draws.standard_normal((num_rows, dim))).astype(np.float32)


def matrix_of(folder, rows, *, files=3, block_rows=64):
    folder.mkdir(exist_ok=True)
    for number, part in enumerate(np.array_split(rows, files)):
        np.save(folder / f"{number}.npy", part)
    opened = open_features(folder)
    view = View(scan_files(opened).mean.astype(np.float32), normalise=False)
    return Matrix(opened, view, block_rows, map_here)


def transform(rows, mean):
    """What is clustered of raw rows: less the mean, scaled to length 1."""
    centred = rows.astype(np.float32) - np.asarray(mean, np.float32)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-12)


def brute_force(rows, centroids):
    return ((rows[:, None].astype(np.float64) - centroids) ** 2).sum(axis=2)
