"""Exact sizes at the least cost: shortest paths on the graph of clusters.

From an assignment that is optimal for its prices, one unit of surplus after the other goes from a
cluster that is too large to one that has room, along the shortest path over clusters:

    edge a -> k costs min over images i of a of d_ik - d_ia, the image that is cheapest to move

    too large: 3 --(image 17 moves, +0.02)--> 8 --(image 4 moves, +0.01)--> 5: has room

The path is found with Dijkstra on costs reduced by the prices, which are never negative, and the
prices follow the distances, so every assignment on the way is optimal among those of its sizes, and
so is the last one (for the given candidates). When n = q K + r, all clusters have q + 1 places and
K - r of them hold a blank, which moves like an image at no cost, at most one to a cluster: which
clusters are the larger ones is part of the optimum. Ties go to the lower row.

Letters: n rows, m candidates per row, K clusters; q, r quotient and rest of n / K.

Source: successive shortest paths with potentials, Ahuja, Magnanti, Orlin, "Network Flows" (1993),
section 9.7.
"""

from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Edge = tuple[int, int]
_NO_ROW = -1


def choose(ids: NDArray[np.int32], distances: Float64, prices: Float64) -> Int64:
    """Return the cluster of least distance - price among the candidates of every row, (n,)."""
    columns = (distances - prices[ids]).argmin(axis=1)
    return np.take_along_axis(ids, columns[:, None], axis=1)[:, 0].astype(np.int64)


class UnreachableError(ValueError):
    """The candidates connect no cluster with room to one that is too large."""


class _Edges:
    """Cheapest move between any two clusters, kept while rows move.

    Moves of the first assignment are sorted once and read from the front; rows that arrive later
    are on small heaps. Entries of rows that have left are skipped when they come up.
    """

    def __init__(
        self, labels: Int64, ids: NDArray[np.int32], distances: Float64, num_clusters: int
    ) -> None:
        self.labels, self._ids, self._distances = labels, ids, distances
        self._num = num_clusters
        own = (ids == labels[:, None]).argmax(axis=1)
        costs = distances - np.take_along_axis(distances, own[:, None], axis=1)
        rows, columns = np.nonzero(ids != labels[:, None])
        pairs, costs = labels[rows] * num_clusters + ids[rows, columns], costs[rows, columns]
        order = np.lexsort((costs, pairs))
        self._rows, self._costs, pairs = rows[order], costs[order], pairs[order]
        bounds = np.searchsorted(pairs, np.arange(num_clusters**2 + 1))
        self._heads, self._ends = bounds[:-1].copy(), bounds[1:]
        self._arrivals: dict[int, list[tuple[float, int]]] = {}
        self.cost = np.full((num_clusters, num_clusters), np.inf)
        self.row = np.full((num_clusters, num_clusters), _NO_ROW)
        filled = np.flatnonzero(self._heads < self._ends)
        self.cost.flat[filled] = self._costs[self._heads[filled]]
        self.row.flat[filled] = self._rows[self._heads[filled]]

    def move(self, row: int, target: int) -> None:
        """Give `row` to cluster `target` and bring the edges up to date."""
        source = int(self.labels[row])
        self.labels[row] = target
        candidates = [int(k) for k in self._ids[row]]
        distances = self._distances[row]
        base = distances[candidates.index(target)]
        for cluster, distance in zip(candidates, distances, strict=True):
            if self.row[source, cluster] == row:
                self._refresh(source, cluster)
            if cluster != target:
                self._arrive(row, target, cluster, float(distance - base))

    def _arrive(self, row: int, source: int, target: int, cost: float) -> None:
        heappush(self._arrivals.setdefault(source * self._num + target, []), (cost, row))
        self.cost[source, target], self.row[source, target] = min(
            (self.cost[source, target], self.row[source, target]), (cost, row)
        )

    def _refresh(self, source: int, target: int) -> None:
        pair = source * self._num + target
        head, end = int(self._heads[pair]), int(self._ends[pair])
        while head < end and self.labels[self._rows[head]] != source:
            head += 1
        self._heads[pair] = head
        heap = self._arrivals.get(pair, [])
        while heap and self.labels[heap[0][1]] != source:
            heappop(heap)
        best = heap[0] if heap else (np.inf, _NO_ROW)
        if head < end:
            best = min(best, (float(self._costs[head]), int(self._rows[head])))
        self.cost[source, target], self.row[source, target] = best


class Finish(NamedTuple):
    """Balanced labels (n,), prices at which they are optimal (K,), and how many units moved."""

    labels: Int64
    prices: Float64
    num_moves: int


