"""A run on other images goes on from a finished one: its encoder, clusters and experts."""

import json
import re
import shutil
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest

from moce_dist.cluster.blocks import open_features
from moce_dist.config import load_config
from moce_dist.data.shards import read_index
from moce_dist.pipeline import Pipeline
from moce_dist.run.artefacts import COMPLETE, is_complete, read_marker
from moce_dist.run.directory import open_run
from moce_dist.train.checkpoint import latest_checkpoint, load_weights, read_manifest

STAGES = ("ingested", "mae", "features", "clusters", "shards", "moce")
# its own number of workers: without Ray, which is quicker
CHANGED = ("parallel.num_workers=1", "moce.epochs=2", "moce.warmup_epochs=0", "gate.noise=0")


@pytest.fixture(scope="module")
def other_images(tmp_path_factory):
    """70 digits that the finished run has not seen; it has seen silhouettes too."""
    from moce_dist.samples import sets

    root, images = tmp_path_factory.mktemp("other") / "images", sets.task("digits").train
    (root / "new").mkdir(parents=True)
    for number in range(70):
        image = images[number * len(images) // 150 + 1]
        (root / "new" / f"{number:04d}.png").write_bytes(image.content)
    return root


@pytest.fixture(scope="module")
def command(arguments, finished, other_images):
    """Arguments of jobs/pretrain.py for a run that goes on from the finished one."""
    return lambda run, *more: arguments(
        run, *CHANGED, f"base_run={finished}", *more, source=f"folder:{other_images}"
    )


@pytest.fixture(scope="module")
def continued(tmp_path_factory, run_job, command):
    """The continued run, images at their nearest centroids: digits alone leave clusters empty."""
    root = tmp_path_factory.mktemp("continued") / "run"
    result = run_job("pretrain", *command(root, "cluster.with_prices=false")).assert_done()
    assert "mae: training on" not in result.err and "k-means" not in result.err
    return root


def test_encoder_clusters_and_experts_are_those_of_the_base(continued, finished):
    for name in STAGES:
        assert is_complete(continued / name, read_marker(continued / name)["inputs"]), name
    for name in ("mae", "clusters", "moce"):
        assert "base" in read_marker(continued / name)["inputs"], name
    ours, theirs = (latest_checkpoint(run / "mae" / "checkpoints") for run in (continued, finished))
    assert ours.name == theirs.name and {p.name for p in (continued / "mae").iterdir()} == {
        "checkpoints", "inputs.json", COMPLETE,
    }  # fmt: skip
    for name in ("centroids.npy", "mean.npy", "prices.npy"):
        old, new = (run / "clusters" / name for run in (finished, continued))
        assert old.read_bytes() == new.read_bytes()
    summary = json.loads((continued / "clusters" / "summary.json").read_text())
    num_images = read_index(continued / "ingested").num_samples
    assert summary["num_images"] == num_images < 70 and summary["num_clusters"] == 8
    assert (summary["balance"], summary["prices"]) == ("assigned", False)
    # a few small steps away from where the base ended, not from copies of the dense MLPs
    old, new = (
        load_weights(latest_checkpoint(run / "moce" / "checkpoints"))
        for run in (finished, continued)
    )
    name = "blocks.3.mlp.experts.{}.fc1.weight"
    for expert in range(4):
        moved = (new[name.format(expert)] - old[name.format(expert)]).norm()
        others = [(old[name.format(expert)] - old[name.format(e)]).norm() for e in range(4)]
        assert moved < 0.5 * sorted(others)[1]


def nearest(folder, run):
    files, mean = open_features(folder), np.load(run / "clusters" / "mean.npy")
    rows = np.concatenate([np.load(path) for path in files.paths])
    seen = rows - mean
    seen /= np.linalg.norm(seen, axis=1, keepdims=True)
    centroids = np.load(run / "clusters" / "centroids.npy")
    squares = np.square(seen[:, None].astype(np.float64) - centroids).sum(axis=2)
    return {key: int(c) for (_, key), c in zip(files.keys(), squares.argmin(axis=1), strict=True)}


def table(path):
    read = pq.read_table(path).to_pydict()
    return dict(zip(read["key"], read["cluster"], strict=True))


def test_empty_clusters_go_all_the_way(continued, read_metrics):
    clusters = table(continued / "clusters" / "assignments.parquet")
    assert clusters == nearest(continued / "features", continued)
    held_out = table(continued / "shards" / "holdout.parquet")
    assert held_out == nearest(continued / "features" / "holdout", continued)
    sizes = np.bincount(list(clusters.values()), minlength=8)
    assert sizes.min() == 0, "no cluster is empty: the case is not tested"
    tars = read_index(continued / "shards").shards
    assert {tar.cluster for tar in tars} == set(np.flatnonzero(sizes).tolist())
    metrics = read_metrics(continued / "moce")
    assert metrics[-1]["images_seen"] == 2 * len(clusters)
    assert np.isfinite([line["loss"] for line in metrics]).all()
    assert json.loads((continued / "moce" / "holdout.json").read_text())["images"] == len(held_out)
    for path in (continued / "moce" / "routing").iterdir():
        assert np.shape(json.loads(path.read_text())) == (2, 8)


def test_transfer_and_report_work_on_it(continued, finished, run_job, images, tmp_path):
    for number, path in enumerate(sorted(images.rglob("*.png"))[::5]):
        target = tmp_path / ("train", "test")[number % 2] / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    named = ("--run", continued, "--task", "imagefolder", "--data", tmp_path)
    run_job("transfer", *named, "--protocol", "knn").assert_done()
    metrics = json.loads((continued / "transfer" / "imagefolder" / "metrics.json").read_text())
    assert {row["backbone"] for row in metrics["results"]} == {"moce", "mae"}
    shown = run_job("report", continued).assert_done()
    assert f"goes on from the encoder, clusters and experts of {finished}" in shown.out
    assert "MAE loss" not in shown.out and "MoCE loss" in shown.out
    assert str(finished) in (continued / "report.html").read_text()


def test_a_control_is_added_to_finished_runs_and_goes_on(
    finished, continued, part_of, arguments, command, run_job, ask, read_metrics
):
    base = part_of(*STAGES)
    run, one = base.parent / "more", "parallel.num_workers=1"
    same = command(continued, "control=true", "cluster.with_prices=false")
    plan = ask("pretrain", *same, "--dry-run").assert_done().out
    assert f"control    from the MAE; {finished} has no control: no experts" in plan
    done = run_job("pretrain", *arguments(base, "control=true", one)).assert_done()
    assert re.search(
        r"^held-out loss: mae \S+ \(\d+ steps fewer\), moce \S+, control \S+$", done.out, re.M
    )
    assert "control: training on 1 workers" in done.err and done.err.count("training on") == 1
    names = ("step", "epoch", "images_seen", "lr")
    control, moce = (
        [[line[name] for name in names] for line in read_metrics(base / stage)]
        for stage in ("control", "moce")
    )
    assert control == moce
    assert json.loads((base / "control" / "holdout.json").read_text())["images"] > 0
    # without the clusters and experts of a continued run made again: its control alone
    shutil.copytree(continued, run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(finished), str(base)))
    flags = command(run, f"base_run={base}", "cluster.with_prices=false")
    plan = ask("pretrain", *flags, "--stage", "control", "--dry-run").assert_done().out
    assert f"control    from {base / 'control'}: no experts" in plan
    done = run_job("pretrain", *flags, "--stage", "control").assert_done()
    last = latest_checkpoint(base / "control" / "checkpoints")
    assert f"control: starting from the weights of {last}" in done.err
    position = read_manifest(latest_checkpoint(run / "control" / "checkpoints"))
    assert position["steps_before"] == len(read_metrics(finished / "mae")) + len(moce)


