"""jobs/cluster.py as a user starts it: results, exit status, one line of error, nothing written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from in_process import run_here

from moce_dist.config import load_config
from moce_dist.run.directory import open_run

ROOT = Path(__file__).parents[3]


def start(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, "jobs/cluster.py", *map(str, arguments)],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def features(tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for name in ("a", "b"):
        np.save(folder / f"{name}.npy", draws.standard_normal((101, 5)).astype(np.float16))
    return folder


def test_folder_of_features_ends_in_balanced_clusters(features, tmp_path):
    out = tmp_path / "out"
    done = start("--features", features, "--num-clusters", 4, "--out", out)
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["size_min"], summary["size_max"], summary["balance"]) == (50, 51, "exact")
    assert np.load(out / "centroids.npy").shape == (4, 5)
    assert (out / "assignments.parquet").is_file() and (out / "COMPLETE").is_file()
    again = start("--features", features, "--num-clusters", 4, "--balance", "off", "--out", out)
    assert again.returncode == 2 and "another request" in again.stderr
    fresh = start(
        "--features", features, "--num-clusters", 4, "--balance", "off", "--out", out, "--fresh"
    )
    assert fresh.returncode == 0, fresh.stderr
    assert json.loads((out / "summary.json").read_text())["balance"] == "off"


def with_nan(folder):
    rows = np.load(folder / "b.npy")
    rows[[70, 90], 1] = np.inf, np.nan
    np.save(folder / "b.npy", rows)


def with_other_type(folder):
    np.save(folder / "b.npy", np.zeros((3, 5), np.int64))


def without_files(folder):
    for path in folder.iterdir():
        path.unlink()


def without_folder(folder):
    without_files(folder)
    folder.rmdir()


@pytest.mark.parametrize(
    ("change", "clusters", "parts"),
    [
        (with_nan, 4, ["b.npy", "row 70", "infinity"]),
        (with_other_type, 4, ["b.npy", "int64", "float16 or float32"]),
        (without_files, 4, ["features", "holds no .npy file"]),
        (without_folder, 4, ["features", "no such folder"]),
        (None, 0, ["cluster.num_clusters = 0"]),
        (None, 203, ["cluster.num_clusters (203)", "(202)"]),
    ],
)
def test_wrong_request_is_status_2_and_writes_nothing(features, tmp_path, change, clusters, parts):
    if change is not None:
        change(features)
    out = tmp_path / "out"
    done = run_here("cluster", "--features", features, "--num-clusters", clusters, "--out", out)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    for part in parts:
        assert part in done.stderr
    assert not out.exists()


def test_dry_run_shows_the_plan_and_writes_nothing(features, tmp_path):
    out = tmp_path / "out"
    done = run_here(
        "cluster", "--features", features, "--num-clusters", 4, "--out", out, "--dry-run"
    )
    assert done.returncode == 0
    assert "202 rows of width 5 in 2 files" in done.stdout and "50.5 rows" in done.stdout
    assert not out.exists()


def test_dry_run_names_keys_that_cannot_be_used(features, tmp_path):
    (features / "b.keys.json").write_text('["a", "b')
    flags = ("--features", features, "--num-clusters", 4, "--out", tmp_path / "out", "--dry-run")
    done = run_here("cluster", *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "b.keys.json: is no readable" in done.stderr


def test_run_keeps_its_configuration_and_refuses_another_one(tmp_path):
    config = load_config(None, ["cluster.num_clusters=8", "data.source=folder:/images"])
    open_run(tmp_path / "run", config)
    plan = run_here(
        "cluster", "--run", tmp_path / "run", "--set", "parallel.num_workers=2", "--dry-run"
    )
    assert plan.returncode == 0, plan.stderr
    assert "clusters   8," in plan.stdout and "workers    2" in plan.stdout
    other = run_here("cluster", "--run", tmp_path / "run", "--num-clusters", 9)
    assert other.returncode == 2 and "cluster.num_clusters: 8 -> 9" in other.stderr
    fresh = run_here("cluster", "--run", tmp_path / "run", "--fresh")
    assert fresh.returncode == 2 and "--fresh" in fresh.stderr
    missing = run_here("cluster", "--run", tmp_path / "nothing")
    assert missing.returncode == 2 and "not a run directory" in missing.stderr


def test_run_of_an_earlier_version_is_read_as_it_was_made(tmp_path):
    root = tmp_path / "run"
    open_run(root, load_config(None, ["moe.shared_base=false", "data.source=folder:/images"]))
    path = root / "config.yaml"
    before = "".join(line for line in path.open() if "shared_base" not in line)
    path.write_text(f"{before}bench: {{rounds: 3}}\n")
    plan = run_here("cluster", "--run", root, "--dry-run")
    assert plan.returncode == 0, plan.stderr
    other = run_here("cluster", "--run", root, "--num-clusters", 9)
    assert "cluster.num_clusters: 256 -> 9" in other.stderr
    assert "shared_base" not in other.stderr
