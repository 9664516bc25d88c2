"""Exact sizes at the least cost: shortest paths on the graph of clusters.

The start is an assignment that is optimal for its prices. Then one unit of surplus after the other
moves from a cluster that is too large to one that has room, along the shortest path over clusters:

    edge a -> k costs min over images i of a of d_ik - d_ia, the image that is cheapest to move

    too large: 3 --(image 17 moves, +0.02)--> 8 --(image 4 moves, +0.01)--> 5: has room

Dijkstra finds the path on reduced costs: with prices g as potentials, edge a -> k costs
d_ik - d_ia - g_k + g_a, which is never negative, as i is in its best cluster. After each path the
distances update the prices so that this stays true. So every assignment on the way, and the last
one too, is the cheapest with its sizes, for the given candidates. Where the candidates lead to no
cluster with room, a search under the current prices adds moves that lead further. The loops over
paths are in `flow.py`.

Twins are images with equal candidates at equal distances. Several of them move in one step, limited
by the twins on every edge of the path, the surplus of its first cluster and the room of its last.

When n = q K + r with r > 0, every cluster has q + 1 places and K - r clusters hold a blank, at most
one each. A blank moves like an image, but at no cost, so the choice of the larger clusters is part
of the optimum. Blanks move through a pool, node K. Ties go to the lower row.

Letters: n rows, m candidates per row, K clusters; q, r quotient and remainder of n / K.

Source: successive shortest paths with potentials, Ahuja, Magnanti, Orlin, "Network Flows" (1993),
section 9.7.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moce_dist.arrays import Float64, Int64
from moce_dist.cluster.balance import Sizes
from moce_dist.cluster.candidates import Candidates, choose, find_twins
from moce_dist.cluster.flow import (
    DONE,
    FULL,
    NONE,
    Edges,
    Frontier,
    Graph,
    Log,
    LotLists,
    Lots,
    Moves,
    Sides,
    measure_lots,
    move_surplus,
)

_MAX_ADDED = 100
"""Most moves that one search adds between two clusters."""
_CLOSED = -1e30
"""Price at which no row chooses a cluster."""
_POOL = 2**22
"""Edges between clusters that are remembered at a time."""
_SPARE = 4096
"""Initial room for new lots, arrivals and logged moves of twins; it doubles when it is full."""

Search = Callable[[Float64], Candidates]
"""Maps prices (K,) to the candidates of the rows at hand."""


class Finish(NamedTuple):
    """Labels (n,) within the sizes, prices (K,) at which they are optimal, and how it was done."""

    labels: Int64
    prices: Float64
    num_moves: int
    num_paths: int
    num_searches: int


def finish(
    found: Candidates, prices: Float64, search: Search, sizes: Sizes, settled: Int64 | None = None
) -> Finish | None:
    """Move rows at the least cost until all sizes are within the bounds.

    Without a smallest size, that is when no cluster is too large; otherwise the two bounds differ
    by at most one. `search` finds candidates of the same rows under given prices; it is called when
    the candidates at hand lead to no cluster with room. `settled` (K,) counts further rows, which
    keep their clusters. Returns None where these make the sizes impossible.
    """
    if not len(found.ids):
        assert settled is not None
        is_full = bool((settled > sizes.largest).any() or (settled < sizes.smallest).any())
        return None if is_full else Finish(np.zeros(0, np.int64), prices, 0, 0, 0)
    flow = _Flow(found, prices, sizes, settled)
    num_searches = 0
    while not flow.run():
        if not flow.look_further(search):
            return None
        num_searches += 1
    return Finish(flow.labels, flow.prices, flow.num_moves, flow.num_paths, num_searches)


def dual_bound(prices: Float64, priced_cost: float, num_rows: int) -> float:
    """Return a lower bound on the cost of any assignment whose sizes differ by at most one.

    `priced_cost` is sum_i min_k (d_ik - g_k) over all K clusters.
    """
    # weak duality: an assignment costs at least priced_cost + sum_k size_k g_k, which is least when
    # the r larger clusters are those of the lowest prices
    quotient, rest = divmod(num_rows, len(prices))
    return float(priced_cost + quotient * prices.sum() + np.sort(prices)[:rest].sum())


class _Flow:
    """Labels, twins, prices, sizes and blanks, from which the arrays of `flow.py` are built."""

    def __init__(
        self, found: Candidates, prices: Float64, sizes: Sizes, settled: Int64 | None
    ) -> None:
        num_clusters = len(prices)
        labels = choose(found, prices)
        # keep the rows of a cluster together in memory
        self._numbers = np.argsort(labels, kind="stable")
        self._labels: Int64 = labels[self._numbers]
        self.num_moves = self.num_paths = 0
        self._found = Candidates(*(part[self._numbers] for part in found))
        self._twins = find_twins(self._found)
        self._further = _Further(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
        counts = np.bincount(labels, minlength=num_clusters)
        counts = counts if settled is None else counts + settled
        surplus = counts - sizes.largest
        has_blank, pool_price = np.zeros(num_clusters, bool), 0.0
        if sizes.smallest:
            # blanks start at the greatest prices, where a place is least wanted; the pool's price
            # is the next one. So no blank's move has a negative reduced cost.
            num_blanks = sizes.largest * num_clusters - int(counts.sum())
            order = np.argsort(-prices, kind="stable")
            has_blank[order[:num_blanks]] = True
            surplus += has_blank
            pool_price = prices[order[num_blanks]]
        self._sides = Sides(np.append(prices, pool_price), surplus, has_blank)
        num_nodes = num_clusters + 1
        previous, lots, reached = (np.zeros(num_nodes, np.int64) for _ in range(3))
        distance, nearest = np.full(num_nodes, np.inf), np.full(1, np.inf)
        self._frontier = Frontier(distance, previous, lots, reached, nearest, np.array([NONE, 0]))

    @property
    def labels(self) -> Int64:
        """Clusters of all rows, (n,)."""
        labels = np.empty_like(self._labels)
        labels[self._numbers] = self._labels
        return labels

    @property
    def prices(self) -> Float64:
        """Prices (K,) at which the assignment is optimal for its sizes."""
        return self._sides.prices[:-1]

    def run(self) -> bool:
        """Move surplus; tell whether all of it was moved or the candidates lead no further."""
        moves, lots = self._moves(), self._lots(_SPARE)
        log = Log(np.zeros((_SPARE, 4), np.int64), np.zeros(3, np.int64))
        measure_lots(moves, lots)
        target, lot = (np.zeros(_POOL + len(self.prices), np.int64) for _ in range(2))
        begin, end, best_lot = (np.full(len(self.prices), NONE) for _ in range(3))
        best, used = np.full(len(self.prices), np.inf), np.zeros(1, int)
        edges = Edges(target, np.zeros(len(target)), lot, begin, end, best, best_lot, used)
        graph = Graph(moves, lots, self._lists(lots), edges, self._sides, self._frontier, log)
        while (ending := move_surplus(graph)) == FULL:
            entries = np.concatenate([graph.log.entries, np.zeros_like(graph.log.entries)])
            log = graph.log._replace(entries=entries)
            graph = graph._replace(lots=_grown_lots(graph.lots), log=log)
        self._write_back(graph.lots, graph.log)
        return bool(ending == DONE)

    def _moves(self) -> Moves:
        bounds = np.searchsorted(self._further.rows, np.arange(len(self._labels) + 1))
        further = self._further
        return Moves(self._numbers, *self._found, bounds, further.ids, further.distances)

    def _lots(self, spare: int) -> Lots:
        num_clusters = len(self.prices)
        keys, sizes = np.unique(self._twins * num_clusters + self._labels, return_counts=True)
        rows, clusters = np.divmod(keys, num_clusters)
        # the lots of the same twins form a ring: each names the next, the last names the first
        following = np.arange(1, len(keys) + 1)
        is_last = np.append(rows[1:] != rows[:-1], True)
        following[is_last] = np.flatnonzero(np.append(True, is_last[:-1]))
        blank = np.zeros(spare, np.int64)
        return Lots(
            row=np.append(rows, blank),
            cluster=np.append(clusters, blank),
            size=np.append(sizes, blank),
            own=np.zeros(len(keys) + spare),
            next=np.append(following, blank),
            arrived_lot=blank,
            arrived_next=blank.copy(),
            used=np.array([len(keys), 0]),
        )

    def _lists(self, lots: Lots) -> LotLists:
        clusters = lots.cluster[: lots.used[0]]
        order = np.argsort(clusters, kind="stable")
        bounds = np.searchsorted(clusters[order], np.arange(len(self.prices) + 1))
        return LotLists(bounds, order, np.full(len(self.prices), NONE))

    def _write_back(self, lots: Lots, log: Log) -> None:
        num_entries, num_moves, num_paths = log.counts.tolist()
        self.num_moves += num_moves
        self.num_paths += num_paths
        used = slice(0, int(lots.used[0]))
        rows, clusters = lots.row[used], lots.cluster[used]
        order = np.argsort(self._twins, kind="stable")
        bounds = np.searchsorted(self._twins[order], np.arange(len(order) + 1))
        is_alone = np.diff(bounds)[rows] == 1
        self._labels[rows[is_alone]] = clusters[is_alone]
        for row, source, target, num in log.entries[:num_entries].tolist():
            twins = order[bounds[row] : bounds[row + 1]]
            self._labels[twins[self._labels[twins] == source][:num]] = target

    def look_further(self, search: Search) -> bool:
        """Find moves out of the clusters in which a search got stuck; tell whether there are any.

        A search with the prices of these clusters closed returns candidates elsewhere only.
        """
        reached = self._frontier.reached[: self._frontier.nodes[1]]
        is_inside = np.zeros(len(self.prices) + 1, bool)
        is_inside[reached] = True
        is_inside = is_inside[:-1]
        found = search(np.where(is_inside, _CLOSED, self.prices))
        found = Candidates(*(part[self._numbers] for part in found))
        # rows stay twins only if the new candidates are equal as well
        before = self._twins
        self._twins = find_twins(found, before)
        self._further = self._further.inherited(before, self._twins)
        moves, lots = self._moves(), self._lots(0)
        measure_lots(moves, lots)
        targets = found.ids[lots.row]
        places, columns = np.nonzero(is_inside[lots.cluster][:, None] & ~is_inside[targets])
        rows, targets = lots.row[places], targets[places, columns]
        distances = found.distances[rows, columns]
        # between two clusters the cheapest moves suffice, no more of them than there is surplus
        surplus = int(np.maximum(self._sides.surplus, 0).sum())
        pairs = lots.cluster[places] * len(self.prices) + targets
        order = np.lexsort((distances - lots.own[places], pairs))
        _, firsts, sizes = np.unique(pairs[order], return_index=True, return_counts=True)
        numbers = np.arange(len(order)) - np.repeat(firsts, sizes)
        chosen = order[numbers < min(surplus, _MAX_ADDED)]
        self._further = self._further.extended(rows[chosen], targets[chosen], distances[chosen])
        return len(chosen) > 0


class _Further(NamedTuple):
    """Moves in addition to the candidates: sorted rows, target clusters, distances to these."""

    rows: Int64
    ids: Int64
    distances: Float64

    def inherited(self, before: Int64, twins: Int64) -> "_Further":
        """Give the moves of a row's lowest twin `before` to its lowest twin now."""
        lowest = np.flatnonzero(twins == np.arange(len(twins)))
        bounds = np.searchsorted(self.rows, np.arange(len(twins) + 1))
        firsts, counts = bounds[before[lowest]], np.diff(bounds)[before[lowest]]
        begins = np.cumsum(counts) - counts
        at = np.arange(counts.sum()) + np.repeat(firsts - begins, counts)
        return _Further(np.repeat(lowest, counts), self.ids[at], self.distances[at])

    def extended(self, rows: Int64, ids: NDArray[Any], distances: Float64) -> "_Further":
        """Add moves, and drop a second one of a row to the same cluster, which is equal."""
        rows, ids = np.append(self.rows, rows), np.append(self.ids, ids)
        _, firsts = np.unique(rows * (int(ids.max(initial=0)) + 1) + ids, return_index=True)
        return _Further(rows[firsts], ids[firsts], np.append(self.distances, distances)[firsts])


def _grown_lots(lots: Lots) -> Lots:
    spare = np.zeros(len(lots.arrived_lot), np.int64)
    parts = {name: part for name, part in lots._asdict().items() if name != "used"}
    return lots._replace(**{name: np.append(part, spare) for name, part in parts.items()})
