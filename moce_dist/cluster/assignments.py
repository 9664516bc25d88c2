"""The table of assignments: which cluster each image is in.

    assignments.parquet  key, shard (name of its features), cluster, distance (squared)

The rows of a shard are neighbours. It has as many rows as there are images, so it is written and
read in batches; only the table of a small data set is read as a whole.

Letters: n samples, K clusters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moce_dist.arrays import Int32, Int64
from moce_dist.cluster.blocks import FeatureFiles
from moce_dist.data.columns import open_table
from moce_dist.data.shards import Shard, ShardIndex
from moce_dist.data.table import SampleTable
from moce_dist.features.extract import feature_names
from moce_dist.run.files import replacing
from moce_dist.run.names import as_text
from moce_dist.settings import ConfigError

_TABLE_ROWS = 2**20
"""Rows of the assignment table whose keys are in memory at a time."""
SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "shard": pa.dictionary(pa.int32(), pa.string()),
        "cluster": pa.int32(),
        "distance": pa.float32(),
    }
)
"""Columns of the table."""


def write_assignments(
    path: Path, files: FeatureFiles, labels: NDArray[Any], distances: NDArray[Any]
) -> None:
    """Write one line per row: key, shard, cluster, squared distance."""
    named = files.keys()
    with replacing(path) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        for first in range(0, len(labels), _TABLE_ROWS):
            part = slice(first, first + _TABLE_ROWS)
            shards, keys = zip(*islice(named, _TABLE_ROWS), strict=True)
            columns = [
                pa.array(keys, pa.string()),
                pa.array(shards, pa.string()).dictionary_encode(),
                pa.array(labels[part], pa.int32()),
                pa.array(distances[part].astype(np.float32), pa.float32()),
            ]
            writer.write_table(pa.table(columns, schema=SCHEMA))


def read_assignments(path: Path) -> dict[str, int]:
    """Return the cluster of every key; for tables of a size that fits in memory.

    Raises:
        ConfigError: the file is missing or is no table of assignments.
    """
    with _opened(path) as table:
        columns = table.read(["key", "cluster"])
        return dict(zip(*(c.to_pylist() for c in columns.columns), strict=True))


def open_assigned(folder: str | Path, path: Path, num_clusters: int = 1) -> SampleTable:
    """Open the index in a folder, its samples in the clusters that the table at `path` gives.

    Raises:
        ConfigError: there is no index, or no such table.
    """
    table, clusters = open_table(folder, num_clusters), read_assignments(path)
    return replace(table, cluster=np.array([clusters[key] for key in table.keys], np.int64))


def count_assignments(path: Path, num_clusters: int) -> Int64:
    """Return the number of rows of every cluster, (K,) or more; raises like `read_assignments`."""
    with _opened(path) as table:
        counts = np.zeros(num_clusters, np.int64)
        for batch in table.iter_batches(_TABLE_ROWS, columns=["cluster"]):
            part = np.bincount(batch["cluster"].to_numpy(), minlength=len(counts))
            part[: len(counts)] += counts
            counts = part
        return counts


def read_labels(path: Path, index: ShardIndex) -> Int32:
    """Return the cluster of every sample of an index, in its order, (n,); -1 for those without.

    Table and index are joined shard by shard. Rows of shards and keys that the index lacks are
    ignored.

    Raises:
        ConfigError: the file is missing or is no table of assignments.
    """
    counts = [shard.num_samples for shard in index.shards]
    firsts = list(accumulate(counts, initial=0))
    numbers = {as_text(name): number for number, name in enumerate(feature_names(index))}
    labels = np.full(sum(counts), -1, np.int32)
    opened, rows_of = None, dict[str, int]()
    with _opened(path) as table:
        for batch in table.iter_batches(_TABLE_ROWS, columns=["key", "shard", "cluster"]):
            codes, clusters = batch["shard"].indices.to_numpy(), batch["cluster"].to_numpy()
            # the rows of a shard are neighbours
            for run in np.split(np.arange(len(codes)), np.flatnonzero(np.diff(codes)) + 1):
                number = numbers.get(batch["shard"].dictionary[int(codes[run[0]])].as_py())
                if number is None:
                    continue
                if number != opened:
                    opened, rows_of = number, rows_by_key(index.shards[number])
                keys = batch["key"].slice(run[0], len(run)).to_pylist()
                rows = np.array([rows_of.get(key, -1) for key in keys])
                labels[firsts[number] + rows[rows >= 0]] = clusters[run[rows >= 0]]
    return labels


def rows_by_key(shard: Shard) -> dict[str, int]:
    """Return the row of every key of a shard."""
    return {key: row for row, key in enumerate(shard.keys)}


def read_rows(path: Path, rows: Int64) -> list[tuple[str, str]]:
    """Return (shard, key) of some rows of a table; raises like `read_assignments`."""
    found: dict[int, tuple[str, str]] = {}
    first = 0
    with _opened(path) as table:
        for batch in table.iter_batches(_TABLE_ROWS, columns=["shard", "key"]):
            inside = rows[(rows >= first) & (rows < first + len(batch))]
            taken = batch.take(pa.array(inside - first))
            columns = (taken["shard"].to_pylist(), taken["key"].to_pylist())
            found.update(zip(inside.tolist(), zip(*columns, strict=True), strict=True))
            first += len(batch)
    return [found[row] for row in rows.tolist()]


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as table:
            yield table
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ConfigError(f"{path}: is no readable table of assignments ({error})") from None
