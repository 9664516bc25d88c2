"""The order of images: which samples a step contains, determined before anything is read.

Per epoch every cluster has a seeded order of its samples. Sample i of a cluster with n samples has
time (i + 1/2) / n in the epoch. All samples sorted by time are the epoch, and step t takes
positions [t B, (t + 1) B). So every cluster advances at its own even pace. If clusters have equal
sizes, every step has, of each cluster, its share within one image. The step is the whole position
of the stream. Nothing here depends on ranks, loader processes or placement.

    two clusters, n = 4 and 2:   time   1/8  2/8  3/8  5/8  6/8  7/8
                                 from    a    b    a    a    b    a     B = 3: [a b a] [a b a]

No order is held in memory. The times determine how many samples of every cluster are before a
position, except for a few samples per cluster, which are sorted. A keyed permutation maps a place
in a cluster's order to a sample. A step costs O(B + K log K) for every n.

The permutation is evaluated only at the places that are needed. A Feistel network on 2 h bits is a
permutation of 0 .. 4^h - 1 for every round function. To permute 0 .. n - 1, the smallest network
with 4^h >= n is applied again to every result outside 0 .. n - 1, until the result is inside. This
is still a permutation and takes under four turns on average.

An epoch may also take only some samples of every cluster, `quotas`. The next epochs continue where
it stopped, so no sample is used again before the others of its cluster, except for the rest that
remains if the cluster's size is no multiple of its quota.

Letters: B images of a step, K clusters, n samples of a cluster.

Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains" (cycle walking); Steele et
al. 2014, "Fast Splittable Pseudorandom Number Generators" (the mixing function).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moce_dist.arrays import Float64, Int64
from moce_dist.data.table import SampleTable

Shares = Float64
PADDING = -1
ORDER = 2
"""Version of the order; version 1 kept every cluster's order in memory."""
_ROUNDING = 1e-9


class StepOrder(NamedTuple):
    """A step's samples before they are looked up; PADDING fills up the last step of an epoch."""

    epoch: int
    clusters: Int64
    """(B,) the cluster of every slot."""
    places: Int64
    """(B,) the place of its sample among those of the cluster in this epoch."""


