"""Law 5: the same bits on 1, 2 and 4 workers; exact sizes differ by at most one."""

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
from ranks import preloaded

from moce_dist.cluster.assign import run_clustering
from moce_dist.cluster.assignments import read_assignments
from moce_dist.config import ClusterConfig
from moce_dist.run.tasks import Workers
from moce_dist.settings import ConfigError

FILES = ("centroids.npy", "assignments.parquet", "prices.npy")


def mixture(folder, sizes, *, dim=12, files=3, seed=0):
    """Unequal Gaussian clusters in shuffled rows over several files."""
    draws = np.random.default_rng(seed)
    centres = draws.standard_normal((len(sizes), dim)) * 3
    rows = np.repeat(centres, sizes, axis=0) + draws.standard_normal((sum(sizes), dim))
    rows = draws.permutation(rows).astype(np.float32)
    folder.mkdir()
    for number, part in enumerate(np.array_split(rows, files)):
        np.save(folder / f"part-{number}.npy", part)
    return rows


def config(**more):
    return ClusterConfig(**{"num_clusters": 6, "block_rows": 128, "iterations": 12, **more})


def on(pool):
    def map_blocks(function, shared, items):
        return pool.map(partial(function, shared), items)

    return Workers(map_blocks)


def run(folder, out, cluster, **more):
    return run_clustering(folder, out, cluster, seed=3, subtract_mean=False, **more)


@pytest.mark.parametrize(
    ("balance", "border_rows"), [("exact", 2**20), ("exact", 1), ("off", 2**20)]
)
def test_same_bits_on_1_2_and_4_workers(tmp_path, balance, border_rows):
    # of 1,500 rows the driver holds the fewest that it may in the second case, 64 for each cluster
    chosen = config(balance=balance, border_rows=border_rows)
    mixture(tmp_path / "features", [900, 300, 200, 50, 30, 20])
    run(tmp_path / "features", tmp_path / "here", chosen)
    context = preloaded()
    for workers in (2, 4):
        out = tmp_path / str(workers)
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            run(tmp_path / "features", out, chosen, workers=on(pool))
        for name in FILES[: 3 if balance == "exact" else 2]:
            assert (out / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name


@pytest.mark.parametrize("sizes", [[900, 300, 200, 50, 30, 20], [1000, 1, 1, 1, 1, 1]])
def test_exact_sizes_differ_by_at_most_one(tmp_path, sizes):
    rows = mixture(tmp_path / "features", sizes)
    summary = run(tmp_path / "features", tmp_path / "out", config())
    clusters = read_assignments(tmp_path / "out" / "assignments.parquet")
    counts = np.bincount(list(clusters.values()), minlength=6)
    assert counts.max() - counts.min() <= 1 and counts.sum() == len(rows)
    assert (summary["size_min"], summary["size_max"]) == (counts.min(), counts.max())


def test_summary_holds_against_an_independent_computation(tmp_path):
    rows = mixture(tmp_path / "features", [300, 100, 60])
    summary = run(tmp_path / "features", tmp_path / "out", config(num_clusters=3))
    labels = pq.read_table(tmp_path / "out" / "assignments.parquet")["cluster"].to_numpy()
    centroids = np.load(tmp_path / "out" / "centroids.npy")
    for cluster in range(3):
        mean = rows[labels == cluster].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(centroids[cluster], mean, atol=1e-5)
    expected = ((rows - centroids[labels]) ** 2).sum(axis=1).mean()
    assert summary["mean_squared_distance"] == pytest.approx(expected, rel=1e-5)


def test_interrupted_run_ends_with_the_same_bits(tmp_path):
    mixture(tmp_path / "features", [900, 300, 200, 50, 30, 20])
    run(tmp_path / "features", tmp_path / "whole", config())
    calls = 0

    def failing(function, shared, items):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise InterruptedError
        return map(partial(function, shared), items)

    with pytest.raises(InterruptedError):
        run(tmp_path / "features", tmp_path / "parts", config(), workers=Workers(failing))
    assert not (tmp_path / "parts" / "COMPLETE").exists()
    run(tmp_path / "features", tmp_path / "parts", config())
    for name in FILES:
        content = (tmp_path / "parts" / name).read_bytes()
        assert content == (tmp_path / "whole" / name).read_bytes(), name


def test_masses_of_one_point_end_and_stay_exact(tmp_path):
    (tmp_path / "features").mkdir()
    rows = np.zeros((600, 4), np.float32)
    rows[:50] = np.random.default_rng(0).standard_normal((50, 4))
    np.save(tmp_path / "features" / "a.npy", rows)
    summary = run(tmp_path / "features", tmp_path / "out", config())
    assert summary["size_max"] - summary["size_min"] <= 1


def planted(folder, change):
    draws = np.random.default_rng(0)
    folder.mkdir()
    for name in ("a.npy", "b.npy"):
        np.save(folder / name, draws.standard_normal((40, 4)).astype(np.float32))
    change(folder)


def not_a_number(folder):
    rows = np.load(folder / "b.npy")
    rows[17, 2] = np.nan
    np.save(folder / "b.npy", rows)


def other_width(folder):
    np.save(folder / "b.npy", np.zeros((5, 3), np.float32))


def truncated(folder):
    content = (folder / "b.npy").read_bytes()
    (folder / "b.npy").write_bytes(content[: len(content) // 2])


def pickled(folder):
    np.save(folder / "b.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


def of_another_order(folder):
    np.save(folder / "b.npy", np.zeros((5, 4), ">f4"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (not_a_number, r"b\.npy.*17"),
        (other_width, r"b\.npy"),
        (truncated, r"b\.npy"),
        (pickled, r"b\.npy"),
        (of_another_order, r"b\.npy: holds >f4"),
    ],
)
def test_bad_features_are_refused_by_name(tmp_path, change, message):
    planted(tmp_path / "features", change)
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "features", tmp_path / "out", config(num_clusters=2))
    assert not (tmp_path / "out" / "COMPLETE").exists()


def test_more_clusters_than_points_is_refused(tmp_path):
    mixture(tmp_path / "features", [3, 2])
    with pytest.raises(ConfigError, match=r"num_clusters \(6\).*\(5\)"):
        run(tmp_path / "features", tmp_path / "out", config())


def test_finished_result_is_left_as_it_is(tmp_path):
    mixture(tmp_path / "features", [90, 30])
    run(tmp_path / "features", tmp_path / "out", config(num_clusters=2))
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    run(tmp_path / "features", tmp_path / "out", config(num_clusters=2))
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["num_images"] == 120
