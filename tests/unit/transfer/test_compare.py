"""The job from flags to metrics.json, on a small run made of real files."""

import io
import json
import shutil
from collections import Counter
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from moce_dist.config import Config, to_yaml
from moce_dist.run import lease
from moce_dist.run.artefacts import file_sha256, mark_complete, read_marker
from moce_dist.run.directory import Run
from moce_dist.run.files import read_faults, write_atomic
from moce_dist.run.rows import value_text
from moce_dist.settings import ConfigError
from moce_dist.transfer.classification.official import OFFICIAL
from moce_dist.transfer.classification.task import Classification

from .conftest import NUM_CLUSTERS, ROOT, by_global_name, transfer, write_checkpoint


def metrics_of(run: Run, task: str) -> dict[str, Any]:
    return json.loads((run.transfer(task) / "metrics.json").read_text())


def test_results_of_a_run_that_must_not_be_written_go_to_out(run, image_folder, job, tmp_path):
    def content():
        files = (path for path in run.root.rglob("*") if path.is_file())
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before, out = content(), tmp_path / "out"
    flags = ["--run", str(run.root), "--task", "imagefolder", "--data", str(image_folder)]
    flags += ["--backbone", "moce,mae", "--out", str(out)]
    job.main([*flags, "--protocol", "knn"])
    assert content() == before
    found = json.loads((out / "imagefolder" / "metrics.json").read_text())
    assert [row["backbone"] for row in found["results"]] == ["moce", "mae"]
    assert (out / "imagefolder" / "backbone" / "model.safetensors").is_file()
    assert not (out / "imagefolder" / lease.LOCK).exists()


def test_comparison_is_written_skipped_and_extended(run, image_folder, job, caplog):
    flags = ["--task", "imagefolder", "--data", str(image_folder)]
    flags += ["--backbone", "moce,mae,random"]
    done = transfer(run, *flags, "--protocol", "knn,linear")
    assert done.returncode == 0, done.stderr
    assert "imagefolder: accuracy" in done.stdout
    folder = run.transfer("imagefolder")
    metrics = metrics_of(run, "imagefolder")
    assert metrics.keys() == {"task", "metric", "results", "summary", "differences"}
    assert {(d["backbone"], d["reference"]) for d in metrics["differences"]} == {
        ("moce", "mae"),
        ("random", "mae"),
    }
    assert [(r["backbone"], r["protocol"], r["seed"]) for r in metrics["results"]] == [
        (b, p, 0) for b in ("moce", "mae", "random") for p in ("knn", "linear")
    ]
    assert all((r["num_train"], r["num_test"]) == (48, 24) for r in metrics["results"])
    # stripes of two directions: chance is 0.5
    assert all(r["value"] > 0.7 for r in metrics["results"])
    choice = json.loads((folder / "choice.json").read_text())
    experts = [layer["expert"] for layer in choice["layers"]]
    assert {str(r["choice"]) for r in metrics["results"]} == {str(experts), "None"}
    assert sum(choice["clusters"].values()) == choice["num_images"] == 48
    assert read_marker(folder)["files"].keys() == {
        *("metrics.json", "choice.json", "backbone/model.safetensors"),
        *("backbone/config.json", "backbone/README.md"),
    }
    assert "| mae (5 steps fewer) | linear |" in (folder / "backbone" / "README.md").read_text()

    before = (folder / "metrics.json").stat().st_mtime_ns
    flags += ["--run", str(run.root)]
    caplog.set_level("INFO")
    job.main([*flags, "--protocol", "knn,linear"])
    assert "nothing to do" in caplog.text
    assert (folder / "metrics.json").stat().st_mtime_ns == before

    job.main([*flags, "--protocol", "finetune", "--seeds", "2"])
    lines = (folder / "results.jsonl").read_text().splitlines()
    assert len(lines) == 6 + 6
    extended = metrics_of(run, "imagefolder")
    assert extended["results"][:6] == metrics["results"]
    assert len(extended["summary"]) == 9


@pytest.fixture
def with_control(run, config, models):
    """The run with a finished control, of the weights of its MAE."""
    folder = run.stage("control")
    checkpoint = folder / "checkpoints" / "step_00000005"
    write_checkpoint(checkpoint, by_global_name(models["mae"], config), steps_before=5)
    mark_complete(folder, {}, checkpoint.iterdir())
    return run


