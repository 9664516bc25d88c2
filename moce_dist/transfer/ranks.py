"""Communication between the ranks of a fit: sums, lists, and batch statistics.

All functions except `share_batch_norm` are collective over the ranks of a machine. With one rank
nothing is sent, and only `join` needs a process group.

Letters: B images of a rank, C channels, H, W pixels.
"""

import os
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moce_dist.config import Config
from moce_dist.model.device import training_device
from moce_dist.transfer.loading import Machine, machine_of

T = TypeVar("T")
_PREPARING = timedelta(hours=12)
"""Timeout of ranks under torchrun, which wait while rank 0 reads a whole data set."""


def join(config: Config) -> Machine:
    """Join the process group of all ranks that a launcher started; return this rank's machine.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    # a detector's or segmenter's head has operations without a repeatable form
    device = training_device(config.parallel, warn_only=True)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # DeepSpeed takes seconds to import, which protocols without training need not wait for
    from moce_dist.parallel.engine import init_distributed

    init_distributed(device, _PREPARING)
    return machine_of(config, rank=dist.get_rank(), num_ranks=dist.get_world_size())


def add_up(values: Tensor, machine: Machine) -> Tensor:
    """Sum a tensor over the ranks; the result is on the CPU and the same on all ranks."""
    if machine.num_ranks == 1:
        return values.cpu()
    total = values.detach().to(machine.device, copy=True)
    dist.all_reduce(total)
    return total.cpu()


def from_first(value: T, machine: Machine) -> T:
    """Return the value of rank 0 on all ranks."""
    sent = [value]
    if machine.num_ranks > 1:
        dist.broadcast_object_list(sent, 0, device=machine.device)
    return sent[0]


def gathered(mine: list[T], machine: Machine) -> list[list[T]]:
    """Return the lists of all ranks, on all ranks."""
    if machine.num_ranks == 1:
        return [mine]
    found: list[list[T]] = [[] for _ in range(machine.num_ranks)]
    dist.all_gather_object(found, mine)
    return found


def in_order(mine: list[T], machine: Machine) -> list[T]:
    """Gather on all ranks, in order, the results of items dealt in turn (rank, rank + R, ...)."""
    found = gathered(mine, machine)
    count = sum(len(each) for each in found)
    return [found[i % machine.num_ranks][i // machine.num_ranks] for i in range(count)]


class _Sum(torch.autograd.Function):
    """Sum over all ranks; its backward pass sums the gradients of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def share_batch_norm(model: nn.Module) -> None:
    """Compute batch normalisation over the images of all ranks, in place; names do not change.

    torch's own SyncBatchNorm does not support CPUs.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.forward = partial(_normalise, module)  # type: ignore[method-assign]


def _normalise(norm: nn.BatchNorm2d, images: Tensor) -> Tensor:
    """Normalise (B, C, H, W) by mean and variance over all ranks' images and pixels."""
    if not norm.training:
        return _activated(norm, nn.BatchNorm2d.forward(norm, images))
    values, shape = images.float(), (1, -1, 1, 1)
    number = values.new_tensor([values.numel() / values.shape[1]])
    total: Tensor = _Sum.apply(torch.cat([values.sum((0, 2, 3)), number]))
    count, mean = total[-1], total[:-1] / total[-1]
    centred = values - mean.view(shape)
    squares: Tensor = _Sum.apply(centred.square().sum((0, 2, 3)))
    variance = squares / count
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    # otherwise the buffers would hold the autograd graphs of all steps
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * count / (count - 1).clamp_min(1), norm.momentum)
        norm.num_batches_tracked += 1
    scaled = centred * (variance + norm.eps).rsqrt().view(shape)
    shifted = scaled * norm.weight.view(shape) + norm.bias.view(shape)
    return _activated(norm, shifted.to(images.dtype))


def _activated(norm: nn.BatchNorm2d, images: Tensor) -> Tensor:
    """Apply what timm's BatchNormAct2d does after it has normalised."""
    for name in ("drop", "act"):
        if isinstance(part := getattr(norm, name, None), nn.Module):
            images = part(images)
    return images
