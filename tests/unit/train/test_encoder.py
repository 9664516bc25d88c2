"""The frozen encoder: which model it is, what its images are, what is refused."""

import os
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.transforms.v2 import functional

from moce_dist.config import load_config
from moce_dist.data.images import normalise
from moce_dist.features.decoding import Framing
from moce_dist.features.encoder import EncoderInput, describe_timm, timm_encoder
from moce_dist.model.customize import customize
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.run.artefacts import begin, mark_complete
from moce_dist.run.directory import Run
from moce_dist.settings import ConfigError
from moce_dist.train.encoder import (
    build_encoder,
    check_encoder,
    encoder_id,
    encoder_pixels,
    encoder_spec,
    load_encoder,
    noted_id,
    same_encoder,
)

CPU = torch.device("cpu")
SMALL = [
    "model.width=48", "model.depth=2", "model.num_heads=4", "model.decoder_width=32",
    "model.decoder_depth=1", "model.decoder_num_heads=4", "data.image_size=32",
    "model.patch_size=8", "moe.layers=[1]",
]  # fmt: skip


def configure(*overrides):
    return load_config(None, [*SMALL, *overrides])


@pytest.fixture
def mae():
    torch.manual_seed(4)
    return MaskedAutoencoder(configure("parallel.precision=fp32")).eval()


@pytest.fixture
def published(mae, tmp_path):
    path = tmp_path / "published.pth"
    torch.save({"model": mae.state_dict()}, path)
    return path


def images(side, count=3):
    draws = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, side, side), generator=draws, dtype=torch.uint8)


def test_published_weights_give_the_features_of_our_mae_in_float32(mae, published):
    config = configure(f"cluster.encoder={published}", "parallel.precision=bf16")
    encoder = build_encoder(config, None, CPU)
    assert encoder.takes == EncoderInput(32)
    found = encoder(images(32))
    assert found.dtype == torch.float32
    with torch.no_grad():
        assert found.equal(mae.features(normalise(images(32))))


def test_weights_without_decoder_are_an_encoder(mae, tmp_path):
    path = tmp_path / "vit.safetensors"
    save_file(customize(mae.state_dict(), ()), path)
    found = build_encoder(configure(f"cluster.encoder={path}"), None, CPU)(images(32))
    with torch.no_grad():
        assert found.equal(mae.features(normalise(images(32))))


@torch.no_grad()
def test_features_of_a_block_are_the_mean_of_its_normed_patch_tokens(mae, published):
    tokens = []
    hook = mae.blocks[0].register_forward_hook(lambda module, given, out: tokens.append(out))
    mae.features(normalise(images(32)))
    hook.remove()
    patches = tokens[0][:, 1:]
    deviation = patches.var(dim=2, correction=0, keepdim=True).add(1e-6).sqrt()
    expected = ((patches - patches.mean(dim=2, keepdim=True)) / deviation).mean(dim=1)
    config = configure(f"cluster.encoder={published}", "cluster.feature_block=0")
    torch.testing.assert_close(build_encoder(config, None, CPU)(images(32)), expected)
    assert encoder_id(config).endswith(", block 0")
    assert encoder_id(config) != encoder_id(configure(f"cluster.encoder={published}"))


def test_pixels_are_the_colours_of_fields():
    encoder = build_encoder(configure("cluster.encoder=pixels"), None, CPU)
    shown = images(32)
    found = encoder(shown).reshape(3, 3, 8, 8)
    torch.testing.assert_close(found[1, 2, 7, 0], normalise(shown)[1, 2, 28:, :4].mean())
    config = configure("cluster.encoder=pixels")
    assert encoder_id(config) == "pixels, 8 x 8 fields"
    spec = encoder_spec(config, None)
    torch.testing.assert_close(spec.factory(*spec.arguments)(shown), encoder(shown))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.encoder=pixels", "cluster.feature_block=0"], "needs cluster.encoder mae"),
        (["cluster.feature_block=99"], r"feature_block \(99\) must be a block below"),
        (["base_run=x", "cluster.source=random"], "must be features with base_run"),
    ],
)
def test_features_that_cannot_be_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        configure(*overrides)


def own_images(own):
    """Images normalised as torchvision does it, by the statistics of the model."""
    return functional.normalize(images(160).float() / 255, own.mean, own.std)


def both(name):
    """An encoder with statistics of its own and the bare model, of the same drawn weights."""
    own = EncoderInput(160, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7))
    torch.manual_seed(1)
    encoder = timm_encoder(name, own, CPU, pretrained=False)
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=0).eval()
    return encoder, model, own_images(own)