def test_a_finished_control_is_what_the_moce_is_compared_with(
    with_control, image_folder, job, capsys
):
    run = with_control
    flags = ["--task", "imagefolder", "--data", str(image_folder), "--run", str(run.root)]
    job.main([*flags, "--protocol", "knn"])
    metrics = metrics_of(run, "imagefolder")
    assert [r["backbone"] for r in metrics["results"]] == ["moce", "control"]
    (difference,) = metrics["differences"]
    assert (difference["reference"], difference["std"]) == ("control", None)
    assert {row["std"] for row in metrics["summary"]} == {None}
    job.main([*flags, "--protocol", "knn", "--backbone", "mae"])
    metrics = metrics_of(run, "imagefolder")
    assert {r["backbone"]: r.get("steps_fewer") for r in metrics["summary"]} == {
        **{"moce": None, "control": None, "mae": 5}
    }
    value = {r["backbone"]: r["value"] for r in metrics["results"]}
    assert value["control"] == value["mae"], "the same weights"
    shown = capsys.readouterr().out
    assert "mae (5 steps fewer)" in shown and "±" not in shown
    card = (run.transfer("imagefolder") / "backbone" / "README.md").read_text()
    assert "| control | knn |" in card and "- moce - control, knn: " in card
    assert len((run.transfer("imagefolder") / "results.jsonl").read_text().splitlines()) == 3
    # without stage moce the longest is the control
    shutil.rmtree(run.stage("moce"))
    job.main([*flags, "--protocol", "knn", "--backbone", "control,mae"])
    assert "mae (5 steps fewer)" in capsys.readouterr().out


def test_other_experts_replace_the_rows_of_the_moce_alone(run, image_folder, job):
    flags = ["--task", "imagefolder", "--data", str(image_folder), "--protocol", "knn"]
    folder = run.transfer("imagefolder")
    for experts in ("0,0", "2,1"):
        job.main([*flags, "--run", str(run.root), "--experts", experts])
        chosen = {r["backbone"]: r["choice"] for r in metrics_of(run, "imagefolder")["results"]}
        assert chosen == {"moce": [int(e) for e in experts.split(",")], "mae": None}
    assert json.loads((folder / "choice.json").read_text())["select"] == "given"
    assert len((folder / "results.jsonl").read_text().splitlines()) == 3


def with_encoder(run: Run, config: Config, name: str, made_with: dict[str, str]) -> Run:
    """The run as if its clusters were made of another encoder's features; without its MAE."""
    cluster = config.cluster.model_copy(update={"encoder": name})
    write_atomic(run.root / "config.yaml", to_yaml(config.model_copy(update={"cluster": cluster})))
    shutil.rmtree(run.stage("mae"))
    mark_complete(run.features, made_with, [])
    return run


def clusters_of(features: torch.Tensor, run: Run, seeds: list[int]) -> dict[str, int]:
    """Make some images' directions the centroids of a run; count the images nearest to each."""
    rows = features.double().numpy()
    mean = rows.mean(axis=0)
    unit = (rows - mean) / np.linalg.norm(rows - mean, axis=1, keepdims=True)
    np.save(run.clusters / "centroids.npy", unit[seeds].astype(np.float32))
    np.save(run.clusters / "mean.npy", mean.astype(np.float32))
    nearest = ((unit[:, None] - unit[seeds]) ** 2).sum(axis=2).argmin(axis=1)
    return {str(c): int(n) for c, n in Counter(nearest.tolist()).items()}


