"""Choice by evidence: folds, a planted best, and test images that nobody looks at."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from moce_dist.model.customize import customize
from moce_dist.run.artefacts import mark_complete
from moce_dist.settings import ConfigError
from moce_dist.transfer.backbone import Backbone, run_backbone
from moce_dist.transfer.choosing import Chooser
from moce_dist.transfer.classification.task import Classification
from moce_dist.transfer.loading import machine_of
from moce_dist.transfer.request import Request
from moce_dist.transfer.select import folds_of, score_folds, try_candidates
from moce_dist.transfer.tasks import Item

from .conftest import by_global_name, write_checkpoint


@pytest.fixture
def task(image_folder) -> Classification:
    return Classification.open("imagefolder", image_folder)


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Keys of all items that are read."""
    keys, original = [], Item.read

    def recorded(item: Item) -> bytes:
        keys.append(item.key)
        return original(item)

    monkeypatch.setattr(Item, "read", recorded)
    return keys


def blind(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model that sees no image: every one has the same features."""
    return {n: torch.zeros_like(t) if "patch_embed" in n else t for n, t in weights.items()}


def candidates(config, models) -> list[Backbone]:
    sees = customize(models["mae"].state_dict(), ())
    names = {"first": blind(sees), "planted": sees, "last": blind(sees)}
    return [run_backbone(name, config, weights) for name, weights in names.items()]


def tried(config, models, task, **transfer) -> list[dict]:
    transfer = config.transfer.model_copy(update=transfer)
    config = config.model_copy(update={"transfer": transfer})
    return try_candidates(candidates(config, models), task, config, machine_of(config))


@pytest.mark.parametrize("by", ["knn", "linear"])
def test_the_planted_best_is_found(by, config, models, task):
    scores = tried(config, models, task, validate_by=by)
    assert scores[0]["name"] == "planted" and scores[0]["mean"] > 0.8
    assert [each["name"] for each in scores[1:]] == ["first", "last"]
    assert scores[1]["mean"] < 0.7 and len(scores[0]["folds"]) == 5


def test_no_test_image_is_read(config, models, task, read):
    tried(config, models, task)
    assert set(read) == {item.key for item in task.train}
    read.clear()
    # planted: a task whose test images lie among its training images
    tried(config, models, replace(task, train=[*task.train, *task.test]))
    assert any(key.startswith("test/") for key in read)


@pytest.mark.parametrize("limit", ["max_train", "validate_images"])
def test_no_more_labels_are_seen_than_are_allowed(limit, config, models, task, read):
    tried(config, models, task, **{limit: 6})
    assert set(read) == {item.key for item in task.subset(6, config.seed).train}


def test_a_single_image_is_refused_in_words(config, models, task):
    with pytest.raises(ValueError, match="validate needs two training images"):
        tried(config, models, task, max_train=1)


def test_labels_of_other_folds_alone_judge_a_fold(config, task):
    # features that tell the image itself and nothing else: whoever saw it would know its label
    draws = torch.Generator().manual_seed(0)
    features, labels = torch.randn(400, 64, generator=draws), torch.arange(400) % 2
    scores = score_folds(
        features, labels, task, config.transfer, seed=0, device=torch.device("cpu")
    )
    assert len(scores) == 5 and abs(np.mean(scores) - 0.5) < 0.1
    twice = torch.cat([features, features])
    seen = score_folds(
        twice, labels.repeat(2), task, config.transfer, seed=0, device=torch.device("cpu")
    )
    assert np.mean(seen) > 0.7


def test_folds_are_seeded_and_share_out_every_class():
    labels = torch.tensor([0] * 10 + [1] * 5)
    folds = folds_of(labels, 5, 0)
    assert np.bincount(folds[:10]).tolist() == [2] * 5 and sorted(folds[10:]) == [0, 1, 2, 3, 4]
    assert folds.tolist() == folds_of(labels, 5, 0).tolist() != folds_of(labels, 5, 1).tolist()


def test_job_chooses_by_folds_and_by_name_in_one_table(
    run, config, models, image_folder, job, read
):
    folder = run.transfer("imagefolder")
    command = ["--run", str(run.root), "--task", "imagefolder", "--data", str(image_folder)]
    names = "moce,moce:validate,moce:merge,moce:mismatched"
    job.main([*command, "--backbone", names, "--protocol", "knn"])
    metrics = json.loads((folder / "metrics.json").read_text())
    made_of = {row["backbone"]: row["choice"] for row in metrics["results"]}
    assert list(made_of) == names.split(",")
    chosen = json.loads((folder / "choice-validate.json").read_text())
    assert {each["name"] for each in chosen["candidates"]} == {
        *("vote", "largest_cluster", "merge, T = 0.5", "merge, T = 1", "merge, T = 2", "average"),
        "extrapolate",
    }
    assert chosen["chosen"] == chosen["candidates"][0]["name"]
    assert "averaged by the weights" in (folder / "backbone-merge" / "README.md").read_text()

    # a control that sees, where the experts' model does not
    sees, moce = by_global_name(models["mae"], config), by_global_name(models["moce"], config)
    write_checkpoint(run.stage("control") / "checkpoints" / "step_00000005", sees)
    mark_complete(run.stage("control"), {}, [])
    write_checkpoint(run.stage("moce") / "checkpoints" / "step_00000006", blind(moce))
    job.main([*command, "--backbone", "moce:validate", "--protocol", "knn"])
    chosen = json.loads((folder / "choice-validate.json").read_text())
    assert chosen["chosen"] == "control" and chosen["layers"] == []
    card = (folder / "backbone-validate" / "README.md").read_text()
    assert "No experts: the dense control" in card and "control/step_00000005" in card


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "digits", "--backbone", "moce:best"], "must be moce:vote or moce:largest"),
        (["--task", "ade20k", "--backbone", "moce:validate"], "has no classes"),
        (["--task", "coco", "--set", "transfer.select=validate"], "has no classes"),
    ],
)
def test_selections_that_cannot_be_are_refused(flags, message, run, job):
    with pytest.raises(ConfigError, match=message):
        job.main([*flags, "--run", str(run.root)])


def test_a_stage_that_still_trains_may_delete_the_checkpoint_that_was_chosen(run, config, task):
    request = Request("imagefolder", None, ("moce",), ("knn",), 1, None)
    chooser = Chooser(request, run, config, task, machine_of(config))
    shutil.rmtree(run.stage("moce") / "checkpoints")
    assert len(chooser.choice()["layers"]) == 2
    # what no backbone needs, or what cannot go any more, is read when it is needed
    assert "weights" not in vars(chooser.stages["mae"])
    mark_complete(run.stage("moce"), {}, [])
    write_checkpoint(
        run.stage("moce") / "checkpoints" / "step_00000006", dict(chooser.stage("moce").weights)
    )
    later = Chooser(request, run, config, task, machine_of(config))
    assert "weights" not in vars(later.stages["moce"])
