"""One command from a folder of images to experts, task models and a report."""

import gzip
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from in_process import run_here
from PIL import Image
from safetensors.torch import load_file
from tars import read_members

from moce_dist.data.shards import read_index
from moce_dist.run.artefacts import COMPLETE, is_complete, read_marker

STAGES = ("ingested", "mae", "features", "clusters", "shards", "moce")
EVERY_STEP = {
    "step", "epoch", "images_seen", "loss", "loss_total", "lr", "images_per_s", "data_wait_s",
}  # fmt: skip
MOCE_STEP = EVERY_STEP | {
    "loss_balance", "loss_confidence", "images_per_expert", "images_exchanged", "bytes_exchanged",
}  # fmt: skip


def contents(index):
    return {
        (key, *sorted(read_members(index.url(shard), start, end).items()))
        for shard in index.shards
        for key, start, end in zip(shard.keys, shard.starts, shard.ends, strict=True)
    }


def written(root):
    return {p.relative_to(root): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", STAGES)
def test_every_artefact_is_complete(finished, name):
    marker = read_marker(finished / name)
    assert marker["files"]
    assert is_complete(finished / name, marker["inputs"])


def test_every_image_is_in_the_tars_with_its_bytes(finished, images):
    ingested = contents(read_index(finished / "ingested"))
    held_out = contents(read_index(finished / "ingested" / "holdout"))
    assert len(ingested) + len(held_out) == 300
    assert len(held_out) > 0
    given = {p.read_bytes() for p in images.rglob("*.png")}
    # sample: (key, ("cls", label), ("png", bytes))
    assert {dict(sample[1:])["png"] for sample in ingested | held_out} == given
    assert contents(read_index(finished / "shards")) == ingested


def test_clusters_are_balanced_and_agree_with_the_tars(finished):
    table = pq.read_table(finished / "clusters" / "assignments.parquet").to_pydict()
    sizes = np.bincount(table["cluster"], minlength=8)
    assert sizes.max() - sizes.min() <= 1
    cluster_of = dict(zip(table["key"], table["cluster"], strict=True))
    for shard in read_index(finished / "shards").shards:
        assert {cluster_of[key] for key in shard.keys} == {shard.cluster}
    assert np.load(finished / "clusters" / "centroids.npy").shape == (8, 32)
    assert np.load(finished / "clusters" / "mean.npy").shape == (32,)
    summary = json.loads((finished / "clusters" / "summary.json").read_text())
    assert summary["num_images"] == len(cluster_of) == sizes.sum()


@pytest.mark.parametrize(("stage", "keys"), [("mae", EVERY_STEP), ("moce", MOCE_STEP)])
def test_metrics_have_every_key_at_every_step(finished, read_metrics, stage, keys):
    metrics = read_metrics(finished / stage)
    assert [line["step"] for line in metrics] == list(range(len(metrics)))
    assert all(keys <= line.keys() for line in metrics)
    num_images = read_index(finished / "ingested").num_samples
    epochs = {"mae": 20, "moce": 15}[stage]
    assert metrics[-1]["images_seen"] == epochs * num_images
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    if stage == "moce":
        used = [np.sum(line["images_per_expert"], axis=1).tolist() for line in metrics]
        per_step = np.diff([0, *(line["images_seen"] for line in metrics)])
        assert used == [[n, n] for n in per_step]


@pytest.mark.parametrize("stage", ["mae", "moce"])
def test_rates_are_those_of_the_images_that_were_used(finished, read_metrics, stage):
    metrics = read_metrics(finished / stage)
    seen = np.diff([0, *(line["images_seen"] for line in metrics)])
    for line, count in zip(metrics, seen, strict=True):
        assert line["images_per_s"] * line["seconds"] == pytest.approx(count, rel=0.01)


def test_held_out_loss_is_that_of_the_readable_models(finished):
    held = read_index(finished / "ingested" / "holdout").num_samples
    found = {
        stage: json.loads((finished / stage / "holdout.json").read_text())
        for stage in ("mae", "moce")
    }
    assert {each["images"] for each in found.values()} == {held}
    done = run_here("moce_dist", "heldout", finished)
    own = json.loads(done.stdout.splitlines()[-1])["own"]
    assert found["moce"]["loss"] == pytest.approx(own, rel=1e-4)


def test_checkpoints_routing_and_placement_are_readable(finished):
    last = max((finished / "moce" / "checkpoints").iterdir())
    tensors = {k: t for p in last.glob("*.safetensors") for k, t in load_file(p).items()}
    for layer in (1, 3):
        for expert in range(4):
            name = f"weight/blocks.{layer}.mlp.experts.{expert}.fc1.weight"
            assert tensors[name].shape == (128, 32)
    assert tensors["weight/gate.weight"].shape == (2, 4, 32)
    for path in (finished / "moce" / "routing").iterdir():
        assert np.shape(json.loads(path.read_text())) == (2, 8)
    for path in (finished / "moce" / "placement").iterdir():
        assert np.shape(json.loads(path.read_text())["expert_group"]) == (2, 4)
    assert not list(finished.rglob("*.tmp"))


@pytest.fixture
def own_copy(finished, tmp_path):
    """A copy of the finished run that a test may write to."""
    return shutil.copytree(finished, tmp_path / "run")


def test_a_second_start_only_finds_everything_done(own_copy, start, arguments):
    before = written(own_copy)
    job = start("pretrain", *arguments(own_copy))
    seen = set()
    job.wait_until(lambda: seen.update(job.helpers()) or job.process.poll() is not None, "end")
    result = job.finish().assert_done()
    assert not seen, "started processes though nothing was left to do"
    assert "training on" not in result.err
    after = written(own_copy)
    changed = {str(p) for p in before if before[p] != after[p]}
    # the resolved configuration and its provenance belong to the newest start
    assert changed == {"config.yaml", "provenance.json"}
    assert before.keys() == after.keys()


def test_single_stages_ask_for_what_they_need(run_job, ask, arguments, tmp_path):
    one = ("parallel.num_workers=1", "mae.epochs=1", "moce.epochs=1")
    run = arguments(tmp_path / "run", *one, "logging.profile_steps=[2,4]")
    refused = ask("pretrain", *run, "--stage", "moce")
    refused.assert_refused(2, tmp_path / "run", "is not complete")
    for stage, made in (("mae", "mae"), ("cluster", "shards"), ("moce", "moce")):
        assert not (tmp_path / "run" / made / COMPLETE).exists()
        run_job("pretrain", *run, "--stage", stage).assert_done()
        assert (tmp_path / "run" / made / COMPLETE).exists()
    for stage in ("mae", "moce"):
        folder = tmp_path / "run" / stage / "profile"
        trace = json.loads(gzip.decompress((folder / "steps_2-3.json.gz").read_bytes()))
        names = [event.get("name") for event in trace["traceEvents"]]
        # two steps of four blocks with four linear maps each, and a decoder
        assert names.count("aten::linear") > 2 * 4 * 4
        assert "aten::addmm" in (folder / "steps_2-3.txt").read_text()


def test_a_dry_run_writes_nothing(ask, arguments, tmp_path):
    result = ask("pretrain", *arguments(tmp_path / "run"), "--dry-run").assert_done()
    assert not list(tmp_path.iterdir())
    for word in ("stages", "experts", "ranks", "batch"):
        assert word in result.out


def test_another_identity_is_refused_and_fresh_sets_it_aside(run_job, ask, arguments, part_of):
    run = part_of("ingested")
    changed = arguments(run, "seed=7", "model.mask_ratio=0.5", "parallel.num_workers=1")
    refused = ask("pretrain", *changed).assert_refused(2, run, "seed: 0 -> 7")
    assert "model.mask_ratio: 0.75 -> 0.5" in refused.error
    assert "num_workers" not in refused.error
    run_job(
        "pretrain", *changed, "--set", "mae.epochs=1", "--stage", "mae", "--fresh"
    ).assert_done()
    (aside,) = run.parent.glob("run.before-*")
    assert (aside / "ingested" / COMPLETE).exists()
    assert (run / "mae" / COMPLETE).exists()


@pytest.mark.long
def test_fewer_workers_may_take_a_run_up(run_job, arguments, part_of, read_metrics, finished):
    run = part_of("ingested", "mae", "features", "clusters", "shards")
    run_job("pretrain", *arguments(run, "parallel.num_workers=1")).assert_done()
    here, there = read_metrics(run / "moce"), read_metrics(finished / "moce")
    assert [m["images_per_expert"][0] for m in here] == [m["images_per_expert"][0] for m in there]
    np.testing.assert_allclose([m["loss"] for m in here], [m["loss"] for m in there], rtol=1e-4)


@pytest.fixture(scope="module")
def task(images, tmp_path_factory):
    """A task of two classes in ImageFolder's layout, from the same images."""
    root = tmp_path_factory.mktemp("task")
    for number, path in enumerate(sorted(images.rglob("*.png"))):
        part = ("train", "train", "test")[number % 3]
        target = root / part / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.save(target)
    return root


def test_a_task_gets_its_model_and_the_report_shows_it(own_copy, task, run_job, config):
    named = ("--run", own_copy, "--task", "imagefolder", "--data", task)
    chosen = ("--backbone", "moce,mae", "--protocol", "knn,finetune", "--config", config)
    budget = ("--set", "transfer.finetune.epochs=2", "--set", "transfer.finetune.batch_size=32")
    done = run_job("transfer", *named, *chosen, *budget).assert_done()
    assert "transfer-imagefolder: 2 of 2 workers" in done.err
    folder = own_copy / "transfer" / "imagefolder"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert len(metrics["results"]) == 4
    values = {r["backbone"]: r["value"] for r in metrics["results"] if r["protocol"] == "knn"}
    assert values.keys() == {"moce", "mae"}
    assert (folder / "models" / "moce-finetune-0" / "last" / "config.json").exists()
    # digits and silhouettes are easy to tell apart, by chance half would be right
    assert min(values.values()) > 0.7
    assert any((folder / "backbone").iterdir())
    shown = run_job("report", own_copy).assert_done()
    assert "imagefolder" in shown.out
    assert (own_copy / "report.html").stat().st_size > 10_000
