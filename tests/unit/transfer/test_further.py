"""Further steps by the job: what they begin with, what they see, when they are not repeated."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from moce_dist.data.columns import open_index
from moce_dist.model.customize import customize
from moce_dist.run.directory import Run, open_run
from moce_dist.run.files import read_jsonl
from moce_dist.settings import ConfigError
from moce_dist.train import loop
from moce_dist.train.checkpoint import latest_checkpoint, load_weights, read_manifest
from moce_dist.transfer import tasks

from .conftest import NUM_CLUSTERS, transfer

IMAGES = 48


def compare(job, run: Run, data, *flags: str) -> dict:
    job.main(
        [
            *("--run", str(run.root), "--task", "imagefolder", "--data", str(data)),
            *("--protocol", "knn", "--set", "transfer.continued.batch_size=8"),
            *("--set", "logging.every_steps=1", "--set", "logging.tensorboard=false", *flags),
        ]
    )
    return json.loads((run.transfer("imagefolder") / "metrics.json").read_text())


@pytest.fixture
def seen(monkeypatch) -> list[list[str]]:
    """Keys of the batches of all training steps."""
    batches, original = [], loop.train_step

    def recorded(state, batch):
        batches.append(batch.keys)
        return original(state, batch)

    monkeypatch.setattr(loop, "train_step", recorded)
    return batches


def test_own_steps_and_their_fair_partners(clustered, image_folder, job, seen, config):
    run, folder = clustered, clustered.transfer("imagefolder")
    metrics = compare(job, run, image_folder, "--continue-images", str(IMAGES))
    rows = {row["backbone"]: row for row in metrics["results"]}
    assert list(rows) == ["moce", "control", "moce+own", "control+own", "control+all"]
    assert "cost" not in rows["moce"] and rows["moce+own"]["choice"] == rows["moce"]["choice"]
    for name in ("moce+own", "control+own", "control+all"):
        assert rows[name]["cost"]["images"] == IMAGES and rows[name]["cost"]["seconds"] > 0
    # own steps of both see the same images, by the task's mass over clusters that hold any
    own, partner, everything = (seen[i : i + 6] for i in (0, 6, 12))
    assert len(seen) == 18 and own == partner
    clusters = json.loads((folder / "choice.json").read_text())["clusters"]
    counts = np.array([clusters.get(str(k), 0) for k in range(NUM_CLUSTERS)], float)
    counts[-1] = 0
    used = np.bincount([int(k[1]) for keys in own for k in keys], minlength=NUM_CLUSTERS)
    # largest remainders of every epoch of whole batches
    np.testing.assert_allclose(used / IMAGES, counts / counts.sum(), atol=1 / 8)
    assert not used[counts == 0].any()
    assert {k[:2] for keys in everything for k in keys} == {f"c{c}" for c in range(5)}

    # they begin with the customised experts, or the control, and with the decoder of each
    start = load_weights(folder / "continued" / f"moce+own-{IMAGES}" / "start")
    moce = load_weights(latest_checkpoint(run.stage("moce") / "checkpoints"))
    expected = customize(moce, rows["moce"]["choice"], with_decoder=True)
    assert start.keys() == expected.keys() and "decoder_pred.weight" in start
    assert all(torch.equal(start[name], expected[name]) for name in start)
    control = load_weights(latest_checkpoint(run.stage("control") / "checkpoints"))
    for out in (
        folder / "continued" / f"control+own-{IMAGES}",
        next((run.root / "control_more").glob(f"{IMAGES}-*")),
    ):
        begun = load_weights(out / "start")
        assert all(torch.equal(begun[name], control[name]) for name in begun)
    for name in ("backbone+own", "backbone-control+own"):
        card = (folder / name / "README.md").read_text()
        assert f"{IMAGES} images of the task's own clusters" in card
        assert timm.create_model(f"local-dir:{folder / name}", pretrained=True, num_classes=2)
    assert "trained without experts" in card and "- checkpoint: control/" in card
    assert not (folder / "backbone-control").exists()

    # nothing is repeated; the steps on all images are those of any task
    seen.clear()
    again = compare(job, run, image_folder, "--continue-images", str(IMAGES))
    assert again == metrics and not seen
    # a request without further steps keeps their rows
    assert compare(job, run, image_folder, "--backbone", "moce,control") == metrics
    shutil.rmtree(folder)
    names = ["--backbone", "control,control+all"]
    compare(job, run, image_folder, "--continue-images", str(IMAGES), *names)
    assert not seen


def test_own_steps_of_the_control_need_no_experts(clustered, image_folder, job, seen):
    flags = ["--continue-images", "16", "--backbone"]
    compare(job, clustered, image_folder, *flags, "moce+own,control+own")
    with_experts = seen[:2]
    assert seen[2:] == with_experts
    seen.clear()
    shutil.rmtree(clustered.stage("moce"))
    shutil.rmtree(clustered.transfer("imagefolder"))
    metrics = compare(job, clustered, image_folder, *flags, "control,control+own")
    assert [row["backbone"] for row in metrics["results"]] == ["control", "control+own"]
    assert seen == with_experts


def test_own_steps_of_the_mae_need_neither_experts_nor_a_control(
    clustered, image_folder, job, seen
):
    run, flags = clustered, ["--continue-images", "16"]
    compare(job, run, image_folder, *flags, "--backbone", "control+own,control+all")
    by_control = list(seen)
    seen.clear()
    shutil.rmtree(run.stage("control"))
    names = ["moce", "mae", "moce+own", "mae+own", "mae+all"]
    metrics = compare(job, run, image_folder, *flags)
    assert [row["backbone"] for row in metrics["results"]] == names
    assert len(seen) == 6 and seen[2:] == by_control
    seen.clear()
    shutil.rmtree(run.stage("moce"))
    shutil.rmtree(run.transfer("imagefolder"))
    metrics = compare(job, run, image_folder, *flags, "--backbone", "mae,mae+own,mae+all")
    # the steps on all images are those of any task
    assert seen == by_control[:2]
    found = {(d["backbone"], d["reference"]) for d in metrics["differences"]}
    assert found == {("mae+own", "mae+all")}
    mae = load_weights(latest_checkpoint(run.stage("mae") / "checkpoints"))
    folder = run.transfer("imagefolder")
    for out in (
        folder / "continued" / "mae+own-16",
        next((run.root / "mae_more").glob("16-*")),
    ):
        begun = load_weights(out / "start")
        assert begun.keys() == mae.keys() and "decoder_pred.weight" in begun
        assert all(torch.equal(begun[name], mae[name]) for name in begun)
    card = (folder / "backbone-mae+own" / "README.md").read_text()
    assert "trained without experts" in card and "- checkpoint: mae/" in card


def test_a_tasks_training_images_alone(clustered, image_folder, job, seen, tmp_path, monkeypatch):
    # headers of large tasks are not checked beforehand
    monkeypatch.setattr(tasks, "SCAN_LIMIT_BYTES", 0)
    run, folder = clustered, clustered.transfer("imagefolder")
    image_folder = shutil.copytree(image_folder, tmp_path / "images")
    for number in range(5):
        (image_folder / "train" / "rows" / f"{number:03d}.png").unlink()
    (image_folder / "train" / "rows" / "torn.png").write_bytes(b"")
    names = "mae+own,mae+train,moce+train"
    flags = ["--continue-images", "48", "--backbone", names]
    metrics = compare(job, run, image_folder, *flags)
    own, by_train, with_experts = (seen[i : i + 6] for i in (0, 6, 12))
    assert len(seen) == 18 and by_train == with_experts and own != by_train
    # an epoch is whole batches without padding; no image comes twice in it
    files = [path.relative_to(image_folder) for path in image_folder.glob("train/*/[0-9]*")]
    drawn = [key.partition("/")[2] for keys in by_train for key in keys]
    assert {*drawn} <= {str(path).replace(".", "_") for path in files} and len(files) == 43
    assert len({*drawn[:40]}) == 40 and len(drawn) == 48
    faults = [f for f in read_jsonl(run.faults) if f["stage"] == "transfer"]
    assert {f["key"] for f in faults} == {"train/rows/torn.png"}
    # the stored images are the files, byte by byte
    index = open_index(folder / "continued" / "train")
    (shard,) = index.shards
    tar = (Path(index.root) / shard.path).read_bytes()
    stored = {
        key.partition("/")[2]: tar[offset : offset + size]
        for key, offset, size in zip(shard.keys, shard.offsets, shard.sizes, strict=True)
    }
    originals = {str(p).replace(".", "_"): (image_folder / p).read_bytes() for p in files}
    assert stored == originals
    # fair partners: the same model on as many images of the clusters
    found = {(d["backbone"], d["reference"]) for d in metrics["differences"]}
    assert found == {("mae+train", "mae+own"), ("moce+train", "mae+own")}
    card = (folder / "backbone-mae+train" / "README.md").read_text()
    assert "48 images of the task's training images alone" in card
    seen.clear()
    assert compare(job, run, image_folder, *flags) == metrics and not seen


def test_training_images_alone_need_no_clusters(run, image_folder, job, seen):
    flags = ["--continue-images", "16", "--backbone", "mae,mae+train"]
    metrics = compare(job, run, image_folder, *flags)
    assert [row["backbone"] for row in metrics["results"]] == ["mae", "mae+train"]
    assert len(seen) == 2
    # a limit is heeded: fewer images than a batch of 8 fill it by several samples of each
    few = compare(job, run, image_folder, *flags, "--set", "transfer.max_train=3")
    drawn = [[key.partition("/")[2] for key in keys] for keys in seen[2:]]
    assert [len({*keys}) for keys in drawn] == [3, 3] and len({*drawn[0], *drawn[1]}) == 3
    assert all(len({*keys}) == 8 for keys in seen[2:])
    assert few["results"][1]["cost"]["images"] == 16


def test_steps_on_training_images_stay_while_these_stay(run, image_folder, job, seen, tmp_path):
    image_folder = shutil.copytree(image_folder, tmp_path / "images")
    flags = ["--continue-images", "16", "--backbone", "mae,mae+train"]
    compare(job, run, image_folder, *flags)
    # what is measured on is no part of the training
    (image_folder / "test" / "rows" / "000.png").unlink()
    compare(job, run, image_folder, *flags)
    shutil.copytree(image_folder / "test", image_folder / "val")
    compare(job, run, image_folder, *flags, "--set", "transfer.evaluate=val")
    compare(job, run, image_folder, *flags, "--set", "transfer.max_train=1000")
    assert len(seen) == 2
    (image_folder / "train" / "rows" / "000.png").unlink()
    compare(job, run, image_folder, *flags)
    assert len(seen) == 4


def test_training_images_that_cannot_be_read_end_the_packing(
    run, image_folder, job, tmp_path, monkeypatch
):
    monkeypatch.setattr(tasks, "SCAN_LIMIT_BYTES", 0)
    image_folder = shutil.copytree(image_folder, tmp_path / "images")
    flags = ["--continue-images", "16", "--backbone", "mae,mae+train"]
    packed = run.transfer("imagefolder") / "continued" / "train"

    def fails(_item):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(tasks.Item, "read", fails)
        compare(job, run, image_folder, *flags)
    assert not packed.exists()
    for path in list(image_folder.glob("train/rows/*"))[:2]:
        path.write_bytes(b"no image")
    with pytest.raises(ConfigError, match="2 of 48 training images cannot be read; each is named"):
        compare(job, run, image_folder, *flags)
    assert not packed.exists()
    assert sum(fault["stage"] == "transfer" for fault in read_jsonl(run.faults)) == 2


def test_training_images_alone_need_no_experts(image_folder, job, seen, run, config, tmp_path):
    moe = config.moe.model_copy(update={"kind": "dense"})
    dense = open_run(tmp_path / "dense", config.model_copy(update={"moe": moe}))
    shutil.copytree(run.stage("mae"), dense.stage("mae"))
    flags = ["--continue-images", "16", "--backbone", "mae,mae+train"]
    compare(job, dense, image_folder, *flags)
    assert len(seen) == 2


def test_other_experts_and_other_numbers_train_anew(clustered, image_folder, job, seen):
    flags = ["--continue-images", "16", "--backbone", "moce:average+own,moce:vote+own"]
    metrics = compare(job, clustered, image_folder, *flags)
    assert len(seen) == 4 and seen[:2] == seen[2:]
    weights = [row["choice"] for row in metrics["results"]]
    assert weights[0] == [pytest.approx([1 / 3] * 3)] * 2 and all(
        isinstance(e, int) for e in weights[1]
    )
    folder = clustered.transfer("imagefolder") / "continued"
    losses = [
        read_jsonl(folder / f"moce-{name}+own-16" / "metrics.jsonl")[0]["loss"]
        for name in ("average", "vote")
    ]
    assert losses[0] != losses[1]
    seen.clear()
    one = ["--backbone", "moce+own"]
    compare(job, clustered, image_folder, "--continue-images", "16", *one, "--experts", "0,1")
    assert len(seen) == 2
    compare(job, clustered, image_folder, "--continue-images", "24", *one, "--experts", "0,1")
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backbone", "moce+own"], "needs --continue-images"),
        (["--backbone", "moce,mae", "--continue-images", "16"], "names nothing [+]own"),
        (["--backbone", "random+own", "--continue-images", "16"], "must be moce, moce:SELECT"),
        (["--backbone", "random+train", "--continue-images", "16"], "must be moce, moce:SELECT"),
        (["--backbone", "moce+all", "--continue-images", "16"], "must be moce, moce:SELECT"),
        (["--backbone", "timm:a+train", "--continue-images", "16"], "timm:a[+]train: further"),
        (["--backbone", "+train", "--continue-images", "16"], "--backbone [+]train: must be"),
        (["--backbone", "moce+", "--continue-images", "16"], "after [+] must stand"),
        (["--backbone", "moce+own", "--continue-images", "7"], "must be at least a batch"),
        (
            [
                "--backbone",
                "moce+own",
                "--continue-images",
                "16",
                "--set",
                "parallel.num_workers=3",
            ],
            "multiple of",
        ),
    ],
)
def test_requests_that_cannot_be_are_refused(flags, message, clustered, image_folder, job):
    with pytest.raises(ConfigError, match=message):
        compare(job, clustered, image_folder, *flags)


def test_run_without_tars_is_refused(run, image_folder, job):
    with pytest.raises(ConfigError, match="shards: is missing"):
        compare(job, run, image_folder, "--backbone", "moce+own", "--continue-images", "16")


def test_tasks_of_a_suite_share_the_steps_on_all_images(clustered, image_folder, job, seen):
    entries = json.dumps([{"task": "imagefolder", "name": name} for name in ("one", "two")])
    flags = ["--backbone", "control+all", "--continue-images", "16"]
    flags += ["--task", "all", "--set", f"transfer.suite={entries}"]
    job.main(
        [
            *("--run", str(clustered.root), "--data", str(image_folder), "--protocol", "knn"),
            *("--set", "transfer.continued.batch_size=8", *flags),
        ]
    )
    assert len(seen) == 2
    rows = json.loads((clustered.transfer("all") / "metrics.json").read_text())["results"]
    assert [(row["task"], row["cost"]["images"]) for row in rows] == [("one", 16), ("two", 16)]


@pytest.mark.timeout(300)
def test_two_processes_of_torchrun_share_the_steps(clustered, image_folder, job):
    flags = ["--task", "imagefolder", "--data", str(image_folder), "--protocol", "knn"]
    flags += ["--backbone", "moce+own,control+all", "--continue-images", "16"]
    for setting in ("transfer.continued.batch_size=8", "logging.every_steps=1"):
        flags += ["--set", setting]
    whole = [read_jsonl(out / "metrics.jsonl") for out in alone(job, clustered, flags)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    done = transfer(clustered, *flags, "--set", "parallel.num_workers=2", launcher=launcher)
    assert done.returncode == 0, done.stderr
    for out, lines in zip(folders(clustered), whole, strict=True):
        shared = read_jsonl(out / "metrics.jsonl")
        assert [x["images_seen"] for x in shared] == [x["images_seen"] for x in lines] == [8, 16]
        losses = [[x["loss"] for x in each] for each in (shared, lines)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        files = read_manifest(latest_checkpoint(out / "checkpoints"))["files"]
        assert len(files) == 2


def folders(run: Run) -> tuple[Path, ...]:
    own = run.transfer("imagefolder") / "continued" / "moce+own-16"
    return own, next((run.root / "control_more").glob("16-????????"))


def alone(job, run: Run, flags: list[str]) -> list[Path]:
    """Take the same steps in this process, and set what they left aside."""
    job.main(["--run", str(run.root), *flags])
    aside = []
    for number, out in enumerate(folders(run)):
        aside.append(run.root / "aside" / str(number))
        shutil.move(out, aside[-1])
    return aside
