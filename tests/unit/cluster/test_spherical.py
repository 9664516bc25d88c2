"""Spherical k-means: directions count, lengths do not, and a zero vector is refused by its row."""

import numpy as np
import pytest

from moce_dist.cluster.assign import assign_features, read_centroids, read_summary, run_clustering
from moce_dist.cluster.assignments import read_assignments
from moce_dist.config import ClusterConfig
from moce_dist.settings import ConfigError

CONFIG = ClusterConfig(num_clusters=4, block_rows=32, spherical=True)


@pytest.fixture
def rows():
    """Four bundles of directions, of unequal numbers, with lengths over three decades."""
    draws = np.random.default_rng(0)
    axes = np.eye(6)[:4].repeat((20, 50, 30, 60), axis=0)
    found = axes + 0.1 * draws.standard_normal((160, 6))
    return (found * 10 ** draws.uniform(-1, 2, (160, 1))).astype(np.float32)


def clustered(folder, rows, config=CONFIG):
    (folder / "features").mkdir(parents=True)
    for number, part in enumerate(np.array_split(rows, 3)):
        np.save(folder / "features" / f"{number}.npy", part)
    run_clustering(folder / "features", folder / "out", config, seed=0, subtract_mean=False)
    return np.array(list(read_assignments(folder / "out" / "assignments.parquet").values()))


def test_directions_are_found_whatever_the_lengths(tmp_path, rows):
    labels = clustered(tmp_path, rows, CONFIG.model_copy(update={"balance": "off"}))
    bundles = np.repeat(np.arange(4), (20, 50, 30, 60))
    assert {len(set(labels[bundles == b])) for b in range(4)} == {1} and len(set(labels)) == 4
    centroids, mean = read_centroids(tmp_path / "out")
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-6)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for cluster in range(4):
        direction = unit[labels == cluster].astype(np.float64).sum(axis=0)
        expected = direction / np.linalg.norm(direction)
        np.testing.assert_allclose(centroids[cluster], expected, rtol=1e-5, atol=1e-6)
    # new features go to the centroid of the greatest cosine
    assert np.array_equal(assign_features(rows, centroids, mean=mean)[0], labels)
    assert np.array_equal((unit @ centroids.T).argmax(axis=1), labels)


def test_lengths_change_nothing(tmp_path, rows):
    scaled = rows * np.exp2(np.arange(len(rows)) % 20, dtype=np.float32)[:, None]
    first, second = clustered(tmp_path / "a", rows), clustered(tmp_path / "b", scaled)
    # the name is that of the groups alone, and balance gives all of them 40
    assert np.array_equal(first, second)
    assert np.bincount(first).tolist() == [40] * 4


def test_sizes_without_balance_are_those_of_the_nearest_centroids(tmp_path, rows):
    clustered(tmp_path, rows)
    centroids, mean = read_centroids(tmp_path / "out")
    sizes = read_summary(tmp_path / "out")["sizes_without_balance"]
    assert sum(sizes) == 160 and max(sizes) > 40
    # the centroids that are kept are the means of the balanced clusters: near, not equal
    nearest = np.bincount(assign_features(rows, centroids, mean=mean)[0], minlength=4)
    assert abs(np.array(sizes) - nearest).max() <= 16


def test_a_zero_vector_is_refused_by_file_and_row(tmp_path, rows):
    rows[75] = 0
    with pytest.raises(ConfigError, match=r"1\.npy: row 21: is zero, and has no direction"):
        clustered(tmp_path, rows)


def test_a_zero_vector_is_a_row_like_others_without_the_spherical_form(tmp_path, rows):
    rows[75] = 0
    labels = clustered(tmp_path, rows, CONFIG.model_copy(update={"spherical": False}))
    assert len(labels) == 160
