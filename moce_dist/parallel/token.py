"""The baseline: DeepSpeed's own MoE layer, in which tokens choose their experts on the device.

It replaces the MLP of a dense block and is trained with the same model, loop and engine as MoCE, so
the two differ in routing alone. A token goes to its best expert while that has capacity, else it is
dropped. Two all-to-alls per layer move tokens there and back, and two more move their gradients,
regardless of where images were read. Where tokens exceed the capacity, the layer drops random ones
without a keyed generator, so a resumed run is not bit-equal.

Source: Lepikhin et al. 2021, arXiv 2006.16668 (GShard); deepspeed.moe. The paper's TokenMoE:
Liu et al. 2023, arXiv 2402.05382, section 4.
"""

import math

import torch
from torch import Tensor, nn

from moce_dist.config import Config
from moce_dist.cost.sizes import TRANSFERS
from moce_dist.model.vit import Mlp, autocast_dtype, initialise
from moce_dist.parallel.deepspeed_import import MoE


class TokenMlp(nn.Module):
    """DeepSpeed's MoE layer in place of a block's MLP, from tokens (B, N, D) to (B, N, D)."""

    def __init__(self, width: int, num_experts: int, ep_size: int, capacity_factor: float) -> None:
        super().__init__()
        self.moe = MoE(
            width,
            Mlp(width),
            num_experts,
            ep_size,
            capacity_factor=capacity_factor,
            eval_capacity_factor=capacity_factor,
        )
        self.apply(initialise)
        self.balance_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Route every token separately; store the layer's balance loss in `balance_loss`."""
        # the experts compute in this dtype anyway; casting first halves the bytes that travel
        x = x.to(autocast_dtype(x))
        y, self.balance_loss, _ = self.moe(x)
        return y


def insert_token_experts(model: nn.Module, config: Config, ep_size: int) -> None:
    """Replace the MLPs of the MoE blocks of a dense `model` by token-routed experts."""
    width = config.model.shape.width
    for index in config.moe_layers:
        block = model.get_submodule(f"blocks.{index}")
        block.mlp = TokenMlp(width, config.moe.num_experts, ep_size, config.moe.capacity_factor)


def token_balance_loss(model: nn.Module) -> Tensor | None:
    """Return the layers' mean balance loss of the last forward pass; None without such layers."""
    losses = [m.balance_loss for m in model.modules() if isinstance(m, TokenMlp)]
    found = [loss for loss in losses if loss is not None]
    return torch.stack(found).mean() if found else None


def token_bytes_exchanged(config: Config, ep_size: int, *, tokens: int, element_size: int) -> int:
    """Count the bytes that leave one rank in a forward and backward pass over its `tokens` tokens.

    Every expert's buffer is sent up to its capacity, padded where there are too few tokens.
    """
    moe = config.moe
    capacity = math.ceil(tokens / moe.num_experts * moe.capacity_factor)
    rows = moe.num_experts * capacity * (ep_size - 1) // ep_size
    return TRANSFERS * len(config.moe_layers) * rows * config.model.shape.width * element_size
