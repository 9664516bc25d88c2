"""The loop of a fit: interrupted and resumed bit for bit, viewed early, kept on disk."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pulses import RecordedPulse
from safetensors.torch import load_file
from torch.utils.data import Dataset

from moce_dist.config import FinetuneConfig
from moce_dist.model.customize import customize
from moce_dist.settings import ConfigError
from moce_dist.transfer import fit
from moce_dist.transfer.backbone import Backbone, run_backbone
from moce_dist.transfer.classification.finetune import LabelMixup
from moce_dist.transfer.classification.task import Classification
from moce_dist.transfer.fit import Fitted, Kept
from moce_dist.transfer.loading import Unread, machine_of
from moce_dist.transfer.predict import load_model
from moce_dist.transfer.segmentation.task import Segmentation
from moce_dist.transfer.skips import Skips
from moce_dist.transfer.training import Trainer, cut_batch

from .conftest import finetune, segment

RECIPE = FinetuneConfig(epochs=4, batch_size=16, warmup_epochs=1)


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def backbone(config, models) -> Backbone:
    return run_backbone("mae", config, customize(models["mae"].state_dict(), ()))


def kill_before(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    whole = fit.seed_step

    def seed_step(seed: int, number: int) -> None:
        if number == step:
            raise KilledError
        whole(seed, number)

    monkeypatch.setattr(fit, "seed_step", seed_step)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last" / "model.safetensors")


def test_interrupted_finetuning_ends_bit_equal(
    config, backbone, image_folder, tmp_path, monkeypatch
):
    task, machine = Classification.open("imagefolder", image_folder), machine_of(config)
    whole, parts = (Kept(tmp_path / name, "a", 4, None) for name in ("whole", "parts"))
    expected = finetune(backbone, task, RECIPE, machine, seed=1, kept=whole)
    with monkeypatch.context() as patched, pytest.raises(KilledError):
        kill_before(patched, 7)
        finetune(backbone, task, RECIPE, machine, seed=1, kept=parts)
    assert [p.name for p in parts.folder.iterdir()] == ["state.safetensors"]
    done = []
    monkeypatch.setattr(fit, "seed_step", lambda s, n, f=fit.seed_step: (done.append(n), f(s, n)))
    assert finetune(backbone, task, RECIPE, machine, seed=1, kept=parts) == expected
    assert done == list(range(4, 12))
    found, reference = weights(parts.folder), weights(whole.folder)
    assert all(torch.equal(found[name], reference[name]) for name in reference)
    assert not (parts.folder / "state.safetensors").exists()


def test_interrupted_segmentation_ends_bit_equal(
    config, backbone, scene_folder, tmp_path, monkeypatch
):
    scenes, machine = Segmentation.read("ade20k", scene_folder), machine_of(config)

    def run(name: str) -> Fitted:
        kept = Kept(tmp_path / name, "a", 2, None)
        out = tmp_path / "out"
        return segment(
            backbone, scenes, config.transfer.segmentation, machine, seed=0, out=out, kept=kept
        )

    expected = run("whole")
    with monkeypatch.context() as patched, pytest.raises(KilledError):
        kill_before(patched, 3)
        run("parts")
    assert run("parts") == expected
    found, reference = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], reference[name]) for name in reference)


@pytest.mark.parametrize("how", ["other conditions", "damaged"])
def test_state_that_does_not_fit_is_passed_over(
    how, config, backbone, image_folder, tmp_path, monkeypatch, caplog
):
    task, machine = Classification.open("imagefolder", image_folder), machine_of(config)
    kept = Kept(tmp_path / "fit", "a", 2, None)
    expected = finetune(backbone, task, RECIPE, machine, seed=1)
    with monkeypatch.context() as patched, pytest.raises(KilledError):
        kill_before(patched, 5)
        finetune(backbone, task, RECIPE, machine, seed=1, kept=kept)
    if how == "damaged":
        state = kept.folder / "state.safetensors"
        state.write_bytes(state.read_bytes()[:100])
    else:
        kept = replace(kept, identity="b")
    assert finetune(backbone, task, RECIPE, machine, seed=1, kept=kept) == expected
    assert "starting anew" in caplog.text


def test_every_step_is_watched_and_no_save_or_view(config, backbone, image_folder, tmp_path):
    task, pulse = Classification.open("imagefolder", image_folder), RecordedPulse()
    kept = Kept(tmp_path, "a", 5, 4, pulse=pulse)
    finetune(backbone, task, RECIPE, machine_of(config), seed=1, kept=kept)
    # views are at multiples of 4, saves at 5 and 10, and the last view is the result
    breaks = {4, 5, 8, 10}
    expected = ["resume"]
    for step in range(12):
        expected += [*(["rest", "resume"] if step in breaks else []), step]
    assert pulse.told == [*expected, "rest"]


def test_early_views_change_nothing_and_keep_the_best(config, backbone, image_folder, tmp_path):
    task, machine = Classification.open("imagefolder", image_folder), machine_of(config)
    plain = Kept(tmp_path / "plain", "a", 100, None)
    viewed = Kept(tmp_path / "viewed", "a", 100, 3)
    expected = finetune(backbone, task, RECIPE, machine, seed=2, kept=plain)
    assert finetune(backbone, task, RECIPE, machine, seed=2, kept=viewed) == expected
    lines = [json.loads(x) for x in (viewed.folder / "views.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert lines[-1]["value"] == expected.measures["accuracy"]
    found, reference = weights(viewed.folder), weights(plain.folder)
    assert all(torch.equal(found[name], reference[name]) for name in reference)
    best = json.loads((viewed.folder / "best" / "config.json").read_text())["moce_dist"]["about"]
    assert best["accuracy"] == max(line["value"] for line in lines)
    assert best["step"] == next(x["step"] for x in lines if x["value"] == best["accuracy"])


def test_nothing_is_kept_when_models_are_not_wanted(config, backbone, image_folder, tmp_path):
    task, machine = Classification.open("imagefolder", image_folder), machine_of(config)
    kept = Kept(tmp_path / "fit", "a", 100, None, models=False)
    finetune(backbone, task, RECIPE, machine, seed=2, kept=kept)
    assert not (tmp_path / "fit" / "last").exists()


def test_test_images_of_which_none_can_be_read_end_the_fit(config, backbone, image_folder):
    task = Classification.open("imagefolder", image_folder)
    lost = [item._replace(content=Path("gone.png")) for item in task.test]
    with pytest.raises(ValueError, match="nor can any other be read"):
        finetune(backbone, replace(task, test=lost), RECIPE, machine_of(config), seed=1)


def test_skips_behind_a_state_are_met_again(config, tmp_path):
    machine, kept = machine_of(config), Kept(tmp_path, "a", 4, None)
    skips = Skips(machine, kept)
    for step in range(6):
        skips.note(step, [None, Unread(f"{step}.png", "empty")])
    again = Skips(machine, kept)
    again.start(4)
    assert [line["step"] for line in again.lines] == [0, 1, 2, 3]
    # what a repaired image was skipped for is no longer known to a third start
    third = Skips(machine, kept)
    third.start(6)
    assert third.lines == again.lines == third.close()
    assert not (tmp_path / "skipped.jsonl").exists()


@pytest.mark.parametrize("warmup", [0.5, 1, 1.5])
def test_a_warm_up_that_is_not_shorter_than_the_fit_is_warned_of(
    warmup, config, backbone, image_folder, caplog
):
    task = Classification.open("imagefolder", image_folder).subset(16, 0)
    recipe = FinetuneConfig(epochs=1, batch_size=16, warmup_epochs=warmup)
    finetune(backbone, task, recipe, machine_of(config), seed=0)
    said = [r.getMessage() for r in caplog.records if "warmup_epochs" in r.getMessage()]
    if warmup < 1:
        assert said == []
        return
    (line,) = said
    assert "\n" not in line
    assert f"transfer.finetune.warmup_epochs ({warmup:g}) is not below" in line
    assert "transfer.finetune.epochs (1)" in line


def test_several_labels_are_learnt_and_mixed(config, backbone, image_folder, tmp_path):
    single = Classification.open("imagefolder", image_folder)

    def several(items):
        return [item._replace(label=(item.label, 1 - item.label)) for item in items]

    task = replace(single, train=several(single.train), test=several(single.test), metric="mAP")
    recipe = FinetuneConfig(
        **{"epochs": 12, "batch_size": 16, "warmup_epochs": 2, "mixup": 0.1, "cutmix": 0.0},
        **{"base_lr": 0.03, "crop_scale_min": 0.5, "drop_path": 0.0, "layer_decay": 0.9},
    )
    kept = Kept(tmp_path / "fit", "a", 100, None)
    found = finetune(backbone, task, recipe, machine_of(config), seed=0, kept=kept).measures
    assert found["mAP"] > 0.8 and found.keys() >= {"mAP_all_points", "mAP_uninterpolated"}
    assert load_model(kept.folder / "last")[1].is_multi_label


def test_mixed_labels_are_weighted_and_those_not_counted_stay_so():
    np.random.seed(0)
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    labels = torch.tensor([[1, 0, -1, 1], [0, 0, 1, 1]])
    mixer = LabelMixup(mixup_alpha=1.0, cutmix_alpha=0.0, num_classes=4)
    mixed, targets = mixer(images.clone(), labels)
    share = 1 - float(mixed[0, 0, 0, 0])
    assert 0 < share < 1
    torch.testing.assert_close(targets[0], torch.tensor([share, 0, -1, 1]))
    torch.testing.assert_close(targets[1], torch.tensor([1 - share, 0, -1, 1]))


def test_batch_is_cut_into_as_many_parts_as_all_ranks_take():
    inputs, targets = torch.arange(5), list("abcde")
    cut = [(x.tolist(), y, n) for x, y, n in cut_batch((inputs, targets), 3, len)]
    assert cut == [([0], ["a"], 1), ([1, 2], ["b", "c"], 2), ([3, 4], ["d", "e"], 2)]
    repeated = [(x.tolist(), n) for x, _, n in cut_batch((inputs[:1], targets[:1]), 2, len)]
    assert repeated == [([0], 0), ([0], 1)]


def test_blocks_cannot_be_prepared_where_there_are_none(config):
    parallel = config.parallel.model_copy(update={"activation_checkpointing": True})
    machine = replace(machine_of(config), parallel=parallel)
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    with pytest.raises(ConfigError, match=r"parallel\.activation_checkpointing .* no ViT blocks"):
        Trainer("a fit", net, torch.nn.functional.mse_loss, optimizer, machine)


class Slow(Dataset):
    """One image that never comes."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        time.sleep(600)


def test_a_fit_notices_that_its_loader_stands_still(config):
    data = config.data.model_copy(
        update={"loader_processes": 1, "stall_timeout_s": 1.5, "prefetch_batches": 1}
    )
    machine = machine_of(config.model_copy(update={"data": data}))
    with pytest.raises(RuntimeError, match=r"nothing for data\.stall_timeout_s \(1\.5 s\)"):
        list(machine.load(Slow(), batch_size=1))
