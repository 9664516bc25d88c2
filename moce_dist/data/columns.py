"""The index of a data set as a memory-mapped file: `index.arrow` beside `index.json`.

With 10^8 images every rank would read 6 GB of JSON. Training needs only the key, position and size
of a sample. `index.arrow` stores these in columns, which all ranks and loader processes of a node
map and share. Values per shard are in the file's metadata.

    key (large_string)   offset (int64)   size (uint32)      20 bytes per sample, plus its key
    metadata             shards: path, cluster, sha256, samples; size and checksum of index.json

`index.json` is authoritative: it is read if `index.arrow` is missing or was written for another
`index.json`.
"""

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moce_dist.data.shards import COLUMNS_NAME, INDEX_NAME, Shard, ShardIndex, read_index
from moce_dist.data.table import Runs, SampleTable, sample_table

_META = b"moce_dist.index"
_FORMAT = "moce_dist.columns.v1"
_LARGEST = 2**32 - 1
_END_BYTES = 2**16


class _Keys(Sequence[str]):
    """The column of keys; a string is created only when it is accessed."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: Any) -> Any:
        return self._column[int(row)].as_py()

    def __iter__(self) -> Iterator[str]:
        return (key.as_py() for key in self._column)


def write_columns(index: ShardIndex) -> None:
    """Write `index.arrow` beside the `index.json` of a local folder.

    Nothing is written for an empty index, or one with an image over 4 GiB.
    """
    import pyarrow as pa

    shards = index.shards
    sizes = np.array([size for shard in shards for size in shard.sizes], np.int64)
    if not len(sizes) or sizes.max() > _LARGEST:
        return
    write_table(
        Path(index.root),
        shards,
        pa.array((key for shard in shards for key in shard.keys), pa.large_string()),
        np.array([o for shard in shards for o in shard.offsets], np.int64),
        sizes.astype(np.uint32),
    )


def write_table(folder: Path, shards: Sequence[Shard], keys: Any, offsets: Any, sizes: Any) -> None:
    """Write `index.arrow` from columns (n,) and the shards' path, cluster, sha256 and count."""
    import pyarrow as pa

    said = {
        "format": _FORMAT,
        "index": _likeness(folder / INDEX_NAME),
        "bytes": int(sizes.sum(dtype=np.int64)),
        "shards": [[s.path, s.cluster, s.sha256, s.num_samples] for s in shards],
    }
    schema = pa.schema(
        [("key", pa.large_string()), ("offset", pa.int64()), ("size", pa.uint32())],
        metadata={_META: json.dumps(said)},
    )
    batch = pa.record_batch([keys, pa.array(offsets), pa.array(sizes)], schema=schema)
    temporary = folder / f".{COLUMNS_NAME}.{os.getpid()}.tmp"
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)
    temporary.replace(folder / COLUMNS_NAME)


def open_table(root: str | Path, num_clusters: int = 1) -> SampleTable:
    """Open the samples of an index: map `index.arrow` if it is valid, else read `index.json`.

    Raises:
        ConfigError: there is no index; see `read_index`.
    """
    if (mapped := _map(root)) is None:
        return sample_table(read_index(root), num_clusters)
    said, batch = mapped
    shards = _heads(said)
    index, lengths = ShardIndex(str(root), []), np.array([s.num_samples for s in shards], np.int64)
    return SampleTable(
        urls=[index.url(shard) for shard in shards],
        keys=_Keys(batch.column("key")),
        shard=Runs(np.arange(len(shards)), lengths),
        offset=batch.column("offset").to_numpy(),
        size=batch.column("size").to_numpy(),
        cluster=Runs(np.array([shard.cluster or 0 for shard in shards], np.int64), lengths),
        digests=[shard.sha256 for shard in shards],
        num_clusters=num_clusters,
        known_bytes=said["bytes"],
    )


def open_shards(root: str | Path) -> list[Shard]:
    """Open the shards of an index; if `index.arrow` is valid, without the columns of samples.

    Raises:
        ConfigError: there is no index; see `read_index`.
    """
    mapped = _map(root)
    return read_index(root).shards if mapped is None else _heads(mapped[0])


def _heads(said: dict[str, Any]) -> list[Shard]:
    return [
        Shard(path, count, cluster=cluster, sha256=digest)
        for path, cluster, digest, count in said["shards"]
    ]


def _map(root: str | Path) -> tuple[dict[str, Any], Any] | None:
    # metadata and columns of index.arrow; None if it is missing or belongs to another index.json
    folder = Path(root)
    if "://" in str(root) or not (folder / COLUMNS_NAME).is_file():
        return None
    import pyarrow as pa

    batch = pa.ipc.open_file(pa.memory_map(str(folder / COLUMNS_NAME))).get_batch(0)
    said = json.loads(batch.schema.metadata[_META])
    is_its_own = (folder / INDEX_NAME).is_file() and said["index"] == _likeness(folder / INDEX_NAME)
    return (said, batch) if said["format"] == _FORMAT and is_its_own else None


def _likeness(index: Path) -> list[int]:
    # size and checksum of both ends; reading the whole file would cost what the columns save
    with index.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(_END_BYTES)
        file.seek(max(0, size - _END_BYTES))
        return [size, zlib.crc32(file.read(), zlib.crc32(first))]
