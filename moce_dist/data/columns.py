"""The index of a data set as a memory-mapped file: `index.arrow` beside `index.json`.

With 10^8 images every rank would read 6 GB of JSON. `index.arrow` stores the samples in columns,
which all ranks, loader processes and workers of a node map and share. Values per shard are in the
file's metadata.

    key (string)              the key; large_string where all keys have over 2 GiB
    offset (int64)            where the image begins in its tar
    size (uint32)             bytes of the image
    before, after (uint32)    bytes of the sample before and behind the image
    metadata                  shards: path, bytes, cluster, sha256, samples; size and checksum of
                              index.json

These are 24 bytes per sample, plus its key.

`index.json` is authoritative: it is read if `index.arrow` is missing, truncated, of another
version, or was written for another `index.json`. The columns themselves are not checked, because
that would read them whole: a changed byte in one is not noticed.
"""

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moce_dist.data.shards import COLUMNS_NAME, INDEX_NAME, Shard, ShardIndex, read_index
from moce_dist.data.table import SampleTable, sample_table
from moce_dist.run.files import replacing

log = logging.getLogger(__name__)
_META = b"moce_dist.index"
_FORMAT = "moce_dist.columns.v2"
_NUMBERS = ("offset", "size", "before", "after")
_LARGEST = 2**32 - 1
_SHORT_KEYS = 2**31
_END_BYTES = 2**16
_VALUES_AT_ONCE = 2**16


class _Column(Sequence[Any]):
    """A column of a mapped shard, equal to the list of its values; pickled as that list.

    `values(part)` lists the values of a slice; it is called whenever some are accessed.
    """

    def __init__(self, count: int, values: Callable[[slice], list[Any]]) -> None:
        self._rows, self._values = range(count), values

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        row = self._rows[index]
        return self._values(slice(row, row + 1))[0]

    def __iter__(self) -> Iterator[Any]:
        for first in self._rows[::_VALUES_AT_ONCE]:
            yield from self._values(slice(first, first + _VALUES_AT_ONCE))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


def _keys(column: Any) -> _Column:
    return _Column(len(column), lambda part: column[part].to_pylist())


def write_columns(index: ShardIndex) -> None:
    """Write `index.arrow` beside the `index.json` of a local folder.

    Nothing is written for an empty index, or one with a sample of over 4 GiB or odd positions.
    """
    import pyarrow as pa

    table = sample_table(index)
    numbers = (table.size, table.before, table.after)
    if not table.num_samples or not all(0 <= c.min() <= c.max() <= _LARGEST for c in numbers):
        return
    keys = pa.array(table.keys, pa.large_string())
    write_table(Path(index.root), index.shards, keys, table.offset, *numbers)


def write_table(
    folder: Path,
    shards: Sequence[Shard],
    keys: Any,
    offset: Any,
    size: Any,
    before: Any,
    after: Any,
) -> None:
    """Write `index.arrow` from columns (n,) and what the shards are apart from their columns."""
    import pyarrow as pa

    said = {
        "format": _FORMAT,
        "index": _likeness(folder / INDEX_NAME),
        "bytes": int(size.sum(dtype=np.int64)),
        "shards": [[s.path, s.bytes, s.cluster, s.sha256, s.num_samples] for s in shards],
    }
    types = {"offset": pa.int64(), "size": pa.uint32(), "before": pa.uint32(), "after": pa.uint32()}
    if keys.nbytes < _SHORT_KEYS:
        keys = keys.cast(pa.string())
    schema = pa.schema([("key", keys.type), *types.items()], metadata={_META: json.dumps(said)})
    numbers = [
        pa.array(column.astype(types[name].to_pandas_dtype(), copy=False))
        for name, column in zip(types, (offset, size, before, after), strict=True)
    ]
    batch = pa.record_batch([keys, *numbers], schema=schema)
    with (
        replacing(folder / COLUMNS_NAME) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        writer.write_batch(batch)


def open_table(root: str | Path, num_clusters: int = 1) -> SampleTable:
    """Open the samples of an index: map `index.arrow` if it is valid, else read `index.json`.

    Raises:
        ConfigError: there is no index; see `read_index`.
    """
    if (mapped := _map(root)) is None:
        return sample_table(read_index(root), num_clusters)
    said, batch = mapped
    heads = ShardIndex(str(root), [_shard(*head) for head in said["shards"]])
    keys = _keys(batch.column("key"))
    table = sample_table(heads, num_clusters)
    return replace(table, keys=keys, known_bytes=said["bytes"], **_numbers(batch))


def open_index(root: str | Path) -> ShardIndex:
    """Open the shards of an index: from `index.arrow` if it is valid, else from `index.json`.

    The columns of mapped shards are read when they are accessed, and each time they are.

    Raises:
        ConfigError: there is no index; see `read_index`.
    """
    if (mapped := _map(root)) is None:
        return read_index(root)
    said, batch = mapped
    keys, numbers = batch.column("key"), _numbers(batch)
    shards, first = [], 0
    for head in said["shards"]:
        shard = _shard(*head)
        part = slice(first, first := first + shard.num_samples)
        places = _places(*(numbers[name][part] for name in _NUMBERS))
        shards.append(replace(shard, keys=_keys(keys[part]), **places))
    return ShardIndex(str(root), shards)


def _places(offset: Any, size: Any, before: Any, after: Any) -> dict[str, Any]:
    # offset is int64, so no sum overflows; sums are computed only when they are accessed
    values: dict[str, Callable[[slice], list[Any]]] = {
        "starts": lambda part: (offset[part] - before[part]).tolist(),
        "ends": lambda part: (offset[part] + size[part] + after[part]).tolist(),
        "offsets": lambda part: offset[part].tolist(),
        "sizes": lambda part: size[part].tolist(),
    }
    return {name: _Column(len(offset), column) for name, column in values.items()}


def _numbers(batch: Any) -> dict[str, Any]:
    return {name: batch.column(name).to_numpy() for name in _NUMBERS}


def _shard(path: str, num_bytes: int, cluster: int | None, sha256: str, count: int) -> Shard:
    return Shard(path, count, num_bytes, sha256, cluster)


def is_mapped(root: str | Path) -> bool:
    """Tell whether an index has columns that can be mapped."""
    return _map(root) is not None


def _map(root: str | Path) -> tuple[dict[str, Any], Any] | None:
    # metadata and columns of index.arrow; None if it is missing or belongs to another index.json
    folder = Path(root)
    if "://" in str(root) or not (folder / COLUMNS_NAME).is_file():
        return None
    import pyarrow as pa

    path, index = folder / COLUMNS_NAME, folder / INDEX_NAME
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        said = json.loads(batch.schema.metadata[_META])
        if said["format"] != _FORMAT:
            raise ValueError(f"format is {said['format']!r}, this version reads {_FORMAT!r}")
        is_its_own = index.is_file() and said["index"] == _likeness(index)
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
        log.warning("%s: is not used, %s is read instead (%s)", path, INDEX_NAME, error)
        return None
    return (said, batch) if is_its_own else None


def _likeness(index: Path) -> list[int]:
    # size and checksum of both ends; reading the whole file would cost what the columns save
    with index.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(_END_BYTES)
        file.seek(max(0, size - _END_BYTES))
        return [size, zlib.crc32(file.read(), zlib.crc32(first))]
