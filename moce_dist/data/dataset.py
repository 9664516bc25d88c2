"""The planned stream for other training code: webdataset-style samples, exactly once per epoch.

It reads plain tars with an `index.json` beside them (jobs/ingest.py writes both) in planned order,
on any number of ranks and loader processes:

    samples = PlannedSamples("/data/shards", batch_size=256, rank=rank, num_ranks=num_ranks)
    pipeline = webdataset.FluidWrapper(samples).decode("pil").to_tuple("jpg", "cls").map(make)
    for epoch in range(90):
        samples.set_epoch(epoch)
        for batch in webdataset.WebLoader(pipeline, batch_size=samples.rank_batch, num_workers=4):
            ...

Step t has the same B samples for every number of ranks R. Rank r has slots [r b, (r + 1) b) of it,
b = B / R, and each of P loader processes makes every P-th step. So a batch of b samples is a rank's
part of one step, and the number of completed steps is the whole position: a killed run resumes with
`load_state_dict({"step": t})`, also on another number of ranks and processes, and its loop begins
with epoch t // steps_per_epoch. With `drop_last`, steps that are left out do not count.

`set_epoch` reaches all loader processes, also those that live on (`persistent_workers`); call it
before every epoch. Without the call, processes that live on, and a loader without processes,
continue with the next epoch after a complete one, but new processes repeat the epoch.

The last step of an epoch may be smaller, and some ranks may have no sample of it. Where all ranks
must take equally many steps (DDP), `drop_last` leaves it out. A `handler` that skips a sample makes
the rank's next batch begin one sample earlier.

Letters: B samples of a step over all ranks, b samples of a rank, R ranks, P loader processes.
"""

import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.handlers import reraise_exception

from moce_dist.data.cache import SampleRange
from moce_dist.data.columns import open_table
from moce_dist.data.plan import ORDER, PADDING, Plan, windows
from moce_dist.data.ranges import Content, RangeReader, one_ahead
from moce_dist.data.tarscan import read_files, split_name

WebSample = dict[str, Any]
"""`__key__`, `__url__` and the bytes of every member by its extension, as in webdataset."""
ReadStep = tuple[int, Any, list[Content]]
"""A step, the rows of its samples in the index, (m,), and what was read of each."""
_WINDOW_BYTES = 2**24