@pytest.mark.parametrize("name", ["test_vit", "test_vit3"])
@torch.no_grad()
def test_vit_gives_the_mean_of_its_patch_tokens_on_its_own_statistics(name):
    encoder, model, shown = both(name)
    tokens = model.forward_features(shown)
    # one class token, and none in the mean
    assert tokens.shape[1] == 101
    expected = tokens[:, 1:].mean(dim=1)
    torch.testing.assert_close(encoder(images(160)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit2", "test_resnet", "test_convnext"])
@torch.no_grad()
def test_other_models_give_their_own_pooled_features(name):
    encoder, model, shown = both(name)
    expected = model.forward_head(model.forward_features(shown), pre_logits=True)
    torch.testing.assert_close(encoder(images(160)), expected, rtol=1e-4, atol=1e-5)
    assert expected.ndim == 2


def test_timm_model_is_described_by_its_data_config():
    half = (0.5,) * 3
    assert describe_timm("test_vit", "x") == EncoderInput(160, half, half, Framing(0.95))
    bilinear = Framing(0.95, method="bilinear")
    assert describe_timm("test_resnet", "x") == EncoderInput(160, half, half, bilinear)
    squash = "convnext_tiny.in12k_ft_in1k_384"
    assert describe_timm(squash, "x") == EncoderInput(384, framing=Framing(1.0, "squash"))
    given = configure("cluster.encoder=timm:vit_small_patch14_dinov2.lvd142m")
    assert encoder_pixels(given) == EncoderInput(518, framing=Framing(1.0))
    assert encoder_pixels(configure()) == EncoderInput(32)


@pytest.mark.usefixtures("timm_offline")
def test_named_timm_model_has_its_weights():
    config = configure("cluster.encoder=timm:test_vit.r160_in1k")
    check_encoder(config)
    spec = encoder_spec(config, None)
    encoder = spec.factory(*spec.arguments)
    torch.manual_seed(3)
    model = timm.create_model("test_vit").eval()
    half = EncoderInput(160, (0.5,) * 3, (0.5,) * 3)
    with torch.no_grad():
        tokens = model.forward_features(own_images(half))
    expected = tokens[:, 1:].mean(dim=1)
    torch.testing.assert_close(encoder(images(160)), expected, rtol=1e-4, atol=1e-5)


def test_worker_finds_a_relative_file_from_anywhere(mae, published, tmp_path, monkeypatch):
    monkeypatch.chdir(published.parent)
    spec = encoder_spec(configure(f"cluster.encoder={published.name}"), None)
    monkeypatch.chdir(os.sep)
    with torch.no_grad():
        assert load_encoder(*spec.arguments)(images(32)).equal(mae.features(normalise(images(32))))


def test_encoder_is_known_by_what_it_computes(mae, published):
    config = configure(f"cluster.encoder={published}")
    before = encoder_id(config)
    os.utime(published, (0, 0))
    assert encoder_id(config) == before
    torch.save({"model": {n: t + 1 for n, t in mae.state_dict().items()}}, published)
    assert encoder_id(config) != before
    published.unlink()
    with pytest.raises(ConfigError, match=rf"cluster\.encoder \({published}\): No such file"):
        encoder_id(config)


def test_timm_model_is_known_by_its_weights(tmp_path, monkeypatch):
    named = configure("cluster.encoder=timm:test_vit")
    short = "timm:test_vit, center 0.95 bicubic"
    now = encoder_id(named)
    assert now == f"{short}, r160_in1k of timm/test_vit.r160_in1k"
    given = timm.get_pretrained_cfg("test_vit")
    other = replace(given, tag="new", hf_hub_id="timm/test_vit.new")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: other)
    assert encoder_id(named) == f"{short}, new of timm/test_vit.new"
    # features that note the weights are those of other ones now
    run = Run(tmp_path)
    mark_complete(run.features, {"encoder": now}, [])
    assert noted_id(run.features, named) == encoder_id(named)
    with pytest.raises(ConfigError, match=r"is not what .*r160_in1k, now .*new\)"):
        same_encoder(run, named)


@pytest.mark.parametrize("is_complete", [True, False])
def test_features_that_note_no_weights_stay_those_of_the_encoder(tmp_path, is_complete):
    named = configure("cluster.encoder=timm:test_vit")
    run, short = Run(tmp_path), "timm:test_vit, center 0.95 bicubic"
    assert noted_id(run.features, named) == encoder_id(named)
    begin(run.features, {"encoder": short})
    if is_complete:
        mark_complete(run.features, {"encoder": short}, [])
        assert same_encoder(run, named) == short
    assert noted_id(run.features, named) == short
    other = configure("cluster.encoder=timm:test_vit2")
    assert noted_id(run.features, other) == encoder_id(other)


def test_models_whose_features_are_no_rows_are_refused(monkeypatch):
    named = configure("cluster.encoder=timm:test_vit")
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: torch.nn.Conv2d(3, 4, 8))
    with pytest.raises(ConfigError, match=r"^cluster\.encoder \(timm:test_vit\): gives .*\(2, D\)"):
        check_encoder(named)


@pytest.mark.parametrize("name", ["timm:no_such_model", "timm:test_vit.nothing", "timm:test_vit4"])
def test_names_that_timm_has_no_weights_for_are_refused(name):
    config = configure(f"cluster.encoder={name}")
    for refusing in (check_encoder, encoder_pixels):
        with pytest.raises(ConfigError, match=rf"^cluster\.encoder \({name}\): is no model"):
            refusing(config)


@pytest.mark.parametrize(
    ("overrides", "name", "message"),
    [
        ([], "none.pth", "no such file"),
        ([], "text.safetensors", "is damaged"),
        ([], "text.pth", "no checkpoint of tensors"),
        (["model.width=96"], "published.pth", "the configured model needs"),
        (["model.depth=3"], "published.pth", "lacks blocks.2"),
    ],
)
def test_files_that_do_not_fit_are_refused(published, overrides, name, message):
    for text in ("text.safetensors", "text.pth"):
        (published.parent / text).write_text("no weights")
    path = published.parent / name
    with pytest.raises(ConfigError, match=rf"^cluster\.encoder \({path}\).*{message}"):
        check_encoder(configure(f"cluster.encoder={path}", *overrides))


def test_own_encoder_needs_no_check():
    check_encoder(configure())