@pytest.mark.usefixtures("timm_offline")
def test_task_meets_the_encoder_that_the_clusters_were_made_with(run, config, image_folder, job):
    name = "timm:test_vit.r160_in1k"
    with_encoder(run, config, name, {"encoder": f"{name}, center 0.95 bicubic"})
    model = timm.create_model(name.removeprefix("timm:"), pretrained=True).eval()
    task = Classification.open("imagefolder", image_folder)
    as_timm = create_transform(**resolve_data_config({}, model=model))
    shown = [as_timm(Image.open(io.BytesIO(item.read())).convert("RGB")) for item in task.train]
    with torch.no_grad():
        features = model.forward_features(torch.stack(shown))[:, 1:].mean(dim=1)
    expected = clusters_of(features, run, [0, 3, 7, 30, 35, 47])
    assert len(expected) == NUM_CLUSTERS and features.shape == (48, 64)
    flags = ["--task", "imagefolder", "--data", str(image_folder), "--run", str(run.root)]
    job.main([*flags, "--backbone", "moce", "--protocol", "knn"])
    choice = json.loads((run.transfer("imagefolder") / "choice.json").read_text())
    assert choice["clusters"] == expected


def test_weights_that_changed_since_the_clusters_are_refused(
    run, config, models, image_folder, job, tmp_path
):
    path = tmp_path / "published.pth"
    torch.save({"model": models["mae"].state_dict()}, path)
    with_encoder(run, config, str(path), {"encoder": f"sha256:{file_sha256(path)}"})
    flags = ["--task", "imagefolder", "--data", str(image_folder), "--run", str(run.root)]
    flags += ["--backbone", "moce", "--protocol", "knn"]
    job.main(flags)
    torch.save({"model": models["moce"].state_dict()}, path)
    with pytest.raises(ConfigError, match=rf"cluster\.encoder \({path}\): is not what"):
        job.main(flags)


def test_changed_budget_repeats_only_its_protocol(run, image_folder, job, caplog):
    flags = ["--task", "imagefolder", "--data", str(image_folder), "--backbone", "mae"]
    flags += ["--run", str(run.root), "--protocol", "knn,linear"]
    job.main(flags)
    caplog.set_level("INFO")
    caplog.clear()
    job.main([*flags, "--set", "transfer.linear_epochs=3"])
    assert "linear seed 0" in caplog.text and "knn seed 0" not in caplog.text


def test_changed_checkpoint_repeats_everything(run, image_folder, job, config, models):
    flags = ["--task", "imagefolder", "--data", str(image_folder), "--backbone", "mae"]
    flags += ["--run", str(run.root), "--protocol", "knn"]
    job.main(flags)
    weights = {n: t + 0.01 for n, t in by_global_name(models["mae"], config).items()}
    write_checkpoint(run.stage("mae") / "checkpoints" / "step_00000006", weights)
    job.main(flags)
    assert len((run.transfer("imagefolder") / "results.jsonl").read_text().splitlines()) == 2
    assert len(metrics_of(run, "imagefolder")["results"]) == 1


def test_damaged_checkpoint_is_passed_over(run, image_folder, job, config, models, caplog):
    newer = run.stage("mae") / "checkpoints" / "step_00000006"
    write_checkpoint(newer, by_global_name(models["mae"], config))
    content = bytearray((newer / "shared.safetensors").read_bytes())
    content[-1] ^= 1
    (newer / "shared.safetensors").write_bytes(content)
    flags = ["--task", "imagefolder", "--data", str(image_folder), "--backbone", "mae"]
    job.main([*flags, "--run", str(run.root), "--protocol", "knn"])
    assert "step_00000006" in caplog.text and "damaged" in caplog.text


def test_few_training_images_are_drawn_by_seed(run, image_folder, job):
    flags = ["--task", "imagefolder", "--data", str(image_folder), "--backbone", "mae"]
    flags += ["--run", str(run.root), "--protocol", "knn", "--seeds", "3"]
    job.main([*flags, "--set", "transfer.max_train=8"])
    metrics = metrics_of(run, "imagefolder")
    assert [(r["seed"], r["num_train"]) for r in metrics["results"]] == [(0, 8), (1, 8), (2, 8)]
    assert metrics["summary"][0]["std"] >= 0


