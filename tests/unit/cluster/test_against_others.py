"""Exact balance against optimal transport (POT), once and in every iteration of k-means."""

import numpy as np
import pytest

from moce_dist.cluster.blocks import View, open_features, scan_files
from moce_dist.cluster.kmeans import Lloyd, State, draw_sample, kmeans
from moce_dist.cluster.matrix import Matrix
from moce_dist.cluster.settle import settle
from moce_dist.config import ClusterConfig
from moce_dist.run.tasks import map_here

ROWS, DIM, CLUSTERS = 6000, 24, 24


def lloyd_of(folder, rows, **settings):
    np.save(folder / "rows.npy", rows)
    files = open_features(folder)
    view = View(scan_files(files).mean.astype(np.float32), normalise=False)
    matrix = Matrix(files, view, 1024, map_here)
    config = ClusterConfig(**settings)
    sample = draw_sample(matrix, config.num_clusters, 0, folder / "sample.npy")
    return Lloyd(matrix, sample, config), rows - view.mean


def distances_of(rows, centroids):
    return ((rows[:, None].astype(np.float64) - centroids) ** 2).sum(axis=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    draws = np.random.default_rng(0)
    centres = 2 * draws.standard_normal((40, DIM))
    weights = draws.dirichlet(np.ones(40))
    rows = centres[draws.choice(40, ROWS, p=weights)] + draws.standard_normal((ROWS, DIM))
    folder, settings = tmp_path_factory.mktemp("features"), {"iterations": 25, "tolerance": 0}
    return lloyd_of(folder, rows.astype(np.float32), num_clusters=CLUSTERS, **settings)


def cost_at_means(rows, labels):
    """Mean squared distance to the means of the labels."""
    rows = rows.astype(np.float64)
    means = np.stack([rows[labels == cluster].mean(axis=0) for cluster in range(CLUSTERS)])
    return ((rows - means[labels]) ** 2).sum(axis=1).mean()


def test_labels_cost_what_optimal_transport_costs(data):
    ot = pytest.importorskip("ot")
    lloyd, rows = data
    centroids = lloyd.first_state(1).centroids
    done = settle(lloyd, State(centroids, np.zeros(CLUSTERS)))
    distances = distances_of(rows, centroids)
    best = ot.emd2([], [], distances, numItermax=10**7)
    ours = distances[np.arange(ROWS), done.labels].mean()
    counts = np.bincount(done.labels, minlength=CLUSTERS)
    assert counts.min() == counts.max() == ROWS // CLUSTERS
    assert best * (1 - 1e-9) <= ours <= 1.001 * best
    assert done.figures["cost_lower_bound"] <= ours * (1 + 1e-9)


@pytest.mark.parametrize("border_rows", [10**6, 4000])
def test_near_duplicates_cost_what_optimal_transport_costs(tmp_path, border_rows):
    ot = pytest.importorskip("ot")
    # half of all rows must spread over half of the clusters, far from their 16 first candidates
    draws = np.random.default_rng(0)
    rows = draws.standard_normal((48 * 128, 8))
    rows[: 24 * 128] = rows[-1] + 1e-3 * draws.standard_normal((24 * 128, 8))
    settings = {"num_clusters": 128, "iterations": 15, "border_rows": border_rows}
    lloyd, rows = lloyd_of(tmp_path, rows.astype(np.float32), **settings)
    state = kmeans(lloyd, seed=0, state_file=tmp_path / "state.npz")
    done = settle(lloyd, state)
    distances = distances_of(rows, state.centroids)
    best = ot.emd2([], [], distances, numItermax=10**7)
    ours = distances[np.arange(len(rows)), done.labels].mean()
    assert np.bincount(done.labels, minlength=128).tolist() == [48] * 128
    assert best * (1 - 1e-6) <= ours <= 1.0001 * best
    assert 0.9999 * best <= done.figures["cost_lower_bound"] <= best * (1 + 1e-6)


def test_clusters_are_as_good_as_those_that_are_balanced_in_every_iteration(data, tmp_path):
    ot = pytest.importorskip("ot")
    lloyd, rows = data
    # k-means whose every assignment is the cheapest balanced one (Bradley et al. 2000)
    centroids = lloyd.first_state(0).centroids.astype(np.float64)
    for _ in range(25):
        distances = distances_of(rows, centroids)
        labels = ot.emd([], [], distances, numItermax=10**7).argmax(axis=1)
        centroids = np.stack([rows[labels == c].mean(axis=0) for c in range(CLUSTERS)])
    assert (np.bincount(labels, minlength=CLUSTERS) == ROWS // CLUSTERS).all()
    expected = cost_at_means(rows, labels)
    state = kmeans(lloyd, seed=0, state_file=tmp_path / "state.npz")
    ours = cost_at_means(rows, settle(lloyd, state).labels)
    assert ours <= 1.01 * expected