@dataclass(frozen=True)
class Plan:
    """The steps of a training stage over a table of samples."""

    table: SampleTable
    batch_size: int
    seed: int
    quotas: Int64 | None = None
    """(K,) samples that an epoch takes of every cluster; None: all of them."""

    @cached_property
    def _counts(self) -> Int64:
        return self.table.cluster_sizes if self.quotas is None else self.quotas

    @cached_property
    def epoch_samples(self) -> int:
        """Number of samples in an epoch, which are all different."""
        return int(self._counts.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch; the last one may be padded."""
        return -(-self.epoch_samples // self.batch_size)

    def epoch_of(self, step: int) -> int:
        """Return the epoch that a step belongs to, from 0."""
        return step // self.steps_per_epoch

    def step_ids(self, step: int) -> Int64:
        """Return the sample ids of a step, (B,); PADDING fills up the last step of an epoch."""
        return self.ids_at(self.step_order(step), np.arange(self.batch_size))

    def step_order(self, step: int) -> StepOrder:
        """Return the clusters of a step's slots, for a rank that needs the ids of few of them."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first, last = (self._used(epoch, at * self.batch_size) for at in (within, within + 1))
        found = self._in_order(epoch, first, last)
        padded = ((0, self.batch_size - len(found[0])),)
        return StepOrder(epoch, *(np.pad(c, padded, constant_values=PADDING) for c in found))

    def ids_at(self, order: StepOrder, slots: Int64) -> Int64:
        """Return the sample ids (s,) at `slots` (s,) of a step; PADDING for padding."""
        clusters, places = order.clusters[slots], order.places[slots]
        planned = clusters != PADDING
        ids = np.full(len(slots), PADDING)
        clusters, places = clusters[planned], places[planned]
        sizes, counts = self.table.cluster_sizes[clusters], self._counts[clusters]
        turns, parts = np.divmod(order.epoch, sizes // counts)
        keys = keys_of(self.seed, turns, clusters)
        members = permuted(parts * counts + places, sizes, keys)
        ids[planned] = self.table.members(clusters, members)
        return ids

    def cursors(self, step: int) -> list[int]:
        """Count the samples of every cluster that the epoch has used before `step`, (K,)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._used(epoch, within * self.batch_size).tolist()

    def _used(self, epoch: int, position: int) -> Int64:
        # number of samples of every cluster among the first `position` of the epoch, (K,)
        counts, total = self._counts, self.epoch_samples
        if position >= total:
            return counts
        # at any time the clusters together are within K / 2 samples of their even pace, so only
        # samples near the position's time need sorting; the margin of 1 per cluster is for rounding
        slack = len(counts) / 2 + 1
        low, high = (
            np.floor(counts * (at / total) + 0.5).astype(np.int64) + margin
            for at, margin in ((max(0.0, position - slack), -1), (position + slack, 1))
        )
        low, high = np.maximum(low, 0), np.minimum(high, counts)
        clusters, _ = self._in_order(epoch, low, high)
        taken = clusters[: position - int(low.sum())]
        return low + np.bincount(taken, minlength=len(counts))

    def _in_order(self, epoch: int, first: Int64, last: Int64) -> tuple[Int64, Int64]:
        # clusters and places (m,) of the samples [first, last) of every cluster, by time; samples
        # of equal time follow a seeded order of clusters, so no cluster is always first
        turns = cluster_order(self.seed, epoch, len(self._counts))
        lengths = (last - first)[turns]
        clusters = np.repeat(turns, lengths)
        begins = np.repeat(np.cumsum(lengths) - lengths, lengths)
        places = np.arange(len(clusters)) - begins + first[clusters]
        order = np.argsort((places + 0.5) / self._counts[clusters], kind="stable")
        return clusters[order], places[order]


@lru_cache(maxsize=4)
def cluster_order(seed: int, epoch: int, num_clusters: int) -> Int64:
    """Return the order of clusters (K,) that samples of equal time follow."""
    draws = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, epoch]))
    # of the ranks that version 2 of the order draws
    return np.argsort(draws.permutation(num_clusters))


def windows(steps: range, longest: int) -> Iterator[range]:
    """Split steps into windows that are read at once, up to `longest` steps.

    The first batch waits only for its own bytes; later windows double.
    """
    taken, length = 0, 1
    while taken < len(steps):
        yield steps[taken : taken + length]
        taken, length = taken + length, min(2 * length, longest)


def quotas_of(shares: Shares, cluster_sizes: Int64, batch_size: int) -> Int64:
    """Return the samples of every cluster per epoch, (K,), in proportion to `shares` (K,).

    An epoch is as many whole batches as possible without repeating a sample. If that is less than
    one batch, it is one batch, or all samples if they are fewer. Clusters that are too small for
    their share then contribute all their samples, and the others the rest.

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


Words = NDArray[np.uint64]
_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(words: Words) -> Words:
    # each bit of the result depends on all bits of the word
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def keys_of(*parts: int | Int64) -> Words:
    """Mix integers, or arrays (m,) of them, into keys of permutations, (m,)."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mixed((key ^ np.atleast_1d(part).astype(np.uint64)) + _GOLDEN)
    return key


def permuted(positions: Int64, sizes: Int64, keys: Words) -> Int64:
    """Return the values at `positions` (m,) of permutations of 0 .. size - 1, (m,).

    Position i refers to the permutation of size `sizes[i]` and key `keys[i]`; both are (m,).
    """
    # frexp's exponent is the number of bits; each half of the network has half of them
    half = ((np.frexp(np.maximum(sizes - 1, 1).astype(np.float64))[1] + 1) // 2).astype(np.uint64)
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = positions.astype(np.uint64)
    todo = np.arange(len(positions))
    while len(todo):
        found = _network(result[todo], half[todo], mask[todo], keys[todo])
        result[todo] = found
        todo = todo[found >= sizes[todo].astype(np.uint64)]
    return result.astype(np.int64)


def _network(words: Words, half: Words, mask: Words, keys: Words) -> Words:
    left, right = words >> half, words & mask
    for turn in range(_ROUNDS):
        change = _mixed(keys + (right << np.uint64(8)) + np.uint64(turn)) & mask
        left, right = right, left ^ change
    return (left << half) | right
