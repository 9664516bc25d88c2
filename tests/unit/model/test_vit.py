"""Blocks that cast their parameters together compute what timm's do, bit for bit."""

import pytest
import torch
from timm.models.vision_transformer import Attention, Block

from moce_dist.model.vit import DenseBlock, SelfAttention


def outputs_and_gradients(block, forward, x):
    block.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = forward(block, x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y, *(parameter.grad for parameter in block.parameters())]


@pytest.mark.parametrize(
    ("module", "theirs"),
    [(DenseBlock(32, 2), Block.forward), (SelfAttention(32, 2, qkv_bias=True), Attention.forward)],
    ids=["block", "attention"],
)
def test_bf16_equals_timm_bit_for_bit(module, theirs):
    draws = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draws) * 0.2
    x = torch.randn(3, 5, 32, generator=draws)
    if isinstance(module, DenseBlock):
        # as timm would have built it
        plain = Block(32, 2, mlp_ratio=4.0, qkv_bias=True, norm_layer=torch.nn.LayerNorm)
        plain.load_state_dict(module.state_dict())
        plain.norm1.eps = plain.norm2.eps = module.norm1.eps
    else:
        plain = Attention(32, 2, qkv_bias=True)
        plain.load_state_dict(module.state_dict())
    ours = outputs_and_gradients(module, lambda m, rows: m(rows), x)
    for mine, other in zip(ours, outputs_and_gradients(plain, theirs, x), strict=True):
        assert mine.dtype == other.dtype and mine.equal(other)


def test_fp32_is_timm_s_own():
    block, x = DenseBlock(32, 2), torch.randn(3, 5, 32)
    assert block(x).equal(Block.forward(block, x))
