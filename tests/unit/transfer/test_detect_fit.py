"""A fit of detection: it learns, goes on bit for bit, is viewed early, saved and used again."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from moce_dist.__main__ import main
from moce_dist.config import TransferConfig
from moce_dist.model.customize import customize
from moce_dist.run.files import read_faults, read_jsonl
from moce_dist.settings import ConfigError
from moce_dist.transfer import fit as loop
from moce_dist.transfer.backbone import Backbone, run_backbone
from moce_dist.transfer.detection.finding import evaluate
from moce_dist.transfer.detection.fit import (
    Squares,
    make_loss,
    make_model,
    split_targets,
    stack_squares,
)
from moce_dist.transfer.detection.fit import fit as fit_detector
from moce_dist.transfer.detection.precision import average_precision, ground_truth
from moce_dist.transfer.detection.task import Detection
from moce_dist.transfer.fit import Kept, Trial
from moce_dist.transfer.loading import machine_of
from moce_dist.transfer.predict import load_model
from moce_dist.transfer.skips import record_skips
from moce_dist.transfer.training import Objective, cut_batch


class DetectorFit(NamedTuple):
    """A task and how it is to be learnt."""

    task: Detection
    trial: Trial

    def squares(self) -> Squares:
        return Squares(self.task, self.trial.transfer.detection, 0)


MakeFit = Callable[..., DetectorFit]


class KilledError(Exception):
    """Stands for the end of the process."""


class Fitted(NamedTuple):
    """A fit that found something: its figures, and the folder of its models and of its output."""

    figures: dict[str, Any]
    models: Path
    out: Path
    ledger: Path


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def backbone(config, models) -> Backbone:
    return run_backbone("mae", config, customize(models["mae"].state_dict(), ()))


@pytest.fixture(scope="module")
def make_fit(backbone, config, coco_folder) -> MakeFit:
    def make(data: Path = coco_folder, **changes: Any) -> DetectorFit:
        recipe = config.transfer.detection.model_copy(update=changes)
        trial = Trial(
            *(backbone, TransferConfig(detection=recipe), machine_of(config)),
            *("finetune", 0, coco_folder),
        )
        return DetectorFit(Detection.read("coco", data), trial)

    return make


def detect(
    fit: DetectorFit, *, seed: int, out: Path, ledger: Path, kept: Kept | None = None
) -> dict[str, Any]:
    """Fit a detector and note what it skipped; return its figures."""
    found = fit_detector(fit.task, replace(fit.trial, seed=seed, out=out, kept=kept))
    record_skips(ledger, found.skipped)
    return dict(found.figures)


@pytest.fixture(scope="module")
def fitted(make_fit, tmp_path_factory) -> Fitted:
    fit = make_fit(
        **{"steps": 90, "batch_size": 4, "lr": 3e-3, "rois": 32},
        **{"scale_min": 0.8, "scale_max": 1.25, "channels": 16},
        **{"drop_path": 0.0, "anchor_strides": 6.0, "window": 7},
    )
    root = tmp_path_factory.mktemp("fitted")
    kept = Kept(root / "models", "a", 1000, 60)
    ledger = root / "faults.jsonl"
    return Fitted(
        detect(fit, seed=0, out=root / "out", ledger=ledger, kept=kept),
        *(kept.folder, root / "out", ledger),
    )


def said(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    main(["predict", *words])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last" / "model.safetensors")


def are_equal(some: Path, other: Path) -> bool:
    found, reference = weights(some), weights(other)
    assert found.keys() == reference.keys()
    return all(torch.equal(found[name], reference[name]) for name in reference)


def kill_before(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    whole = loop.seed_step

    def seed_step(seed: int, number: int) -> None:
        if number == step:
            raise KilledError
        whole(seed, number)

    monkeypatch.setattr(loop, "seed_step", seed_step)


def test_training_finds_bright_objects(fitted):
    assert fitted.figures["box"]["AP50"] > 0.4 and fitted.figures["mask"]["AP50"] > 0.3
    # objects are smaller than 32 x 32
    assert fitted.figures["box"]["AP large"] is None
    written = json.loads((fitted.out / "scores.json").read_text())
    assert written == {**fitted.figures, "skipped_images": 0}
    preview = np.asarray(Image.open(fitted.out / "000000000000.png"))
    assert preview.shape == (40 * 8, 2 * 56 * 8, 3)


def test_views_lead_to_the_measured_model(fitted):
    lines = read_jsonl(fitted.models / "views.jsonl")
    assert [line["step"] for line in lines] == [60, 90]
    assert lines[-1]["value"] == fitted.figures["box"]["AP"]
    assert lines[-1]["measures"]["mask AP50"] == fitted.figures["mask"]["AP50"]
    # figures without objects are no numbers, and are left out
    assert "box AP large" not in lines[-1]["measures"]
    best = json.loads((fitted.models / "best" / "config.json").read_text())["moce_dist"]["about"]
    assert best["box AP"] == max(line["value"] for line in lines)
    assert {p.name for p in fitted.models.iterdir()} == {"views.jsonl", "best", "last"}


def test_saved_detector_scores_what_the_fit_measured(fitted, make_fit, tmp_path):
    fit = make_fit()
    model, spec = load_model(fitted.models / "last")
    assert (spec.kind, list(spec.classes)) == ("detect", ["yellow", "red"])
    found = evaluate(model, fit.task, fit.trial.machine, tmp_path)
    for kind, values in fitted.figures.items():
        assert values == pytest.approx(
            {n: None if v != v else v for n, v in found.figures[kind].items()}, abs=0
        )


def test_interrupted_detection_ends_bit_equal(make_fit, coco_folder, tmp_path, monkeypatch):
    """Weights, figures, views and skipped images are those of a fit that nothing interrupted."""
    data = Path(shutil.copytree(coco_folder, tmp_path / "data"))
    fit = make_fit(data, steps=7)
    (data / "train2017" / "000000000002.jpg").write_bytes(b"\xff\xd8 nothing")
    (data / "val2017" / "000000000001.jpg").write_bytes(b"")

    def run(name: str) -> dict[str, Any]:
        kept = Kept(tmp_path / name / "models", "a", 2, 3)
        out, ledger = tmp_path / name / "out", tmp_path / name / "faults.jsonl"
        return detect(fit, seed=1, out=out, ledger=ledger, kept=kept)

    expected = run("whole")
    with monkeypatch.context() as patched, pytest.raises(KilledError):
        kill_before(patched, 5)
        run("parts")
    assert (tmp_path / "parts" / "models" / "state.safetensors").is_file()
    done: list[int] = []
    monkeypatch.setattr(loop, "seed_step", lambda s, n, f=loop.seed_step: (done.append(n), f(s, n)))
    assert run("parts") == expected
    assert done == [4, 5, 6]
    parts, whole = (tmp_path / name for name in ("parts", "whole"))
    assert are_equal(parts / "models", whole / "models")
    for name in ("models/views.jsonl", "out/scores.json"):
        assert (parts / name).read_text() == (whole / name).read_text()
    keys = [[f["key"] for f in read_faults(at / "faults.jsonl")] for at in (parts, whole)]
    assert keys[0] == keys[1] and set(keys[0]) == {
        *("train2017/000000000002.jpg", "val2017/000000000001.jpg")
    }
    names = {path.name for path in (parts / "models").iterdir()}
    assert names == {"views.jsonl", "best", "last"}


def test_early_views_change_nothing_and_seeds_do(make_fit, tmp_path):
    fit = make_fit(steps=3)

    def run(name: str, seed: int, view_every: int | None) -> Path:
        kept = Kept(tmp_path / name, "a", 100, view_every)
        detect(fit, seed=seed, out=tmp_path, ledger=tmp_path / "faults.jsonl", kept=kept)
        return kept.folder

    plain = run("plain", 0, None)
    assert are_equal(run("viewed", 0, 1), plain)
    assert not are_equal(run("other", 1, None), plain)


def test_parts_of_a_batch_add_up(make_fit):
    fit = make_fit(batch_size=4, drop_path=0.0)
    model, squares = make_model(*fit), fit.squares()
    alone = [squares[0, i] for i in range(4)]
    images, (joined, counts), *_ = stack_squares(alone)
    targets = split_targets(joined, counts)
    for target, square in zip(targets, alone, strict=True):
        assert target.keys() == square.label.keys()
        assert all(target[name].equal(square.label[name]) for name in target)
    # with every proposal taken, nothing of the heads' draws is left to chance
    model.rpn.fg_bg_sampler.batch_size_per_image = 10**6
    model.roi_heads.fg_bg_sampler.batch_size_per_image = 10**6
    loss_of = make_loss(model, fit.trial.machine.device)
    parts = [loss_of(images[i : i + 1], targets[i : i + 1]).detach() for i in range(4)]
    cut = list(cut_batch((images, targets), 4, len))
    whole = torch.stack([loss_of(*part).detach() * weight / 4 for *part, weight in cut]).sum()
    torch.testing.assert_close(whole, torch.stack(parts).mean())


def test_only_the_pyramid_runs_in_bfloat16(make_fit):
    fit = make_fit()
    machine = replace(fit.trial.machine, bf16=True)
    model, squares = make_model(fit.task, replace(fit.trial, machine=machine)), fit.squares()
    kinds: dict[str, torch.dtype] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, __, output: kinds.update({name: output.dtype})

    model.backbone.vit.blocks[0].mlp.fc1.register_forward_hook(note("vit"))
    model.roi_heads.box_head.register_forward_hook(note("head"))
    images, targets, *_ = stack_squares([squares[0, 0]])
    loss_of = make_loss(model, machine.device)
    Objective(model, loss_of, machine)(images, split_targets(*targets))
    assert kinds == {"vit": torch.bfloat16, "head": torch.float32}


def test_damaged_images_are_skipped_counted_and_named(make_fit, coco_folder, tmp_path):
    data = Path(shutil.copytree(coco_folder, tmp_path / "data"))
    fit = make_fit(data, steps=3, batch_size=6)
    (data / "train2017" / "000000000002.jpg").write_bytes(b"\xff\xd8 nothing")
    (data / "val2017" / "000000000001.jpg").write_bytes(b"")
    ledger = tmp_path / "faults.jsonl"
    figures = detect(fit, seed=0, out=tmp_path / "out", ledger=ledger)
    faults = read_faults(ledger)
    assert [f["key"] for f in faults] == 3 * ["train2017/000000000002.jpg"] + [
        "val2017/000000000001.jpg"
    ]
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["skipped_images"] == 2
    assert figures["box"]["AP"] is not None
    for path in (data / "train2017").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"train2017/.*: image is empty; nor can any"):
        detect(fit, seed=0, out=tmp_path / "out", ledger=ledger)


def test_predicted_objects_are_those_of_the_evaluation(
    fitted, make_fit, coco_folder, tmp_path, capsys
):
    """Scored by COCO's evaluator, the lines give the figures that the fit reports, to the bit."""
    model, some_images = str(fitted.models / "last"), str(coco_folder / "val2017")
    found = said(capsys, model, some_images, "--min-score", "0")
    lines = {Path(line["image"]): line["objects"] for line in found}
    instances = make_fit().task
    ids = dict(zip(instances.classes, instances.category_ids, strict=True))
    entries: list[dict[str, Any]] = []
    assert len(lines) == len(instances.test)
    for some_image in instances.test:
        scores = [each["score"] for each in lines[some_image.image]]
        assert scores == sorted(scores, reverse=True)
        for each in lines[some_image.image]:
            width, height = each["box"][2:]
            assert each["mask"]["size"] == [some_image.height, some_image.width]
            entry = {"image_id": some_image.id, "category_id": ids[each["name"]]}
            entry |= {"score": each["score"], "bbox": each["box"], "area": width * height}
            entries.append({**entry, "segmentation": each["mask"]})
    truth = ground_truth(instances.test, instances)
    boxes = average_precision(truth, entries, "bbox")
    assert all(boxes[name] == v for name, v in fitted.figures["box"].items() if v is not None)
    masks = average_precision(truth, entries, "segm")
    assert masks["AP"] == fitted.figures["mask"]["AP"]


