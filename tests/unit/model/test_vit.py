"""Blocks and what they consist of compute what timm's do, bit for bit."""

import contextlib
from functools import partial

import pytest
import torch
from timm.layers import PatchEmbed as TimmPatchEmbed
from timm.models.vision_transformer import Attention, Block

from moce_dist.model.vit import DenseBlock, PatchEmbed, SelfAttention

NORM = partial(torch.nn.LayerNorm, eps=1e-6)
PAIRS = {
    "block": (
        lambda: DenseBlock(32, 2),
        lambda: Block(32, 2, mlp_ratio=4.0, qkv_bias=True, norm_layer=NORM),
        (3, 5, 32),
    ),
    "attention": (
        lambda: SelfAttention(32, 2),
        lambda: Attention(32, 2, qkv_bias=True),
        (3, 5, 32),
    ),
    "patches": (lambda: PatchEmbed(8, 32), lambda: TimmPatchEmbed(16, 8, 3, 32), (3, 3, 16, 16)),
}


def outputs_and_gradients(module, x, precision):
    lower = torch.autocast("cpu", torch.bfloat16)
    with lower if precision == "bf16" else contextlib.nullcontext():
        y = module(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", PAIRS)
def test_outputs_and_gradients_equal_timms_bit_for_bit(name, precision):
    ours, theirs, shape = PAIRS[name]
    module, plain = ours(), theirs()
    draws = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draws) * 0.2
    plain.load_state_dict(module.state_dict())
    x = torch.randn(shape, generator=draws)
    pairs = zip(
        outputs_and_gradients(module, x, precision),
        outputs_and_gradients(plain, x, precision),
        strict=True,
    )
    for mine, other in pairs:
        assert mine.dtype == other.dtype and mine.equal(other)
