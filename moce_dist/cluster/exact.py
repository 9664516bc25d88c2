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
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from moce_dist.cluster.balance import Sizes
from moce_dist.cluster.edges import Candidates, Edges, Float64, Int64

NO_NODE = -1
_MAX_ADDED = 100
"""Moves between two clusters that one search adds at most."""
_MAX_STALE = 8
"""Entries of a heap per cluster, outdated ones included, before it is made anew."""
_CLOSED = -1e30
"""Price at which nothing goes to a cluster."""


Search = Callable[[Float64], Candidates]
"""Candidates of all rows under given prices (K,), best first."""


def choose(nearest: Candidates, prices: Float64) -> Int64:
    """Return the cluster of least distance - price among the candidates of every row, (n,)."""
    columns = (nearest.distances - prices[nearest.ids]).argmin(axis=1)
    return np.take_along_axis(nearest.ids, columns[:, None], axis=1)[:, 0].astype(np.int64)


class _Path(NamedTuple):
    """A way from surplus to room: where images move, and from and to which cluster a blank does."""

    source: int
    target: int
    moves: list[tuple[int, int]]
    blank: tuple[int, int] | None


class _Frontier:
    """What Dijkstra has reached: nodes by distance, and the nearest cluster with room so far."""

    def __init__(self, num_nodes: int) -> None:
        self.distance = np.full(num_nodes, np.inf)
        self._previous = np.full(num_nodes, NO_NODE)
        self._heap: list[tuple[float, int]] = []
        self._reached: list[int] = []
        self.room, self.bound = NO_NODE, np.inf

    def clear(self) -> None:
        """Forget everything, in the time that it took to reach it."""
        self.distance[self._reached] = np.inf
        self._previous[self._reached] = NO_NODE
        self._heap, self._reached, self.room, self.bound = [], [], NO_NODE, np.inf

    def reach(self, node: int, distance: float, previous: int, *, has_room: bool = False) -> None:
        """Note a nearer way to a node; one that is no nearer than the room is of no use."""
        if distance >= self.bound or distance >= self.distance[node]:
            return
        self.distance[node], self._previous[node] = distance, previous
        self._reached.append(node)
        if has_room:
            self.room, self.bound = node, distance
        else:
            heappush(self._heap, (distance, node))

    def look_again(self, distance: float) -> None:
        """Have `NO_NODE` come up at a distance."""
        if distance < self.bound:
            heappush(self._heap, (distance, NO_NODE))

    def pop(self) -> tuple[float, int] | None:
        """Take out the nearest node; None when none is nearer than the room."""
        while self._heap and self._heap[0][0] < self.bound:
            distance, node = heappop(self._heap)
            if node == NO_NODE or distance == self.distance[node]:
                return distance, node
        return None

    def inside(self) -> Int64:
        """Return the nodes that are nearer than the room."""
        nodes = np.unique(np.array(self._reached, np.int64))
        return nodes[self.distance[nodes] < self.bound]

    def nodes_to(self, target: int) -> list[int]:
        """Return the nodes on the shortest path to `target`."""
        nodes = [target]
        while (node := int(self._previous[nodes[-1]])) != NO_NODE:
            nodes.append(node)
        return nodes[::-1]