@pytest.mark.long
def test_a_killed_one_ends_in_the_same_bits(continued, start, command, learned, tmp_path):
    run = tmp_path / "run"
    request = command(run, "cluster.with_prices=false", "checkpoint.every_steps=1")
    job = start("pretrain", *request)
    job.wait_until(lambda: any((run / "moce" / "checkpoints").glob("step_*")), "moce")
    job.process.kill()
    assert job.finish().status == -signal.SIGKILL and not (run / "moce" / COMPLETE).exists()
    result = start("pretrain", *request).finish().assert_done()
    assert "moce: resuming at step" in result.err and "goes on from" not in result.err
    assert learned(run / "moce") == learned(continued / "moce")
    names = [p.name for p in (continued / "clusters").glob("*.[np][pa][yr]*")]
    assert {"centroids.npy", "assignments.parquet"} <= set(names)
    for name in names:
        old, new = (root / "clusters" / name for root in (continued, run))
        assert old.read_bytes() == new.read_bytes(), name


def test_with_prices_the_same_images_spread_otherwise(continued, ask, command, tmp_path):
    request = command(tmp_path / "run")
    plan = ask("pretrain", *request, "--dry-run").assert_done().out
    assert "goes on    from" in plan and "under their prices" in plan
    assert not list(tmp_path.iterdir())
    config = load_config(request[1], [word for word in request[4:] if word != "--set"])
    run = open_run(tmp_path / "run", config)
    run.features.symlink_to(continued / "features")
    assert Pipeline(run, config).clusters()["prices"]
    priced, nearest = (
        np.bincount(list(table(root / "clusters" / "assignments.parquet").values()), minlength=8)
        for root in (run.root, continued)
    )
    assert priced.sum() == nearest.sum() and priced.tolist() != nearest.tolist()


def test_what_does_not_fit_the_base_is_refused(ask, command, arguments, finished, tmp_path):
    run = tmp_path / "run"
    refused = ask("pretrain", *command(run, "moe.num_experts=2", "cluster.num_clusters=16"))
    refused.assert_refused(2, finished, "moe.num_experts: 4 -> 2", "cluster.num_clusters: 8 -> 16")
    missing = ask("pretrain", *arguments(run, f"base_run={tmp_path / 'none'}"))
    missing.assert_refused(2, "base_run", tmp_path / "none", "is not a run directory")
    assert not run.exists()
