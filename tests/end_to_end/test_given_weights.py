"""Weights that exist go straight to features, clusters, experts and the control."""

import re

import pytest
import torch

from moce_dist.config import load_config, to_yaml
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.run.artefacts import is_complete, read_marker

STAGES = ("ingested", "mae", "features", "clusters", "shards", "moce", "control")


@pytest.fixture
def published(config, tmp_path):
    """A file as the published ones are: an encoder, no decoder."""
    torch.manual_seed(1)
    weights = MaskedAutoencoder(load_config(config)).state_dict()
    kept = {n: t for n, t in weights.items() if not n.startswith(("decoder", "mask_token"))}
    torch.save({"model": kept}, tmp_path / "published.pth")
    return tmp_path / "published.pth"


def test_no_step_of_stage_mae_is_needed(published, run_job, ask, arguments, tmp_path):
    flags = ("parallel.num_workers=1", "mae.epochs=0", f"model.init={published}", "control=true")
    request = arguments(tmp_path / "run", *flags, "moce.epochs=1", "moce.warmup_epochs=0")
    plan = ask("pretrain", *request, "--dry-run").assert_done().out
    assert f"stages     mae (no step, the weights of {published}), cluster, moce, control" in plan
    done = run_job("pretrain", *request).assert_done()
    assert f"mae: no step, the weights of {published} are taken" in done.err
    run = tmp_path / "run"
    for name in STAGES:
        assert is_complete(run / name, read_marker(run / name)["inputs"]), name
    assert [p.name for p in (run / "mae" / "checkpoints").iterdir()] == ["step_00000000"]
    # the file may go once it was taken
    published.unlink()
    again = run_job("pretrain", *request).assert_done()
    assert "training" not in again.err and "mae: complete" in again.err
    shown = run_job("report", run).assert_done().out
    assert re.search(r"MAE loss: taken as given, held-out: \d\.\d+ on \d+ images", shown)


def test_weights_that_are_not_there_or_do_not_fit_are_refused(published, ask, arguments, tmp_path):
    run = tmp_path / "run"
    without = ask("pretrain", *arguments(run, "mae.epochs=0"))
    without.assert_refused(2, "mae.epochs (0) needs model.init")
    missing = arguments(run, "mae.epochs=0", f"model.init={tmp_path}/none.pth")
    ask("pretrain", *missing).assert_refused(2, "model.init", "none.pth): no such file")
    other = arguments(run, "mae.epochs=0", f"model.init={published}", "model.width=64")
    ask("pretrain", *other).assert_refused(2, "model.init", "the configured model needs")
    assert not run.exists()


def test_weights_may_go_once_the_stage_has_a_checkpoint(config, ask, arguments, tmp_path):
    run = tmp_path / "run"
    request = arguments(run, f"model.init={tmp_path}/none.pth")
    run.mkdir()
    overrides = [pair for pair in request if "=" in str(pair)]
    (run / "config.yaml").write_text(to_yaml(load_config(config, overrides)))
    ask("pretrain", *request, "--dry-run").assert_refused(2, "none.pth): no such file")
    checkpoint = run / "mae" / "checkpoints" / "step_00000500"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    ask("pretrain", *request, "--dry-run").assert_done()
    anew = ask("pretrain", *request, "--fresh", "--dry-run")
    anew.assert_refused(2, "none.pth): no such file")
