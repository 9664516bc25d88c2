"""Experts that tokens choose, merged into a task's dense ViT by the share of its tokens."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from moce_dist.config import Config
from moce_dist.model.customize import customize
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.transfer.backbone import run_backbone
from moce_dist.transfer.select import mix_of
from moce_dist.transfer.token import UsageMlp, choose_by_use, usage_counter, without_gates

from .conftest import NUM_EXPERTS, SIZE

PARTS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
LAYERS = (1, 3)


def gate_name(block: int) -> str:
    return f"blocks.{block}.mlp.moe.deepspeed_moe.gate.wg.weight"


@pytest.fixture
def weights(config: Config, models: dict[str, MaskedAutoencoder]) -> dict[str, Tensor]:
    """A token-routed model by global name: experts that differ, gates that tell tokens apart."""
    torch.manual_seed(3)
    found = dict(models["mae"].state_dict())
    for block in LAYERS:
        for part in PARTS:
            dense = found.pop(f"blocks.{block}.mlp.{part}")
            for expert in range(NUM_EXPERTS):
                moved = dense + 0.1 * torch.randn_like(dense)
                found[f"blocks.{block}.mlp.experts.{expert}.{part}"] = moved
        found[gate_name(block)] = torch.randn(NUM_EXPERTS, config.model.shape.width)
    return found


def one_token(x: Tensor, weights: dict[str, Tensor], block: int) -> tuple[int, float, Tensor]:
    """The layer by its definition, for a single token (D,)."""
    p = torch.softmax(weights[gate_name(block)] @ x, dim=0)
    best = int(p.argmax())
    w1, b1, w2, b2 = (weights[f"blocks.{block}.mlp.experts.{best}.{part}"] for part in PARTS)
    return best, float(p[best]), p[best] * (w2 @ F.gelu(w1 @ x + b1) + b2)


def test_every_token_takes_its_best_expert_weighted_with_its_probability(weights):
    x = torch.randn(2, 5, 24)
    mlp = UsageMlp(weights, 3, NUM_EXPERTS)
    y = mlp(x)
    expected = [[one_token(token, weights, 3) for token in image] for image in x]
    for image in range(2):
        for token in range(5):
            torch.testing.assert_close(y[image, token], expected[image][token][2])
        counts = [sum(e == best for best, _, _ in expected[image]) for e in range(NUM_EXPERTS)]
        p = sum(p for _, p, _ in expected[image])
        torch.testing.assert_close(mlp.used[image], torch.tensor([*counts, p]))
    assert len({best for image in expected for best, _, _ in image}) > 1


def test_experts_are_averaged_by_the_share_of_tokens_and_the_mean_probability_is_folded_in():
    # two images of 4 tokens, E = 3: 8 tokens, p sums to 4; the second layer has one expert alone
    used = torch.tensor([[4, 0, 0, 3, 4, 0, 0, 1], [2, 2, 0, 1, 4, 0, 0, 1]]).float()
    names = {
        f"blocks.{b}.mlp.experts.{e}.{part}": b for b in LAYERS for e in range(3) for part in PARTS
    }
    choice = choose_by_use(used, dict.fromkeys(names, torch.zeros(1)), task="t")
    assert mix_of(choice) == [[0.75, 0.25, 0.0], [1.0, 0.0, 0.0]]
    assert choice["scale"] == [0.5, 0.25] and choice["num_images"] == 2
    values = {name: torch.full((1,), float(name.split(".")[4]) + 1) for name in names}
    dense = customize(values, mix_of(choice), scale=choice["scale"])
    assert float(dense["blocks.1.mlp.fc1.weight"]) == pytest.approx(0.75 * 1 + 0.25 * 2)
    assert float(dense["blocks.1.mlp.fc2.bias"]) == pytest.approx(0.5 * 1.25)


def test_where_the_gate_tells_nothing_apart_the_merged_vit_is_the_model(config, weights):
    for block in LAYERS:
        weights[gate_name(block)].zero_()
    images = torch.randn(3, 3, SIZE, SIZE)
    count = usage_counter(weights, config, torch.device("cpu"))
    used = count(images)
    choice = choose_by_use(used, weights, task="t")
    # all scores are equal: every token takes the first expert, with p = 1 / E
    assert mix_of(choice) == [[1.0, 0.0, 0.0]] * 2
    assert choice["scale"] == pytest.approx([1 / NUM_EXPERTS] * 2)
    tokens = (SIZE // config.model.patch_size) ** 2 + 1
    assert used.view(3, 2, NUM_EXPERTS + 1)[:, :, 0].tolist() == [[tokens] * 2] * 3
    dense = customize(without_gates(weights), mix_of(choice), scale=choice["scale"])
    backbone = run_backbone("token", config, dense)
    vit = backbone.features_model(0)
    assert isinstance(vit, timm.models.VisionTransformer)
    token_model = MaskedAutoencoder(config)
    shared = {n: t for n, t in without_gates(weights).items() if ".experts." not in n}
    token_model.load_state_dict(shared, strict=False)
    for block in LAYERS:
        token_model.blocks[block].mlp = UsageMlp(weights, block, NUM_EXPERTS)
    with torch.no_grad():
        torch.testing.assert_close(vit(images), token_model.features(images), rtol=1e-4, atol=1e-5)
