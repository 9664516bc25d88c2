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
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from moce_dist.config import DataConfig
from moce_dist.data.cache import Wanted
from moce_dist.data.columns import write_columns
from moce_dist.data.progress import track
from moce_dist.data.ranges import RangeReader
from moce_dist.data.shards import (
    INDEX_NAME,
    TAR_END,
    Shard,
    ShardIndex,
    read_index,
    scan_shard,
    write_index,
)
from moce_dist.data.writer import all_or_nothing, finished_tar, note_finished
from moce_dist.run.artefacts import fingerprint, is_complete, mark_complete
from moce_dist.run.files import naming
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
        shard, position = Shard(self.name, cluster=self.cluster), 0
        for _, taken in self.parts:
            for row, key in enumerate(taken.keys):
                start = taken.starts[row]
                shard.keys.append(key)
                shard.starts.append(position)
                shard.offsets.append(position + taken.offsets[row] - start)
                shard.sizes.append(taken.sizes[row])
                position += taken.ends[row] - start
                shard.ends.append(position)
        return replace(shard, num_samples=len(shard.keys), bytes=position + len(TAR_END))


class _Writing(NamedTuple):
    """Settings that all tasks share."""

    out: Path
    timeout_s: float
    deadline_s: float


def reshard(
    index: ShardIndex,
    assignments: Mapping[str, int],
    out: Path,
    data: DataConfig,
    *,
    inputs: Mapping[str, object],
    map_tasks: MapTasks = map_here,
) -> ShardIndex:
    """Copy every sample into a tar of its cluster; skip this if done before from equal `inputs`.

    Writes `out/cluster-CCCCC-NNNNNN.tar` of about `data.shard_bytes`, `index.json`, `index.arrow`
    and, last, `COMPLETE`. Keys of `assignments` that the index lacks (held-out images) are ignored.

    Raises:
        ConfigError: a sample has no assignment.
        RuntimeError: a source changed since it was indexed, the copy differs, or the disk is full.
    """
    out = out.resolve()
    if is_complete(out, inputs):
        logger.info("%s: complete already", out)
        return read_index(out)
    plans = plan_tars(index, assignments, data.shard_bytes)
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


def plan_tars(index: ShardIndex, assignments: Mapping[str, int], shard_bytes: int) -> list[TarPlan]:
    """Assign samples to tars, by cluster, then in the order of the index.

    Raises:
        ConfigError: a sample has no assignment.
    """
    tars: dict[int, list[TarPlan]] = {}
    filled: dict[int, int] = {}
    for shard in index.shards:
        url = index.url(shard)
        by_cluster: dict[int, list[int]] = {}
        for row, key in enumerate(shard.keys):
            if key not in assignments:
                raise ConfigError(f"{url}: sample {key!r} has no assignment")
            by_cluster.setdefault(assignments[key], []).append(row)
        for cluster, rows in sorted(by_cluster.items()):
            for row in rows:
                size = shard.ends[row] - shard.starts[row]
                series = tars.setdefault(cluster, [])
                if not series or filled[cluster] + size > shard_bytes:
                    name = f"cluster-{cluster:05d}-{len(series):06d}.tar"
                    series.append(TarPlan(name, cluster, []))
                    filled[cluster] = 0
                _take(series[-1], url, shard, row)
                filled[cluster] += size
    return [tar for cluster in sorted(tars) for tar in tars[cluster]]


def _take(tar: TarPlan, url: str, shard: Shard, row: int) -> None:
    if not tar.parts or tar.parts[-1][0] != url:
        tar.parts.append((url, Shard(shard.path)))
    taken = tar.parts[-1][1]
    taken.keys.append(shard.keys[row])
    taken.starts.append(shard.starts[row])
    taken.ends.append(shard.ends[row])
    taken.offsets.append(shard.offsets[row])
    taken.sizes.append(shard.sizes[row])


def write_tar(shared: _Writing, tar: TarPlan) -> Shard:
    """Write one tar, check it and give it its final name, unless an earlier attempt did.

    Raises:
        RuntimeError: a source ends early or has changed, or the copy differs.
        OSError: the tar cannot be written.
    """
    if (found := finished_tar(shared.out, tar.name)) is not None:
        return found[0]
    # one file per process: a lost worker that still writes must not damage another worker's file
    temporary = shared.out / f".{tar.name}.{os.getpid()}.tmp"
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
    if faults or parsed != expected:
        raise RuntimeError(
            f"{shared.out / tar.name}: differs from what was planned; a source has changed since "
            f"it was indexed, or the copy failed (sources: {', '.join(u for u, _ in tar.parts)})"
        )
    temporary.replace(shared.out / tar.name)
    note_finished(shared.out, parsed)
    return parsed


def _contents(shared: _Writing, tar: TarPlan) -> Iterator[memoryview]:
    wanted = [
        Wanted(url, start, end - start)
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
