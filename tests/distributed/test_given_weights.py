"""Stage mae without a step: the weights that it was given are its checkpoint, bit for bit."""

import socket

import pytest
import torch

from moce_dist.config import make_config
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.run.files import read_jsonl
from moce_dist.train.checkpoint import latest_checkpoint, load_weights, read_manifest
from moce_dist.train.job import StageJob


@pytest.fixture
def published(cases, tmp_path):
    """Weights as they are published: of the encoder alone, all of them different from new ones."""
    torch.manual_seed(7)
    weights = {
        name: torch.randn_like(tensor)
        for name, tensor in MaskedAutoencoder(cases.tiny_config()).state_dict().items()
        if not name.startswith(("decoder", "mask_token"))
    }
    torch.save({"model": weights}, tmp_path / "published.pth")
    return tmp_path / "published.pth", weights


@pytest.mark.parametrize("ranks", [1, 2])
def test_given_weights_are_the_checkpoint_and_the_control_starts_from_them(
    pools, own_run, published, ranks
):
    path, weights = published
    options = [f"parallel.num_workers={ranks}", "mae.epochs=0", f"model.init={path}"]
    # the second time as after a kill between checkpoint and marker
    for _ in range(2):
        pools(ranks).run("train_to_end", run=str(own_run), overrides=options, stage="mae")
    (checkpoint,) = (own_run / "mae" / "checkpoints").iterdir()
    assert checkpoint == latest_checkpoint(checkpoint.parent) and checkpoint.name[-8:] == "0" * 8
    found = load_weights(checkpoint)
    assert {"mask_token", "decoder_pred.weight"} <= found.keys()
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor), name
    assert read_jsonl(own_run / "mae" / "metrics.jsonl") == []
    losses = {}
    for stage in ("moce", "control"):
        short = [*options, "moce.epochs=0.2"]
        pools(ranks).run("train_to_end", run=str(own_run), overrides=short, stage=stage)
        losses[stage] = read_jsonl(own_run / stage / "metrics.jsonl")[0]["loss"]
    assert losses["control"] == pytest.approx(losses["moce"], rel=1e-5)
    assert read_manifest(checkpoint)["step"] == 0


def test_hosts_with_other_weights_stop_together(pools, own_run, published, tmp_path):
    path, weights = published
    copy, other = tmp_path / "copy.pth", tmp_path / "other.pth"
    torch.save({"model": weights}, copy)
    torch.save({"model": weights | {"norm.bias": weights["norm.bias"] + 1e-6}}, other)
    one, two = pools(2).run("weights_given", run=str(own_run), inits=[str(path), str(copy)])
    assert one == two and one["norm.bias"] == pytest.approx(weights["norm.bias"].sum().item())
    refused = pools(2).run("weights_given", run=str(own_run), inits=[str(path), str(other)])
    for said, init in zip(refused, (path, other), strict=True):
        assert said.startswith(f"model.init ({init}): differs between hosts: ")
        assert said.count(f" on {socket.gethostname()}") == 2


def test_a_file_of_weights_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for init, expected in (("a.pth", f"{tmp_path}/a.pth"), ("vit_base.mae", "vit_base.mae")):
        config = make_config({"model": {"init": init}})
        assert StageJob(config, tmp_path, "mae", "").config.model.init == expected
        assert config.model.init == init
