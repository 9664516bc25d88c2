"""Exact sizes at the least cost: shortest paths on the graph of clusters.

From an assignment that is optimal for its prices, one unit of surplus after the other goes from a
cluster that is too large to one that has room, along the shortest path over clusters:

    edge a -> k costs min over images i of a of d_ik - d_ia, the image that is cheapest to move

    too large: 3 --(image 17 moves, +0.02)--> 8 --(image 4 moves, +0.01)--> 5: has room

The path is found with Dijkstra on costs reduced by the prices, which are never negative, and the
prices follow the distances, so every assignment on the way is optimal among those of its sizes,
and so is the last one, for the given candidates. Where these lead to no cluster with room, a search
under the prices of the moment adds some that lead further.

Twins, images with equal candidates at equal distances, move together: as many in one step as the
path has of them on every edge, as its first cluster has too many, and as its last one has room for.

When n = q K + r, all clusters have q + 1 places and K - r of them hold a blank, which moves like an
image at no cost, at most one to a cluster: which clusters are the larger ones is part of the
optimum. Ties go to the lower row.

Letters: n rows, m candidates per row, K clusters; q, r quotient and rest of n / K.

Source: successive shortest paths with potentials, Ahuja, Magnanti, Orlin, "Network Flows" (1993),
section 9.7.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Edge = tuple[int, int]
_NO_ROW = -1
_MAX_ADDED = 100
"""Moves between two clusters that one search adds at most."""
_CLOSED = -1e30
"""Price at which nothing goes to a cluster."""


class Candidates(NamedTuple):
    """The m best clusters of every row, int32, and the squared distances to them: (n, m)."""

    ids: NDArray[np.int32]
    distances: NDArray[Any]


Search = Callable[[Float64], Candidates]
"""Candidates of all rows under given prices (K,), best first."""


def choose(nearest: Candidates, prices: Float64) -> Int64:
    """Return the cluster of least distance - price among the candidates of every row, (n,)."""
    columns = (nearest.distances - prices[nearest.ids]).argmin(axis=1)
    return np.take_along_axis(nearest.ids, columns[:, None], axis=1)[:, 0].astype(np.int64)


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
        self._order = np.argsort(self.of, kind="stable")
        self._sorted = self.of[self._order]

    def rows(self, row: int) -> Int64:
        """Return all rows like a row, itself included, in order."""
        low, high = np.searchsorted(self._sorted, (self.of[row], self.of[row] + 1))
        return self._order[low:high]


class _Edges:
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
        rows, columns = np.nonzero(ids != labels[:, None])
        pairs = labels[rows] * num_clusters + ids[rows, columns]
        costs = distances[rows, columns] - self._own[rows]
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
        return self._further.get(source, {}).get(target, (np.inf, _NO_ROW))

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
        ids, distances = self._nearest.ids[first].tolist(), self._nearest.distances[first].tolist()
        added = self._added.get(int(self._twins.of[first]), [])
        moves = dict([*zip(ids, distances, strict=True), *added])
        self.labels[rows], self._own[rows] = target, moves[target]
        for cluster, distance in moves.items():
            _, best = self.best(source, cluster)
            if best != _NO_ROW and self.labels[best] != source:
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
        best = heap[0] if heap else (np.inf, _NO_ROW)
        edge = self._find(source, target)
        if edge is not None:
            head, end = int(self._heads[edge]), int(self._ends[edge])
            while head < end and self.labels[self._rows[head]] != source:
                head += 1
            self._heads[edge] = head
            if head < end:
                best = min(best, (float(self._costs[head]), int(self._rows[head])))
        self._set(source, target, best)


class _Flow:
    """Sizes, blanks, prices and edges; moves surplus until no cluster is too large."""

    def __init__(self, edges: _Edges, prices: Float64, search: Search, *, largest: int) -> None:
        self.edges, self.prices, self._search = edges, prices.copy(), search
        self.num_moves = self.num_paths = self.num_searches = 0
        self._has_blank = np.zeros(len(prices), bool)
        self.surplus = np.bincount(edges.labels, minlength=len(prices)) - largest

    def place_blanks(self, num_blanks: int) -> None:
        """Put blanks where, under the prices, a place is least wanted: at the greatest g."""
        self._has_blank[np.argsort(-self.prices, kind="stable")[:num_blanks]] = True
        self.surplus += self._has_blank

    def run(self) -> None:
        """Move all surplus; what is at the cost of a path follows on it without a new search."""
        for source in range(len(self.surplus)):
            while self.surplus[source] > 0:
                path = self._shortest_path(source)
                blanks = [self._is_blank_move(*edge) for edge in path]
                costs = [self.edges.best(*edge)[0] for edge in path]
                self._augment(path, blanks)
                while not any(blanks) and self._can_repeat(path, costs):
                    self._augment(path, blanks)

    def _can_repeat(self, path: list[Edge], costs: list[float]) -> bool:
        is_open = self.surplus[path[0][0]] > 0 and self.surplus[path[-1][1]] < 0
        return bool(is_open) and [self.edges.best(*edge)[0] for edge in path] == costs

    def _is_blank_move(self, source: int, target: int) -> bool:
        can = bool(self._has_blank[source] and not self._has_blank[target])
        return can and self.edges.best(source, target)[0] > 0

    def _augment(self, path: list[Edge], blanks: list[bool]) -> None:
        limit = 1 if any(blanks) else int(min(self.surplus[path[0][0]], -self.surplus[path[-1][1]]))
        rows = [
            np.empty(0, np.int64) if is_blank else self.edges.alike(*edge, limit)
            for edge, is_blank in zip(path, blanks, strict=True)
        ]
        num = 1 if any(blanks) else min(map(len, rows))
        # the far end first: an image must not move on in the step that it arrives in
        for at in reversed(range(len(path))):
            source, target = path[at]
            if blanks[at]:
                self._has_blank[source], self._has_blank[target] = False, True
            else:
                self.edges.move(rows[at][:num], target)
        self.surplus[path[0][0]] -= num
        self.surplus[path[-1][1]] += num
        self.num_moves += num
        self.num_paths += 1

    def _shortest_path(self, source: int) -> list[Edge]:
        while True:
            target, distance, previous = self._dijkstra(source)
            if target is not None:
                break
            self._leave(np.isfinite(distance))
        self.prices += np.minimum(distance, distance[target]) - distance[target]
        return _edges_to(target, previous)

    def _dijkstra(self, source: int) -> tuple[int | None, Float64, Int64]:
        """Reduced distances from `source`, up to the nearest cluster with room (None: no path)."""
        num_clusters = len(self.surplus)
        distance = np.full(num_clusters, np.inf)
        distance[source] = 0
        unsettled, previous = distance.copy(), np.full(num_clusters, -1)
        while True:
            nearest = int(unsettled.argmin())
            reach = unsettled[nearest]
            if np.isinf(reach):
                return None, distance, previous
            if self.surplus[nearest] < 0:
                return nearest, distance, previous
            unsettled[nearest] = np.inf
            ways = [self.edges.out(nearest)]
            if self._has_blank[nearest]:
                free = np.flatnonzero(~self._has_blank)
                ways.append((free, np.zeros(len(free))))
            for targets, costs in ways:
                reduced = costs + self.prices[nearest] - self.prices[targets]
                reduced = np.maximum(reduced, 0) + reach
                is_nearer = reduced < distance[targets]
                nearer = targets[is_nearer]
                distance[nearer] = unsettled[nearer] = reduced[is_nearer]
                previous[nearer] = nearest

    def _leave(self, is_inside: NDArray[np.bool_]) -> None:
        """Find moves out of clusters that no candidate leads out of."""
        outside = self._search(np.where(is_inside, _CLOSED, self.prices))
        surplus = int(np.maximum(self.surplus, 0).sum())
        self.edges.add(is_inside, outside, limit=min(surplus, _MAX_ADDED))
        self.num_searches += 1


def _edges_to(target: int, previous: Int64) -> list[Edge]:
    path: list[Edge] = []
    while previous[target] >= 0:
        path.append((int(previous[target]), target))
        target = int(previous[target])
    return path[::-1]


class Finish(NamedTuple):
    """Labels (n,) within the sizes, prices (K,) at which they are optimal, and how it was done."""

    labels: Int64
    prices: Float64
    num_moves: int
    num_paths: int
    num_searches: int


def finish(
    nearest: Candidates, prices: Float64, search: Search, *, largest: int, is_exact: bool
) -> Finish:
    """Move rows at the least cost until no cluster has more than `largest`.

    With `is_exact` that is ceil(n / K), and sizes differ by at most one in the end. `search` finds
    candidates under given prices; it is asked when those at hand do not connect.
    """
    num_rows, num_clusters = len(nearest.ids), len(prices)
    edges = _Edges(choose(nearest, prices), nearest, num_clusters)
    flow = _Flow(edges, prices, search, largest=largest)
    if is_exact:
        flow.place_blanks(largest * num_clusters - num_rows)
    flow.run()
    return Finish(edges.labels, flow.prices, flow.num_moves, flow.num_paths, flow.num_searches)


def dual_bound(prices: Float64, priced_cost: float, num_rows: int) -> float:
    """Bound the cost of any assignment whose sizes differ by at most one from below.

    `priced_cost` is sum_i min_k (d_ik - g_k) over all K clusters.
    """
    quotient, rest = divmod(num_rows, len(prices))
    return float(priced_cost + quotient * prices.sum() + np.sort(prices)[:rest].sum())
