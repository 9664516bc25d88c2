"""Weights that users already have: the published layout, timm's, and what is refused."""

import argparse
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

from moce_dist.config import load_config
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.settings import ConfigError
from moce_dist.train.pretrained import initial_weights

SMALL = [
    "model.width=48", "model.depth=2", "model.num_heads=4", "model.decoder_width=32",
    "model.decoder_depth=1", "model.decoder_num_heads=4", "data.image_size=32",
    "model.patch_size=8", "moe.layers=[1]",
]  # fmt: skip


def configure(*overrides):
    return load_config(None, [*SMALL, *overrides])


def published(seed=9):
    torch.manual_seed(seed)
    return dict(MaskedAutoencoder(configure()).state_dict())


def test_published_pth_with_decoder_and_namespace(tmp_path):
    weights, path = published(), tmp_path / "mae_pretrain.pth"
    torch.save({"model": weights, "args": argparse.Namespace(lr=1e-3), "epoch": 799}, path)
    found = initial_weights(configure(f"model.init={path}"))
    assert found.keys() == weights.keys()
    assert all(found[name].equal(weights[name]) for name in weights)


def test_encoder_only_file_starts_a_new_decoder_and_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    weights = {n: t for n, t in published().items() if "decoder" not in n and n != "mask_token"}
    path = tmp_path / "encoder.pth"
    torch.save({"model": weights}, path)
    found = initial_weights(configure(f"model.init={path}"))
    assert all(found[name].equal(tensor) for name, tensor in weights.items())
    assert found["decoder_pred.weight"].equal(initial_weights(configure())["decoder_pred.weight"])
    assert "decoder starts new" in caplog.text


def test_timm_backbone_file(tmp_path):
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4,
        num_classes=10,
    )  # fmt: skip
    path = tmp_path / "model.safetensors"
    save_file(vit.state_dict(), path)
    found = initial_weights(configure(f"model.init={path}"))
    assert found["blocks.1.mlp.fc1.weight"].equal(vit.state_dict()["blocks.1.mlp.fc1.weight"])


def test_positions_are_resampled_to_another_image_size(tmp_path):
    path = tmp_path / "mae.pth"
    torch.save({"model": published()}, path)
    found = initial_weights(configure(f"model.init={path}", "data.image_size=64"))
    assert found["pos_embed"].shape == (1, 65, 48)


def test_a_classifiers_head_is_left_out(tmp_path):
    path, weights = tmp_path / "tuned.pth", published()
    heads = {"head.weight": torch.ones(9, 48), "fc_norm.bias": torch.ones(48)}
    torch.save({"model": weights | heads}, path)
    assert initial_weights(configure(f"model.init={path}")).keys() == weights.keys()


def deeper(weights, blocks):
    """Return the tensors of one more block than the model has."""
    return {
        name.replace(f"{blocks}.0.", f"{blocks}.2."): tensor
        for name, tensor in weights.items()
        if name.startswith(f"{blocks}.0.")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"norm.weight": torch.ones(3)}, r"norm.weight is \(3,\).*needs \(48,\)"),
        (lambda w: {n: t for n, t in w.items() if n != "cls_token"}, "lacks cls_token"),
        (lambda w: {"epoch": 3}, "holds no state dict"),
        (
            lambda w: w | {f"blocks.{i}.ls1.gamma": torch.ones(48) for i in range(2)},
            r"model.init .*bad.pth\): .* no place for blocks.0.ls1.gamma and 1 more$",
        ),
        (lambda w: w | deeper(w, "blocks"), "no place for blocks.2.norm1.weight and 11 more$"),
        (lambda w: w | deeper(w, "decoder_blocks"), "no place for decoder_blocks.2.norm1.weight"),
        (lambda w: w | {"reg_token": torch.ones(1, 4, 48)}, "no place for reg_token$"),
        (lambda w: w | {"pos_embed": torch.ones(1, 16, 48)}, "pos_embed has 16 positions"),
        (lambda w: w | {"pos_embed": torch.ones(4, 4, 4, 48)}, r"pos_embed is \(4, 4, 4, 48\)"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    path = tmp_path / "bad.pth"
    torch.save({"model": change(published())}, path)
    with pytest.raises(ConfigError, match=message):
        initial_weights(configure(f"model.init={path}"))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        initial_weights(configure(f"model.init={tmp_path}/none.pth"))


@pytest.mark.parametrize("name", ["weights/mae.ckpt", "vit_none", "vit_tiny_patch16_224"])
def test_weights_that_timm_has_not_are_one_line_that_names_the_field(name, timm_offline):
    """No file, no model of timm, and one that is not on the disk while there is no network."""
    with pytest.raises(ConfigError, match=rf"^model\.init \({name}\): .+$"):
        initial_weights(configure(f"model.init={name}"))


class Bomb:
    def __reduce__(self):
        return print, ("unpickled",)


def test_nothing_but_tensors_is_unpickled(tmp_path, capsys):
    path = tmp_path / "bomb.pth"
    torch.save({"model": published(), "extra": Bomb()}, path)
    with pytest.raises(ConfigError, match="is no checkpoint of tensors"):
        initial_weights(configure(f"model.init={path}"))
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ConfigError, match="is no checkpoint of tensors"):
        initial_weights(configure(f"model.init={path}"))
    assert "unpickled" not in capsys.readouterr().out
