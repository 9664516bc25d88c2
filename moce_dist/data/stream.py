"""The planned stream: a rank's batches, read by range from the tars of the plan.

The plan determines the samples of a step. The placement determines which expert group reads each
sample (`Readers`, passed in). Rank arithmetic assigns the slots of a group to its ranks. Loader
processes read and decode. A batch is a pure function of (plan, placement, step, rank), so reading
can start at any step, without the steps before.

A sample that cannot be read or decoded keeps its slot, as a zero image of weight 0, and becomes one
line in faults.jsonl. The divisor of the loss remains the planned number of images, so other ranks
need not be told.

Letters: B images of a step over all ranks, R ranks, b = B / R images of a rank, N patches, S image
side (pixels), K clusters.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from moce_dist.arrays import Int64
from moce_dist.config import DataConfig
from moce_dist.data.cache import SampleCache, SampleRange
from moce_dist.data.decoders import ImageError
from moce_dist.data.device import Undecoded, Waiting
from moce_dist.data.images import Croppable, SampleDraws, draw_cut, open_croppable
from moce_dist.data.kept import KeptSamples
from moce_dist.data.plan import PADDING, Plan, windows
from moce_dist.data.ranges import Content, Range, RangeReader, is_remote, one_ahead
from moce_dist.data.table import SampleTable
from moce_dist.run.files import record_fault

GroupOf = Callable[[Int64], Int64]
"""Maps the cluster of every slot of a step, (B,), to the group that reads the slot, (B,)."""


class Batch(NamedTuple):
    """What a rank trains on in one step; clusters and cluster counts are the same on all ranks."""

    step: int
    images: Tensor
    """(b, 3, S, S) uint8 RGB, not normalised: a quarter of the bytes of float32 samples."""
    noise: Tensor
    """(b, N) float32, uniform; determines the mask."""
    weights: Tensor
    """(b,) float32: 1, or 0 for padding and unreadable images."""
    clusters: Tensor
    """(R, b) int64: the cluster of every slot of every rank, PADDING for padding."""
    cluster_counts: Tensor
    """(K,) int64: planned images per cluster, padding left out."""
    keys: list[str]
    """(b,) sample keys, empty for padding."""
    waiting: Undecoded | None = None
    """Crops that the device decodes; `BatchStream` does this before it returns the batch."""


@dataclass(frozen=True)
class StreamSpec:
    """Everything besides the step and the placement that determines a rank's batches."""

    plan: Plan
    data: DataConfig
    num_patches: int
    num_ranks: int
    rank: int
    ledger: Path
    stage: str
    kept: KeptSamples | None = None
    """Samples of the plan's table that need not be read."""


@dataclass
class PlannedStep:
    """One step as a rank sees it."""

    number: int
    ids: Int64
    """(b,) sample ids of this rank's slots, PADDING for padding."""
    clusters: Int64
    """(R, b), see `Batch`."""
    cluster_counts: Int64
    """(K,), see `Batch`."""
    is_read: NDArray[np.bool_]
    """(b,) whether a slot's sample has to be read: it is neither padding nor kept in memory."""
    contents: list[Content | None] = field(default_factory=list)
    """(b,) encoded images, None where nothing is read."""


def open_cache(data: DataConfig, table: SampleTable) -> SampleCache | None:
    """Open the cache for a table's remote samples; None if none is configured."""
    if data.cache is None:
        return None
    versions = {
        url: digest for url, digest in zip(table.urls, table.digests, strict=True) if is_remote(url)
    }
    num_bytes = table.num_bytes
    if len(versions) < len(table.urls):
        rows = np.flatnonzero([url in versions for url in table.urls])
        num_bytes = int(table.size[np.isin(table.shard[np.arange(table.num_samples)], rows)].sum())
    share = data.cache_bytes / max(1, num_bytes)
    return SampleCache(Path(data.cache), versions, min(1.0, share))


class _Announced(NamedTuple):
    """Steps whose samples will be read soon, and the positions of the samples."""

    steps: list[PlannedStep]
    wanted: list[SampleRange]
    ranges: list[Range]


class Readers(NamedTuple):
    """The group that reads each slot, for the steps from the previous `stop` up to this one."""

    stop: int
    group_of: GroupOf


