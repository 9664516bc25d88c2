"""A run directory with every file that a finished run has."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moce_dist.config import make_config
from moce_dist.report.page import write_report
from moce_dist.run.directory import open_run
from moce_dist.run.files import record_fault

DOMAINS = ("digits", "silhouettes", "satellite", "elevation", "relief", "brain")
LAYERS, EXPERTS, CLUSTERS, BATCH = 2, 4, 12, 64


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def metrics_line(step, *, start, rate):
    return {
        "step": step,
        "epoch": step // 50,
        "images_seen": (step + 1) * BATCH,
        "loss": start * math.exp(-step / 120) + 0.3,
        "loss_total": start * math.exp(-step / 120) + 0.31,
        "lr": 1e-3 * min(1, step / 20),
        "images_per_s": rate,
        "data_wait_s": 0.01,
    }


def moce_line(step, random):
    weights = random.dirichlet(np.full(EXPERTS, 4 + step / 10), LAYERS)
    experts = [random.multinomial(BATCH, w).tolist() for w in weights]
    return metrics_line(step, start=0.4, rate=310.0 + step % 7) | {
        "loss_balance": 0.2 * math.exp(-step / 60),
        "loss_confidence": 1.2 * math.exp(-step / 90),
        "images_per_expert": experts,
        "images_exchanged": int(20 * math.exp(-step / 50)),
        "images_exchanged_contiguous": BATCH * LAYERS // 2,
        "bytes_exchanged": 76_800,
    }


def write_clusters(folder, random):
    folder.mkdir(parents=True)
    cluster = np.repeat(np.arange(CLUSTERS), 50)
    domain = np.where(random.random(len(cluster)) < 0.9, cluster % 6, random.integers(6, size=600))
    table = {
        "key": [f"{DOMAINS[d]}/{i:06d}" for i, d in enumerate(domain)],
        "shard": ["000000.tar"] * len(cluster),
        "cluster": cluster.astype(np.int32),
        "distance": random.random(len(cluster), np.float32),
    }
    pq.write_table(pa.table(table), folder / "assignments.parquet")
    summary = {"num_images": len(cluster), "num_clusters": CLUSTERS, "size_min": 50, "size_max": 50}
    (folder / "summary.json").write_text(json.dumps(summary))
    np.save(folder / "centroids.npy", np.zeros((CLUSTERS, 8), np.float32))


def write_transfer(folder, task, metric, value):
    results = [
        {"backbone": b, "protocol": p, "seed": s, "value": value + gain, "num_train": 500}
        for b, gain in (("moce", 0.03), ("mae", 0.01), ("random", -0.3))
        for p in ("knn", "linear")
        for s in range(2)
    ]
    summary = [
        {"backbone": r["backbone"], "protocol": r["protocol"], "mean": r["value"], "std": 0.004}
        for r in results
        if r["seed"] == 0
    ]
    folder.mkdir(parents=True)
    document = {"task": task, "metric": metric, "results": results, "summary": summary}
    difference = {"backbone": "moce", "protocol": "knn", "reference": "mae"}
    document["differences"] = [{**difference, "mean": 0.02, "std": 0.001}]
    (folder / "metrics.json").write_text(json.dumps(document))


def write_control(root):
    """Give a run a control, and the figures of its tasks differences to it."""
    steps = range(0, 300, 5)
    lines = [metrics_line(s, start=0.4, rate=400) for s in steps]
    write_lines(root / "control" / "metrics.jsonl", lines)
    (root / "control" / "holdout.json").write_text('{"loss": 0.4001, "images": 60}')
    for path in (root / "transfer").glob("*/metrics.json"):
        document = json.loads(path.read_text())
        for row in document["summary"]:
            if row["backbone"] == "mae":
                row["steps_fewer"] = 60
        difference = {"backbone": "moce", "protocol": "knn", "reference": "control"}
        document["differences"] = [{**difference, "mean": 0.01, "std": 0.001}]
        path.write_text(json.dumps(document))


def build_finished(folder):
    random = np.random.default_rng(0)
    run = open_run(folder / "quickstart", make_config({"seed": 3, "moe": {"num_experts": 4}}))
    steps = range(0, 300, 5)
    write_lines(
        run.stage("mae") / "metrics.jsonl", [metrics_line(s, start=0.7, rate=400) for s in steps]
    )
    write_lines(run.stage("moce") / "metrics.jsonl", [moce_line(s, random) for s in steps])
    (run.stage("mae") / "holdout.json").write_text('{"loss": 0.4211, "images": 60}')
    (run.stage("moce") / "holdout.json").write_text('{"loss": 0.3987, "images": 60}')
    table = random.integers(EXPERTS, size=(LAYERS, CLUSTERS))
    for step in range(0, 300, 100):
        path = run.stage("moce") / "routing" / f"step_{step}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(table.tolist()))
        table = table.copy()
        table[0, : 3 - step // 100] = (table[0, : 3 - step // 100] + 1) % EXPERTS
    write_clusters(run.clusters, random)
    write_transfer(run.transfer("digits"), "digits", "accuracy", 0.9)
    write_transfer(run.transfer("climate"), "climate", "accuracy", 0.7)
    checkpoint = run.stage("moce") / "checkpoints" / "step_00000300"
    checkpoint.mkdir(parents=True)
    (checkpoint / "rank.bin").write_bytes(bytes(3000))
    record_fault(run.faults, shard="000002.tar", key="relief/7", reason="image is empty")
    record_fault(run.faults, shard="<b>.tar", key=None, reason="truncated <script>alert(1)")
    return run.root


@pytest.fixture
def finished(tmp_path):
    return build_finished(tmp_path)


@pytest.fixture(scope="session")
def rendered(tmp_path_factory):
    return write_report(build_finished(tmp_path_factory.mktemp("rendered")))
