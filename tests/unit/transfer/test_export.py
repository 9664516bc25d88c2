"""The exported folder: timm alone loads it and computes our encoder's features."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from moce_dist.data.kept import KeptImages
from moce_dist.model.customize import customize
from moce_dist.model.moce import LocalDispatcher
from moce_dist.settings import ConfigError
from moce_dist.transfer.backbone import Backbone, run_backbone, timm_backbone
from moce_dist.transfer.export import export_backbone, model_card
from moce_dist.transfer.loading import TaskImages
from moce_dist.transfer.predict import load_model
from moce_dist.transfer.saved import classifier_spec, save_model
from moce_dist.transfer.tasks import Item

from .conftest import by_global_name

TIMM_ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "moce_dist":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import numpy as np, timm, torch
images = torch.from_numpy(np.load("images.npy"))
model = timm.create_model("local-dir:backbone", pretrained=True).eval()
with torch.no_grad():
    np.save("features.npy", model(images).numpy())
headed = timm.create_model("local-dir:backbone", pretrained=True, num_classes=7)
assert headed(images).shape == (2, 7)
larger = timm.create_model("local-dir:backbone", pretrained=True, img_size=24)
assert larger(torch.zeros(1, 3, 24, 24)).shape == (1, 24)
data = timm.data.resolve_model_data_config(model)
assert data["input_size"] == (3, 16, 16) and data["interpolation"] == "bicubic", data
assert tuple(data["mean"]) == (0.485, 0.456, 0.406) and data["crop_pct"] == 1.0, data
try:
    import moce_dist
except ImportError:
    print("alone")
"""


