"""From a MoCE to the dense ViT of one task: keep one expert per MoE layer, forget the rest.

A task's images all take the same expert in a layer, so the gate is a constant for them and the MoE
layer is an ordinary MLP. Where the gate's probability p weights the expert's output
(`gate.combine: prob`), the output is p (W h + b) = (p W) h + (p b): p goes into the last linear
layer.

    blocks.5.mlp.experts.3.fc1.weight   --route[layer of block 5] = 3-->   blocks.5.mlp.fc1.weight
    blocks.5.mlp.experts.0.fc1.weight   --------------------------------   dropped
    gate.*, mask_token, decoder_*       --------------------------------   dropped

Letters: D width, K clusters, L MoE layers (counted from 0, in the order of their blocks), E
experts.

Source: Liu et al. 2023, arXiv 2402.05382, section 3 (deployment of customised models).
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moce_dist.config import GateConfig
from moce_dist.model.gate import logits, probabilities, routing_table

_EXPERT = re.compile(r"blocks\.(\d+)\.mlp\.experts\.(\d+)\.(.+)")
_ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
_NOT_ENCODER = ("gate.", "mask_token", "decoder_")


def routes(weights: Mapping[str, Tensor], gate: GateConfig, *, num_groups: int = 1) -> Tensor:
    """List the expert of every cluster in every MoE layer, (L, K) int64, as routed without noise.

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
    weights: Mapping[str, Tensor], route: Sequence[int], *, scale: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Build the dense ViT's state dict, in timm's names, of the images that take `route`.

    Args:
        weights: all tensors of a MoCE (or of a dense MAE, then `route` is empty) by global name.
        route: the expert of every MoE layer, L numbers below E.
        scale: with `gate.combine: prob`, the probability p of every layer's expert, L numbers; it
            is folded into the expert's `fc2`.

    Raises:
        ValueError: the route does not fit the weights, or a tensor belongs to neither encoder,
        decoder nor gate.
    """
    blocks, num_experts = moe_shape(weights)
    _check_route(route, len(blocks), num_experts)
    factors = [1.0] * len(blocks) if scale is None else list(scale)
    if len(factors) != len(blocks):
        raise ValueError(f"scale has {len(factors)} numbers, must be one for {len(blocks)} layers")
    chosen = {block: (route[i], factors[i]) for i, block in enumerate(blocks)}
    dense: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if match := _EXPERT.fullmatch(name):
            expert, factor = chosen[int(match[1])]
            if int(match[2]) == expert:
                folded = tensor * factor if match[3].startswith("fc2.") else tensor
                dense[f"blocks.{match[1]}.mlp.{match[3]}"] = folded
        elif name.startswith(_ENCODER):
            dense[name] = tensor
        elif not name.startswith(_NOT_ENCODER):
            raise ValueError(f"{name}: is no tensor of an encoder, a decoder or a gate")
    return dense


def _check_route(route: Sequence[int], num_layers: int, num_experts: int) -> None:
    if len(route) != num_layers:
        raise ValueError(
            f"route {list(route)} must name one expert for each of {num_layers} layers"
        )
    if any(not 0 <= expert < num_experts for expert in route):
        raise ValueError(f"route {list(route)} must name experts from 0 to {num_experts - 1}")