def test_what_no_seed_decides_is_measured_once(run, image_folder, job):
    flags = ["--task", "imagefolder", "--data", str(image_folder), "--run", str(run.root)]
    job.main([*flags, "--backbone", "mae,random", "--protocol", "knn", "--seeds", "2"])
    metrics = metrics_of(run, "imagefolder")
    assert [(r["backbone"], r["seed"]) for r in metrics["results"]] == [
        ("mae", 0), ("random", 0), ("random", 1),
    ]  # fmt: skip
    mae, random = metrics["summary"]
    assert mae["std"] is None and random["std"] is not None
    # rows of a protocol that is not asked for now stay
    job.main([*flags, "--backbone", "mae", "--protocol", "logistic2"])
    job.main([*flags, "--backbone", "mae", "--protocol", "linear"])
    protocols = {row["protocol"] for row in metrics_of(run, "imagefolder")["results"]}
    assert protocols == {"knn", "logistic2", "linear"}


def test_segmentation_is_compared_by_the_same_job(run, scene_folder, job):
    job.main(["--task", "ade20k", "--data", str(scene_folder), "--run", str(run.root)])
    metrics = metrics_of(run, "ade20k")
    assert metrics["metric"] == "mIoU"
    assert [(r["backbone"], r["protocol"]) for r in metrics["results"]] == [
        ("moce", "finetune"),
        ("mae", "finetune"),
    ]
    assert all((r["num_train"], r["num_test"]) == (6, 3) for r in metrics["results"])
    written = {p.name for p in (run.transfer("ade20k") / "predictions" / "moce-0").iterdir()}
    assert written == {"scores.json", "0.png", "1.png", "2.png"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "digitz"], "--task digitz: must be one of"),
        ([], "--task: is missing"),
        (["--task", "imagefolder"], "needs --data"),
        (["--task", "imagefolder", "--data", "/nowhere"], "--data /nowhere: is not a folder"),
        (["--task", "digits", "--data", "/tmp"], "leave --data out"),
        (["--task", "digits", "--backbone", "moco"], "--backbone moco: must be one of"),
        (["--task", "digits", "--backbone", "mae,mae"], "distinct names"),
        (["--task", "digits", "--protocol", "svm"], "--protocol svm: must be one of"),
        (["--task", "ade20k", "--protocol", "knn"], "must be one of finetune for ade20k"),
        (
            ["--task", "voc2007", "--protocol", "finetune,logistic10"],
            "--protocol logistic10: must be one of finetune, linear, knn for voc2007",
        ),
        (["--task", "digits", "--seeds", "0"], "--seeds 0: must be at least 1"),
        (
            [
                *("--task", "digits", "--seeds", "2", "--backbone", "moce:validate"),
                *("--set", "transfer.max_train=9"),
            ],
            "--seeds 2: with transfer.max_train, validate would choose by labels",
        ),
        (
            ["--task", "digits", "--set", "parallel.num_workers=64"],
            "parallel.num_workers (64): must be at most 8 to fit digits in steps of 16 images",
        ),
        (["--task", "digits", "--experts", "0"], "must name 2 experts"),
        (["--task", "digits", "--experts", "0,3"], "from 0 to 2"),
        (["--task", "digits", "--experts", "a,b"], "must be whole numbers"),
        (
            ["--task", "digits", "--experts", "0,1", "--backbone", "moce:merge"],
            "not with --experts",
        ),
        (["--task", "digits", "--set", "model.depth=6"], "model.depth"),
        (["--task", "ade20k", "--set", "transfer.segmentation.crop=36"], "multiple of twice"),
        (["--task", "digits", "--bogus"], "--bogus"),
    ],
)
def test_wrong_request_ends_with_one_line_and_status_2(flags, message, run):
    done = transfer(run, *flags)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not (run.root / "transfer").exists()


def test_run_without_the_needed_stage_is_refused(run):
    (run.stage("moce") / "checkpoints").rename(run.root / "elsewhere")
    done = transfer(run, "--task", "digits")
    assert done.returncode == 2 and "moce/checkpoints: is missing" in done.stderr


def test_dry_run_writes_nothing(run):
    done = transfer(run, "--task", "digits", "--dry-run")
    assert done.returncode == 0 and "backbones  moce, mae" in done.stdout
    assert "1000 training, 500 test, 10 classes" in done.stdout
    assert not (run.root / "transfer").exists()


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs" / "transfer").glob("*.yaml")))
def test_recipes_dry_run_without_a_run(
    recipe, job, capsys, scene_folder, image_folder, coco_folder
):
    job.main(["--config", str(recipe), "--dry-run"])
    plan = capsys.readouterr().out
    assert "--data is not given" in plan
    if "task: all" in recipe.read_text():
        assert plan.count("--data is not given") == len(OFFICIAL)
        return
    own = {"ade20k": scene_folder, "coco": coco_folder, "imagefolder": image_folder}
    data = own[plan.split()[1]]
    job.main(["--config", str(recipe), "--dry-run", "--data", str(data)])
    assert f"{data}: " in capsys.readouterr().out


