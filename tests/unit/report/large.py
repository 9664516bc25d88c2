"""A record of the largest run that a page must bear, with noise in every image.

24 layers of 256 experts, 4,096 clusters in 1,000 domains, 32 groups, six tasks. Noise is what
JPEG and PNG compress worst.
"""

import base64
import io

import numpy as np
from PIL import Image

from moce_dist.cluster.gallery import sheet_name, shown_clusters
from moce_dist.config import make_config
from moce_dist.report import page
from moce_dist.report.reconstruct import Reconstructions, Row, Tile
from moce_dist.report.record import Certainty, Clusters, Record, Stage
from moce_dist.run.directory import open_run

LAYERS, EXPERTS, CLUSTERS, DOMAINS, GROUPS = 24, 256, 4096, 1000, 32
TABLES, LINES, TASKS, SEEDS = 40, 2000, 6, 5
COLUMNS = ["original", "masked", "MAE, step 500", "MAE, step 300000", "control"]
COLUMNS += ["MoCE, own experts", "MoCE, other experts"]


def noise(random, width, height):
    buffer = io.BytesIO()
    pixels = random.integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def clusters(folder, random):
    folder.mkdir(parents=True)
    sheets = {}
    for cluster in shown_clusters(CLUSTERS):
        sheets[cluster] = folder / sheet_name(cluster)
        sheets[cluster].write_bytes(noise(random, 936, 64))
    counts = random.integers(0, 200, (CLUSTERS, DOMAINS))
    summary = {"nmi": 0.5, "seconds": 7200.0, "sizes_without_balance": counts.sum(axis=1).tolist()}
    centroids = random.standard_normal((CLUSTERS, 1024), np.float32)
    names = [f"n{domain:08d}" for domain in range(DOMAINS)]
    return Clusters(names, counts, summary=summary, centroids=centroids, sheets=sheets)


def stage(random):
    steps = np.arange(LINES)
    columns = {
        "step": steps, "images_seen": 4096 * (steps + 1), "loss": random.random(LINES),
        "lr": random.random(LINES), "images_per_s": 9000 + random.random(LINES),
        "data_wait_s": random.random(LINES) / 9, "images_exchanged": random.random(LINES) * 99,
        "loss_balance": random.random(LINES), "loss_confidence": random.random(LINES),
    }  # fmt: skip
    lines = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    experts = random.integers(0, 999, (LINES, LAYERS, EXPERTS))
    lines = [line | {"images_per_expert": experts[i]} for i, line in enumerate(lines)]
    return Stage(lines, {"loss": 0.4, "images": 50_000}, experts)


def placement(random, step):
    images = random.integers(1, 9999, GROUPS).tolist()
    traffic = {"images_per_group": images, "local_fraction": 0.8, "images_exchanged": 99.0}
    return {
        "step": step,
        "expert_group": (np.arange(LAYERS * EXPERTS).reshape(LAYERS, EXPERTS) % GROUPS).tolist(),
        "shape": [LAYERS, EXPERTS, CLUSTERS, GROUPS],
        "shares": {
            "cluster": list(range(CLUSTERS)),
            "group": random.integers(0, GROUPS, CLUSTERS).tolist(),
            "share": [1.0] * CLUSTERS,
        },
        "predicted_per_epoch": traffic,
        "measured_in_interval": traffic,
    }


def task(random, name):
    pairs = [(b, p) for b in ("moce", "control", "mae", "random") for p in ("knn", "finetune")]
    rows = [
        {"backbone": b, "protocol": p, "seed": seed, "value": 0.5}
        for b, p in pairs
        for seed in range(SEEDS)
    ]
    summary = [{"backbone": b, "protocol": p, "mean": 0.5, "std": 0.01} for b, p in pairs]
    layers = [
        {"layer": i, "block": i, "expert": 3, "mass": 0.4, "runner_up": 7, "runner_up_mass": 0.2}
        | {"masses": random.dirichlet(np.ones(EXPERTS)).tolist()}
        for i in range(LAYERS)
    ]
    images = {str(cluster): 10 for cluster in random.permutation(CLUSTERS)[:500]}
    choice = {"select": "vote", "num_images": 5000, "layers": layers, "clusters": images}
    return {"task": name, "metric": "accuracy", "results": rows, "summary": summary}, choice


def reconstructions(random):
    def tile(number):
        content = base64.b64encode(noise(random, 112, 112)).decode()
        loss = None if number < 2 else float(random.random())
        return Tile(f"data:image/jpeg;base64,{content}", loss)

    shown = shown_clusters(CLUSTERS)[:6]
    rows = [Row(c, shown[0], [tile(i) for i in range(len(COLUMNS))]) for c in shown]
    return Reconstructions(COLUMNS, rows, True, shown, random.random((6, 6)))


def build_large(folder):
    """Return the record of such a run, and its reconstructions."""
    random = np.random.default_rng(0)
    moe = {"num_experts": EXPERTS, "layers": list(range(LAYERS))}
    parallel = {"num_workers": GROUPS, "num_groups": GROUPS}
    config = make_config(
        {
            **{"model": {"size": "large"}, "moe": moe, "parallel": parallel, "control": True},
            **{"cluster": {"num_clusters": CLUSTERS}, "mae": {"batch_size": 4096}},
            "moce": {"batch_size": 4096},
        }
    )
    record = Record(open_run(folder / "large", config).root, config)
    record.clusters = clusters(record.run.clusters / "gallery", random)
    record.stages = {name: stage(random) for name in ("mae", "moce", "control")}
    for step in range(0, 500 * TABLES, 500):
        table = random.integers(0, EXPERTS, (LAYERS, CLUSTERS))
        record.routing.append((step, table))
        p = random.random((LAYERS, CLUSTERS))
        record.certainty.append(Certainty(step, p, (1 - p) / 2))
        record.placements.append(placement(random, step))
    for number in range(TASKS):
        metrics, choice = task(random, f"task-{number}")
        record.transfers.append(metrics)
        record.choices[metrics["task"]] = choice
    record.faults = [{"reason": f"reason {i % 40}", "key": f"{i}"} for i in range(10_000)]
    return record, reconstructions(random)


def write_large(folder, patch):
    """Write the page of such a run; `patch` is pytest's, because there are no checkpoints."""
    record, seen = build_large(folder)
    patch.setattr(page, "reconstruct", lambda *_: seen)
    path = folder / "large.html"
    path.write_text(page.render(record))
    return path