def test_sure_objects_are_drawn_as_the_fit_draws_them(fitted, coco_folder, tmp_path, capsys):
    model, some_images = str(fitted.models / "last"), str(coco_folder / "val2017")
    sure = said(capsys, model, some_images, "--out", str(tmp_path))
    every = said(capsys, model, some_images, "--min-score", "0")
    assert sum(len(line["objects"]) for line in sure) > 0
    for line, full in zip(sure, every, strict=True):
        assert line["objects"] == [o for o in full["objects"] if o["score"] >= 0.5]
        drawn = np.asarray(Image.open(line["drawn"]))
        preview = np.asarray(Image.open(fitted.out / Path(line["drawn"]).name))
        assert np.array_equal(drawn, preview[:, : drawn.shape[1]])
    assert "drawn" not in every[0]


def test_unreadable_image_has_a_line_and_the_others_go_on(fitted, coco_folder, tmp_path, capsys):
    data = Path(shutil.copytree(coco_folder / "val2017", tmp_path / "data"))
    (data / "000000000001.jpg").write_bytes(b"nothing")
    capsys.readouterr()
    with pytest.raises(RuntimeError, match="1 of 3 images could not be read"):
        main(["predict", str(fitted.models / "last"), str(data)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [("error" in line) for line in lines] == [False, True, False]


def test_what_a_detector_cannot_do_is_one_line(fitted, coco_folder, tmp_path):
    model = fitted.models / "last"
    image = tmp_path / "a.png"
    Image.new("RGB", (40, 30)).save(image)
    for words, message in (
        (["predict", str(model), str(image), "--min-score", "1.5"], "--min-score 1.5: must be"),
        (["predict", str(model), str(image), "--out", str(tmp_path)], "is one of the images"),
        (["predict", str(fitted.models), str(image)], "holds no last model"),
        (["onnx", str(model), "--out", str(tmp_path / "m.onnx")], "is a detector, which onnx does"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(words)
    other = Path(shutil.copytree(model, tmp_path / "model"))
    text = (other / "config.json").read_text()
    for change, message in (
        (("detect", "dream"), r"config\.json: describes no model .*unknown kind dream"),
        (('"channels": 16', '"channels": 8'), r"model\.safetensors: .*size mismatch"),
        (('"architecture": "vit', '"architecture": "vat'), r"config\.json: describes no model"),
    ):
        assert change[0] in text
        (other / "config.json").write_text(text.replace(*change))
        with pytest.raises(ConfigError, match=message):
            main(["predict", str(other), str(image)])
