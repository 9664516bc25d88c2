"""Rewriting tars by cluster, so that each group of workers streams the clusters it trains on.

Samples are copied as raw byte ranges, in index order within a cluster; headers and contents do not
change:

    train-000000.tar   a b c d            cluster-00000-000000.tar   a d f
    train-000001.tar   e f g       ->     cluster-00001-000000.tar   b c e g

The index and the assignments alone determine the content of every new tar, so each tar is a task of
its own: workers write tars in parallel, and after a kill the finished ones stay. A written tar is
parsed again from the disk. It gets its final name only if it has the planned keys at the planned
positions, and the sha256 of the bytes that were read from the sources. The plan contains every
sample once, so the new tars have the same multiset of (key, bytes) as the sources.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moce_dist.arrays import Int32, Int64
from moce_dist.config import DataConfig
from moce_dist.data.cache import SampleRange
from moce_dist.data.columns import open_index, write_columns
from moce_dist.data.progress import track
from moce_dist.data.ranges import RangeReader
from moce_dist.data.shards import INDEX_NAME, Shard, ShardIndex, scan_shard, write_index
from moce_dist.data.tarscan import TAR_END
from moce_dist.data.writer import all_or_nothing, finished_tar, note_finished
from moce_dist.run.artefacts import fingerprint, is_complete, mark_complete
from moce_dist.run.files import naming, temporary_name
from moce_dist.run.tasks import MapTasks, map_here
from moce_dist.settings import ConfigError

logger = logging.getLogger(__name__)


class TarPlan(NamedTuple):
    """One tar to be written: its name, its cluster and its samples, in order."""

    name: str
    cluster: int
    parts: list[tuple[str, Shard]]
    """URL of a source tar and the index rows of the samples to copy from it."""

    def expected(self) -> Shard:
        """Return the index entry that the tar should get, without the sha256."""
        samples, position = [], 0
        for _, taken in self.parts:
            rows = zip(
                taken.keys, taken.starts, taken.ends, taken.offsets, taken.sizes, strict=True
            )
            for key, start, end, offset, size in rows:
                length = end - start
                samples.append((key, position, position + length, position + offset - start, size))
                position += length
        entry = Shard(self.name, bytes=position + len(TAR_END), cluster=self.cluster)
        return entry.with_samples(samples)


class TarPlans(Sequence[TarPlan]):
    """The tars of a data set; a plan is made when it is accessed.

    Between accesses 8 bytes per sample and a few numbers per tar are in memory.
    """

    def __init__(self, index: ShardIndex, labels: Int32, shard_bytes: int) -> None:
        """Assign samples to tars by their clusters `labels` (n,), then in the order of the index.

        Raises:
            ConfigError: a sample has no cluster, which the label -1 says.
        """
        self._index = index
        counts = np.array([shard.num_samples for shard in index.shards], np.int64)
        self._firsts = np.cumsum(counts) - counts
        if len(missing := np.flatnonzero(labels < 0)):
            url, taken = self._take(missing[:1])[0]
            raise ConfigError(f"{url}: sample {taken.keys[0]!r} has no assignment")
        self._order = np.argsort(labels, kind="stable")
        # a tar is filled until the next sample exceeds `shard_bytes`, and has at least one
        ends = np.cumsum(_sample_bytes(index, counts)[self._order])
        sizes = np.bincount(labels)
        self._tars: list[tuple[int, int, int, int]] = []
        for cluster, last in enumerate(np.cumsum(sizes)):
            first, number = last - sizes[cluster], 0
            while first < last:
                filled = ends[first - 1] if first else 0
                end = np.searchsorted(ends[first:last], filled + shard_bytes, side="right") + first
                end = max(first + 1, int(end))
                self._tars.append((cluster, number, int(first), end))
                first, number = end, number + 1

    def __len__(self) -> int:
        return len(self._tars)

    def __getitem__(self, number: Any) -> Any:
        cluster, nth, first, end = self._tars[number]
        name = f"cluster-{cluster:05d}-{nth:06d}.tar"
        return TarPlan(name, cluster, self._take(self._order[first:end]))

    def _take(self, rows: Int64) -> list[tuple[str, Shard]]:
        # within a cluster rows ascend, so those of a shard are neighbours
        numbers = np.searchsorted(self._firsts, rows, side="right") - 1
        parts = []
        for part in np.split(rows, np.flatnonzero(np.diff(numbers)) + 1):
            number = int(np.searchsorted(self._firsts, part[0], side="right")) - 1
            shard = self._index.shards[number]
            taken = shard.take((part - self._firsts[number]).tolist())
            parts.append((self._index.url(shard), taken))
        return parts


def _sample_bytes(index: ShardIndex, counts: Int64) -> Int64:
    sizes = np.empty(int(counts.sum()), np.int64)
    first = 0
    for shard in index.shards:
        part = sizes[first : first + shard.num_samples]
        part[:] = list(shard.ends)
        part -= list(shard.starts)
        first += shard.num_samples
    return sizes


class _Writing(NamedTuple):
    """Settings that all tasks share."""

    out: Path
    timeout_s: float
    deadline_s: float


def reshard(
    index: ShardIndex,
    labels: Int32,
    out: Path,
    data: DataConfig,
    *,
    inputs: Mapping[str, object],
    map_tasks: MapTasks = map_here,
) -> ShardIndex:
    """Copy every sample into a tar of its cluster; skip this if done before from equal `inputs`.

    `labels` (n,) has the cluster of every sample, in the order of the index.

    Writes `out/cluster-CCCCC-NNNNNN.tar` of about `data.shard_bytes`, `index.json`, `index.arrow`
    and, last, `COMPLETE`.

    Raises:
        ConfigError: a sample has no cluster (its label is -1).
        RuntimeError: a source changed since it was indexed, the copy differs, or the disk is full.
    """
    out = out.resolve()
    if is_complete(out, inputs):
        logger.info("%s: complete already", out)
        return open_index(out)
    plans = TarPlans(index, labels, data.shard_bytes)
    shared = _Writing(out, data.read_timeout_s, data.read_deadline_s)
    attempt = fingerprint({**inputs, "shard_bytes": data.shard_bytes, "tars": len(plans)})
    with all_or_nothing(out, ("cluster-*.tar", INDEX_NAME), attempt):
        written = map_tasks(write_tar, shared, plans)
        shards = list(track(written, "tars written", total=len(plans)))
        resharded = write_index(out, shards)
        write_columns(resharded)
        known = {shard.path: shard.sha256 for shard in shards}
        mark_complete(out, inputs, [out / INDEX_NAME, *map(out.joinpath, known)], known)
    return resharded


def write_tar(shared: _Writing, tar: TarPlan) -> Shard:
    """Write one tar, check it and give it its final name, unless an earlier attempt did.

    Raises:
        RuntimeError: a source ends early or has changed, or the copy differs.
        OSError: the tar cannot be written.
    """
    if (found := finished_tar(shared.out, tar.name)) is not None:
        return found[0]
    temporary = temporary_name(shared.out / tar.name)
    digest = hashlib.sha256()
    with naming(temporary), temporary.open("wb") as file:
        for content in _contents(shared, tar):
            digest.update(content)
            file.write(content)
        digest.update(TAR_END)
        file.write(TAR_END)
    expected = replace(tar.expected(), sha256=digest.hexdigest())
    # positions and keys as found in the written tar
    parsed, faults = scan_shard(str(temporary), path=tar.name, cluster=tar.cluster)
    # a member that ingest reported is in a sample's bytes, and is reported again
    if any(fault.key is None for fault in faults) or parsed != expected:
        raise RuntimeError(
            f"{shared.out / tar.name}: differs from what was planned; a source has changed since "
            f"it was indexed, or the copy failed (sources: {', '.join(u for u, _ in tar.parts)})"
        )
    temporary.replace(shared.out / tar.name)
    note_finished(shared.out, parsed)
    return parsed


def _contents(shared: _Writing, tar: TarPlan) -> Iterator[memoryview]:
    wanted = [
        SampleRange(url, start, end - start)
        for url, taken in tar.parts
        for start, end in zip(taken.starts, taken.ends, strict=True)
    ]
    keys = (key for _, taken in tar.parts for key in taken.keys)
    with closing(RangeReader(shared.timeout_s, shared.deadline_s)) as reader:
        contents = reader.read_in_turn(wanted)
        for key, place, content in zip(keys, wanted, contents, strict=True):
            if isinstance(content, OSError):
                raise RuntimeError(f"{place.url}: sample {key!r} cannot be read: {content}")
            yield content