class PlannedSamples(IterableDataset[WebSample]):
    """The samples of an index in the order of a plan; one iteration yields the rest of an epoch.

    An iteration begins at the position set by `set_epoch` or `load_state_dict`. The error of a
    sample that cannot be read goes to `handler`, as in webdataset; by default it is raised.
    """

    def __init__(
        self,
        index: str | Path,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int | None = None,
        num_ranks: int | None = None,
        drop_last: bool = False,
        handler: Callable[[Exception], bool] = reraise_exception,
    ) -> None:
        """Read the index of a folder or URL; rank and number of ranks default to torchrun's.

        With `drop_last` an epoch has only steps of B samples.

        Raises:
            ConfigError: there is no index, or it has another format.
            ValueError: `num_ranks` does not divide `batch_size`, B, `rank` is out of range, or
                `drop_last` leaves no step.
        """
        self._rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        ranks = int(os.environ.get("WORLD_SIZE", "1")) if num_ranks is None else num_ranks
        if batch_size % ranks or not 0 <= self._rank < ranks:
            raise ValueError(
                f"batch_size ({batch_size}) must be a multiple of num_ranks ({ranks}), and rank "
                f"({self._rank}) one of them"
            )
        self.rank_batch = batch_size // ranks
        """Samples of this rank in a step, b."""
        self._plan = Plan(open_table(index), batch_size, seed)
        self._handler, self._drop_last, self._is_loaded = handler, drop_last, False
        has_rest = self._plan.epoch_samples % batch_size > 0
        self.steps_per_epoch = self._plan.steps_per_epoch - (drop_last and has_rest)
        """Steps of an epoch; the last one may be smaller, and is left out with `drop_last`."""
        if self.steps_per_epoch == 0:
            samples = self._plan.epoch_samples
            raise ValueError(f"drop_last: {samples} samples are no step of batch_size {batch_size}")
        # where the next iteration begins, and where the present one is: next step, number of its
        # samples that were yielded, whether this process makes that step
        self._begin = self._now = (0, 0, False)
        # loader processes have copies of this object, which follow the original by what they share:
        # step and number of samples as they were set last, and how often they were set
        self._shared = torch.zeros(3, dtype=torch.int64)
        self._shared.share_memory_()  # type: ignore[no-untyped-call]
        self._times_set, self._has_iterated = 0, False

    def set_epoch(self, epoch: int) -> None:
        """Begin the next iteration at the start of an epoch, unless the position is within it.

        Raises:
            ValueError: the position that was loaded is in a later epoch.
        """
        at = self._begin[0] // self.steps_per_epoch
        if self._is_loaded and epoch < at:
            raise ValueError(f"epoch {epoch} is over: the loaded position is in epoch {at}")
        self._is_loaded = False
        begin = self._begin if at == epoch else (epoch * self.steps_per_epoch, 0, False)
        self._set_begin(begin)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of this process (`step`, `slot` within it) and what it is valid for.

        Between two steps, `{"step": t}` is enough to resume.
        """
        step, slot, is_own = self._now
        return {"step": step, "slot": slot, "is_own": is_own, **self._order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a position, in a loader process or before any are started.

        Raises:
            ValueError: the position belongs to other data, batch size or seed; or it is within a
                step and belongs to another number of ranks.
        """
        slot, mine = state.get("slot", 0), self._order
        if "samples" in state:
            # states without a version of the order were written with version 1
            state = {"order": 1, **state}
        for name, value in state.items():
            # between two steps any number of ranks may resume
            if name in mine and value != mine[name] and (slot or name != "rank_batch"):
                raise ValueError(f"{name} of the state is {value}, here it is {mine[name]}")
        self._is_loaded = True
        is_own = state.get("is_own", False) and get_worker_info() is not None
        self._set_begin((state["step"], slot, is_own))

    def _set_begin(self, begin: tuple[int, int, bool]) -> None:
        self._begin = self._now = begin
        if get_worker_info() is None:
            self._times_set += 1
            self._shared[:] = torch.tensor((*begin[:2], self._times_set))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy; one that is not in a loader process follows no other object."""
        self.__dict__.update(state)
        self._shared.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def _order(self) -> dict[str, int]:
        plan = self._plan
        return {
            "order": ORDER,
            "samples": plan.table.num_samples,
            "data": zlib.crc32("".join(plan.table.digests).encode()),
            "batch_size": plan.batch_size,
            "seed": plan.seed,
            "rank_batch": self.rank_batch,
            "drop_last": self._drop_last,
        }

    def __iter__(self) -> Iterator[WebSample]:
        if get_worker_info() is not None:
            step, slot, times_set = self._shared.tolist()
            # the first iteration begins where the copy does, whatever was set since it was made
            if self._has_iterated and times_set != self._times_set:
                self._begin, self._times_set = (step, slot, False), times_set
            self._has_iterated = True
        self._now = self._begin
        return self._samples()

    def _samples(self) -> Iterator[WebSample]:
        worker = get_worker_info()
        first, slot, is_own = self._begin
        stop = (first // self.steps_per_epoch + 1) * self.steps_per_epoch
        every = 1 if worker is None else worker.num_workers
        mine = first if worker is None or is_own else first + worker.id
        for step, rows, contents in self._read_ahead(range(mine, stop, every)):
            skipped = slot if step == first else 0
            for at in range(skipped, len(rows)):
                # before the yield, so that a state taken after it counts this sample
                self._now = (step, at + 1, True)
                try:
                    sample = self._sample(int(rows[at]), contents[at])
                except (OSError, ValueError, tarfile.TarError) as error:
                    named = ValueError(f"{' of '.join(self._place(int(rows[at])))}: {error}")
                    if not self._handler(named):
                        return
                else:
                    yield sample
            if step + every < stop:
                self._now = (step + every, 0, True)
        self._begin = (stop, 0, False)
        if worker is None:
            # the state of a loader process stays in its epoch until all processes have ended theirs
            self._now = self._begin

    def _read_ahead(self, steps: range) -> Iterator[ReadStep]:
        table = self._plan.table
        step_bytes = max(1, table.num_bytes) / max(1, table.num_samples) * self.rank_batch
        longest = max(1, int(_WINDOW_BYTES / step_bytes))
        with closing(RangeReader()) as reader:
            yield from one_ahead(self._read(window, reader) for window in windows(steps, longest))

    def _read(self, steps: range, reader: RangeReader) -> list[ReadStep]:
        table = self._plan.table
        parts = [self._rows(step) for step in steps]
        rows = np.concatenate(parts)
        before = table.before[rows].astype(np.int64)
        starts, sizes = table.offset[rows] - before, before + table.size[rows] + table.after[rows]
        columns = (table.shard[rows], starts, sizes)
        wanted = [
            SampleRange(table.urls[shard], start, size)
            for shard, start, size in zip(*(c.tolist() for c in columns), strict=True)
        ]
        found = iter(reader.read(wanted))
        contents = [[next(found) for _ in part] for part in parts]
        return list(zip(steps, parts, contents, strict=True))

    def _rows(self, step: int) -> Any:
        epoch, step = divmod(step, self.steps_per_epoch)
        order = self._plan.step_order(epoch * self._plan.steps_per_epoch + step)
        first = self._rank * self.rank_batch
        own = self._plan.ids_at(order, np.arange(first, first + self.rank_batch))
        return own[own != PADDING]

    def _sample(self, row: int, content: Content) -> WebSample:
        if isinstance(content, OSError):
            raise content
        key, url = self._place(row)
        sample: WebSample = {"__key__": key, "__url__": url}
        for path, body in read_files(content):
            if (name := split_name(path)) is not None and name[0] == key:
                sample[name[1]] = body
        if len(sample) == len(("__key__", "__url__")):
            raise ValueError("its bytes in the tar are no sample of this key")
        return sample

    def _place(self, row: int) -> tuple[str, str]:
        # key and tar URL of a sample
        table = self._plan.table
        return table.keys[row], table.urls[int(table.shard[np.array([row])][0])]
