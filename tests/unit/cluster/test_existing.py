"""New features and clusters that are there: nearest ones, in blocks, the same bits everywhere."""

import json
import multiprocessing
import shutil
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
from mixtures import transform

from moce_dist.cluster import assignments
from moce_dist.cluster.assign import run_clustering
from moce_dist.cluster.assignments import read_assignments
from moce_dist.cluster.existing import (
    assign_files,
    assign_folder,
    assign_table,
    open_new_features,
    read_clusters,
)
from moce_dist.config import ClusterConfig
from moce_dist.run.artefacts import (
    is_complete,
    mark_complete,
    read_marker,
)
from moce_dist.run.tasks import Workers
from moce_dist.settings import ConfigError

K, D = 5, 6


def mixture(seed, sizes=(2000, 300, 150, 100, 50)):
    """Unequal Gaussian clusters far from the origin, in shuffled rows."""
    centres = np.random.default_rng(7).standard_normal((len(sizes), D)) * 3 + 10
    draws = np.random.default_rng(seed)
    rows = np.repeat(centres, sizes, axis=0) + draws.standard_normal((sum(sizes), D))
    return draws.permutation(rows).astype(np.float16)


def save(folder, rows, files=3, *, named=True):
    folder.mkdir(parents=True)
    for number, part in enumerate(np.array_split(rows, files)):
        np.save(folder / f"s{number}.npy", part)
        if named:
            keys = [f"domain{row % 2}/{number}-{row}" for row in range(len(part))]
            (folder / f"s{number}.keys.json").write_text(json.dumps(keys))
    return folder


@pytest.fixture(scope="module", params=["run", "bare", "spherical"])
def clusters(request, tmp_path_factory):
    """Balanced clusters of the features of a run, of bare ones, and of directions."""
    root = tmp_path_factory.mktemp(request.param)
    config = ClusterConfig(
        num_clusters=K, block_rows=64, iterations=8, spherical=request.param == "spherical"
    )
    out, is_run = root / "clusters", request.param == "run"
    run_clustering(
        save(root / "old", mixture(0)), out, config, seed=1, subtract_mean=is_run, inputs={"of": 1}
    )
    return out


def brute_force(rows, clusters, *, with_prices):
    """Cluster and squared distance of every row, by all differences in float64."""
    centroids, mean = np.load(clusters / "centroids.npy"), clusters / "mean.npy"
    seen = transform(rows, np.load(mean)) if mean.is_file() else rows
    squares = np.square(seen[:, None].astype(np.float64) - centroids).sum(axis=2)
    prices = np.load(clusters / "prices.npy") if with_prices else np.zeros(K)
    labels = (squares - prices).argmin(axis=1)
    return labels, squares[np.arange(len(rows)), labels]


@pytest.mark.parametrize("with_prices", [False, True])
def test_every_row_goes_where_brute_force_sends_it(tmp_path, clusters, with_prices):
    rows, out = mixture(1), tmp_path / "out"
    labels, distances = brute_force(rows, clusters, with_prices=with_prices)
    summary = assign_folder(
        save(tmp_path / "new", rows), clusters, out, block_rows=64, with_prices=with_prices
    )
    table = pq.read_table(out / "assignments.parquet")
    assert table.column_names == ["key", "shard", "cluster", "distance"]
    assert table["cluster"].to_numpy().tolist() == labels.tolist()
    np.testing.assert_allclose(table["distance"].to_numpy(), distances, rtol=1e-4, atol=1e-6)
    assert read_assignments(out / "assignments.parquet")["domain1/1-1"] == labels[868]
    sizes = np.bincount(labels, minlength=K)
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["mean_squared_distance"] == pytest.approx(distances.mean(), rel=1e-4)
    expected = {
        "num_images": 2600, "num_clusters": K, "dim": D, "size_min": sizes.min(),
        "size_max": sizes.max(), "balance": "assigned", "prices": with_prices,
    }  # fmt: skip
    assert {name: summary[name] for name in expected} == expected
    for name in ("centroids.npy", "mean.npy", "prices.npy"):
        there = [(f / name).read_bytes() for f in (clusters, out) if (f / name).is_file()]
        assert len(there) in (0, 2) and len(set(there)) <= 1
    assert is_complete(out, read_marker(out)["inputs"])
    assert "summary.json" in read_marker(out)["files"]


