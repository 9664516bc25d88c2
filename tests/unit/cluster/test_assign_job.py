"""jobs/cluster.py --assign-to: new features and clusters that are there, as a user asks for it."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from in_process import load_script, run_here

from moce_dist.cluster.assign import run_clustering
from moce_dist.config import ClusterConfig
from moce_dist.settings import ConfigError

ROOT = Path(__file__).parents[3]
main = load_script(ROOT / "jobs" / "cluster.py").main


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No running Ray cluster, whatever stands in the environment."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def old(tmp_path):
    """Clusters of 202 rows, under their prices 50 or 51 each."""
    folder = tmp_path / "features"
    save(folder, seed=0)
    config = ClusterConfig(num_clusters=4)
    run_clustering(folder, tmp_path / "old", config, seed=0, subtract_mean=False)
    return tmp_path / "old"


def save(folder, *, seed, rows=101, dim=5):
    folder.mkdir()
    draws = np.random.default_rng(seed)
    for name in ("a", "b"):
        np.save(folder / f"{name}.npy", draws.standard_normal((rows, dim)).astype(np.float16))
    return folder


def ask(new, old, out, *more):
    main([str(x) for x in ("--features", new, "--assign-to", old, "--out", out, *more)])


@pytest.mark.parametrize("more", [(), ("--prices",)])
def test_new_features_get_the_clusters_of_an_earlier_request(tmp_path, old, capsys, more):
    new, out = save(tmp_path / "new", seed=1, rows=40), tmp_path / "out"
    ask(new, old, out, *more, "--dry-run")
    plan = capsys.readouterr().out
    how = "under their prices" if more else "to the nearest centroid"
    assert f"clusters   4 of {old}, {how}; rows are taken as they are" in plan
    assert "80 rows of width 5 in 2 files" in plan and not out.exists()
    ask(new, old, out, *more)
    assert "balance                  assigned" in capsys.readouterr().out
    rows = np.concatenate([np.load(new / f"{name}.npy") for name in "ab"]).astype(np.float64)
    squares = np.square(rows[:, None] - np.load(old / "centroids.npy")).sum(axis=2)
    prices = np.load(old / "prices.npy") if more else 0
    table = pq.read_table(out / "assignments.parquet")
    assert table["cluster"].to_pylist() == (squares - prices).argmin(axis=1).tolist()
    assert table["key"].to_pylist()[39:41] == ["a.npy:39", "b.npy:0"]
    assert json.loads((out / "summary.json").read_text())["prices"] == bool(more)


def test_fresh_sets_another_result_aside(tmp_path, old):
    new, out = save(tmp_path / "new", seed=1), tmp_path / "out"
    ask(new, old, out)
    with pytest.raises(ConfigError, match="another request"):
        ask(new, old, out, "--prices")
    ask(new, old, out, "--prices", "--fresh")
    (aside,) = tmp_path.glob("out.before-*")
    assert (aside / "COMPLETE").is_file() and (out / "COMPLETE").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-clusters", "4"), "--num-clusters: the clusters of --assign-to stay"),
        (("--balance", "off"), "--balance: the clusters of --assign-to stay"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(tmp_path, old, flags, message):
    with pytest.raises(ConfigError, match=message):
        ask(save(tmp_path / "new", seed=1), old, tmp_path / "out", *flags)


def test_flags_that_do_not_go_together_are_refused(tmp_path, old):
    features = str(tmp_path / "features")
    with pytest.raises(ConfigError, match="--prices: is of --assign-to only"):
        main(["--features", features, "--out", str(tmp_path / "out"), "--prices"])
    with pytest.raises(ConfigError, match=r"--assign-to: is of --features; .*base_run"):
        main(["--run", str(tmp_path / "run"), "--assign-to", str(old)])
    with pytest.raises(ConfigError, match="holds what --assign-to names"):
        ask(features, old, old)
    # with --fresh they would be set aside before they are read
    for out in (features, tmp_path):
        with pytest.raises(ConfigError, match="holds what --features names"):
            main(["--features", features, "--num-clusters", "2", "--out", str(out), "--fresh"])
    with pytest.raises(ConfigError, match=r"--out .*b\.npy: is a file"):
        ask(features, old, tmp_path / "features" / "b.npy")


@pytest.mark.parametrize(
    ("name", "dim", "parts"),
    [
        ("old", 4, ["a.npy", "has width 4", "the centroids have 5"]),
        ("features", 5, ["features", "holds no finished clustering"]),
        ("nothing", 5, ["nothing", "no such folder of clusters"]),
    ],
)
def test_wrong_request_is_status_2_in_one_line(tmp_path, old, name, dim, parts):
    new, out = save(tmp_path / "new", seed=1, dim=dim), tmp_path / "out"
    words = ["--features", new, "--assign-to", old.parent / name, "--out", out]
    done = run_here("cluster", *words)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    for part in parts:
        assert part in done.stderr
    assert not out.exists()
