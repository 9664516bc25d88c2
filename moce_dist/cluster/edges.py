"""The cheapest moves of images between clusters, kept while images move (see `exact.py`).

Twins, images with equal candidates at equal distances, stand for each other and move together.

Letters: n rows, m candidates per row, K clusters.
"""

from heapq import heappop, heappush
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
NO_ROW = -1
"""Stands for a row where no row can move."""


class Candidates(NamedTuple):
    """The m best clusters of every row, int32, and the squared distances to them: (n, m)."""

    ids: NDArray[np.int32]
    distances: NDArray[Any]


class _Twins:
    """Rows with equal candidates; `of` (n,) holds the lowest row that is like a row."""

    def __init__(self, nearest: Candidates) -> None:
        ids, distances = nearest.ids, np.ascontiguousarray(nearest.distances)
        columns = [*ids.T, *distances.view(np.int32).T]
        factors = np.random.default_rng(0).integers(1, 2**63, len(columns), np.uint64) | 1
        hashed = np.zeros(len(ids), np.uint64)
        for column, factor in zip(columns, factors, strict=True):
            hashed += column.astype(np.uint32) * factor
        _, firsts, groups = np.unique(hashed, return_index=True, return_inverse=True)
        self.of = firsts[groups]
        others = np.flatnonzero(self.of != np.arange(len(ids)))
        likes = self.of[others]
        is_like = (ids[others] == ids[likes]) & (distances[others] == distances[likes])
        unlike = others[~is_like.all(axis=1)]
        self.of[unlike] = unlike
        self._sort()

    def _sort(self) -> None:
        self._order = np.argsort(self.of, kind="stable")
        self._sorted = self.of[self._order]

    def part(self, found: Candidates) -> Int64:
        """Part rows from twins that found something else in a further search; return them."""
        others = np.flatnonzero(self.of != np.arange(len(self.of)))
        likes = self.of[others]
        is_like = (found.ids[others] == found.ids[likes]).all(axis=1)
        is_like &= (found.distances[others] == found.distances[likes]).all(axis=1)
        parted = others[~is_like]
        self.of[parted] = parted
        if len(parted):
            self._sort()
        return parted

    def rows(self, row: int) -> Int64:
        """Return all rows like a row, itself included, in order."""
        low, high = np.searchsorted(self._sorted, (self.of[row], self.of[row] + 1))
        return self._order[low:high]


