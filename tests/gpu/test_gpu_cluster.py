"""Clustering on a GPU: as on the CPU but for rounding, the same bits every time, exact sizes."""

import numpy as np
import pytest
import torch

from moce_dist.cluster.assign import run_clustering
from moce_dist.cluster.assignments import read_assignments
from moce_dist.cluster.blocks import View, open_features, read_block, residents
from moce_dist.cluster.nearest import make_base, search
from moce_dist.cluster.sweeps import add_rows
from moce_dist.config import ClusterConfig
from moce_dist.run.tasks import HERE, Workers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    draws = np.random.default_rng(0)
    centres = draws.standard_normal((24, 32))
    for name in ("a", "b"):
        rows = centres[draws.choice(24, 5001)] + draws.standard_normal((5001, 32))
        np.save(folder / f"{name}.npy", rows.astype(np.float16))
    return folder


def test_search_and_sums_are_those_of_the_cpu(features):
    files = open_features(features)
    view = View(np.full(32, 0.1, np.float32), normalise=True)
    block = files.blocks(4096)[0]
    here, there = read_block(block, view), read_block(block, view, "cuda")
    torch.testing.assert_close(there.cpu(), here)
    again = read_block(block, view, "cuda")
    assert torch.equal(there, again) and len(residents()) >= 1
    centroids = np.random.default_rng(1).standard_normal((16, 32))
    base = torch.from_numpy(make_base(centroids, np.zeros(16)))
    found = search(here, base, num=4), search(there, base.cuda(), num=4)
    torch.testing.assert_close(found[1].priced.cpu(), found[0].priced, rtol=1e-4, atol=1e-4)
    sums = [torch.zeros(16, 33, dtype=torch.float64, device=rows.device) for rows in (here, there)]
    for total, rows in zip(sums, (here, there), strict=True):
        add_rows(total, rows, found[0].ids[:, 0].to(rows.device))
    torch.testing.assert_close(sums[1].cpu(), sums[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("border_rows", [2**20, 2000])
def test_clusters_are_exact_alike_and_as_good_as_on_the_cpu(features, tmp_path, border_rows):
    config = ClusterConfig(
        num_clusters=20, iterations=8, tolerance=0, block_rows=1024, border_rows=border_rows
    )
    costs = {}
    for name, workers in (("cpu", HERE), ("gpu", HERE._replace(device="cuda")), ("again", None)):
        summary = run_clustering(
            features,
            tmp_path / name,
            config,
            seed=0,
            subtract_mean=False,
            workers=workers or Workers(device="cuda"),
        )
        costs[name] = summary["mean_squared_distance"]
        assert summary["size_max"] - summary["size_min"] <= 1
    assert costs["gpu"] == pytest.approx(costs["cpu"], rel=0.01)
    gpu, again = (read_assignments(tmp_path / n / "assignments.parquet") for n in ("gpu", "again"))
    assert gpu == again
