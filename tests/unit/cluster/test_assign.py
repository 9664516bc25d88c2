"""Assignments of new features, their table, and the summary of a run's features."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mixtures import transform
from sklearn.metrics import normalized_mutual_info_score

from moce_dist.cluster import assign
from moce_dist.cluster.assign import assign_features, make_clusters, read_centroids, run_clustering
from moce_dist.cluster.assignments import read_assignments
from moce_dist.cluster.blocks import View, open_features, scan_files
from moce_dist.cluster.domains import domain_figures
from moce_dist.config import ClusterConfig
from moce_dist.run.artefacts import is_complete
from moce_dist.settings import ConfigError


def run_features(folder, shifts=(0.0, 0.0, 0.0), per_shard=40):
    """Features of a run: raw rows far from the origin, keys `DOMAIN/NUMBER` beside them."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    parts = []
    for number, shift in enumerate(shifts):
        rows = draws.standard_normal((per_shard, 6)) * 0.3 + 20
        rows[:, number % 6] += 4 + shift
        parts.append(rows.astype(np.float16))
        np.save(folder / f"s{number}.npy", parts[-1])
        keys = [f"domain{number}/{row}" for row in range(per_shard)]
        (folder / f"s{number}.keys.json").write_text(json.dumps(keys))
    return np.concatenate(parts)


def clustered(tmp_path, **more):
    arguments = {"seed": 1, "subtract_mean": True, **more}
    config = ClusterConfig(num_clusters=3, block_rows=32)
    return run_clustering(tmp_path / "features", tmp_path / "clusters", config, **arguments)


def test_run_is_clustered_in_transformed_features_with_its_keys(tmp_path):
    rows = run_features(tmp_path / "features")
    summary = clustered(tmp_path, inputs={"features": "x"})
    centroids, mean = read_centroids(tmp_path / "clusters")
    assert mean is not None and mean.dtype == np.float32
    np.testing.assert_allclose(mean, rows.astype(float).mean(axis=0), rtol=1e-6)
    table = pq.read_table(tmp_path / "clusters" / "assignments.parquet")
    assert table.column_names == ["key", "shard", "cluster", "distance"]
    assert table["key"].to_pylist()[40:42] == ["domain1/0", "domain1/1"]
    assert table["shard"].to_pylist()[40] == "s1"
    labels = table["cluster"].to_numpy()
    expected = ((transform(rows, mean) - centroids[labels]) ** 2).sum(axis=1)
    np.testing.assert_allclose(table["distance"].to_numpy(), expected, atol=1e-5)
    assert summary["mean_squared_distance"] == pytest.approx(expected.mean(), rel=1e-4)
    assert is_complete(tmp_path / "clusters", {"features": "x"})
    assert not (tmp_path / "clusters" / "state.npz").exists()


def test_summary_tells_how_clusters_and_domains_agree(tmp_path):
    run_features(tmp_path / "features")
    summary = clustered(tmp_path)
    assert summary["nmi"] == pytest.approx(1)
    assert sorted(max(mix.values()) for mix in summary["domains"]) == [40, 40, 40]
    for name in ("num_images", "num_clusters", "dim", "iterations", "seconds", "seed", "balance"):
        assert name in summary
    assert summary == json.loads((tmp_path / "clusters" / "summary.json").read_text())


def test_new_features_go_where_the_old_ones_are(tmp_path):
    rows = run_features(tmp_path / "features")
    clustered(tmp_path)
    centroids, mean = read_centroids(tmp_path / "clusters")
    labels, distances = assign_features(rows, centroids, mean=mean)
    brute = ((transform(rows, mean)[:, None] - centroids) ** 2).sum(axis=2)
    assert (labels == brute.argmin(axis=1)).all()
    np.testing.assert_allclose(distances, brute.min(axis=1), atol=1e-5)
    table = read_assignments(tmp_path / "clusters" / "assignments.parquet")
    assert list(table.values()) == labels.tolist()


