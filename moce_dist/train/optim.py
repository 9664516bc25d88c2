"""Optimiser and learning rate.

AdamW with decay on matrices only; linear warm-up, then half a cosine; the peak grows linearly
with the batch. Source: He et al. 2022, arXiv 2111.06377, table 8; Goyal et al. 2017, arXiv
1706.02677.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from moce_dist.config import GateConfig, MoeConfig, StageConfig
from moce_dist.model.moce import is_expert, is_stacked

if TYPE_CHECKING:
    from moce_dist.parallel.engine import Engine

_TOKENS = ("cls_token", "mask_token")


def has_decay(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether weight decay applies: to matrices, not to biases, norms, tokens and the gate."""
    # stacked experts have one dimension more than the dense layers that they copy
    dims = parameter.ndim - is_stacked(name)
    return dims >= 2 and name not in _TOKENS and not name.startswith("gate.")


def parameter_groups(
    model: nn.Module, stage: StageConfig, gate: GateConfig, moe: MoeConfig
) -> list[dict[str, Any]]:
    """Split trainable parameters into groups with and without decay, the gate, and the experts.

    The gate and the experts have separate groups only if their learning rate or decay differs,
    because every group is a launch of the optimiser's kernels.
    """
    gate_scale = 0.0 if gate.assign == "fixed" else gate.lr_scale
    # the loop decays them towards their mean instead
    expert_decay = stage.weight_decay if moe.mean_decay is None else 0.0
    groups: dict[str, dict[str, Any]] = {
        "decay": {"weight_decay": stage.weight_decay, "lr_scale": 1.0},
        "no_decay": {"weight_decay": 0.0, "lr_scale": 1.0},
        "experts_decay": {"weight_decay": expert_decay, "lr_scale": moe.lr_scale},
        "experts_no_decay": {"weight_decay": 0.0, "lr_scale": moe.lr_scale},
        "gate": {"weight_decay": 0.0, "lr_scale": gate_scale},
    }
    for name, group in groups.items():
        group.update(name=name, params=[])
    are_apart = moe.lr_scale != 1 or moe.mean_decay is not None
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "decay" if has_decay(name, parameter) else "no_decay"
            kind = f"experts_{kind}" if are_apart and is_expert(name) else kind
            is_apart = name.startswith("gate.") and gate_scale != 1
            groups["gate" if is_apart else kind]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def optimizer_factory(
    stage: StageConfig,
) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    """Return the function that makes the stage's optimiser from parameter groups.

    The optimiser is fused: its few kernels also clip the gradients and can skip the update.
    """

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if stage.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=stage.lr, fused=True)
        return torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas, fused=True)

    return make


def learning_rate(
    stage: StageConfig, step: int, *, steps_per_epoch: int, total_steps: int
) -> float:
    """Learning rate of a step, counted from 0."""
    warmup = stage.warmup_epochs * steps_per_epoch
    return warm_cosine(step, steps=total_steps, warmup=warmup, peak=stage.lr, least=stage.min_lr)


def warm_cosine(step: int, *, steps: int, warmup: float, peak: float, least: float) -> float:
    """Rate of a step, counted from 0: linear to `peak`, then half a cosine to `least`."""
    if step < warmup:
        return peak * (step + 1) / math.ceil(warmup)
    progress = (step - warmup) / max(1.0, steps - warmup)
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * progress))


def stop_unless_finite(name: str, what: str, value: float, step: int) -> None:
    """Stop a training when a figure of a step, which is the same on all ranks, is not finite.

    Raises:
        FloatingPointError: naming the training, the figure and the step.
    """
    if not math.isfinite(value):
        raise FloatingPointError(f"{name}: {what} is {value} at step {step}")


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the rate of every parameter group, scaled by the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


@torch.no_grad()
def decay_to_mean(engine: "Engine", moe: MoeConfig, lr: float) -> None:
    """Decay experts towards their mean, if `moe.mean_decay` is set, as AdamW does towards 0.

    Call it between `agree` and `step`. At ZeRO-0 it changes nothing if `step` will not update; at
    ZeRO-1 and 2 `step` raises FloatingPointError then, after experts have decayed. Collective over
    the expert-parallel group, and over the replicas at ZeRO-1 and 2.
    """
    if not moe.mean_decay:
        return
    stacks = [p for name, p in engine.module.named_parameters() if is_stacked(name)]
    if not stacks:
        return
    weights = [engine.weight(parameter) for parameter in stacks]
    sums = torch.cat([weight.sum(dim=0).flatten() for weight in weights])
    dist.all_reduce(sums, group=engine.expert_group)
    means = torch.split(sums / moe.num_experts, [weight[0].numel() for weight in weights])
    for parameter, weight, mean in zip(stacks, weights, means, strict=True):
        share = lr * moe.lr_scale * moe.mean_decay * engine.may_update
        engine.set_weight(parameter, weight.lerp(mean.view_as(weight[0]), share))
