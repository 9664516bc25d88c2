"""SIGKILL of a worker and of the driver: the same command finishes with the same bits."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

ROOT = Path(__file__).parents[3]
FILES = ("centroids.npy", "prices.npy", "assignments.parquet")
ITERATIONS = 40


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    draws = np.random.default_rng(0)
    centres = draws.standard_normal((48, 64))
    for number in range(3):
        rows = centres[draws.choice(48, 12_000)] + 2 * draws.standard_normal((12_000, 64))
        np.save(folder / f"{number}.npy", rows.astype(np.float16))
    return folder


def start(features, out, workers=2):
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    settings = {
        "cluster.block_rows": 1024,
        "cluster.iterations": ITERATIONS,
        "cluster.tolerance": 0.0,
        "parallel.num_workers": workers,
    }
    command = [sys.executable, "jobs/cluster.py", "--features", features, "--num-clusters", 32]
    command += ["--out", out, *(f"--set={name}={value}" for name, value in settings.items())]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return [int(number) for number in re.findall(r"k-means iteration (\d+):", errors)]


def iterations_on_disk(out):
    path = out / "state.npz"
    if not path.is_file():
        return 0
    with np.load(path) as state:
        return int(state["scalars"][0])


def wait_for_iteration(process, out, iteration):
    deadline = time.monotonic() + 300
    while iterations_on_disk(out) < iteration:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def expected(features, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    assert finish(start(features, out, workers=1)) == list(range(1, ITERATIONS + 1))
    return [(out / name).read_bytes() for name in FILES]


def workers_of(process):
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if child.cmdline()[0].startswith("ray::_Worker.do"):
                found.append(child)
        except (psutil.Error, IndexError):
            continue
    return found


@pytest.mark.long
def test_killed_worker_is_replaced(features, expected, tmp_path):
    out = tmp_path / "out"
    process = start(features, out)
    wait_for_iteration(process, out, 2)
    while not (found := workers_of(process)):
        assert process.poll() is None
    found[0].kill()
    assert finish(process) == list(range(1, ITERATIONS + 1))
    assert [(out / name).read_bytes() for name in FILES] == expected


@pytest.mark.long
def test_killed_driver_goes_on_from_its_last_iteration(features, expected, tmp_path):
    out = tmp_path / "out"
    process = start(features, out)
    wait_for_iteration(process, out, 3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = iterations_on_disk(out)
    assert 3 <= done < ITERATIONS
    assert finish(start(features, out)) == list(range(done + 1, ITERATIONS + 1))
    assert [(out / name).read_bytes() for name in FILES] == expected