def test_bare_features_are_compared_as_they_are_with_and_without_prices():
    draws = np.random.default_rng(0)
    rows = draws.standard_normal((200, 4)).astype(np.float32) + 1000
    centroids = draws.standard_normal((5, 4)) + 1000
    prices = draws.standard_normal(5) * 2
    brute = ((rows[:, None].astype(np.float64) - centroids) ** 2).sum(axis=2)
    labels, distances = assign_features(rows, centroids)
    assert (labels == brute.argmin(axis=1)).all()
    np.testing.assert_allclose(distances, brute.min(axis=1), rtol=1e-3)
    clusters = make_clusters(centroids, None, prices)
    augmented = torch.ones(200, 5)
    clusters.view.apply(torch.from_numpy(rows), augmented[:, :-1])
    labels, distances = clusters.assign(augmented)
    assert (labels == (brute - prices).argmin(axis=1)).all()
    np.testing.assert_allclose(distances, brute[np.arange(200), labels], rtol=1e-3)


def test_bare_features_have_file_and_row_as_key_and_no_mean(tmp_path):
    folder = tmp_path / "features"
    run_features(folder)
    for names in folder.glob("*.json"):
        names.unlink()
    clustered(tmp_path, subtract_mean=False)
    table = pq.read_table(tmp_path / "clusters" / "assignments.parquet")
    assert table["key"].to_pylist()[39:41] == ["s0.npy:39", "s1.npy:0"]
    assert table["shard"].to_pylist()[39] == "s0.npy"
    assert read_centroids(tmp_path / "clusters")[1] is None


def test_another_request_is_refused_unless_a_stage_says_what_it_is_made_from(tmp_path):
    run_features(tmp_path / "features")
    clustered(tmp_path)
    with pytest.raises(ConfigError, match="another request"):
        clustered(tmp_path, seed=2)
    assert clustered(tmp_path, seed=2, inputs={"features": "y"})["seed"] == 2


def other_order(features):
    rows = np.load(features / "s1.npy")
    np.save(features / "s1.npy", rows[::-1].copy())


def other_keys(features):
    keys = json.loads((features / "s1.keys.json").read_text())
    (features / "s1.keys.json").write_text(json.dumps(keys[::-1]))


def no_keys(features):
    (features / "s1.keys.json").unlink()


@pytest.mark.parametrize("change", [other_order, other_keys, no_keys])
def test_a_result_is_not_that_of_other_rows_or_keys(tmp_path, change):
    run_features(tmp_path / "features")
    first = clustered(tmp_path)
    assert clustered(tmp_path) == first
    change(tmp_path / "features")
    with pytest.raises(ConfigError, match="another request"):
        clustered(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["one"]', "holds 1 keys for 40 rows"),
        ('["one", "t', "is no readable list of keys"),
        (json.dumps({str(i): i for i in range(40)}), "must be a list of strings"),
        (json.dumps(list(range(40))), "must be a list of strings"),
        (json.dumps([f"k{i % 39}" for i in range(40)]), "holds the key k0 2 times"),
    ],
)
def test_unusable_keys_are_named_before_anything_is_computed(tmp_path, monkeypatch, text, message):
    run_features(tmp_path / "features")
    (tmp_path / "features" / "s1.keys.json").write_text(text)
    for name in ("scan_files", "kmeans"):
        monkeypatch.setattr(assign, name, None)
    with pytest.raises(ConfigError, match=rf"s1\.keys\.json: {message}"):
        clustered(tmp_path)


def test_two_files_may_have_the_same_key(tmp_path):
    run_features(tmp_path / "features")
    keys = (tmp_path / "features" / "s0.keys.json").read_text()
    (tmp_path / "features" / "s1.keys.json").write_text(keys)
    clustered(tmp_path)
    table = pq.read_table(tmp_path / "clusters" / "assignments.parquet")
    assert table["key"].to_pylist()[:40] == table["key"].to_pylist()[40:80]


LIMIT = float(np.sqrt(np.finfo(np.float32).max / 16))


@pytest.mark.parametrize("size", [1.01 * LIMIT, 1.5e19])
def test_rows_too_large_for_distances_in_float32_are_named(tmp_path, size):
    rows = run_features(tmp_path / "features").astype(np.float32)[:40]
    rows[7, 2] = size
    np.save(tmp_path / "features" / "s2.npy", rows)
    with pytest.raises(ConfigError, match=r"s2\.npy: row 7: .* above 2\.13e\+37, 1/16 of"):
        clustered(tmp_path, subtract_mean=False)