class PlannedStream(IterableDataset[Batch]):
    """A rank's batches from step `start` on; each of P loader processes makes every P-th batch.

    Process i iterates over `readers[i]`, in the order of the steps, and waits there for the next
    `Readers`. While the steps of one window are decoded, the bytes of the next window are read.
    """

    def __init__(self, spec: StreamSpec, start: int, readers: Sequence[Iterable[Readers]]) -> None:
        self._spec, self._start, self._readers = spec, start, readers

    def __iter__(self) -> Iterator[Batch]:
        return map(self._batch, self.steps())

    def steps(self) -> Iterator[PlannedStep]:
        """Yield the steps of this process with the encoded bytes of their samples."""
        worker = get_worker_info()
        number, processes = (0, 1) if worker is None else (worker.id, worker.num_workers)
        data = self._spec.data
        cache = open_cache(data, self._spec.plan.table)
        with closing(RangeReader(data.read_timeout_s, data.read_deadline_s, cache)) as reader:
            yield from one_ahead(self._all_windows(number, processes, reader))

    def _all_windows(
        self, number: int, processes: int, reader: RangeReader
    ) -> Iterator[list[PlannedStep]]:
        first = self._start + number
        for stop, group_of in self._readers[number]:
            steps = range(first, stop, processes)
            yield from self._read_windows(steps, group_of, reader)
            first += len(steps) * processes

    def _read_windows(
        self, steps: range, group_of: GroupOf, reader: RangeReader
    ) -> Iterator[list[PlannedStep]]:
        announced: _Announced | None = None
        for window in self._windows(steps):
            # announced before the previous window is read, so that the disk always has requests
            coming = self._announce([self._planned(number, group_of) for number in window], reader)
            if announced is not None:
                yield self._read(announced, reader)
            announced = coming
        if announced is not None:
            yield self._read(announced, reader)

    def _windows(self, steps: range) -> Iterator[range]:
        spec, table = self._spec, self._spec.plan.table
        mean = max(1, table.num_bytes / table.num_samples)
        step_bytes = mean * spec.plan.batch_size / spec.num_ranks
        return windows(steps, max(1, round(spec.data.read_ahead_bytes / step_bytes)))

    def _announce(self, steps: list[PlannedStep], reader: RangeReader) -> _Announced:
        table = self._spec.plan.table
        ids = np.concatenate([step.ids[step.is_read] for step in steps])
        columns = (table.shard[ids].tolist(), table.offset[ids].tolist(), table.size[ids].tolist())
        wanted = [
            SampleRange(table.urls[shard], offset, size)
            for shard, offset, size in zip(*columns, strict=True)
        ]
        return _Announced(steps, wanted, reader.announce(wanted))

    def _read(self, announced: _Announced, reader: RangeReader) -> list[PlannedStep]:
        found = iter(reader.read(announced.wanted, announced.ranges))
        for step in announced.steps:
            step.contents.extend(next(found) if is_read else None for is_read in step.is_read)
        return announced.steps

    def _planned(self, number: int, group_of: GroupOf) -> PlannedStep:
        spec = self._spec
        order = spec.plan.step_order(number)
        # (R, b): slots by group, equally many each; the exchange needs those of all ranks
        slots = np.argsort(group_of(order.clusters), kind="stable").reshape(spec.num_ranks, -1)
        planned = order.clusters[order.clusters != PADDING]
        counts = np.bincount(planned, minlength=len(spec.plan.table.cluster_sizes))
        own = spec.plan.ids_at(order, slots[spec.rank])
        is_read = own != PADDING
        if spec.kept is not None:
            is_read &= ~spec.kept.has(own)
        return PlannedStep(number, own, order.clusters[slots], counts, is_read)

    def _batch(self, step: PlannedStep) -> Batch:
        spec, table, side = self._spec, self._spec.plan.table, self._spec.data.image_size
        slots = len(step.ids)
        images = np.zeros((slots, side, side, 3), np.uint8)
        noise = np.empty((slots, spec.num_patches), np.float32)
        weights = np.zeros(slots, np.float32)
        waiting, on_device = Waiting(), spec.data.decode_on == "device"
        generators, epoch = SampleDraws(), spec.plan.epoch_of(step.number)
        for slot, sample_id in enumerate(step.ids):
            key = "" if sample_id == PADDING else table.keys[sample_id]
            # the mask is drawn before the crop, as a crop takes a varying number of draws
            draws = generators.of(spec.plan.seed, epoch, key)
            noise[slot] = draws.random(spec.num_patches, np.float32)
            if sample_id == PADDING:
                continue
            try:
                data, image = self._spec.data, self._image(step, slot)
                cut = draw_cut(image, scale_min=data.crop_scale_min, hflip=data.hflip, draws=draws)
                if not on_device or not waiting.take(slot, int(sample_id), cut):
                    images[slot] = cut.pixels(side)
            except (ImageError, OSError) as error:
                record_bad_image(spec, step.number, int(sample_id), str(error))
            else:
                weights[slot] = 1.0
        return Batch(
            step=step.number,
            images=torch.from_numpy(images).permute(0, 3, 1, 2),
            noise=torch.from_numpy(noise),
            weights=torch.from_numpy(weights),
            clusters=torch.from_numpy(step.clusters),
            cluster_counts=torch.from_numpy(step.cluster_counts),
            keys=["" if i == PADDING else table.keys[i] for i in step.ids],
            waiting=waiting.collect(),
        )

    def _image(self, step: PlannedStep, slot: int) -> Croppable:
        kept, sample_id, content = self._spec.kept, int(step.ids[slot]), step.contents[slot]
        step.contents[slot] = None
        if kept is not None and (image := kept.get(sample_id)) is not None:
            return image
        if content is None or isinstance(content, OSError):
            raise content or AssertionError("a planned slot was not read")
        image = open_croppable(content)
        if kept is not None:
            kept.keep(sample_id, image, content)
        return image


def record_bad_image(spec: StreamSpec, step: int, sample_id: int, reason: str) -> None:
    """Record a sample that could not be used in the ledger."""
    table = spec.plan.table
    record_fault(
        spec.ledger,
        stage=spec.stage,
        epoch=spec.plan.epoch_of(step),
        step=step,
        shard=table.urls[int(table.shard[np.array(sample_id)])],
        key=table.keys[sample_id],
        offset=int(table.offset[sample_id]),
        reason=reason,
    )
