"""Sum gradients over the ranks in buckets, while the backward pass still runs.

Parameters are laid out in buckets in the order in which the backward pass finishes them. When the
last gradient of a bucket is there, the bucket's all-reduce begins, while earlier layers still
compute. All ranks issue the buckets in the same order, whatever order gradients come in, because
collectives of several groups that are issued in different orders deadlock.

    parameters   embed  block 0  block 1  decoder          backward pass: right to left
    buckets            [   2   ][    1   ][  0  ]           issued: 0, 1, 2

Gradients of shared parameters are summed over all ranks, those of experts over the ranks that hold
the same experts. After `finish` every gradient is a view into its bucket, so nothing is copied
back. Only buckets of another dtype than the parameters are copied back, once.

Source: Li et al. 2020, arXiv 2006.15704 (PyTorch DDP), section 3.2.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moce_dist.cost.sizes import BUCKET_BYTES

_LEAST_BYTES, _FEWEST_BUCKETS = 2**20, 8
"""Least size of a bucket, and the number of buckets below which they are made smaller: otherwise
nothing of a small model's reduction would overlap."""


@dataclass
class Bucket:
    """Parameters whose gradients are reduced together, and the buffer of the all-reduce."""

    parameters: list[nn.Parameter]
    group: dist.ProcessGroup | None
    """Ranks that the gradients are summed over; None for all ranks."""
    flat: Tensor
    views: list[Tensor]
    """Views into `flat`, one per parameter and of its shape."""
    is_ready: set[int] = field(default_factory=set)
    """Positions of the parameters whose gradients are complete."""
    work: Any = None

    def begin(self) -> None:
        """Copy the gradients in, zeros for parameters without one, and start the all-reduce."""
        gradients = []
        for parameter, view in zip(self.parameters, self.views, strict=True):
            gradients.append(view.zero_() if parameter.grad is None else parameter.grad)
            # release the copied gradient: from now on the buffer holds it
            parameter.grad = view if view.dtype == parameter.dtype else None
        torch._foreach_copy_(self.views, gradients)
        self.work = dist.all_reduce(self.flat, group=self.group, async_op=True)

    def end(self) -> None:
        """Wait for the all-reduce; on a GPU only the stream waits, not the host."""
        self.work.wait()
        self.work = None
        self.is_ready.clear()
        if self.flat.dtype != self.parameters[0].dtype:
            gradients = [torch.empty_like(parameter) for parameter in self.parameters]
            torch._foreach_copy_(gradients, self.views)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient


class GradientReducer:
    """Sums gradients over ranks in the last backward pass of a step; collective over all ranks."""

    def __init__(
        self,
        parameters: Iterable[tuple[nn.Parameter, dist.ProcessGroup | None]],
        *,
        dtype: torch.dtype | None = None,
        bucket_bytes: int | None = None,
    ) -> None:
        """Lay out buckets and hook into the backward pass.

        Args:
            parameters: (parameter, group of the ranks that hold it; None: all ranks), in the order
                in which the backward pass finishes them. A group of one rank needs no reduction.
            dtype: of the buckets; None: that of the parameters.
            bucket_bytes: size at which a bucket is closed; None: by the size of the model.
        """
        listed = list(parameters)
        if bucket_bytes is None:
            total = sum(p.numel() * (dtype or p.dtype).itemsize for p, _ in listed)
            bucket_bytes = min(BUCKET_BYTES, max(_LEAST_BYTES, total // _FEWEST_BUCKETS))
        self._buckets: list[Bucket] = []
        self._is_armed = False
        self._next = 0
        self._hooks: list[Any] = []
        for members, group in _fill(listed, dtype, bucket_bytes):
            sizes = [parameter.numel() for parameter in members]
            flat = torch.empty(
                sum(sizes), dtype=dtype or members[0].dtype, device=members[0].device
            )
            views = [
                part.view_as(parameter)
                for part, parameter in zip(torch.split(flat, sizes), members, strict=True)
            ]
            bucket = Bucket(members, group, flat, views)
            self._buckets.append(bucket)
            for position, parameter in enumerate(members):
                self._hooks.append(self._watch(bucket, position, parameter))

    @property
    def num_buckets(self) -> int:
        """Number of collectives in a step."""
        return len(self._buckets)

    def _watch(self, bucket: Bucket, position: int, parameter: nn.Parameter) -> Any:
        def arrived(_: Tensor) -> None:
            if self._is_armed:
                bucket.is_ready.add(position)
                self._issue(only_ready=True)

        return parameter.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]

    def _issue(self, *, only_ready: bool) -> None:
        while self._next < len(self._buckets):
            bucket = self._buckets[self._next]
            if only_ready and len(bucket.is_ready) < len(bucket.parameters):
                return
            bucket.begin()
            self._next += 1

    def start(self) -> None:
        """Prepare to sum during the next backward pass, the last one of the step."""
        self._is_armed, self._next = True, 0

    def finish(self) -> None:
        """Wait for all sums; parameters without a gradient on this rank get one as well."""
        self._issue(only_ready=False)
        self._is_armed = False
        for bucket in self._buckets:
            bucket.end()

    def detach(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()


def in_backward_order(
    module: nn.Module, replicas: dist.ProcessGroup
) -> Iterator[tuple[nn.Parameter, dist.ProcessGroup | None]]:
    """Yield parameters with their process groups in the order in which their gradients appear.

    `replicas` is the group of the ranks that hold the same experts.
    """
    # the gate weights the output of every MoE layer, so its gradient is complete only after the
    # backward pass of the first MoE layer; in bfloat16 two layers of the decoder are cast together
    # with the patch embedding, and get their gradients with it: all of these come last
    last = ("gate.", "decoder_embed.", "decoder_pred.")
    named = [item for item in module.named_parameters() if item[1].requires_grad][::-1]
    for _, parameter in sorted(named, key=lambda item: item[0].startswith(last)):
        yield parameter, None if getattr(parameter, "allreduce", True) else replicas


def _fill(
    parameters: Sequence[tuple[nn.Parameter, dist.ProcessGroup | None]],
    dtype: torch.dtype | None,
    bucket_bytes: int,
) -> list[tuple[list[nn.Parameter], dist.ProcessGroup | None]]:
    # one bucket per group and dtype is open at a time; a bucket is ordered by its last parameter
    closed: list[tuple[list[nn.Parameter], dist.ProcessGroup | None]] = []
    is_open: dict[tuple[Any, torch.dtype], tuple[list[nn.Parameter], int]] = {}
    groups: dict[tuple[Any, torch.dtype], dist.ProcessGroup | None] = {}
    for parameter, group in parameters:
        if dist.get_world_size(group) == 1:
            continue
        key = (group, parameter.dtype)
        members, size = is_open.get(key, ([], 0))
        members.append(parameter)
        size += parameter.numel() * (dtype or parameter.dtype).itemsize
        is_open[key], groups[key] = (members, size), group
        if size >= bucket_bytes:
            closed.append((members, group))
            del is_open[key]
    return [*closed, *((members, groups[key]) for key, (members, _) in is_open.items())]
