"""Clusters that no features have made, random ones and domains: their centroids are means, too."""

import json

import numpy as np
import pytest
from mixtures import transform

from moce_dist.cluster.assign import assign_features, read_centroids, run_clustering
from moce_dist.cluster.assignments import read_assignments
from moce_dist.cluster.domains import random_clusters
from moce_dist.config import ClusterConfig
from moce_dist.settings import ConfigError


def features(folder):
    """Three domains of 14, 13 and 13 rows in two files; the keys are not in their order."""
    folder.mkdir()
    draws, rows = np.random.default_rng(0), []
    keys = [f"{'bca'[i % 3]}/{i}" for i in range(40)]
    for number, part in enumerate((keys[:25], keys[25:])):
        centres = np.array(
            [[20 + 5 * ("abc".index(key[0]) == axis) for axis in range(6)] for key in part]
        )
        rows.append((centres + draws.standard_normal(centres.shape) * 0.3).astype(np.float16))
        np.save(folder / f"s{number}.npy", rows[-1])
        (folder / f"s{number}.keys.json").write_text(json.dumps(part))
    return keys, np.concatenate(rows)


def clustered(tmp_path, source, num_clusters, seed=1):
    config = ClusterConfig(num_clusters=num_clusters, source=source, block_rows=8)
    out = tmp_path / f"{source}-{num_clusters}-{seed}"
    named = {"seed": seed, "subtract_mean": True, "inputs": {"features": "x"}}
    return out, run_clustering(tmp_path / "features", out, config, **named)


@pytest.mark.parametrize(("source", "num_clusters"), [("random", 4), ("folder", 3)])
def test_centroids_are_the_means_of_what_was_given(tmp_path, source, num_clusters):
    keys, rows = features(tmp_path / "features")
    out, summary = clustered(tmp_path, source, num_clusters)
    labels = np.array([read_assignments(out / "assignments.parquet")[key] for key in keys])
    centroids, mean = read_centroids(out)
    unit = transform(rows, mean)
    for cluster, centroid in enumerate(centroids):
        np.testing.assert_allclose(centroid, unit[labels == cluster].mean(axis=0), atol=1e-6)
    assert summary["source"] == source and summary["num_clusters"] == num_clusters
    assert not list(out.glob("prices.npy")) and not list(out.glob("s*.npy"))
    # whoever comes later is assigned to the nearest one
    again, _ = assign_features(rows, centroids, mean=mean)
    nearest = ((unit[:, None] - centroids) ** 2).sum(axis=2).argmin(axis=1)
    assert again.tolist() == nearest.tolist()


def test_domains_are_the_first_folders_in_the_order_of_their_names(tmp_path):
    keys, _ = features(tmp_path / "features")
    out, summary = clustered(tmp_path, "folder", 3)
    labels = read_assignments(out / "assignments.parquet")
    assert all(labels[key] == "abc".index(key[0]) for key in keys)
    assert summary["domains"] == [{"a": 13}, {"b": 14}, {"c": 13}]
    assert summary["nmi"] == pytest.approx(1)


def test_other_numbers_than_that_of_the_domains_are_refused(tmp_path):
    features(tmp_path / "features")
    with pytest.raises(ConfigError, match=r"cluster.num_clusters \(4\) must be 3"):
        clustered(tmp_path, "folder", 4)


def test_random_clusters_are_balanced_and_follow_seed_and_key_alone():
    keys = [f"k{i}" for i in range(1001)]
    labels = random_clusters(keys, 8, 0)
    assert np.ptp(np.bincount(labels, minlength=8)) <= 1
    backwards = random_clusters(keys[::-1], 8, 0)
    assert backwards[::-1].tolist() == labels.tolist()
    assert random_clusters(keys, 8, 1).tolist() != labels.tolist()
    # neighbours share a cluster as often as chance has it
    assert (labels[1:] == labels[:-1]).mean() == pytest.approx(1 / 8, abs=0.04)


def test_another_seed_is_another_draw_and_features_another_clustering(tmp_path):
    features(tmp_path / "features")
    tables = [
        read_assignments(clustered(tmp_path, *how)[0] / "assignments.parquet")
        for how in (("random", 3, 1), ("random", 3, 2), ("features", 3, 1))
    ]
    assert tables[0] != tables[1] != tables[2]
