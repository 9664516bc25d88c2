"""Rewriting tars by cluster, so that a group of workers streams the clusters it trains on.

Samples are copied as raw byte ranges, in index order within a cluster; headers and contents stay as
they are. The sources are read once, front to back, in large blocks. Afterwards the new tars are
parsed anew, and the multiset of (key, bytes) must be that of the sources:

    train-000000.tar   a b c d            cluster-00000-000000.tar   a d f
    train-000001.tar   e f g       ->     cluster-00001-000000.tar   b c e g
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from moce_dist.data.progress import track
from moce_dist.data.shards import (
    INDEX_NAME,
    Shard,
    ShardIndex,
    read_index,
    scan_shard,
    write_index,
)
from moce_dist.data.writer import ShardSeries, all_or_nothing
from moce_dist.run import is_complete, mark_complete
from moce_dist.settings import ConfigError

logger = logging.getLogger(__name__)

_READ_BYTES = 8 * 2**20
_BUFFERS_BYTES = 256 * 2**20


class _RawSample(NamedTuple):
    key: str
    content: bytes
    image_offset: int
    image_size: int


def reshard(
    index: ShardIndex,
    assignments: Mapping[str, int],
    out: Path,
    *,
    shard_bytes: int,
    inputs: Mapping[str, Any],
) -> ShardIndex:
    """Copy every sample into a tar of its cluster; at once when done before from equal `inputs`.

    Writes `out/cluster-CCCCC-NNNNNN.tar`, `index.json` and, last, `COMPLETE`. Keys of `assignments`
    that the index lacks (held-out images) are passed over.

    Raises:
        ConfigError: a sample has no assignment.
        RuntimeError: a source changed since it was indexed, the copy differs, or the disk is full.
    """
    out = out.resolve()
    if is_complete(out, inputs):
        logger.info("%s: complete already", out)
        return read_index(out)
    for shard in index.shards:
        for key in shard.keys:
            if key not in assignments:
                raise ConfigError(f"{index.url(shard)}: sample {key!r} has no assignment")
    with all_or_nothing(out, ("cluster-*.tar", INDEX_NAME, ".*.tmp")):
        shards, digest = _copy(index, assignments, out, shard_bytes)
        _verify(ShardIndex(str(out), shards), index.num_samples, digest)
        resharded = write_index(out, shards)
        mark_complete(out, inputs, [out / INDEX_NAME, *out.glob("cluster-*.tar")])
    return resharded


def _copy(
    index: ShardIndex, assignments: Mapping[str, int], out: Path, shard_bytes: int
) -> tuple[list[Shard], int]:
    clusters = sorted({assignments[key] for shard in index.shards for key in shard.keys})
    buffer_bytes = min(2**20, _BUFFERS_BYTES // max(1, len(clusters)))
    series = {
        cluster: ShardSeries(
            out,
            f"cluster-{cluster:05d}",
            shard_bytes,
            cluster=cluster,
            buffer_bytes=buffer_bytes,
        )
        for cluster in clusters
    }
    digest = 0
    for sample in track(_samples(index), "samples resharded", total=index.num_samples):
        digest += _digest(sample)
        writer = series[assignments[sample.key]].writer(len(sample.content))
        writer.add_raw(*sample)
    return [shard for cluster in clusters for shard in series[cluster].close()], digest


def _samples(index: ShardIndex) -> Iterator[_RawSample]:
    for shard in index.shards:
        yield from _raw_samples(index.url(shard), shard)


def _raw_samples(url: str, shard: Shard) -> Iterator[_RawSample]:
    with fsspec.open(url, "rb") as file:
        for first, last in _runs(shard):
            base = shard.starts[first]
            file.seek(base)
            block = file.read(shard.ends[last] - base)
            if len(block) < shard.ends[last] - base:
                raise RuntimeError(f"{url}: ends before sample {shard.keys[last]!r}")
            for row in range(first, last + 1):
                start = shard.starts[row]
                content = block[start - base : shard.ends[row] - base]
                yield _RawSample(
                    shard.keys[row], content, shard.offsets[row] - start, shard.sizes[row]
                )


def _runs(shard: Shard) -> Iterator[tuple[int, int]]:
    # rows from first to last, both included, that one read of about 8 MiB covers
    first = 0
    for row in range(shard.num_samples):
        is_last = row + 1 == shard.num_samples
        if is_last or shard.ends[row + 1] - shard.starts[first] > _READ_BYTES:
            yield first, row
            first = row + 1


def _digest(sample: _RawSample) -> int:
    # sums of these are equal for equal multisets, whatever the order
    hashed = hashlib.blake2b(sample.key.encode(errors="surrogateescape"), digest_size=32)
    hashed.update(b"\0")
    hashed.update(sample.content)
    return int.from_bytes(hashed.digest())


def _verify(written: ShardIndex, num_samples: int, digest: int) -> None:
    found, count = 0, 0
    for shard in track(written.shards, "shards verified", total=len(written.shards)):
        url = written.url(shard)
        # positions and keys as the tar itself has them, not as they were meant
        parsed, faults = scan_shard(url, path=shard.path, cluster=shard.cluster)
        if faults or parsed != shard:
            raise RuntimeError(f"{url}: differs from its index; {faults or 'a source has changed'}")
        for sample in _raw_samples(url, parsed):
            found += _digest(sample)
            count += 1
    if (count, found) != (num_samples, digest):
        raise RuntimeError(
            f"{written.root}: {count} samples of {num_samples} were kept, or their bytes differ"
        )
