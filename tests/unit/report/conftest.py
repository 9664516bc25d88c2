"""A run directory with every file that a finished run has."""

import io
import json
import math
import tarfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from moce_dist.config import make_config
from moce_dist.data.shards import scan_shard, write_index
from moce_dist.model.gate import fixed_weight, standardise
from moce_dist.model.moce import experts_from_dense
from moce_dist.report.page import write_report
from moce_dist.run.directory import open_run
from moce_dist.run.files import record_fault
from moce_dist.train.checkpoint import FORMAT, step_folder, write_weights
from moce_dist.train.pretrained import initial_weights
from moce_dist.train.saver import publish, write_tensors

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
    mixes = [Counter(DOMAINS[d] for d in domain[cluster == c]) for c in range(CLUSTERS)]
    summary = {"num_images": len(cluster), "num_clusters": CLUSTERS, "size_min": 50, "size_max": 50}
    summary |= {"domains": mixes, "seconds": 12.0}
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


def write_gate(folder, step, random):
    (folder / "gate").mkdir(exist_ok=True)
    chosen = 0.4 + step / 600 + 0.1 * random.random((LAYERS, CLUSTERS))
    document = {"chosen": chosen.tolist(), "runner_up": ((1 - chosen) / 2).tolist()}
    (folder / "gate" / f"step_{step}.json").write_text(json.dumps(document))


def write_placement(folder, step):
    """Two groups: even clusters are read by one, odd ones by the other, the last by both."""
    traffic = {"images": 600, "bytes_exchanged": 0, "images_per_group": [300, 300]}
    cluster = [*range(CLUSTERS), CLUSTERS - 1]
    shares = {
        "cluster": cluster,
        "group": [c % 2 for c in cluster[:-1]] + [0],
        "share": [1.0] * (CLUSTERS - 1) + [0.5, 0.5],
    }
    document = {
        "step": step,
        "expert_group": [[0, 0, 1, 1], [0, 1, 0, 1]],
        "shape": [LAYERS, EXPERTS, CLUSTERS, 2],
        "shares": shares,
        "predicted_per_epoch": traffic
        | {"local_fraction": 0.9, "images_exchanged": 120.0, "images_exchanged_contiguous": 600.0},
        "measured_in_interval": traffic | {"local_fraction": 0.875, "images_exchanged": 150.0}
        if step < 200
        else None,
        "experts_moved": 0,
    }
    (folder / "placement").mkdir(exist_ok=True)
    (folder / "placement" / f"step_{step}.json").write_text(json.dumps(document))


def write_choice(folder):
    """The choice of two layers: one sure, one not."""
    layers = [
        {"layer": i, "block": b, "expert": 2, "mass": m, "runner_up": 0, "runner_up_mass": r}
        | {"masses": [r, 0.0, m, round(1 - m - r, 6)]}
        for i, b, m, r in ((0, 1, 0.91, 0.06), (1, 3, 0.37, 0.33))
    ]
    document = {"task": folder.name, "select": "vote", "num_images": 400, "layers": layers}
    document["clusters"] = {"4": 300, "7": 100}
    (folder / "choice.json").write_text(json.dumps(document))


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
        write_gate(run.stage("moce"), step, random)
        write_placement(run.stage("moce"), step)
        table = table.copy()
        table[0, : 3 - step // 100] = (table[0, : 3 - step // 100] + 1) % EXPERTS
    write_clusters(run.clusters, random)
    write_transfer(run.transfer("digits"), "digits", "accuracy", 0.9)
    write_choice(run.transfer("digits"))
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


SMALL = {
    "data": {"image_size": 16, "loader_processes": 0},
    "model": {"size": "tiny", "width": 32, "depth": 2, "num_heads": 2, "patch_size": 4}
    | {"decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    "moe": {"num_experts": 3, "layers": [0, 1]},
    "cluster": {"num_clusters": 3},
    "gate": {"assign": "fixed"},
}


def write_shards(folder, random):
    """One tar a cluster, five noisy images of one colour in each; the second has a broken one."""
    folder.mkdir()
    shards = []
    for cluster in range(3):
        path = folder / f"{cluster:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(5):
                pixels = random.integers(0, 200, (20, 24, 3)).astype(np.uint8)
                pixels[:, :, cluster] = 255
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                content = b"broken" if (cluster, number) == (1, 2) else buffer.getvalue()
                member = tarfile.TarInfo(f"c{cluster}/{number}.png")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        shards.append(scan_shard(str(path), path=path.name, cluster=cluster)[0])
    write_index(folder, shards)


def publish_weights(folder, step, weights):
    """Publish weights as training does; of the earlier ones the newest and the oldest stay."""
    tensors = {f"weight/{name}": tensor for name, tensor in weights.items()}
    files = write_tensors(folder / "new" / "rank-00000.safetensors", tensors)
    manifest = {"format": FORMAT, "step": step, "files": files}
    publish(folder / "new", step_folder(folder, step), manifest, keep=1)


def build_seen(folder):
    """Build a run with images and checkpoints.

    The MAE has an early and a late one; control and experts are equal copies of the late one.
    """
    random = np.random.default_rng(0)
    config = make_config(SMALL)
    run = open_run(folder / "seen", config)
    dense = initial_weights(config)
    for step, scale in ((10, 0.5), (20, 0.9), (30, 1.0)):
        weights = {name: scale * tensor for name, tensor in dense.items()}
        publish_weights(run.stage("mae") / "checkpoints", step, weights)
    write_weights(run.stage("control") / "checkpoints" / "step_00000020", dense)
    centroids = standardise(torch.from_numpy(np.eye(3, 32, dtype=np.float32)))
    experts = experts_from_dense(dense, config.moe_layers, 3)
    weights = {name: tensor.clone() for name, tensor in experts.items()}
    weights["gate.weight"] = fixed_weight(centroids, 3, 0).expand(2, 3, 32).clone()
    weights["gate.cluster_embedding"] = centroids
    write_weights(run.stage("moce") / "checkpoints" / "step_00000020", weights)
    write_shards(run.shards, random)
    return run.root, weights


@pytest.fixture
def seen(tmp_path):
    return build_seen(tmp_path)