class _Flow:
    """Sizes, blanks, prices and edges; moves surplus until no cluster is too large."""

    def __init__(self, edges: _Edges, prices: Float64, largest: int, num_blanks: int) -> None:
        num_clusters = len(prices)
        self.edges, self.prices, self.num_moves = edges, prices.copy(), 0
        self._has_blank = np.zeros(num_clusters, bool)
        # under the prices blanks are best where a place is least wanted: at the greatest g
        self._has_blank[np.argsort(-prices, kind="stable")[:num_blanks]] = True
        counts = np.bincount(edges.labels, minlength=num_clusters)
        self.surplus = counts + self._has_blank - largest

    def run(self) -> None:
        """Move all surplus; equal images follow on a path at its cost without a new search."""
        for source in range(len(self.surplus)):
            while self.surplus[source] > 0:
                path = self._shortest_path(source)
                blanks = [self._is_blank_move(*edge) for edge in path]
                costs = [self.edges.cost[edge] for edge in path]
                self._augment(path, blanks)
                while not any(blanks) and self._can_repeat(path, costs):
                    self._augment(path, blanks)

    def _can_repeat(self, path: list[Edge], costs: list[float]) -> bool:
        is_open = self.surplus[path[0][0]] > 0 and self.surplus[path[-1][1]] < 0
        return bool(is_open) and [self.edges.cost[edge] for edge in path] == costs

    def _is_blank_move(self, source: int, target: int) -> bool:
        can = bool(self._has_blank[source] and not self._has_blank[target])
        return can and self.edges.cost[source, target] > 0

    def _augment(self, path: list[Edge], blanks: list[bool]) -> None:
        # the far end first: an image must not move on in the step that it arrives in
        for (source, target), is_blank in reversed(list(zip(path, blanks, strict=True))):
            if is_blank:
                self._has_blank[source], self._has_blank[target] = False, True
            else:
                self.edges.move(int(self.edges.row[source, target]), target)
        self.surplus[path[0][0]] -= 1
        self.surplus[path[-1][1]] += 1
        self.num_moves += 1

    def _shortest_path(self, source: int) -> list[Edge]:
        num_clusters = len(self.surplus)
        distance = np.full(num_clusters, np.inf)
        distance[source] = 0
        unsettled, previous = distance.copy(), np.full(num_clusters, -1)
        while True:
            nearest = int(unsettled.argmin())
            reach = unsettled[nearest]
            if np.isinf(reach):
                raise UnreachableError(f"no path from cluster {source} to one with room")
            if self.surplus[nearest] < 0:
                break
            unsettled[nearest] = np.inf
            costs = self.edges.cost[nearest]
            if self._has_blank[nearest]:
                costs = np.where(self._has_blank, costs, np.minimum(costs, 0))
            reduced = np.maximum(costs + self.prices[nearest] - self.prices, 0) + reach
            nearer = np.flatnonzero(reduced < distance)
            distance[nearer] = unsettled[nearer] = reduced[nearer]
            previous[nearer] = nearest
        self.prices += np.minimum(distance, reach) - reach
        return _edges_to(nearest, previous)


def _edges_to(target: int, previous: Int64) -> list[Edge]:
    path: list[Edge] = []
    while previous[target] >= 0:
        path.append((int(previous[target]), target))
        target = int(previous[target])
    return path[::-1]


def finish(
    ids: NDArray[np.int32], distances: Float64, prices: Float64, *, largest: int, is_exact: bool
) -> Finish:
    """Move rows among their candidates (n, m), at the least cost, until no cluster is too large.

    No cluster has more than `largest` rows in the end. With `is_exact` that is ceil(n / K), and
    sizes differ by at most one.

    Raises:
        UnreachableError: more candidates are needed.
    """
    num_clusters = len(prices)
    edges = _Edges(choose(ids, distances, prices), ids, distances, num_clusters)
    num_blanks = largest * num_clusters - len(ids) if is_exact else 0
    flow = _Flow(edges, prices, largest, num_blanks)
    flow.run()
    return Finish(edges.labels, flow.prices, flow.num_moves)


def dual_bound(prices: Float64, priced_cost: float, num_rows: int) -> float:
    """Bound the cost of any assignment whose sizes differ by at most one from below.

    `priced_cost` is sum_i min_k (d_ik - g_k) over all K clusters.
    """
    quotient, rest = divmod(num_rows, len(prices))
    return float(priced_cost + quotient * prices.sum() + np.sort(prices)[:rest].sum())
