"""All samples of an index as columns; a sample's id is its row.

A column is an array, a part of a memory-mapped file (columns.py), or runs: a value that all samples
of a shard share is stored once per shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from moce_dist.arrays import Int64
from moce_dist.data.shards import ShardIndex


@dataclass(frozen=True)
class Runs:
    """A run-length encoded column: `values[j]` fills `lengths[j]` rows; both are (m,)."""

    values: Int64
    lengths: Int64

    @cached_property
    def ends(self) -> Int64:
        """The row after every run, (m,)."""
        return np.cumsum(self.lengths)

    def __getitem__(self, rows: Int64) -> Int64:
        """Return the values of rows, like an array."""
        return self.values[np.searchsorted(self.ends, rows, side="right")]


@dataclass(frozen=True)
class SampleTable:
    """The samples of an index, n rows."""

    urls: list[str]
    keys: Sequence[str]
    shard: Int64 | Runs
    offset: Int64
    size: Int64
    before: Int64
    after: Int64
    """Bytes of the sample before and behind its image, which has `size` bytes from `offset`."""
    cluster: Int64 | Runs
    digests: list[str] = field(default_factory=list)
    """Sha256 of the shards at `urls`, "" where it is not known."""
    num_clusters: int = 1
    """Least number of clusters K; the last ones may have no samples."""
    known_bytes: int | None = None
    """Bytes of all samples, if already summed."""

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return len(self.keys)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all samples."""
        return int(self.size.sum()) if self.known_bytes is None else self.known_bytes

    @cached_property
    def cluster_sizes(self) -> Int64:
        """Samples per cluster, (K,)."""
        runs = self._runs
        sizes = np.zeros(max(self.num_clusters, 1 + runs.values.max(initial=0)), np.int64)
        np.add.at(sizes, runs.values, runs.lengths)
        return sizes

    def members(self, clusters: Int64, places: Int64) -> Int64:
        """Return the sample ids (m,) at `places` (m,) of `clusters` (m,), each in order of ids."""
        order, firsts, before = self._by_cluster
        at = before[clusters] + places
        # with runs sorted by cluster: the run whose rows contain each position
        run = np.searchsorted(self._moved_ends, at, side="right")
        return firsts[order[run]] + at - (self._moved_ends[run] - self._runs.lengths[order[run]])

    @cached_property
    def _runs(self) -> Runs:
        if isinstance(self.cluster, Runs):
            return self.cluster
        begins = np.flatnonzero(np.diff(self.cluster, prepend=-1))
        return Runs(self.cluster[begins], np.diff(begins, append=len(self.cluster)))

    @cached_property
    def _by_cluster(self) -> tuple[Int64, Int64, Int64]:
        # runs sorted by cluster, first row of every run, number of samples in earlier clusters
        order = np.argsort(self._runs.values, kind="stable")
        firsts = self._runs.ends - self._runs.lengths
        return order, firsts, np.cumsum(self.cluster_sizes) - self.cluster_sizes

    @cached_property
    def _moved_ends(self) -> Int64:
        return np.cumsum(self._runs.lengths[self._by_cluster[0]])


def sample_table(index: ShardIndex, num_clusters: int = 1) -> SampleTable:
    """Flatten an index; samples without a cluster are in cluster 0."""
    shards = index.shards
    counts = np.array([shard.num_samples for shard in shards], np.int64)
    starts, ends, offset, size = (
        np.array([place for shard in shards for place in getattr(shard, name)], np.int64)
        for name in ("starts", "ends", "offsets", "sizes")
    )
    return SampleTable(
        urls=[index.url(shard) for shard in shards],
        keys=[key for shard in shards for key in shard.keys],
        shard=Runs(np.arange(len(shards)), counts),
        offset=offset,
        size=size,
        before=offset - starts,
        after=ends - offset - size,
        cluster=Runs(np.array([shard.cluster or 0 for shard in shards], np.int64), counts),
        digests=[shard.sha256 for shard in shards],
        num_clusters=num_clusters,
    )