class _Flow:
    """Sizes, blanks, prices and edges; moves surplus until no cluster is too large.

    Blanks go through a pool, node K: from any cluster that has one, to any that has none.
    """

    def __init__(self, edges: Edges, prices: Float64, search: Search, *, largest: int) -> None:
        self.edges, self._search = edges, search
        self.num_moves = self.num_paths = self.num_searches = 0
        self._prices, self._pool = np.append(prices, 0.0), len(prices)
        self._has_blank = np.zeros(len(prices), bool)
        self._places: list[tuple[float, int]] = []
        self._held: list[tuple[float, int]] = []
        self._frontier = _Frontier(len(self._prices))
        self.surplus = np.bincount(edges.labels, minlength=len(prices)) - largest

    @property
    def prices(self) -> Float64:
        """Prices (K,) at which the assignment is optimal for its sizes."""
        return self._prices[:-1]

    def place_blanks(self, num_blanks: int) -> None:
        """Put blanks where, under the prices, a place is least wanted: at the greatest g."""
        order = np.argsort(-self.prices, kind="stable")
        self._has_blank[order[:num_blanks]] = True
        self.surplus += self._has_blank
        self._prices[self._pool] = self.prices[order[num_blanks]]
        self._offer(order[num_blanks:].tolist())

    def run(self) -> None:
        """Move all surplus; what is at the cost of a path follows on it without a new search."""
        for source in np.flatnonzero(self.surplus > 0).tolist():
            while self.surplus[source] > 0:
                path = self._shortest_path(source)
                costs = [self.edges.best(*move)[0] for move in path.moves]
                self._augment(path)
                while path.blank is None and self._can_repeat(path, costs):
                    self._augment(path)

    def _can_repeat(self, path: _Path, costs: list[float]) -> bool:
        is_open = self.surplus[path.source] > 0 and self.surplus[path.target] < 0
        return bool(is_open) and [self.edges.best(*move)[0] for move in path.moves] == costs

    def _augment(self, path: _Path) -> None:
        num = int(min(self.surplus[path.source], -self.surplus[path.target]))
        if path.blank is not None:
            num = 1
            giver, taker = path.blank
            self._has_blank[giver], self._has_blank[taker] = False, True
            self._offer([giver])
        rows = [self.edges.alike(*move, num) for move in path.moves]
        num = min([num, *map(len, rows)])
        # the far end first: an image must not move on in the step that it arrives in
        for (_, target), leaving in zip(reversed(path.moves), reversed(rows), strict=True):
            self.edges.move(leaving[:num], target)
        self.surplus[path.source] -= num
        self.surplus[path.target] += num
        self.num_moves += num
        self.num_paths += 1

    def _shortest_path(self, source: int) -> _Path:
        frontier = self._frontier
        while not self._reach_room(source):
            self._leave(frontier.inside())
            frontier.clear()
        nodes, inside = frontier.nodes_to(frontier.room), frontier.inside()
        self._prices[inside] += frontier.distance[inside] - frontier.bound
        frontier.clear()
        self._offer(inside[inside != self._pool].tolist())
        moves = list(pairwise(nodes))
        if self._pool not in nodes:
            return _Path(source, nodes[-1], moves, None)
        at = nodes.index(self._pool)
        return _Path(
            source, nodes[-1], moves[: at - 1] + moves[at + 1 :], (nodes[at - 1], nodes[at + 1])
        )

    def _reach_room(self, source: int) -> bool:
        """Grow the frontier from `source` up to the nearest cluster with room, if there is one."""
        frontier, prices = self._frontier, self._prices
        frontier.reach(source, 0.0, NO_NODE)
        while (nearest := frontier.pop()) is not None:
            distance, node = nearest
            if node == NO_NODE:
                self._held.append(heappop(self._places))
                _, place = self._held[-1]
                has_room = bool(self.surplus[place] < 0)
                frontier.reach(place, distance, self._pool, has_room=has_room)
            elif node != self._pool:
                self._relax(node, distance)
            if node in (NO_NODE, self._pool) and (best := self._next_place()) is not None:
                ahead = max(prices[self._pool] - prices[best], 0.0)
                frontier.look_again(frontier.distance[self._pool] + ahead)
        for held in self._held:
            heappush(self._places, held)
        self._held = []
        return frontier.room != NO_NODE

    def _relax(self, node: int, distance: float) -> None:
        frontier, prices = self._frontier, self._prices
        if self._has_blank[node]:
            ahead = max(prices[node] - prices[self._pool], 0.0)
            frontier.reach(self._pool, distance + ahead, node)
        targets, costs = self.edges.out(node)
        reached = np.maximum(costs + (prices[node] - prices[targets]), 0) + distance
        has_room = self.surplus[targets] < 0
        bound = min(frontier.bound, reached[has_room].min(initial=np.inf))
        nearer = np.flatnonzero((reached <= bound) & (reached < frontier.distance[targets]))
        for at in nearer.tolist():
            frontier.reach(int(targets[at]), float(reached[at]), node, has_room=bool(has_room[at]))

    def _offer(self, clusters: list[int]) -> None:
        if len(self._places) > _MAX_STALE * len(self._has_blank):
            self._places, clusters = [], np.flatnonzero(~self._has_blank).tolist()
        for cluster in clusters:
            if not self._has_blank[cluster]:
                heappush(self._places, (-float(self._prices[cluster]), cluster))

    def _next_place(self) -> int | None:
        """Return the cluster of the greatest price that has no blank."""
        while self._places:
            price, cluster = self._places[0]
            if not self._has_blank[cluster] and price == -self._prices[cluster]:
                return cluster
            heappop(self._places)
        return None

    def _leave(self, nodes: Int64) -> None:
        """Find moves out of clusters that no candidate leads out of."""
        is_inside = np.zeros(len(self._prices), bool)
        is_inside[nodes] = True
        outside = self._search(np.where(is_inside, _CLOSED, self._prices)[:-1])
        surplus = int(np.maximum(self.surplus, 0).sum())
        self.edges.add(is_inside[:-1], outside, limit=min(surplus, _MAX_ADDED))
        self.num_searches += 1


class Finish(NamedTuple):
    """Labels (n,) within the sizes, prices (K,) at which they are optimal, and how it was done."""

    labels: Int64
    prices: Float64
    num_moves: int
    num_paths: int
    num_searches: int


def finish(nearest: Candidates, prices: Float64, search: Search, sizes: Sizes) -> Finish:
    """Move rows at the least cost until all sizes are within the bounds.

    Without a smallest size that is until none is too large; otherwise the two bounds differ by at
    most one. `search` finds candidates under given prices; it is asked when those at hand do not
    connect.
    """
    num_rows, num_clusters = len(nearest.ids), len(prices)
    edges = Edges(choose(nearest, prices), nearest, num_clusters)
    flow = _Flow(edges, prices, search, largest=sizes.largest)
    if sizes.smallest:
        flow.place_blanks(sizes.largest * num_clusters - num_rows)
    flow.run()
    return Finish(edges.labels, flow.prices, flow.num_moves, flow.num_paths, flow.num_searches)


def dual_bound(prices: Float64, priced_cost: float, num_rows: int) -> float:
    """Bound the cost of any assignment whose sizes differ by at most one from below.

    `priced_cost` is sum_i min_k (d_ik - g_k) over all K clusters.
    """
    quotient, rest = divmod(num_rows, len(prices))
    return float(priced_cost + quotient * prices.sum() + np.sort(prices)[:rest].sum())
