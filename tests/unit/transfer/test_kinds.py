"""A new kind of task is a class, three functions and an entry of the table."""

import json
from dataclasses import dataclass

import pytest
import torch

from moce_dist.__main__ import main
from moce_dist.run.artefacts import fingerprint
from moce_dist.run.files import read_faults
from moce_dist.settings import ConfigError
from moce_dist.transfer import kinds
from moce_dist.transfer.fit import Fitted
from moce_dist.transfer.saved import dense_spec, save_model
from moce_dist.transfer.tasks import Item, Task

FITS = []


@dataclass(frozen=True)
class Brightness(Task):
    """Bright and dark images, told apart at a glance."""

    kind = "glance"
    names = ("brightness",)
    protocols = ("glance",)

    metric: str = "hits"

    @classmethod
    def read(cls, name, data):
        if data is None:
            raise ConfigError(f"--task {name}: needs --data")
        items = [Item(path.name, path) for path in sorted(data.rglob("*.png"))]
        return cls(name, ["dark", "bright"], items[::2], items[1::2])

    @classmethod
    def check(cls, config):
        if config.transfer.knn_k > 100:
            raise ConfigError("transfer.knn_k: too many for a glance")

    @classmethod
    def budget(cls, transfer, protocol):
        return {"knn_k": transfer.knn_k}

    @classmethod
    def plan(cls, transfer):
        return "a glance"

    @classmethod
    def batch_size(cls, transfer):
        return 1

    def fingerprint(self):
        return fingerprint([item.key for item in self.train])

    def images(self):
        return list(self.train)

    def scan(self, *, threads):
        return [f"{len(self.train)} images were glanced at"]


def fit(task, trial):
    FITS.append((trial.backbone.name, trial.seed))
    model = trial.backbone.features_model(trial.seed)
    spec = dense_spec(trial.backbone, task, trial.backbone.image_size, blinks=3)
    save_model(trial.kept.folder / "last", model, spec, {})
    skipped = [{"key": task.test[0].key, "reason": "dull"}]
    return Fitted({"hits": 0.75, "misses": 0.25}, skipped, {"blinks": 3})


def build(spec):
    assert spec.options == {"blinks": 3}
    return spec.vit()


def predict(model, spec, images, options):
    pixels = torch.zeros(1, 3, spec.image_size, spec.image_size)
    for item in images:
        yield {"image": item.key, "width": model(pixels).shape[1], "top": options.top}


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(kinds, "KINDS", [*kinds.KINDS, (Brightness, __name__)])


def test_a_new_kind_is_compared_exported_and_used(
    table, run, job, image_folder, config, tmp_path, capsys
):
    flags = ["--run", str(run.root), "--task", "brightness", "--data", str(image_folder)]
    flags += ["--backbone", "moce,mae", "--seeds", "2"]
    job.main([*flags, "--dry-run"])
    assert "budget     a glance\n" in capsys.readouterr().out
    for _ in range(2):
        job.main(flags)
        assert "36 images were glanced at\n" in capsys.readouterr().out
    assert sorted(FITS) == [("mae", 0), ("mae", 1), ("moce", 0), ("moce", 1)]
    folder = run.transfer("brightness")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["metric"] == "hits" and len(metrics["results"]) == 4
    row = metrics["results"][0]
    assert (row["value"], row["measures"]["misses"], row["blinks"]) == (0.75, 0.25, 3)
    assert (row["num_train"], row["num_test"], row["skipped_images"]) == (36, 36, 1)
    assert "dull" in {fault["reason"] for fault in read_faults(run.faults)}
    assert (folder / "backbone" / "model.safetensors").is_file()
    image = next(image_folder.rglob("*.png"))
    main(["predict", str(folder), str(image), "--top", "7"])
    line = json.loads(capsys.readouterr().out)
    assert line == {"image": image.name, "width": config.model.shape.width, "top": 7}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--protocol", "knn"], "--protocol knn: must be one of glance for brightness"),
        (["--backbone", "moce:validate"], "brightness has no classes"),
        (["--set", "transfer.knn_k=101"], "too many for a glance"),
        (["--task", "darkness"], "--task darkness: must be one of .*coco, brightness"),
    ],
)
def test_what_a_new_kind_does_not_take_is_one_line(table, flags, message, run, job):
    with pytest.raises(ConfigError, match=message):
        job.main(["--run", str(run.root), "--task", "brightness", *flags])


def test_a_model_of_a_kind_that_is_not_there_is_refused(table, run, job, image_folder, monkeypatch):
    flags = ["--run", str(run.root), "--task", "brightness", "--data", str(image_folder)]
    job.main([*flags, "--backbone", "mae"])
    monkeypatch.undo()
    with pytest.raises(
        ConfigError, match=r"config\.json: describes no model \(unknown kind glance"
    ):
        main(["predict", str(run.transfer("brightness")), str(image_folder)])