def test_rows_just_below_the_limit_are_clustered(tmp_path):
    rows = run_features(tmp_path / "features").astype(np.float32)[:40]
    rows[[7, 9], 2] = 0.99 * LIMIT, -0.99 * LIMIT
    np.save(tmp_path / "features" / "s2.npy", rows)
    assert clustered(tmp_path, subtract_mean=False)["size_max"] == 40


@pytest.mark.parametrize(("far", "is_warned"), [(10, False), (1e5, True)])
def test_a_range_beyond_the_digits_of_float32_is_warned_of(tmp_path, caplog, far, is_warned):
    rows = run_features(tmp_path / "features").astype(np.float32)[:40]
    rows[:20, 0] += far
    np.save(tmp_path / "features" / "s2.npy", rows)
    config = ClusterConfig(num_clusters=4, balance="off")
    folders = tmp_path / "features", tmp_path / "clusters"
    run_clustering(*folders, config, seed=1, subtract_mean=False)
    assert ("over so large a range" in caplog.text) == is_warned


def test_sha256_of_all_rows_follows_their_bytes_and_order_alone(tmp_path):
    rows = np.random.default_rng(0).standard_normal((20_000, 3)).astype(np.float32)

    def content(rows):
        np.save(tmp_path / "a.npy", rows)
        return scan_files(open_features(tmp_path)).content

    first, swapped = content(rows), rows.copy()
    swapped[[0, -1]] = rows[[-1, 0]]
    assert content(np.asfortranarray(rows)) == first
    assert content(swapped) != first


def test_agreement_with_domains_is_that_of_scikit_learn():
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 7, 500)
    domains = (labels + draws.integers(0, 3, 500)) % 5
    figures = domain_figures([f"{domain}/{i}" for i, domain in enumerate(domains)], labels, 8)
    assert figures["nmi"] == pytest.approx(normalized_mutual_info_score(domains, labels))
    for cluster, mix in enumerate(figures["domains"]):
        names, counts = np.unique(domains[labels == cluster], return_counts=True)
        assert mix == {str(name): count for name, count in zip(names, counts, strict=True)}
    assert len(figures["domains"]) == 8 and figures["domains"][7] == {}


def test_of_many_domains_the_most_frequent_are_listed(monkeypatch):
    keys = [f"{domain}/{i}" for domain in range(5) for i in range(domain + 1)]
    labels = np.arange(len(keys)) % 2
    whole = domain_figures(keys, labels, 2)
    monkeypatch.setattr("moce_dist.cluster.domains.MOST_DOMAINS", 2)
    few = domain_figures(keys, labels, 2)
    assert few["nmi"] == whole["nmi"]
    assert few["domains"] == [{d: mix[d] for d in ("4", "3")} for mix in whole["domains"]]


def test_keys_without_folders_have_no_domains():
    assert domain_figures(["a.npy:0", "a.npy:1"], np.array([0, 1]), 2) == {}


@pytest.mark.parametrize("name", ["assignments.parquet", "centroids.npy"])
def test_missing_or_broken_results_are_named(tmp_path, name):
    read = read_assignments if name.endswith("parquet") else lambda path: read_centroids(tmp_path)
    with pytest.raises(ConfigError, match=name):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(ConfigError, match=name):
        read(tmp_path / name)


def test_what_is_clustered_is_less_the_mean_and_of_length_one(tmp_path):
    rows = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float16) + 3
    for number, part in enumerate(np.array_split(rows, 3)):
        np.save(tmp_path / f"{number}.npy", part)
    mean = scan_files(open_features(tmp_path)).mean
    np.testing.assert_allclose(mean, rows.astype(np.float64).mean(axis=0), rtol=1e-12)
    centred = rows.astype(np.float64) - mean
    expected = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    view = View(mean.astype(np.float32), normalise=True)
    np.testing.assert_allclose(
        open_features(tmp_path).take(np.arange(50), view)[:, :-1], expected, atol=1e-5
    )
    out = torch.empty(1, 6)
    view.apply(torch.from_numpy(view.mean[None]), out)
    assert out.tolist() == [[0] * 6]
