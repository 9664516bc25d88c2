"""A run whose clusters are made of a timm model's features, from images to a task's ViT."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file

from moce_dist.run.artefacts import read_marker

ENCODER = "timm:test_vit.r160_in1k"


@pytest.fixture(scope="module")
def overrides():
    return (
        f"cluster.encoder={ENCODER}",
        *("parallel.num_workers=1", "mae.epochs=1", "moce.epochs=1", "moce.warmup_epochs=0.5"),
        *("mae.warmup_epochs=0.5", "transfer.max_train=64"),
    )


@pytest.fixture(scope="module")
def environment(timm_hub):
    return {"HF_HOME": str(timm_hub), "HF_HUB_OFFLINE": "1"}


@pytest.mark.long
def test_run_with_an_encoder_of_another_width(tmp_path, run_job, arguments, overrides, environment):
    run = tmp_path / "run"
    flags = arguments(run, *overrides)
    # its features need no MAE
    run_job("pretrain", *flags, "--stage", "cluster", env=environment).assert_done()
    assert not (run / "mae").exists()
    inputs = read_marker(run / "features")["inputs"]
    assert inputs.keys() == {"encoder", "data"} and inputs["encoder"].startswith(ENCODER)
    made = {p: p.stat().st_mtime_ns for p in (run / "features").rglob("*.npy")}
    assert {np.load(path).shape[1] for path in made} == {64}
    done = run_job("pretrain", *flags, env=environment).assert_done()
    assert "features: complete" in done.err
    assert {p: p.stat().st_mtime_ns for p in made} == made
    assert np.load(run / "clusters" / "centroids.npy").shape == (8, 64)
    last = max((run / "moce" / "checkpoints").iterdir())
    weights = {k: t for p in last.glob("*.safetensors") for k, t in load_file(p).items()}
    assert weights["weight/gate.weight"].shape == (2, 4, 64)
    assert weights["weight/blocks.1.mlp.experts.0.fc1.weight"].shape == (128, 32)
    task = ("--task", "digits", "--backbone", "moce", "--protocol", "knn")
    limit = ("--set", "transfer.max_train=64")
    run_job("transfer", *task, "--run", run, *limit, env=environment).assert_done()
    choice = json.loads((run / "transfer" / "digits" / "choice.json").read_text())
    assert choice["num_images"] == 64


def test_encoder_that_does_not_exist_is_refused_before_anything_is_written(
    tmp_path, ask, arguments
):
    name = "timm:no_such_model"
    result = ask("pretrain", *arguments(tmp_path / "run", f"cluster.encoder={name}"))
    result.assert_refused(2, f"cluster.encoder ({name}): is no model of timm's with weights")
    assert not (tmp_path / "run").exists()


def test_dry_run_names_the_encoder(tmp_path, ask, arguments):
    flags = arguments(tmp_path / "run", f"cluster.encoder={ENCODER}")
    assert f"features of {ENCODER}" in ask("pretrain", *flags, "--dry-run").assert_done().out
