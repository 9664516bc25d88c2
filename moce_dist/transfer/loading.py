"""Loading of a task's items as batches of pixels, and the machine that processes them.

A training draw depends only on (seed, epoch, key of the item), so a fit gives the same result with
any number of loader processes. R ranks share the batch of a step and the batches of a test.

Letters: B images of a step, S side in pixels, R ranks.
"""

import contextlib
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from moce_dist.arrays import Int64, Pixels
from moce_dist.config import Config, FinetuneConfig, ParallelConfig
from moce_dist.data.images import centre_sample, draw_cut, sample_generator, to_planes
from moce_dist.data.kept import KeptImages
from moce_dist.data.loaders import load
from moce_dist.features.decoding import framed_image
from moce_dist.features.encoder import EncoderInput
from moce_dist.model.device import choose_device
from moce_dist.settings import ConfigError
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.tasks import Item

logger = logging.getLogger(__name__)

Draw = tuple[int, int]


class Unread(NamedTuple):
    """An unreadable image: its key, and the reason."""

    key: str
    reason: str


class Loaded(NamedTuple):
    """One decoded image (3, S, S) uint8, or a collated batch (B, 3, S, S).

    `label` is () or (C,) for classes, or (S, S) for pixels. If `reason` is not empty, the image
    `key` could not be read.
    """

    pixels: Any
    label: Any
    key: Any
    reason: Any

    def faults(self) -> list[Unread | None]:
        """Return the fault of every image of a batch, None if it was read."""
        pairs = zip(self.key, self.reason, strict=True)
        return [Unread(key, reason) if reason else None for key, reason in pairs]


class TrainingItems(Dataset[Loaded]):
    """Training samples by (epoch, index); the next readable item replaces an unreadable one."""

    def __init__(self, items: Sequence[Any]) -> None:
        """Take items that have a `key`."""
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, draw: Draw) -> Loaded:
        """Return item `index` as it looks in `epoch`, or the next one that can be read.

        Raises:
            ValueError: no item can be read.
        """
        (epoch, index), reason = draw, ""
        key = str(self.items[index].key)
        for number in itertools.chain(range(index, len(self)), range(index)):
            try:
                return Loaded(*self.read(self.items[number], epoch), key, reason)
            except (ValueError, OSError) as error:
                reason = reason or str(error)
        raise ValueError(f"{key}: {reason}; nor can any other be read")

    def read(self, item: Any, epoch: int) -> tuple[Any, Any]:
        """Return pixels and label of an item as it looks in an epoch."""
        raise NotImplementedError


