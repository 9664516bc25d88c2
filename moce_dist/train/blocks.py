"""Prepare a transformer's blocks for training: activation checkpointing and compilation."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from moce_dist.config import ParallelConfig
from moce_dist.model.moce import MoceBlock
from moce_dist.model.vit import Mlp


def prepare_blocks(blocks: Iterable[Any], parallel: ParallelConfig) -> None:
    """Checkpoint activations of blocks and compile them, in place; names do not change.

    In blocks with experts, checkpointing covers the attention and the experts, compilation only the
    attention. Neither covers the routing: its collectives must run once, and its shapes change with
    every step.
    """
    for block in blocks:
        # the MLP of this package, or timm's
        is_dense = hasattr(block.mlp, "fc1")
        if parallel.activation_checkpointing:
            for part in [block] if is_dense else [block.attn, *expert_modules(block)]:
                part.forward = partial(checkpoint, part.forward, use_reentrant=False)
        if parallel.compile:
            (block if is_dense else block.attn).compile(dynamic=False)


def expert_modules(block: nn.Module) -> list[nn.Module]:
    """Return the modules of a block that compute its experts and their shared part."""
    if isinstance(block, MoceBlock):
        shared = block.mlp.shared
        return [block.mlp.experts] if shared is None else [block.mlp.experts, shared]
    return [module for module in block.get_submodule("mlp").modules() if isinstance(module, Mlp)]
