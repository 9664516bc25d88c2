"""One order of images: which samples a step contains, decided before anything is read.

Per epoch every cluster has a seeded order of its samples. Sample i of a cluster with n samples
stands at time (i + 1/2) / n of the epoch; all samples sorted by time are the epoch, and step t
takes positions [t B, (t + 1) B). So every cluster advances at its own even pace, each step holds
each cluster within one image of its share, and the whole position of the stream is one cursor per
cluster plus the step. Nothing here depends on ranks, loader processes or placement.

    two clusters, n = 4 and 2:   time   1/8  2/8  3/8  5/8  6/8  7/8
                                 from    a    b    a    a    b    a     B = 3: [a b a] [a b a]

Letters: B images of a step, K clusters.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moce_dist.data.shards import ShardIndex

Ids = NDArray[np.int64]
PADDING = -1


@dataclass(frozen=True)
class SampleTable:
    """All samples of an index as columns; a sample's id is its row."""

    urls: list[str]
    keys: list[str]
    shard: Ids
    offset: Ids
    size: Ids
    cluster: Ids
    digests: list[str] = field(default_factory=list)
    """Sha256 of the shards at `urls`, where it is known."""
    num_clusters: int = 1
    """Clusters K that there are at least; the last ones may hold no sample."""

    @property
    def num_samples(self) -> int:
        """Samples in the table."""
        return len(self.keys)

    @cached_property
    def cluster_sizes(self) -> Ids:
        """Samples per cluster, (K,)."""
        return np.bincount(self.cluster, minlength=self.num_clusters)


def sample_table(index: ShardIndex, num_clusters: int = 1) -> SampleTable:
    """Flatten an index; samples without a cluster are of cluster 0."""
    shards = index.shards
    counts = [shard.num_samples for shard in shards]
    return SampleTable(
        urls=[index.url(shard) for shard in shards],
        keys=[key for shard in shards for key in shard.keys],
        shard=np.repeat(np.arange(len(shards)), counts),
        offset=np.array([o for shard in shards for o in shard.offsets], np.int64),
        size=np.array([s for shard in shards for s in shard.sizes], np.int64),
        cluster=np.repeat(np.array([shard.cluster or 0 for shard in shards], np.int64), counts),
        digests=[shard.sha256 for shard in shards],
        num_clusters=num_clusters,
    )


@dataclass(frozen=True)
class Plan:
    """The steps of a training stage over a table of samples."""

    table: SampleTable
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every sample is used once; the last one is padded."""
        return -(-self.table.num_samples // self.batch_size)

    def epoch_of(self, step: int) -> int:
        """Epoch that a step belongs to, from 0."""
        return step // self.steps_per_epoch

    def epoch_order(self, epoch: int) -> Ids:
        """Ids of all samples in the order of an epoch, (n,)."""
        sizes = self.table.cluster_sizes
        draws = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, epoch]))
        # the turn comes first, so that it does not depend on the sizes of the clusters
        turn = draws.permutation(len(sizes))
        by_cluster = np.argsort(self.table.cluster, kind="stable")
        members = np.split(by_cluster, np.cumsum(sizes)[:-1])
        ids = np.concatenate([draws.permutation(ids) for ids in members])
        times = np.concatenate([(np.arange(n) + 0.5) / n for n in sizes if n])
        # equal times go by a seeded turn of the clusters, so that no cluster is always first
        return ids[np.lexsort((np.repeat(turn, sizes), times))]

    def step_ids(self, order: Ids, step: int) -> Ids:
        """Sample ids of a step, (B,), from its epoch's order; PADDING fills the last step."""
        start = step % self.steps_per_epoch * self.batch_size
        ids = order[start : start + self.batch_size]
        return np.pad(ids, (0, self.batch_size - len(ids)), constant_values=PADDING)

    def cursors(self, step: int) -> list[int]:
        """Count the samples of every cluster that its epoch has used before `step`, (K,)."""
        used = step % self.steps_per_epoch * self.batch_size
        clusters = self.table.cluster[self.epoch_order(self.epoch_of(step))[:used]]
        return np.bincount(clusters, minlength=len(self.table.cluster_sizes)).tolist()