@dataclass(frozen=True)
class Machine:
    """Where a fit runs: device, whether matrix products are bfloat16, decoding processes.

    A rank splits its part of a batch into `micro_batches` and accumulates their gradients.
    """

    device: torch.device
    bf16: bool
    loader_processes: int
    eval_batch_size: int
    micro_batches: int
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    rank: int = 0
    num_ranks: int = 1
    prefetch_batches: int = 2
    stall_s: float | None = None
    """Seconds without a batch after which loading fails."""
    kept_images: KeptImages = field(default_factory=lambda: KeptImages(0), compare=False)
    """Cache of the images of its one task."""

    def rows(self, batch_size: int, *, mirrored: bool = False) -> list[int]:
        """Return the rows of a step's batch that this rank computes.

        With `mirrored`, which needs an even batch, rows are symmetric: Mixup takes an image's
        partner from its mirror position, so both must be on one rank.
        """
        if not mirrored:
            return list(range(self.rank, batch_size, self.num_ranks))
        front = range(self.rank, batch_size // 2, self.num_ranks)
        return [*front, *(batch_size - 1 - i for i in reversed(front))]

    def load(self, dataset: Dataset[Any], **options: Any) -> Iterator[Any]:
        """Yield the batches of a DataLoader with this machine's processes; see `loaders.load`."""
        if self.loader_processes:
            options["prefetch_factor"] = self.prefetch_batches
        yield from load(dataset, self.loader_processes, stall_s=self.stall_s, **options)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which forward passes of a fit run."""
        if not self.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def machine_of(config: Config, *, rank: int = 0, num_ranks: int = 1) -> Machine:
    """Choose the machine of a rank; bfloat16 only on a GPU, threads only on a CPU.

    If there are fewer ranks than `parallel.num_workers`, they share the micro-batches and threads
    of all workers.
    """
    parallel = config.parallel
    device = choose_device(parallel)
    has_gpu = device.type == "cuda"
    if not has_gpu:
        threads = parallel.num_workers * parallel.threads_per_worker // num_ranks
        torch.set_num_threads(max(1, min(threads, os.cpu_count() or 1)))
    micro_batches = -(-parallel.num_workers * parallel.micro_batches // num_ranks)
    mine = {"num_workers": num_ranks, "micro_batches": micro_batches}
    return Machine(
        device,
        has_gpu and parallel.precision == "bf16",
        config.data.loader_processes,
        config.cluster.batch_size,
        micro_batches,
        parallel.model_copy(update=mine),
        rank,
        num_ranks,
        config.data.prefetch_batches,
        config.data.stall_timeout_s,
        # every loader process keeps images of its own
        KeptImages(
            config.data.keep_bytes // max(1, config.data.loader_processes)
            if config.data.keep == "memory"
            else 0
        ),
    )


class TaskImages(TrainingItems):
    """Items as (3, S, S) uint8, as a model takes them; with `augment` cropped and mirrored.

    Without `augment`, an unreadable item is blank.
    """

    def __init__(
        self,
        items: Sequence[Item],
        model: Backbone | EncoderInput,
        kept: KeptImages,
        *,
        augment: FinetuneConfig | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(items)
        self._size, self._kept = model.image_size, kept
        self._augment, self._seed = augment, seed
        # all backbones get the same squares; an encoder has its own framing
        self._framing = model.framing if isinstance(model, EncoderInput) else None

    def __getitem__(self, draw: Draw) -> Loaded:
        """Return item `index` as it looks in `epoch`, for a draw (epoch, index)."""
        if self._augment is not None:
            return super().__getitem__(draw)
        item = self.items[draw[1]]
        try:
            return Loaded(*self.read(item, draw[0]), item.key, "")
        except (ValueError, OSError) as error:
            blank = np.zeros((3, self._size, self._size), np.uint8)
            label = np.asarray(item.label, np.int64)
            return Loaded(blank, label, item.key, str(error))

    def read(self, item: Item, epoch: int) -> tuple[Pixels, Int64]:
        """Return pixels and label of an item."""
        size = self._size
        if self._framing is not None:
            pixels = framed_image(item.read(), size, self._framing)
        elif self._augment is None:
            pixels = centre_sample(self._kept.open(item.key, item.read), size)
        else:
            cut = draw_cut(
                self._kept.open(item.key, item.read),
                scale_min=self._augment.crop_scale_min,
                hflip=self._augment.hflip,
                draws=sample_generator(self._seed, epoch, item.key),
            )
            pixels = to_planes(cut.pixels(size))
        return pixels, np.asarray(item.label, np.int64)


def eval_batches(
    items: Sequence[Item], model: Backbone | EncoderInput, machine: Machine
) -> Iterator[tuple[Tensor, Tensor, list[Unread | None]]]:
    """Yield (images (B, 3, S, S) uint8, labels (B,) or (B, C)) of all items in order, on the CPU.

    Each of R ranks gets every R-th batch; batches, and so results, do not depend on R. Unreadable
    images are blank; the last element has the fault of every image, or None.
    """
    size = machine.eval_batch_size
    order = [
        [(0, i) for i in range(a, min(a + size, len(items)))] for a in range(0, len(items), size)
    ]
    mine = order[machine.rank :: machine.num_ranks]
    dataset = TaskImages(items, model, machine.kept_images)
    for look in machine.load(dataset, batch_sampler=mine):
        yield look.pixels, look.label, look.faults()


class TrainingOrder:
    """The draws of every step; each epoch is one permutation without its incomplete last batch."""

    def __init__(self, num_items: int, batch_size: int, epochs: int, seed: int) -> None:
        self._num_items, self.batch_size = num_items, batch_size
        self._epochs, self._seed = epochs, seed

    @classmethod
    def of_steps(cls, num_items: int, most: int, steps: int, seed: int) -> "TrainingOrder":
        """Take as many epochs as `steps` steps of up to `most` items begin."""
        batch_size = min(most, num_items)
        return cls(num_items, batch_size, -(-steps // (num_items // batch_size)), seed)

    def __len__(self) -> int:
        return self._epochs * (self._num_items // self.batch_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        for epoch in range(self._epochs):
            permuted = np.random.default_rng([self._seed, epoch]).permutation(self._num_items)
            for start in range(0, self._num_items - self.batch_size + 1, self.batch_size):
                yield [(epoch, int(i)) for i in permuted[start : start + self.batch_size]]


def rank_draws(
    order: TrainingOrder,
    machine: Machine,
    start: int,
    stop: int | None = None,
    *,
    mirrored: bool = False,
) -> Iterator[list[Draw]]:
    """Yield this rank's draws of the steps from `start` to `stop`.

    Raises:
        ConfigError: a step has too few images for so many ranks.
    """
    most = order.batch_size // (2 if mirrored else 1)
    if machine.num_ranks > most:
        raise ConfigError(
            f"parallel.num_workers ({machine.num_ranks}) must be at most {most} for steps of "
            f"{order.batch_size} images{', two on every worker' if mirrored else ''}"
        )
    for batch in itertools.islice(order, start, stop):
        yield [batch[i] for i in machine.rows(len(batch), mirrored=mirrored)]
