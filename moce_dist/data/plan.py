"""One order of images: which samples a step contains, decided before anything is read.

Per epoch every cluster has a seeded order of its samples. Sample i of a cluster with n samples
stands at time (i + 1/2) / n of the epoch; all samples sorted by time are the epoch, and step t
takes positions [t B, (t + 1) B). So every cluster advances at its own even pace, each step holds
each cluster within one image of its share, and the whole position of the stream is one cursor per
cluster plus the step. Nothing here depends on ranks, loader processes or placement.

    two clusters, n = 4 and 2:   time   1/8  2/8  3/8  5/8  6/8  7/8
                                 from    a    b    a    a    b    a     B = 3: [a b a] [a b a]

An epoch may also take only some samples of every cluster, `quotas`; the next ones go on where it
stopped, so that a cluster is used up before any sample of it is used again (but for what is left
when its size is no multiple of its quota).

Letters: B images of a step, K clusters.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moce_dist.data.shards import ShardIndex

Ids = NDArray[np.int64]
Shares = NDArray[np.float64]
PADDING = -1
_ROUNDING = 1e-9


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
    quotas: Ids | None = None
    """(K,) samples that an epoch takes of every cluster; None: all that there are."""

    @property
    def epoch_samples(self) -> int:
        """Samples of an epoch, no one twice."""
        return self.table.num_samples if self.quotas is None else int(self.quotas.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every sample of an epoch is used once; the last one is padded."""
        return -(-self.epoch_samples // self.batch_size)

    def epoch_of(self, step: int) -> int:
        """Epoch that a step belongs to, from 0."""
        return step // self.steps_per_epoch

    @cached_property
    def _members(self) -> list[Ids]:
        by_cluster = np.argsort(self.table.cluster, kind="stable")
        return np.split(by_cluster, np.cumsum(self.table.cluster_sizes)[:-1])

    def epoch_order(self, epoch: int) -> Ids:
        """Ids of the samples of an epoch in their order, (n,)."""
        draws = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, epoch]))
        # the turn comes first, so that it does not depend on the sizes of the clusters
        turn = draws.permutation(len(self.table.cluster_sizes))
        if self.quotas is None:
            parts = [draws.permutation(ids) for ids in self._members]
        else:
            parts = [self._part(k, int(quota), epoch) for k, quota in enumerate(self.quotas)]
        ids = np.concatenate(parts)
        times = np.concatenate([(np.arange(n) + 0.5) / n for n in map(len, parts) if n])
        # equal times go by a seeded turn of the clusters, so that no cluster is always first
        return ids[np.lexsort((np.repeat(turn, [len(part) for part in parts]), times))]

    def _part(self, cluster: int, quota: int, epoch: int) -> Ids:
        """Take an epoch's samples of a cluster, (quota,)."""
        ids = self._members[cluster]
        if quota == 0:
            return ids[:0]
        turn, place = divmod(epoch, len(ids) // quota)
        draws = np.random.Philox(key=self.seed, counter=[0, turn, cluster + 1, 0])
        order = np.random.Generator(draws).permutation(ids)
        return order[place * quota : (place + 1) * quota]

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


def quotas_of(shares: Shares, cluster_sizes: Ids, batch_size: int) -> Ids:
    """Say how many samples of every cluster an epoch takes, (K,), in proportion to `shares` (K,).

    An epoch is as long as it can be with no sample twice, in whole batches; it is a batch at least,
    where clusters that are too small for their share give all they have and the others the rest.

    Raises:
        ValueError: no cluster with a share has samples.
    """
    wanted = np.where(cluster_sizes > 0, shares, 0.0)
    if not wanted.sum() > 0:
        raise ValueError("no cluster with a share has samples")
    wanted /= wanted.sum()
    used = wanted > 0
    longest = int((cluster_sizes[used] / wanted[used]).min() + _ROUNDING)
    total = min(max(longest // batch_size, 1) * batch_size, int(cluster_sizes[used].sum()))
    ideal, is_open = np.zeros(len(wanted)), used
    while is_open.any():
        rest = total - ideal[~is_open].sum()
        ideal[is_open] = wanted[is_open] * rest / wanted[is_open].sum()
        is_full = is_open & (ideal > cluster_sizes)
        if not is_full.any():
            break
        ideal[is_full] = cluster_sizes[is_full]
        is_open = is_open & ~is_full
    # largest remainders
    quotas = np.floor(ideal + _ROUNDING).astype(np.int64)
    quotas[np.argsort(quotas - ideal, kind="stable")[: total - quotas.sum()]] += 1
    return quotas
