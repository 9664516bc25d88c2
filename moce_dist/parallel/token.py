"""The baseline: DeepSpeed's own MoE layer, whose tokens choose their experts on the device.

It stands where a dense block has its MLP and is trained by the same model, loop and engine as
MoCE, so that the two differ in routing alone. A token goes to its best expert while there is room
(capacity), else it is dropped; two all-to-alls a layer move it there and back, and two more its
gradient, wherever the image was read. Its choice among the tokens that are too many is random and
not keyed, so a resumed run is not bit-equal.

Source: Lepikhin et al. 2021, arXiv 2006.16668 (GShard); deepspeed.moe. The paper's TokenMoE:
Liu et al. 2023, arXiv 2402.05382, section 4.
"""

import math

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from moce_dist.config import Config
from moce_dist.model.vit import Mlp, initialise


class TokenMlp(nn.Module):
    """DeepSpeed's MoE layer in place of a block's MLP; tokens (B, N, D) to (B, N, D)."""

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
        """Route every token by itself; leaves the layer's loss in `balance_loss`."""
        if torch.is_autocast_enabled(x.device.type):
            # the experts compute in this type anyway; casting first halves what travels
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y, self.balance_loss, _ = self.moe(x)
        return y


def insert_token_experts(model: nn.Module, config: Config, ep_size: int) -> None:
    """Replace the MLPs of the MoE blocks of a dense `model` by token-routed experts."""
    width = config.model.shape.width
    for index in config.moe_layers:
        block = model.get_submodule(f"blocks.{index}")
        block.mlp = TokenMlp(width, config.moe.num_experts, ep_size, config.moe.capacity_factor)


def token_balance_loss(model: nn.Module) -> Tensor | None:
    """Mean of the layers' balance losses of the last forward pass; None without such layers."""
    losses = [m.balance_loss for m in model.modules() if isinstance(m, TokenMlp)]
    found = [loss for loss in losses if loss is not None]
    return torch.stack(found).mean() if found else None


def token_bytes_exchanged(config: Config, ep_size: int, *, tokens: int, element_size: int) -> int:
    """Bytes that leave one rank in a forward and backward pass over `tokens` tokens of its own.

    Every expert's buffer is full to its capacity, with padding where tokens are too few.
    """
    moe = config.moe
    capacity = math.ceil(tokens / moe.num_experts * moe.capacity_factor)
    rows = moe.num_experts * capacity * (ep_size - 1) // ep_size
    return 4 * len(config.moe_layers) * rows * config.model.shape.width * element_size
