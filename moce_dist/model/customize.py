"""Turn a MoCE into the dense ViT of one task: one MLP per MoE layer, made of its experts.

All images of a task take the same expert in a layer, so the gate is constant for them and the MoE
layer is an ordinary MLP. Where the gate's probability p weights the expert's output
(`gate.combine: prob`), the output is p (W h + b) = (p W) h + (p b), so p is folded into the last
linear layer. Experts began as copies of one MLP, so an average of their weights also is a valid
model: a layer takes one expert, or all of them with weights that sum to 1 (which may be negative,
on a line through them). A layer's shared hidden
units come first, as in the dense MLP that they were split from. Where experts are offsets of a base
(`moe.shared_base`), the base is added to them.

    blocks.5.mlp.experts.3.fc1.weight   --route[layer of block 5] = 3-->   blocks.5.mlp.fc1.weight
    blocks.5.mlp.experts.0.fc1.weight   --------------------------------   dropped
    gate.*, mask_token, decoder_*       --------------------------------   dropped

Letters: D width, K clusters, L MoE layers (from 0, in the order of their blocks), E experts.

Source: Liu et al. 2023, arXiv 2402.05382, section 3 (deployment of customised models).
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moce_dist.config import GateConfig
from moce_dist.model.gate import logits, probabilities, routing_table
from moce_dist.model.moce import hidden_axis

_SHARED = re.compile(r"blocks\.\d+\.mlp\.(shared|base)\..+")
_EXPERT = re.compile(r"blocks\.(\d+)\.mlp\.experts\.(\d+)\.(.+)")
_ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
_DECODER = ("mask_token", "decoder_")
_SUM_TOLERANCE = 1e-6
Mix = Sequence[int | Sequence[float]]
"""For every MoE layer, what its dense MLP is made of: one expert, or weights over all experts."""


def routes(weights: Mapping[str, Tensor], gate: GateConfig, *, num_groups: int = 1) -> Tensor:
    """Return the expert of every cluster in every MoE layer, (L, K) int64, routed without noise.

    `weights` are those of a MoCE by global name (`gate.weight` (L, E, D), `gate.cluster_embedding`
    (K, D), `gate.cluster_group` (K,)).
    """
    scores = logits(weights["gate.weight"], weights["gate.cluster_embedding"])
    groups = weights.get("gate.cluster_group")
    table = routing_table(scores, gate, num_groups=num_groups, cluster_group=groups)
    return torch.from_numpy(table)


def cluster_probabilities(weights: Mapping[str, Tensor]) -> Tensor:
    """Return the gate's probabilities p of every expert for every cluster, (L, K, E)."""
    return probabilities(weights["gate.weight"], weights["gate.cluster_embedding"])


def moe_shape(weights: Mapping[str, Tensor]) -> tuple[list[int], int]:
    """Find which blocks of a state dict carry experts, in order, and how many experts each has.

    A dense state dict gives `([], 0)`.
    """
    found = [m for m in map(_EXPERT.fullmatch, weights) if m]
    blocks = sorted({int(m[1]) for m in found})
    return blocks, 1 + max((int(m[2]) for m in found), default=-1)


def customize(
    weights: Mapping[str, Tensor],
    mix: Mix,
    *,
    scale: Sequence[float] | None = None,
    with_decoder: bool = False,
) -> dict[str, Tensor]:
    """Build the state dict, in timm's names, of the dense ViT for images that take `mix`.

    Args:
        weights: all tensors of a MoCE (or of a dense MAE, then `mix` is empty) by global name.
        mix: for every MoE layer its expert, a number below E, or weights over its E experts.
        scale: with `gate.combine: prob`, the weight of every layer's output, L numbers; it is
            folded into `fc2`.
        with_decoder: keep the decoder's tensors, under their own names, for a dense MAE.

    Raises:
        ValueError: the mix does not fit the weights, or a tensor belongs to neither encoder,
        decoder nor gate.
    """
    blocks, num_experts = moe_shape(weights)
    if len(mix) != len(blocks):
        raise ValueError(f"route {list(mix)} must name one expert for each of {len(blocks)} layers")
    rows = [_mix_row(layer, num_experts) for layer in mix]
    factors = [1.0] * len(blocks) if scale is None else list(scale)
    if len(factors) != len(blocks):
        raise ValueError(f"scale has {len(factors)} numbers, must be one for {len(blocks)} layers")
    chosen = {block: (rows[i], factors[i]) for i, block in enumerate(blocks)}
    kept = (*_ENCODER, *_DECODER) if with_decoder else _ENCODER
    dense: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if match := _EXPERT.fullmatch(name):
            block, part = match[1], match[3]
            if int(match[2]) == 0:
                row, factor = chosen[int(block)]
                stem = f"blocks.{block}.mlp.experts"
                merged = _merge([weights[f"{stem}.{e}.{part}"] for e in range(num_experts)], row)
                if (base := weights.get(f"blocks.{block}.mlp.base.{part}")) is not None:
                    merged = base + merged
                folded = merged * factor if part.startswith("fc2.") else merged
                shared, axis = weights.get(f"blocks.{block}.mlp.shared.{part}"), hidden_axis(part)
                if shared is not None and axis is not None:
                    folded = torch.cat([shared, folded], dim=axis)
                dense[f"blocks.{block}.mlp.{part}"] = folded
        elif _SHARED.fullmatch(name):
            continue
        elif name.startswith(kept):
            dense[name] = tensor
        elif not name.startswith(("gate.", *_DECODER)):
            raise ValueError(f"{name}: is no tensor of an encoder, a decoder or a gate")
    return dense


def _merge(stack: Sequence[Tensor], row: Sequence[float]) -> Tensor:
    used = [(weight, tensor) for weight, tensor in zip(row, stack, strict=True) if weight]
    if len(used) == 1:
        return used[0][1]
    # in float64, so that the average of equal experts is exactly that expert
    return sum((w * t.double() for w, t in used), torch.zeros(())).to(stack[0].dtype)


def _mix_row(layer: int | Sequence[float], num_experts: int) -> list[float]:
    if isinstance(layer, int):
        if not 0 <= layer < num_experts:
            raise ValueError(f"route names {layer}, must name experts from 0 to {num_experts - 1}")
        return [float(expert == layer) for expert in range(num_experts)]
    if len(layer) != num_experts or not abs(sum(layer) - 1) <= _SUM_TOLERANCE:
        raise ValueError(
            f"weights {list(layer)} must be {num_experts} numbers that sum to 1, one an expert"
        )
    return list(layer)
