"""The compiled inner loops of `balance.py`: coordinate ascent on the prices, row by row.

All functions work in place on one thread and in a fixed order, so equal input gives equal bits.
They are compiled once per machine; see `compiled.py` for where the machine code is cached.

Letters: s rows, K clusters, m candidates of a row.
"""

from typing import Any, NamedTuple

import numpy as np

from moce_dist.arrays import Float32, Int32, Int64
from moce_dist.cluster.candidates import Candidates
from moce_dist.compiled import compiled

_SAMPLED_FROM = 600
"""Array length above which selection first narrows the range with a sample."""


class Lists(NamedTuple):
    """Candidates by row, and the same entries sorted by cluster.

    `ids` and `distances` are (s, m). The entries of cluster k are `bounds[k]` to `bounds[k + 1]` of
    `rows` and `of_cluster`, (s m) each: a row, in ascending order, and its distance to the cluster.
    """

    ids: Int32
    distances: Float32
    bounds: Int64
    rows: Int32
    of_cluster: Float32


class Ranks(NamedTuple):
    """Best and second best cluster of every row under the prices, and distance - price: (s, 2).

    Both entries of a row are adjacent in memory because rows are looked up in random order.
    """

    ids: Int32
    values: Float32


class Bounds(NamedTuple):
    """Bounds on the number of rows that a cluster may take, (K,), and on its price, (K + 1,).

    A number is negative where a cluster's `balance.FixedRows` already exceed its size.
    """

    smallest: Int64
    largest: Int64
    lowest: Float32
    highest: Float32


def make_lists(found: Candidates, num_clusters: int) -> Lists:
    """Sort candidates by cluster."""
    distances = np.ascontiguousarray(found.distances, np.float32)
    ids = np.ascontiguousarray(found.ids, np.int32)
    return Lists(ids, distances, *_by_cluster(ids, distances, num_clusters))


@compiled
def _by_cluster(ids: Any, distances: Any, num_clusters: Any) -> Any:
    num_rows, num = ids.shape
    bounds = np.zeros(num_clusters + 1, np.int64)
    for row in range(num_rows):
        for place in range(num):
            bounds[ids[row, place] + 1] += 1
    bounds = np.cumsum(bounds)
    ends = bounds[:-1].copy()
    rows = np.empty(num_rows * num, np.int32)
    of_cluster = np.empty(num_rows * num, np.float32)
    for row in range(num_rows):
        for place in range(num):
            cluster = ids[row, place]
            rows[ends[cluster]] = row
            of_cluster[ends[cluster]] = distances[row, place]
            ends[cluster] += 1
    return bounds, rows, of_cluster


@compiled
def _rank_row(lists: Any, prices: Any, ranks: Any, row: Any) -> None:
    first = second = np.float32(np.inf)
    first_id = second_id = np.int32(0)
    for place in range(lists.ids.shape[1]):
        cluster = lists.ids[row, place]
        value = lists.distances[row, place] - prices[cluster]
        if value < first:
            second, second_id = first, first_id
            first, first_id = value, cluster
        elif value < second:
            second, second_id = value, cluster
    ranks.ids[row, 0], ranks.ids[row, 1] = first_id, second_id
    ranks.values[row, 0], ranks.values[row, 1] = first, second


@compiled
def rank_rows(lists: Any, prices: Any, ranks: Any) -> None:
    """Write every row's best and second best cluster into `ranks`; ties go to the first listed."""
    for row in range(len(lists.ids)):
        _rank_row(lists, prices, ranks, row)


@compiled
def dual(lists: Any, prices: Any, bounds: Any) -> Any:
    """Return the dual value at `prices`, a lower bound on the cost of the best assignment."""
    total: Any = 0.0
    for cluster in range(len(bounds.largest)):
        price = prices[cluster]
        total += bounds.largest[cluster] * min(price, 0.0)
        total += bounds.smallest[cluster] * max(price, 0.0)
    for row in range(len(lists.ids)):
        best = np.float32(np.inf)
        for place in range(lists.ids.shape[1]):
            value = lists.distances[row, place] - prices[lists.ids[row, place]]
            best = min(best, value)
        total += best
    return total


@compiled
def _select(values: Any, low: Any, high: Any, place: Any) -> None:
    # Hoare's quickselect on values[low..high]: afterwards values[place] is what sorting would put
    # there, and nothing before it is greater
    while low < high:
        pivot, left, right = values[place], low, high
        while left <= right:
            while values[left] < pivot:
                left += 1
            while values[right] > pivot:
                right -= 1
            if left <= right:
                values[left], values[right] = values[right], values[left]
                left += 1
                right -= 1
        if right < place:
            low = left
        if place < left:
            high = right


@compiled
def price_above(limits: Any, size: Any) -> Any:
    """Return a price above exactly `size` of the limits: midway to the next larger limit."""
    num = len(limits)
    if num > _SAMPLED_FROM:
        # Floyd and Rivest 1975: selecting in a sample first leaves a pivot close to the wanted one
        sample = 0.5 * num ** (2 / 3)
        shift = 0.5 * np.sqrt(np.log(num) * sample * (1 - sample / num)) * np.sign(2 * size - num)
        low = max(0, int(size - size * sample / num + shift))
        high = min(num - 1, int(size + (num - size) * sample / num + shift))
        _select(limits, low, high, size)
    _select(limits, 0, num - 1, size)
    below = limits[0]
    for place in range(1, size):
        below = max(below, limits[place])
    return (below + limits[size]) / np.float32(2)


@compiled
def _level(limits: Any, bounds: Any, cluster: Any) -> Any:
    smallest, largest = bounds.smallest[cluster], bounds.largest[cluster]
    if len(limits) > largest:
        # the fixed rows alone may exceed the largest size
        price = price_above(limits, largest) if largest >= 0 else bounds.lowest[cluster]
        if price < 0:
            return price
    if len(limits) <= smallest:
        # even all rows that list the cluster are too few
        return bounds.highest[cluster]
    price = price_above(limits, smallest) if smallest > 0 else np.float32(0)
    return max(price, np.float32(0))


@compiled
def reprice(lists: Any, prices: Any, ranks: Any, bounds: Any) -> None:
    """Set every price in turn to the level at which its cluster's size fits; to 0 if 0 fits."""
    ids, values = ranks
    limits = np.empty(np.diff(lists.bounds).max(), np.float32)
    for cluster in range(len(prices) - 1):
        begin, end = lists.bounds[cluster], lists.bounds[cluster + 1]
        for entry in range(begin, end):
            row = lists.rows[entry]
            other = values[row, 1] if ids[row, 0] == cluster else values[row, 0]
            limits[entry - begin] = lists.of_cluster[entry] - other
        price = _level(limits[: end - begin], bounds, cluster)
        price = min(max(price, bounds.lowest[cluster]), bounds.highest[cluster])
        if price == prices[cluster]:
            continue
        prices[cluster] = price
        for entry in range(begin, end):
            row = lists.rows[entry]
            value = lists.of_cluster[entry] - price
            if ids[row, 0] == cluster or ids[row, 1] == cluster:
                _rank_row(lists, prices, ranks, row)
            elif value < values[row, 0]:
                ids[row, 1], values[row, 1] = ids[row, 0], values[row, 0]
                ids[row, 0], values[row, 0] = cluster, value
            elif value < values[row, 1]:
                ids[row, 1], values[row, 1] = cluster, value
