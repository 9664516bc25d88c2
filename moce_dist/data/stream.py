"""The planned stream: a rank's batches, read by range from the tars of the plan.

The plan says which samples a step contains, the placement says which expert group reads each of
them (`GroupOf`, passed in), rank arithmetic says which slots of a group are whose. Loader
processes only decode: a batch is a pure function of (plan, placement, step, rank).

A sample that cannot be read or decoded keeps its slot: a zero image of weight 0 and one line in
faults.jsonl. The divisor of the loss stays the planned number of images, so nobody has to be told.

Letters: B images of a step over all ranks, b = B / R images of a rank, N patches, S image side
(pixels).
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moce_dist.config import DataConfig
from moce_dist.data.images import ImageError, sample_generator, train_image
from moce_dist.data.plan import PADDING, Ids, Plan, SampleTable
from moce_dist.run import record_fault

GroupOf = Callable[[Ids], Ids]


class Batch(NamedTuple):
    """What a rank trains on in one step; clusters and their counts are the same on all ranks."""

    step: int
    images: Tensor
    """(b, 3, S, S) float32."""
    noise: Tensor
    """(b, N) float32, uniform; decides the mask."""
    weights: Tensor
    """(b,) float32: 1, or 0 for padding and unreadable images."""
    clusters: Tensor
    """(R, b) int64: the cluster of every slot of every rank, PADDING for padding."""
    cluster_counts: Tensor
    """(K,) int64: planned images per cluster, padding left out."""
    keys: list[str]
    """(b,) sample keys, empty for padding."""


@dataclass(frozen=True)
class Layout:
    """Who holds which slots: R ranks host G groups; every rank has B / R slots of a step."""

    num_ranks: int
    num_groups: int

    def rank_slots(self, groups: Ids) -> Ids:
        """Return every rank's slots, (R, b), from the group of every slot, (B,), equally large."""
        return np.argsort(groups, kind="stable").reshape(self.num_ranks, -1)


@dataclass
class RangeReader:
    """Reads byte ranges; local files stay open."""

    _open: dict[str, int] = field(default_factory=dict)

    def read(self, url: str, offset: int, size: int) -> bytes:
        """Read `size` bytes at `offset`.

        Raises:
            OSError: the file cannot be read, or ends before.
        """
        if "://" in url:
            with fsspec.open(url, "rb") as file:
                file.seek(offset)
                content: bytes = file.read(size)
        else:
            # opened once in each process: thousands of samples come from the same few tars
            if url not in self._open:
                self._open[url] = os.open(url, os.O_RDONLY)
            content = os.pread(self._open[url], size, offset)
        if len(content) != size:
            raise OSError(f"ends after {len(content)} of {size} bytes")
        return content


@dataclass(frozen=True)
class StreamSpec:
    """Everything that a rank's batches follow from, besides the step."""

    plan: Plan
    data: DataConfig
    num_patches: int
    layout: Layout
    rank: int
    ledger: Path
    stage: str


class StepDataset(Dataset[Batch]):
    """Map a global step to this rank's batch."""

    def __init__(self, spec: StreamSpec, group_of: GroupOf) -> None:
        self._spec, self._group_of = spec, group_of
        self._reader = RangeReader()
        self._order = lru_cache(maxsize=1)(spec.plan.epoch_order)

    def __getitem__(self, step: int) -> Batch:
        spec, table = self._spec, self._spec.plan.table
        ids = spec.plan.step_ids(self._order(spec.plan.epoch_of(step)), step)
        planned = ids != PADDING
        clusters = np.where(planned, table.cluster[ids], PADDING)
        # all ranks compute all ranks' slots: the exchange needs to know who reads what
        slots = spec.layout.rank_slots(self._group_of(clusters))
        mine = ids[slots[spec.rank]]
        samples = [self._sample(step, sample_id) for sample_id in mine]
        counts = np.bincount(clusters[planned], minlength=len(table.cluster_sizes))
        return Batch(
            step=step,
            images=torch.from_numpy(np.stack([image for image, _, _ in samples])),
            noise=torch.from_numpy(np.stack([noise for _, noise, _ in samples])),
            weights=torch.tensor([weight for _, _, weight in samples]),
            clusters=torch.from_numpy(clusters[slots]),
            cluster_counts=torch.from_numpy(counts),
            keys=["" if i == PADDING else table.keys[i] for i in mine],
        )

    def _sample(
        self, step: int, sample_id: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
        spec, table, data = self._spec, self._spec.plan.table, self._spec.data
        key = "" if sample_id == PADDING else table.keys[sample_id]
        # the mask is drawn before the crop, so that it does not depend on how often the crop tries
        draws = sample_generator(spec.plan.seed, spec.plan.epoch_of(step), key)
        noise = draws.random(spec.num_patches, np.float32)
        zero = np.zeros((3, data.image_size, data.image_size), np.float32)
        if sample_id == PADDING:
            return zero, noise, 0.0
        try:
            image = train_image(
                self._read(table, sample_id),
                size=data.image_size,
                scale_min=data.crop_scale_min,
                hflip=data.hflip,
                draws=draws,
            )
        except (ImageError, OSError) as error:
            self._record(step, sample_id, str(error))
            return zero, noise, 0.0
        return image, noise, 1.0

    def _read(self, table: SampleTable, sample_id: int) -> bytes:
        url = table.urls[table.shard[sample_id]]
        return self._reader.read(url, int(table.offset[sample_id]), int(table.size[sample_id]))

    def _record(self, step: int, sample_id: int, reason: str) -> None:
        spec, table = self._spec, self._spec.plan.table
        record_fault(
            spec.ledger,
            stage=spec.stage,
            epoch=spec.plan.epoch_of(step),
            step=step,
            shard=table.urls[table.shard[sample_id]],
            key=table.keys[sample_id],
            offset=int(table.offset[sample_id]),
            reason=reason,
        )


def stream(spec: StreamSpec, group_of: GroupOf, *, start: int, stop: int) -> Iterator[Batch]:
    """Yield this rank's batches of steps [start, stop), decoded ahead by `loader_processes`.

    Raises:
        RuntimeError: the loader delivered nothing for `data.stall_timeout_s`, or a process died.
    """
    processes = spec.data.loader_processes
    loader = DataLoader(
        StepDataset(spec, group_of),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=processes,
        prefetch_factor=spec.data.prefetch_batches if processes else None,
        timeout=spec.data.stall_timeout_s if processes else 0,
    )
    yield from loader
