"""Items of a task to batches of pixels, and the machine that works on them.

A training draw depends on (seed, epoch, key of the item) alone, so a fit gives the same result with
any number of loader processes.

Letters: B images, S side in pixels.
"""

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moce_dist.config import Config, FinetuneConfig
from moce_dist.data.images import MEAN, STD, eval_image, sample_generator, train_image
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.tasks import Item

logger = logging.getLogger(__name__)
_REPORT_S = 5.0

Batches = Iterator[tuple[Tensor, Tensor]]
Draw = tuple[int, int]
Statistics = NDArray[np.float32]


@dataclass(frozen=True)
class Machine:
    """Where a fit runs: device, whether matrix products are bfloat16, decoding processes.

    A step's batch is computed in `micro_batches` parts, whose gradients add up.
    """

    device: torch.device
    bf16: bool
    loader_processes: int
    eval_batch_size: int
    micro_batches: int

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which forward passes of a fit run."""
        if not self.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def machine_of(config: Config) -> Machine:
    """Choose the device that the configuration allows; bfloat16 on a GPU, threads on a CPU."""
    has_gpu = config.parallel.use_gpu is not False and torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    bf16 = has_gpu and config.parallel.precision == "bf16"
    if not has_gpu:
        # one process does here what all workers do in training
        threads = config.parallel.num_workers * config.parallel.threads_per_worker
        torch.set_num_threads(min(threads, os.cpu_count() or 1))
    return Machine(
        device,
        bf16,
        config.data.loader_processes,
        config.cluster.batch_size,
        config.parallel.micro_batches,
    )


def backward_in_parts(
    inputs: Tensor, targets: Any, machine: Machine, loss_of: Callable[[Tensor, Any], Tensor]
) -> Tensor:
    """Add up the gradients of the mean of `loss_of(inputs, targets)` over the parts of a batch.

    Returns the loss, detached. Parts weigh by their number of inputs (B, ...); targets are a
    tensor (B, ...) or a list of B.
    """
    total = torch.zeros((), device=inputs.device)
    size = -(-len(inputs) // machine.micro_batches)
    for start in range(0, len(inputs), size):
        some = inputs[start : start + size]
        with machine.autocast():
            loss = loss_of(some, targets[start : start + size]) * (len(some) / len(inputs))
        torch.autograd.backward(loss)
        total += loss.detach()
    return total


class Progress:
    """Log how far a loop is, how fast, and how long it still takes, every few seconds."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._done, self._start = 0, time.monotonic()
        self._reported = self._start

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        self._done += count
        now = time.monotonic()
        if now - self._reported < _REPORT_S:
            return
        self._reported = now
        rate = self._done / (now - self._start)
        left = (self._total - self._done) / rate
        logger.info(
            "%s: %d/%d %s, %.1f %s/s, %d:%02d left",
            *(self._name, self._done, self._total, self._unit, rate, self._unit),
            *divmod(round(left), 60),
        )


def renormalisation(backbone: Backbone) -> tuple[Statistics, Statistics]:
    """Return factor and shift, (3, 1, 1) each, from ImageNet's statistics to a backbone's own."""
    mean, std, own_mean, own_std = (
        np.array(values, np.float32).reshape(3, 1, 1)
        for values in (MEAN, STD, backbone.mean, backbone.std)
    )
    return std / own_std, (mean - own_mean) / own_std


class TaskImages(Dataset[tuple[np.ndarray, NDArray[np.int64]]]):
    """Items as (3, S, S) float32 normalised for a backbone; with `augment` cropped and mirrored."""

    def __init__(
        self,
        items: Sequence[Item],
        backbone: Backbone,
        *,
        augment: FinetuneConfig | None = None,
        seed: int = 0,
    ) -> None:
        self._items, self._size = items, backbone.image_size
        self._augment, self._seed = augment, seed
        self._factor, self._shift = renormalisation(backbone)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, draw: Draw) -> tuple[np.ndarray, NDArray[np.int64]]:
        """Return item `index` as it looks in `epoch` and its label, () or (C,), for a draw.

        A draw is (epoch, index).

        Raises:
            ValueError: the image cannot be read.
        """
        epoch, index = draw
        item = self._items[index]
        try:
            pixels = self._pixels(item, epoch)
        except (ValueError, OSError) as error:
            raise ValueError(f"{item.key}: unreadable image: {error}") from None
        return pixels * self._factor + self._shift, np.asarray(item.label, np.int64)

    def _pixels(self, item: Item, epoch: int) -> np.ndarray:
        if self._augment is None:
            return eval_image(item.read(), self._size)
        return train_image(
            item.read(),
            size=self._size,
            scale_min=self._augment.crop_scale_min,
            hflip=self._augment.hflip,
            draws=sample_generator(self._seed, epoch, item.key),
        )


def eval_batches(items: Sequence[Item], backbone: Backbone, machine: Machine) -> Batches:
    """Yield (images (B, 3, S, S), labels (B,) or (B, C)) of all items in order, on the CPU."""
    size = machine.eval_batch_size
    order = [
        [(0, i) for i in range(a, min(a + size, len(items)))] for a in range(0, len(items), size)
    ]
    dataset = TaskImages(items, backbone)
    yield from DataLoader(dataset, batch_sampler=order, num_workers=machine.loader_processes)


class TrainingOrder:
    """The draws of every step: each epoch is one permutation, whose remainder is left out."""

    def __init__(self, num_items: int, batch_size: int, epochs: int, seed: int) -> None:
        self._num_items, self._batch_size = num_items, batch_size
        self._epochs, self._seed = epochs, seed

    def __len__(self) -> int:
        return self._epochs * (self._num_items // self._batch_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        for epoch in range(self._epochs):
            permuted = np.random.default_rng([self._seed, epoch]).permutation(self._num_items)
            for start in range(0, self._num_items - self._batch_size + 1, self._batch_size):
                yield [(epoch, int(i)) for i in permuted[start : start + self._batch_size]]


def training_batches(
    images: TaskImages, order: TrainingOrder, machine: Machine, start: int = 0
) -> Batches:
    """Yield (images (B, 3, S, S), labels (B,) or (B, C)) from step `start` of the order on."""
    draws = itertools.islice(order, start, None)
    yield from DataLoader(images, batch_sampler=draws, num_workers=machine.loader_processes)
