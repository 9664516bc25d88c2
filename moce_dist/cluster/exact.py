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
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moce_dist.cluster.edges import Candidates, Edges, Float64, Int64

Edge = tuple[int, int]
_MAX_ADDED = 100
"""Moves between two clusters that one search adds at most."""
_CLOSED = -1e30
"""Price at which nothing goes to a cluster."""


Search = Callable[[Float64], Candidates]
"""Candidates of all rows under given prices (K,), best first."""


def choose(nearest: Candidates, prices: Float64) -> Int64:
    """Return the cluster of least distance - price among the candidates of every row, (n,)."""
    columns = (nearest.distances - prices[nearest.ids]).argmin(axis=1)
    return np.take_along_axis(nearest.ids, columns[:, None], axis=1)[:, 0].astype(np.int64)


class _Flow:
    """Sizes, blanks, prices and edges; moves surplus until no cluster is too large."""

    def __init__(self, edges: Edges, prices: Float64, search: Search, *, largest: int) -> None:
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
    edges = Edges(choose(nearest, prices), nearest, num_clusters)
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