class Edges:
    """Cheapest move between any two clusters, kept while rows move.

    Moves of the first assignment are sorted once and read from the front; those of rows that arrive
    later, or that are added later, are on small heaps, where a row stands for its twins, too.
    Entries of rows that have left are skipped when they come up. Only pairs that some row can move
    between are held: edges of the first assignment by (source, target), further ones behind them.
    """

    def __init__(self, labels: Int64, nearest: Candidates, num_clusters: int) -> None:
        self.labels, self._nearest, self._num = labels, nearest, num_clusters
        self._twins = _Twins(nearest)
        self._added: dict[int, list[tuple[int, float]]] = {}
        self._heaps: dict[int, list[tuple[float, int]]] = {}
        ids, distances = nearest
        # an index may name a cluster twice
        columns = (ids == labels[:, None]).argmax(axis=1)
        self._own = np.take_along_axis(distances, columns[:, None], axis=1)[:, 0]
        moves = np.flatnonzero(ids != labels[:, None])
        rows = (moves // ids.shape[1]).astype(np.int32)
        pairs = labels[rows] * num_clusters + ids.ravel()[moves]
        costs = distances.ravel()[moves] - self._own[rows]
        del moves
        order = np.lexsort((costs, pairs))
        self._rows, self._costs = rows[order], costs[order]
        self._pairs, self._heads, sizes = np.unique(
            pairs[order], return_index=True, return_counts=True
        )
        self._ends = self._heads + sizes
        self._firsts = np.searchsorted(self._pairs, np.arange(num_clusters + 1) * num_clusters)
        self._targets = self._pairs % num_clusters
        self._cost = self._costs[self._heads].astype(np.float64)
        self._row = self._rows[self._heads]
        self._further: dict[int, dict[int, tuple[float, int]]] = {}

    def out(self, source: int) -> tuple[Int64, Float64]:
        """Return the clusters that rows of one can move to, and the costs of the cheapest moves."""
        edges = slice(self._firsts[source], self._firsts[source + 1])
        targets, costs = self._targets[edges], self._cost[edges]
        if further := self._further.get(source):
            targets = np.append(targets, list(further))
            costs = np.append(costs, [cost for cost, _ in further.values()])
        return targets, costs

    def best(self, source: int, target: int) -> tuple[float, int]:
        """Return cost and row of the cheapest move; infinity where there is none."""
        edge = self._find(source, target)
        if edge is not None:
            return float(self._cost[edge]), int(self._row[edge])
        return self._further.get(source, {}).get(target, (np.inf, NO_ROW))

    def _find(self, source: int, target: int) -> int | None:
        pair = source * self._num + target
        edge = int(self._pairs.searchsorted(pair))
        return edge if edge < len(self._pairs) and self._pairs[edge] == pair else None

    def _set(self, source: int, target: int, best: tuple[float, int]) -> None:
        edge = self._find(source, target)
        if edge is not None:
            self._cost[edge], self._row[edge] = best
        else:
            self._further.setdefault(source, {})[target] = best

    def add(self, is_inside: NDArray[np.bool_], found: Candidates, limit: int) -> None:
        """Add moves out of some clusters to the candidates outside, the cheapest of each pair."""
        self._part(found)
        # one row stands for its twins in the same cluster
        _, alone = np.unique(self.labels * len(self.labels) + self._twins.of, return_index=True)
        alone = np.sort(alone)
        is_way = is_inside[self.labels[alone]][:, None] & ~is_inside[found.ids[alone]]
        places, columns = np.nonzero(is_way)
        rows = alone[places]
        targets, distances = found.ids[rows, columns], found.distances[rows, columns]
        pairs = self.labels[rows] * self._num + targets
        order = np.lexsort((distances - self._own[rows], pairs))
        _, firsts, sizes = np.unique(pairs[order], return_index=True, return_counts=True)
        places = np.arange(len(order)) - np.repeat(firsts, sizes)
        for at in order[places < limit]:
            row, target, distance = int(rows[at]), int(targets[at]), float(distances[at])
            self._added.setdefault(int(self._twins.of[row]), []).append((target, distance))
            self._offer(row, int(self.labels[row]), target, distance - float(self._own[row]))

    def _part(self, found: Candidates) -> None:
        before = self._twins.of.copy()
        for row in self._twins.part(found).tolist():
            self._added[row] = list(self._added.get(int(before[row]), []))
            source, own = int(self.labels[row]), float(self._own[row])
            for target, distance in self._moves(row).items():
                if target != source:
                    self._offer(row, source, target, distance - own)

    def _moves(self, row: int) -> dict[int, float]:
        """Return the clusters that a row can be in, and its distances to them."""
        ids, distances = self._nearest.ids[row].tolist(), self._nearest.distances[row].tolist()
        added = self._added.get(int(self._twins.of[row]), [])
        return dict([*zip(ids, distances, strict=True), *added])

    def alike(self, source: int, target: int, limit: int) -> Int64:
        """Return the row of the cheapest move and its twins beside it, at most `limit`."""
        return self._twins_in(self.best(source, target)[1], source)[:limit]

    def _twins_in(self, row: int, cluster: int) -> Int64:
        rows = self._twins.rows(row)
        return rows[self.labels[rows] == cluster]

    def move(self, rows: Int64, target: int) -> None:
        """Give twins of one cluster to cluster `target` and bring the edges up to date."""
        first = int(rows[0])
        source = int(self.labels[first])
        moves = self._moves(first)
        self.labels[rows], self._own[rows] = target, moves[target]
        for cluster, distance in moves.items():
            _, best = self.best(source, cluster)
            if best != NO_ROW and self.labels[best] != source:
                self._refresh(source, cluster)
            if cluster != target:
                self._offer(first, target, cluster, distance - moves[target])

    def _offer(self, row: int, source: int, target: int, cost: float) -> None:
        heappush(self._heaps.setdefault(source * self._num + target, []), (cost, row))
        self._set(source, target, min(self.best(source, target), (cost, row)))

    def _refresh(self, source: int, target: int) -> None:
        heap, renewed = self._heaps.get(source * self._num + target, []), set()
        while heap and self.labels[heap[0][1]] != source:
            cost, row = heappop(heap)
            twin = int(self._twins.of[row])
            # one entry is enough for all twins
            if twin not in renewed and len(left := self._twins_in(row, source)):
                heappush(heap, (cost, int(left[0])))
            renewed.add(twin)
        best = heap[0] if heap else (np.inf, NO_ROW)
        edge = self._find(source, target)
        if edge is not None:
            head, end = int(self._heads[edge]), int(self._ends[edge])
            while head < end and self.labels[self._rows[head]] != source:
                head += 1
            self._heads[edge] = head
            if head < end:
                best = min(best, (float(self._costs[head]), int(self._rows[head])))
        self._set(source, target, best)