def test_recipe_lies_over_the_runs_configuration(run, image_folder, job, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("transfer:\n  task: imagefolder\n  knn_k: 5\n")
    flags = ["--config", str(recipe), "--data", str(image_folder), "--run", str(run.root)]
    job.main([*flags, "--backbone", "mae", "--protocol", "knn"])
    assert len(metrics_of(run, "imagefolder")["results"]) == 1
    recipe.write_text("data:\n  image_size: 32\n")
    with pytest.raises(ConfigError, match=r"data\.image_size: 16 -> 32"):
        job.main([*flags, "--task", "imagefolder"])


def test_fresh_sets_the_task_aside(run, image_folder, job):
    flags = ["--task", "imagefolder", "--data", str(image_folder), "--backbone", "mae"]
    flags += ["--protocol", "knn", "--run", str(run.root)]
    job.main(flags)
    job.main([*flags, "--fresh"])
    folders = sorted(p.name for p in (run.root / "transfer").iterdir())
    assert folders[0] == "imagefolder" and folders[1].startswith("imagefolder.before-")
    assert (run.root / "config.yaml").exists()


def test_unreadable_image_is_found_by_the_scan(run, image_folder, tmp_path):
    data = tmp_path / "damaged"
    shutil.copytree(image_folder, data)
    bad = data / "test" / "rows" / "005.png"
    bad.write_bytes(bad.read_bytes()[:-40])
    done = transfer(run, "--task", "imagefolder", "--data", str(data))
    assert done.returncode == 2
    assert f"{bad}: unreadable image" in done.stderr


def test_images_of_a_set_too_large_to_scan_are_skipped_and_counted(
    run, image_folder, tmp_path, job, monkeypatch
):
    damaged, without = tmp_path / "damaged", tmp_path / "without"
    for data in (damaged, without):
        shutil.copytree(image_folder, data)
    for name in ("train/rows/002.png", "test/rows/005.png"):
        (damaged / name).write_bytes(b"\x89PNG nothing")
        (without / name).unlink()
    monkeypatch.setattr("moce_dist.transfer.tasks.SCAN_LIMIT_BYTES", 0)

    command = ["--run", str(run.root), "--task", "imagefolder"]

    def rows(data, *flags):
        half = ("--set", "data.max_fault_fraction=0.5")
        job.main([*command, "--data", str(data), "--fresh", *flags, *half])
        return metrics_of(run, "imagefolder")["results"]

    # a share that could not be read leaves no figure: the next attempt may find it well again
    knn = ["--data", str(damaged), "--backbone", "mae", "--protocol", "knn"]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"mae knn seed 0: more images .*max_fault_fraction"):
            job.main([*command, *knn])
    assert not (run.root / "transfer" / "imagefolder" / "metrics.json").exists()
    frozen = ("--backbone", "moce,mae", "--protocol", "knn,linear")
    results = [rows(data, *frozen) for data in (damaged, without)]
    (fit,) = rows(damaged, "--backbone", "mae", "--protocol", "finetune")
    # one in each split; the fit draws its training images once an epoch, some left out
    assert [row.pop("skipped_images") for row in results[0]] == [2] * 4
    assert 1 <= fit["skipped_images"] <= 2
    (summary,) = metrics_of(run, "imagefolder")["summary"]
    assert f"({fit['skipped_images']} images skipped)" in value_text(summary)
    for row in results[0] + results[1]:
        del row["num_train"], row["num_test"]
    assert results[0] == results[1]
    named = {line["key"] for line in read_faults(run.faults)}
    assert {key.rpartition("/")[2] for key in named} >= {"005.png"}
    assert all(key.endswith(("train/rows/002.png", "test/rows/005.png")) for key in named)