def test_prices_keep_the_sizes_of_like_data_near_balance(tmp_path, clusters):
    features = save(tmp_path / "new", mixture(2))
    nearest, priced = (
        assign_folder(features, clusters, tmp_path / str(p), block_rows=64, with_prices=p)
        for p in (False, True)
    )
    # exact balance would be 520 of each; the draws differ
    assert priced["size_max"] <= 1.15 * 520 and priced["size_min"] >= 0.85 * 520
    spread = [summary["size_max"] - summary["size_min"] for summary in (nearest, priced)]
    assert spread[0] > 2 * spread[1]


@pytest.fixture(scope="module")
def two_workers():
    """Two processes as who computes on blocks."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield Workers(lambda function, shared, items: pool.map(partial(function, shared), items))


def test_same_bits_on_1_and_2_workers(tmp_path, clusters, two_workers):
    features = save(tmp_path / "new", mixture(3))
    run = partial(assign_folder, features, clusters, block_rows=128, with_prices=True)
    run(tmp_path / "one")
    run(tmp_path / "two", workers=two_workers)
    one, two = ((tmp_path / n / "assignments.parquet").read_bytes() for n in ("one", "two"))
    assert one == two
    # and the same request
    assert read_marker(tmp_path / "one")["inputs"] == read_marker(tmp_path / "two")["inputs"]


def test_a_table_alone_is_that_of_the_folder_on_any_number_of_workers(
    tmp_path, clusters, two_workers
):
    features = save(tmp_path / "new", mixture(5))
    assign_folder(features, clusters, tmp_path / "whole", block_rows=128)
    expected = (tmp_path / "whole" / "assignments.parquet").read_bytes()
    for number, workers in enumerate((Workers(), two_workers)):
        table = tmp_path / str(number) / "assignments.parquet"
        assign_table(features, clusters, table, block_rows=128, workers=workers)
        assert table.read_bytes() == expected and list(table.parent.iterdir()) == [table]


def test_features_are_never_in_memory_together(tmp_path):
    rows = np.random.default_rng(0).standard_normal((60_000, 64)).astype(np.float32)
    features = save(tmp_path / "new", rows, named=False)
    out = tmp_path / "clusters"
    out.mkdir()
    np.save(out / "centroids.npy", rows[:4])
    mark_complete(out, {}, [out / "centroids.npy"])
    clusters = read_clusters(out)
    files = open_new_features(features, clusters)
    tracemalloc.start()
    done = assign_files(files, clusters, block_rows=1024)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert done.labels[:4].tolist() == [0, 1, 2, 3]
    # label and distance of a row take 16 bytes, its features 256
    assert peak < 16 * len(rows) + rows.nbytes / 8


def test_table_is_the_same_in_parts(tmp_path, clusters, monkeypatch):
    features = save(tmp_path / "new", mixture(4))
    write = partial(assign_folder, features, clusters, block_rows=64)
    write(tmp_path / "whole")
    monkeypatch.setattr(assignments, "_TABLE_ROWS", 700)
    write(tmp_path / "parts")
    whole, parts = (
        pq.read_table(tmp_path / name / "assignments.parquet").to_pydict()
        for name in ("whole", "parts")
    )
    assert whole == parts and len(whole["key"]) == 2600


def test_a_finished_request_is_left_and_another_one_refused(tmp_path, clusters):
    features, out = save(tmp_path / "new", mixture(5)), tmp_path / "out"
    first = assign_folder(features, clusters, out, block_rows=64)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert assign_folder(features, clusters, out, block_rows=64) == first
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    with pytest.raises(ConfigError, match="another request"):
        assign_folder(features, clusters, out, block_rows=64, with_prices=True)
    given = {"features": "x"}
    again = assign_folder(features, clusters, out, block_rows=64, with_prices=True, inputs=given)
    assert again["prices"] and is_complete(out, given)
    with pytest.raises(ConfigError, match="the clusters themselves"):
        assign_folder(features, clusters, clusters, block_rows=64)


def other_order(features):
    np.save(features / "s1.npy", np.load(features / "s1.npy")[::-1].copy())


def other_keys(features):
    keys = json.loads((features / "s1.keys.json").read_text())
    (features / "s1.keys.json").write_text(json.dumps(keys[::-1]))


@pytest.mark.parametrize("change", [other_order, other_keys])
def test_a_result_is_not_that_of_other_rows_or_keys(tmp_path, clusters, change):
    features, out = save(tmp_path / "new", mixture(5)), tmp_path / "out"
    assign_folder(features, clusters, out, block_rows=64)
    change(features)
    with pytest.raises(ConfigError, match=r"another request, made with moce_dist \d+\.\d+"):
        assign_folder(features, clusters, out, block_rows=64)


def not_a_number(new, _):
    rows = np.load(new / "s1.npy")
    rows[17, 2] = np.nan
    np.save(new / "s1.npy", rows)


def a_key_twice(new, _):
    keys = json.loads((new / "s1.keys.json").read_text())
    (new / "s1.keys.json").write_text(json.dumps([*keys[:-1], keys[4]]))


def other_width(new, _):
    for path in new.glob("*.npy"):
        np.save(path, np.load(path)[:, :4])


def truncated(new, _):
    content = (new / "s1.npy").read_bytes()
    (new / "s1.npy").write_bytes(content[: len(content) // 2])


def without_rows(new, _):
    for path in new.glob("s*"):
        path.unlink()
    np.save(new / "empty.npy", np.zeros((0, D), np.float32))


def without_centroids(_, clusters):
    (clusters / "centroids.npy").unlink()


def without_marker(_, clusters):
    (clusters / "COMPLETE").unlink()


def without_prices(_, clusters):
    (clusters / "prices.npy").unlink()


def flat_centroids(_, clusters):
    np.save(clusters / "centroids.npy", np.zeros(D, np.float32))


def other_mean(_, clusters):
    np.save(clusters / "mean.npy", np.zeros(D + 1, np.float32))


def other_prices(_, clusters):
    np.save(clusters / "prices.npy", np.full(K, np.nan))


def without_direction(new, clusters):
    np.save(clusters / "mean.npy", np.zeros(D, np.float32))
    rows = np.load(new / "s2.npy")
    rows[3] = 0
    np.save(new / "s2.npy", rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (not_a_number, r"s1\.npy: row 17: NaN"),
        (a_key_twice, r"s1\.keys\.json: holds the key domain0/1-4 2 times"),
        (other_width, r"s0\.npy: has width 4, the centroids have 6"),
        (truncated, r"s1\.npy: is not a readable"),
        (without_rows, r"new: holds no rows"),
        (without_centroids, r"centroids\.npy: is not readable"),
        (without_marker, r"clusters: holds no finished clustering"),
        (without_prices, r"prices\.npy: is missing; .*balance off"),
        (flat_centroids, r"centroids\.npy: holds float32 \(6,\).*\(any, any\)"),
        (other_mean, r"mean\.npy: holds float32 \(7,\).*\(6\)"),
        (other_prices, r"prices\.npy: holds float64 \(5,\), must be finite"),
        (without_direction, r"s2\.npy: row 3: is zero"),
    ],
)
def test_bad_input_is_refused_by_name_and_nothing_written(tmp_path, change, message):
    new, clusters = save(tmp_path / "new", mixture(6)), tmp_path / "clusters"
    config = ClusterConfig(num_clusters=K, iterations=2)
    run_clustering(save(tmp_path / "old", mixture(0)), clusters, config, seed=1, subtract_mean=True)
    change(new, clusters)
    with pytest.raises(ConfigError, match=message):
        assign_folder(new, clusters, tmp_path / "out", block_rows=64, with_prices=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["centroids.npy", "mean.npy", "prices.npy"])
@pytest.mark.parametrize("content", [b"", b"damaged"])
def test_damaged_files_of_clusters_are_named(tmp_path, clusters, name, content):
    copy = tmp_path / "clusters"
    shutil.copytree(clusters, copy)
    (copy / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name}: is not readable"):
        read_clusters(copy, with_prices=True)
