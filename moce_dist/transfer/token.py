"""A task's dense ViT from experts that tokens choose (`moe.kind: token`), merged by their use.

    images --the model's own token gates--> tokens per expert --shares--> weights averaged by them

The tokens of an image choose different experts, so no route is a model of it. Experts started as
copies of one MLP, so their average is a model. The layer weights a token's output with its
probability p; the mean of p over the task's tokens is folded into the last linear layer.

Letters: B images, N tokens with the class token, D width, L MoE layers, E experts.

Source: the gate is that of deepspeed.moe (parallel/token.py): top-1 of a softmax in float32, here
without a capacity, so that no token is dropped.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moce_dist.config import Config
from moce_dist.data.images import normalise
from moce_dist.model.customize import moe_shape
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.transfer.select import layer_choice

_GATE = "blocks.{}.mlp.moe.deepspeed_moe.gate.wg.weight"
_PARTS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


def without_gates(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a token-routed model's weights without its gates, as `customize` takes them."""
    gates = {_GATE.format(block) for block in moe_shape(weights)[0]}
    return {name: tensor for name, tensor in weights.items() if name not in gates}


class UsageMlp(nn.Module):
    """The experts of one layer and their gate, in one process; records what tokens choose."""

    def __init__(self, weights: Mapping[str, Tensor], block: int, num_experts: int) -> None:
        """Take the tensors of block number `block` from weights with global names."""
        super().__init__()
        gate = weights[_GATE.format(block)].float()
        self.register_buffer("gate", gate, persistent=False)
        stem = f"blocks.{block}.mlp.experts"
        for part in _PARTS:
            stack = [weights[f"{stem}.{e}.{part}"] for e in range(num_experts)]
            self.register_buffer(part.replace(".", "_"), torch.stack(stack), persistent=False)
        self.used = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Send every token of (B, N, D) through its best expert, weighted with its p.

        `used` (B, E + 1) then holds each image's number of tokens per expert, and the sum of p.
        """
        p, best = F.linear(x.float(), self.get_buffer("gate")).softmax(dim=-1).max(dim=-1)
        y = torch.zeros_like(x)
        w1, b1, w2, b2 = (self.get_buffer(part.replace(".", "_")) for part in _PARTS)
        for expert in range(len(w1)):
            mine = best == expert
            hidden = F.gelu(F.linear(x[mine], w1[expert], b1[expert]))
            y[mine] = F.linear(hidden, w2[expert], b2[expert])
        counts = F.one_hot(best, len(w1)).sum(dim=1)
        self.used = torch.cat([counts.float(), p.sum(dim=1, keepdim=True)], dim=1)
        return y * p[..., None].to(y.dtype)


def usage_counter(
    weights: Mapping[str, Tensor], config: Config, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Build a function from images (B, 3, S, S) uint8 to `used` of all layers, (B, L * (E + 1))."""
    parallel = config.parallel.model_copy(update={"precision": "fp32"})
    model = MaskedAutoencoder(config.model_copy(update={"parallel": parallel}))
    blocks, num_experts = moe_shape(weights)
    layers = {block: UsageMlp(weights, block, num_experts) for block in blocks}
    for block, mlp in layers.items():
        model.get_submodule(f"blocks.{block}").mlp = mlp
    shared = {n: t for n, t in without_gates(weights).items() if ".experts." not in n}
    model.load_state_dict(shared)
    model.to(device).eval().requires_grad_(requires_grad=False)

    def count(images: Tensor) -> Tensor:
        model.features(normalise(images))
        return torch.cat([mlp.used for mlp in layers.values()], dim=1)

    return count


def choose_by_use(used: Tensor, weights: Mapping[str, Tensor], *, task: str) -> dict[str, Any]:
    """Make the content of choice.json from the `used` of n images, (n, L * (E + 1))."""
    blocks, num_experts = moe_shape(weights)
    sums = used.double().sum(dim=0).view(len(blocks), num_experts + 1)
    counts, p = sums[:, :-1], sums[:, -1]
    shares = counts / counts.sum(dim=1, keepdim=True)
    return {
        "task": task,
        "select": "use",
        "num_images": len(used),
        "layers": [
            layer_choice(i, block, share, share, None)
            for i, (block, share) in enumerate(zip(blocks, shares.numpy(), strict=True))
        ],
        "scale": (p / counts.sum(dim=1)).tolist(),
        "clusters": {},
        "warning": None,
    }