def test_timm_alone_computes_the_features_of_the_moce_encoder(tmp_path, config, models):
    moce, route = models["moce"], [2, 1]
    weights = customize(by_global_name(moce, config), route)
    export_backbone(run_backbone("moce", config, weights), tmp_path / "backbone", "card\n")
    images = torch.randn(2, 3, 16, 16)
    np.save(tmp_path / "images.npy", images.numpy())

    command = [sys.executable, "-I", "-c", TIMM_ALONE]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.strip() == "alone", done.stderr

    dispatcher = LocalDispatcher(torch.tensor(route)[:, None].expand(2, 2), 3)
    with torch.no_grad():
        expected = moce.features(images, dispatcher, torch.ones(2, 2))
    found = torch.from_numpy(np.load(tmp_path / "features.npy"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_transformers_and_segmentation_models_load_the_same_weights(tmp_path, config, models):
    import segmentation_models_pytorch as smp
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    folder = tmp_path / "with space [v1]"
    weights = customize(by_global_name(models["moce"], config), [2, 1])
    export_backbone(run_backbone("moce", config, weights), folder, "card\n")
    alone = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)

    wrapped = AutoModel.from_pretrained(folder).eval()
    assert torch.equal(wrapped(images).pooler_output, alone(images))
    assert torch.equal(wrapped(images).last_hidden_state, alone.forward_features(images))
    assert AutoConfig.from_pretrained(folder).num_labels == 0
    pixels = AutoImageProcessor.from_pretrained(folder)(Image.new("RGB", (20, 30)))["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)

    encoder = smp.DPT(
        encoder_name=f"tu-local-dir:{folder}",
        encoder_depth=2,
        decoder_intermediate_channels=(8, 8),
        encoder_weights="imagenet",
        dynamic_img_size=True,
    ).encoder.model
    for name, found in (("timm_model.", wrapped), ("model.", encoder)):
        state = {key.removeprefix(name): tensor for key, tensor in found.state_dict().items()}
        expected = {key: tensor for key, tensor in weights.items() if key in state}
        assert expected and all(torch.equal(state[key], expected[key]) for key in expected)
        assert len(expected) >= len(weights) - 2, "all but the last norm"


@torch.no_grad()
def test_classifier_gives_the_same_answers_in_timm_and_transformers(tmp_path, config, models):
    from transformers import AutoModelForImageClassification

    backbone = run_backbone("mae", config, customize(models["mae"].state_dict(), ()))
    spec = classifier_spec(
        backbone, "pets", ["cat", "dog", "hen"], is_multi_label=False, fc_norm=True
    )
    model = spec.vit().eval()
    save_model(tmp_path, model, spec, {})
    images = torch.randn(2, 3, 16, 16)
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    alone = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(wrapped(images).logits, model(images))
    assert torch.equal(alone(images), model(images))
    assert wrapped.config.id2label == {0: "cat", 1: "dog", 2: "hen"}
    ours, again = load_model(tmp_path)
    assert torch.equal(ours(images), model(images)) and again.classes == ["cat", "dog", "hen"]
    bare = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    assert bare(images).shape == (2, 24)


@torch.no_grad()
def test_backbone_of_mae_computes_the_features_of_mae(config, models):
    images = torch.randn(2, 3, 16, 16)
    backbone = run_backbone("mae", config, customize(models["mae"].state_dict(), ()))
    found = backbone.features_model(seed=0)(images)
    torch.testing.assert_close(found, models["mae"].features(images), rtol=1e-4, atol=1e-5)


def test_random_backbone_is_drawn_by_its_seed(config):
    def weights(seed: int) -> torch.Tensor:
        return run_backbone("random", config, None).features_model(seed).blocks[0].mlp.fc1.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_classifier_starts_from_the_weights_with_a_new_norm_behind_the_mean(config, models):
    backbone = run_backbone("mae", config, customize(models["mae"].state_dict(), ()))
    model = backbone.classifier(5, seed=0, drop_path=0.1)
    assert torch.equal(model.blocks[2].attn.qkv.weight, models["mae"].blocks[2].attn.qkv.weight)
    assert isinstance(model.norm, torch.nn.Identity)
    assert isinstance(model.fc_norm, torch.nn.LayerNorm)
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 5)


def test_dense_model_of_another_side_keeps_the_weights(config, models):
    backbone: Backbone = run_backbone("mae", config, customize(models["mae"].state_dict(), ()))
    model = backbone.dense_model(32, seed=0, drop_path=0.0).eval()
    assert model.pos_embed.shape == (1, 1 + 64, 24)
    same = backbone.dense_model(16, seed=0, drop_path=0.0).eval()
    assert torch.equal(same.pos_embed, models["mae"].pos_embed)


def test_card_tells_experts_and_results():
    layer = {"layer": 0, "block": 1, "expert": 2, "mass": 0.75, "runner_up": 0}
    choice = {
        **{"task": "digits", "num_images": 10, "clusters": {"4": 10}, "warning": "spread"},
        "select": "vote",
        "layers": [{**layer, "runner_up_mass": 0.25, "entropy": 0.56}],
    }
    row = {"backbone": "moce", "protocol": "knn", "mean": 0.9375, "std": None}
    card = model_card("digits", choice, {"metric": "accuracy", "summary": [row]}, {"run": "demo"})
    assert "| 0 | 1 | 2 | 0.750 | 0 | 0.250 | 0.560 |" in card
    assert "| moce | knn | 0.9375 |\n" in card
    assert "- their clusters (images): 4 (10)\n" in card
    assert "- warning: spread" in card and "- run: demo" in card
    assert "Nothing yet." in model_card("digits", choice, None, {})


def test_card_tells_merged_weights_candidates_and_the_control():
    layer = {"layer": 0, "block": 1, "expert": None, "weights": [0.75, 0.25], "mass": None}
    choice = {
        **{"task": "t", "num_images": 3, "clusters": {"0": 3}, "warning": None},
        **{"select": "validate", "chosen": "merge, T = 1"},
        "layers": [{**layer, "runner_up": None, "runner_up_mass": 0.0, "entropy": 0.562}],
        "candidates": [{"name": "merge, T = 1", "mean": 0.9, "folds": []}],
    }
    card = model_card("t", choice, None, {})
    assert "All experts of every MoE layer" in card and "One expert" not in card
    assert "| layer | block | weight of expert 0 | weight of expert 1 | entropy (nats) |" in card
    assert "| 0 | 1 | 0.750 | 0.250 | 0.562 |" in card
    assert "| merge, T = 1 | 0.900 |" in card
    beyond = {**choice["layers"][0], "weights": [1.25, -0.25]}
    card = model_card("t", {**choice, "layers": [beyond]}, None, {})
    assert "beyond the best fitting one" in card and "| 1.250 | -0.250 |" in card
    control = model_card("t", {**choice, "layers": [], "chosen": "control"}, None, {})
    assert "No experts: the dense control" in control and "weight of expert" not in control


def test_model_of_timms_own_gets_pixels_with_its_own_statistics(tmp_path):
    mean, std, color = (0.5, 0.5, 0.5), (0.5, 0.4, 0.25), (10, 100, 200)
    backbone = Backbone("timm:x", "vit_tiny_patch16_224", {}, 224, mean=mean, std=std)
    # of one colour, so that no filter has anything to round
    Image.new("RGB", (64, 48), color).save(tmp_path / "plain.png")
    items = [Item("a", tmp_path / "plain.png", 0)]
    found, *_ = TaskImages(items, backbone, KeptImages(0))[(0, 0)]
    assert found.shape == (3, 224, 224)
    expected = (np.array(color) / 255 - mean) / std
    flat = np.broadcast_to(expected.reshape(3, 1, 1), (3, 224, 224))
    pixels = backbone.normalise(torch.from_numpy(found))
    np.testing.assert_allclose(pixels, flat, rtol=1e-5)


def test_other_architectures_classify_but_do_not_segment():
    backbone = Backbone("timm:resnet10t", "resnet10t", {}, 64)
    assert backbone.features_model(0)(torch.zeros(1, 3, 64, 64)).shape == (1, 512)
    assert backbone.classifier(4, seed=0, drop_path=0.1)(torch.zeros(2, 3, 64, 64)).shape == (2, 4)
    with pytest.raises(ConfigError, match="must be a plain ViT"):
        backbone.dense_model(64, seed=0, drop_path=0.1)


@pytest.mark.parametrize("name", ["timm:no_such_model", "timm:vit_tiny_patch16_224.nothing"])
def test_names_that_timm_does_not_know_are_refused(name):
    with pytest.raises(ConfigError, match=f"--backbone {name}"):
        timm_backbone(name)


def test_timms_mae_is_described_without_loading_it():
    backbone = timm_backbone("timm:vit_base_patch16_224.mae")
    assert (backbone.image_size, backbone.mean) == (224, (0.485, 0.456, 0.406))


@torch.no_grad()
def test_timms_mae_is_pooled_like_the_runs_own(monkeypatch):
    name, known = "vit_tiny_patch16_224.mae", timm.models._registry
    torch.manual_seed(0)
    plain = timm.create_model(name.partition(".")[0], num_classes=0).eval()
    plain.norm.weight.copy_(torch.rand(192))
    given = timm.get_pretrained_cfg("vit_base_patch16_224.mae")
    given = replace(given, hf_hub_id=None, url="", state_dict=plain.state_dict())
    monkeypatch.setitem(known._model_pretrained_cfgs, name, given)
    monkeypatch.setattr(known, "_model_has_pretrained", {*known._model_has_pretrained, name})

    backbone, images = timm_backbone(f"timm:{name}"), torch.randn(2, 3, 224, 224)
    tokens = plain.forward_features(images)
    found = backbone.features_model(0)(images)
    torch.testing.assert_close(found, tokens[:, 1:].mean(dim=1))
    # fine-tuning has a new norm after the mean, as for the run's own
    model = backbone.classifier(3, seed=0, drop_path=0.0)
    assert isinstance(model.norm, torch.nn.Identity) and model.fc_norm.weight.eq(1).all()
    assert torch.equal(model.blocks[-1].mlp.fc2.weight, plain.blocks[-1].mlp.fc2.weight)
    dense = backbone.dense_model(32, seed=0, drop_path=0.0)
    assert torch.equal(dense.norm.weight, plain.norm.weight)
    assert backbone.identity != timm_backbone("timm:vit_tiny_patch16_224").identity


def test_config_json_names_the_architecture(tmp_path, config, models):
    backbone = run_backbone("mae", config, customize(models["mae"].state_dict(), ()))
    export_backbone(backbone, tmp_path, "")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architecture"] == "vit_base_patch16_224"
    assert written["model_args"]["embed_dim"] == 24
    assert written["num_classes"] == written["pretrained_cfg"]["num_classes"] == 0
    assert "num_classes" not in written["model_args"]
    assert load_model(tmp_path)[0](torch.zeros(1, 3, 16, 16)).shape == (1, 24)
