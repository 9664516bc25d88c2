"""Shortest paths on the graph of clusters, and what moves along them: the loops of `exact.py`.

Twins that lie in one cluster are a lot; they move together, and a row without twins is a lot of its
own. A cluster knows its lots in two lists: those that it began with, by their margin (what the
cheapest move costs at the prices of that time), and those that arrived later. Prices only fall
while surplus moves, so a move out of cluster a costs at least its margin less the fall of a's
price: the first list is read up to the point from where on nothing can lead nearer than the cluster
with room that is already known.

    cluster 3   began with   lot 17 (margin 0.02)  lot 4 (0.05)  lot 92 (0.31) ...
                arrived      lot 55, lot 8

All functions run in one thread in a fixed order: equal input gives equal bits.

Letters: n rows, m candidates per row, K clusters; the pool of blanks is node K.
"""

from heapq import heappop, heappush
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moce_dist.cluster.compiled import compiled

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
NONE = -1
DONE, STUCK, FULL = 0, 1, 2
"""How `move_surplus` ends: all is moved, no way leads on, no memory is left for lots."""


class Moves(NamedTuple):
    """Where rows can go: candidates (n, m), and further ones, `bounds[i]` to `bounds[i + 1]`.

    Twins share those of their lowest row.
    """

    ids: NDArray[np.int32]
    distances: NDArray[Any]
    bounds: Int64
    further_ids: Int64
    further_distances: Float64


class Lots(NamedTuple):
    """Lowest twin, cluster, size and distance of each lot; `next` leads around the twins' lots.

    Arrays have spare room; `used` (2,) counts the lots and the arrivals in them.
    """

    row: Int64
    cluster: Int64
    size: Int64
    own: Float64
    next: Int64
    arrived_lot: Int64
    arrived_next: Int64
    used: Int64


class Lists(NamedTuple):
    """The lots that clusters began with, by margin, and the last arrival of each.

    Those of cluster k are `lots[bounds[k]:bounds[k + 1]]`.
    """

    bounds: Int64
    lots: Int64
    margins: Float64
    last_arrival: Int64


class Sides(NamedTuple):
    """Prices (K + 1,) and what they were first; images too many and blanks of clusters, (K,)."""

    prices: Float64
    first_prices: Float64
    surplus: Int64
    has_blank: NDArray[np.bool_]


class Frontier(NamedTuple):
    """What a search has reached: nodes with distance, node before and lot that moves, (K + 1,).

    `nearest` (1,) is the distance of the nearest cluster with room, `nodes` (2,) that cluster and
    the number of entries of `reached`.
    """

    distance: Float64
    previous: Int64
    lot: Int64
    reached: Int64
    nearest: Float64
    nodes: Int64


class Log(NamedTuple):
    """Moves of twins, (row, source, target, number) each, and counts: entries, moves, paths."""

    entries: Int64
    counts: Int64


class Graph(NamedTuple):
    """All that paths are made of."""

    moves: Moves
    lots: Lots
    lists: Lists
    sides: Sides
    frontier: Frontier
    log: Log


@compiled
def own_distance(moves: Any, row: Any, cluster: Any) -> Any:
    """Return the distance of a row to one of the clusters that it can be in, else infinity."""
    for place in range(moves.ids.shape[1]):
        if moves.ids[row, place] == cluster:
            return np.float64(moves.distances[row, place])
    for at in range(moves.bounds[row], moves.bounds[row + 1]):
        if moves.further_ids[at] == cluster:
            return moves.further_distances[at]
    return np.inf


@compiled
def measure_lots(moves: Any, lots: Any, prices: Any) -> Any:
    """Write the lots' distances; return what the cheapest move of each costs under `prices`.

    That is infinity where there is none.
    """
    margins = np.full(lots.used[0], np.inf)
    for lot in range(lots.used[0]):
        row, source = lots.row[lot], lots.cluster[lot]
        lots.own[lot] = own_distance(moves, row, source)
        base = prices[source] - lots.own[lot]
        for place in range(moves.ids.shape[1]):
            target = moves.ids[row, place]
            if target != source:
                cost = moves.distances[row, place] - prices[target] + base
                margins[lot] = min(margins[lot], cost)
        for at in range(moves.bounds[row], moves.bounds[row + 1]):
            if moves.further_ids[at] != source:
                cost = moves.further_distances[at] - prices[moves.further_ids[at]] + base
                margins[lot] = min(margins[lot], cost)
    return margins


@compiled
def move_surplus(graph: Any) -> int:
    """Move images along shortest paths until no cluster has too many; return how it ended.

    At `STUCK` the frontier holds the nodes from which no move leads on.
    """
    lots, sides, frontier, log = graph.lots, graph.sides, graph.frontier, graph.log
    for source in range(len(sides.surplus)):
        while sides.surplus[source] > 0:
            _find_room(graph, source)
            if frontier.nodes[0] == NONE:
                return STUCK
            num, length = _amount(graph, source)
            free = min(len(lots.row) - lots.used[0], len(lots.arrived_lot) - lots.used[1])
            if min(free, len(log.entries) - log.counts[0]) < length:
                return FULL
            _move_along(graph, source, num)
            for at in range(frontier.nodes[1]):
                node = frontier.reached[at]
                nearer = frontier.distance[node] - frontier.nearest[0]
                sides.prices[node] += min(nearer, 0.0)
    return DONE


@compiled
def _find_room(graph: Any, source: Any) -> None:
    # Dijkstra's, on costs reduced by the prices, which are never negative
    sides, frontier = graph.sides, graph.frontier
    pool = len(sides.surplus)
    for at in range(frontier.nodes[1]):
        frontier.distance[frontier.reached[at]] = np.inf
    frontier.nearest[0] = np.inf
    frontier.nodes[0], frontier.nodes[1] = NONE, 0
    # the last entry ends the search where there is no room
    heap = [(np.inf, np.int64(NONE))]
    _reach(graph, heap, (source, np.int64(NONE), np.int64(NONE)), 0.0)
    while True:
        distance, node = heappop(heap)
        if distance >= frontier.nearest[0]:
            break
        if distance > frontier.distance[node]:
            continue
        if node != pool:
            _leave_cluster(graph, heap, node)
            continue
        for place in range(pool):
            if not sides.has_blank[place]:
                ahead = max(sides.prices[pool] - sides.prices[place], 0.0)
                step = (np.int64(place), np.int64(pool), np.int64(NONE))
                _reach(graph, heap, step, distance + ahead)


@compiled
def _reach(graph: Any, heap: Any, step: Any, distance: Any) -> None:
    frontier, surplus = graph.frontier, graph.sides.surplus
    node, previous, lot = step
    # a node that is no nearer than the room is of no use
    if distance >= frontier.nearest[0] or distance >= frontier.distance[node]:
        return
    if frontier.distance[node] == np.inf:
        frontier.reached[frontier.nodes[1]] = node
        frontier.nodes[1] += 1
    frontier.distance[node] = distance
    frontier.previous[node], frontier.lot[node] = previous, lot
    if node < len(surplus) and surplus[node] < 0:
        frontier.nearest[0], frontier.nodes[0] = distance, node
    else:
        heappush(heap, (distance, node))


@compiled
def _leave_cluster(graph: Any, heap: Any, node: Any) -> None:
    lots, lists, sides, frontier = graph.lots, graph.lists, graph.sides, graph.frontier
    pool, distance = len(sides.surplus), frontier.distance[node]
    if sides.has_blank[node]:
        ahead = max(sides.prices[node] - sides.prices[pool], 0.0)
        _reach(graph, heap, (np.int64(pool), node, np.int64(NONE)), distance + ahead)
    fallen = sides.prices[node] - sides.first_prices[node]
    for at in range(lists.bounds[node], lists.bounds[node + 1]):
        if distance + lists.margins[at] + fallen > frontier.nearest[0]:
            break
        lot = lists.lots[at]
        if lots.cluster[lot] == node and lots.size[lot] > 0:
            _offer_lot(graph, heap, lot)
    arrival = lists.last_arrival[node]
    while arrival != NONE:
        lot = lots.arrived_lot[arrival]
        if lots.cluster[lot] == node and lots.size[lot] > 0:
            _offer_lot(graph, heap, lot)
        arrival = lots.arrived_next[arrival]


@compiled
def _offer_lot(graph: Any, heap: Any, lot: Any) -> None:
    moves, lots, prices = graph.moves, graph.lots, graph.sides.prices
    row, source = lots.row[lot], lots.cluster[lot]
    base = prices[source] - lots.own[lot]
    for place in range(moves.ids.shape[1]):
        target = np.int64(moves.ids[row, place])
        if target != source:
            cost = moves.distances[row, place] - prices[target] + base
            _offer(graph, heap, (target, source, lot), cost)
    for at in range(moves.bounds[row], moves.bounds[row + 1]):
        target = moves.further_ids[at]
        if target != source:
            cost = moves.further_distances[at] - prices[target] + base
            _offer(graph, heap, (target, source, lot), cost)


@compiled
def _offer(graph: Any, heap: Any, step: Any, cost: Any) -> None:
    frontier, rows = graph.frontier, graph.lots.row
    target, source, lot = step
    distance = frontier.distance[source] + max(cost, 0.0)
    is_tie = distance == frontier.distance[target] and frontier.previous[target] == source
    if is_tie and rows[lot] < rows[frontier.lot[target]]:
        frontier.lot[target] = lot
    else:
        _reach(graph, heap, step, distance)


@compiled
def _amount(graph: Any, source: Any) -> Any:
    # how many images the whole path can take, and its length
    sides, frontier = graph.sides, graph.frontier
    pool, node = len(sides.surplus), frontier.nodes[0]
    num, length = min(sides.surplus[source], -sides.surplus[node]), 0
    while node != source:
        lot = frontier.lot[node]
        if lot != NONE:
            num = min(num, graph.lots.size[lot])
        node = frontier.previous[node]
        if node == pool:
            num = 1
        length += 1
    return num, length


@compiled
def _move_along(graph: Any, source: Any, num: Any) -> None:
    lots, sides, frontier, log = graph.lots, graph.sides, graph.frontier, graph.log
    pool, node = len(sides.surplus), frontier.nodes[0]
    sides.surplus[source] -= num
    sides.surplus[node] += num
    # the far end first: an image must not move on in the step that it arrives in
    while node != source:
        previous, lot = frontier.previous[node], frontier.lot[node]
        if lot != NONE:
            if lots.size[lot] > 1 or lots.next[lot] != lot:
                entry = log.entries[log.counts[0]]
                entry[0], entry[1], entry[2], entry[3] = lots.row[lot], previous, node, num
                log.counts[0] += 1
            _move(graph, lot, node, num)
        elif previous == pool:
            sides.has_blank[node] = True
        elif node == pool:
            sides.has_blank[previous] = False
        node = previous
    log.counts[1] += num
    log.counts[2] += 1


@compiled
def _move(graph: Any, lot: Any, target: Any, num: Any) -> None:
    lots, last_arrival = graph.lots, graph.lists.last_arrival
    other = lots.next[lot]
    while other != lot and lots.cluster[other] != target:
        other = lots.next[other]
    if other == lot and lots.size[lot] > num:
        other = lots.used[0]
        lots.used[0] += 1
        lots.row[other], lots.size[other] = lots.row[lot], 0
        lots.next[other], lots.next[lot] = lots.next[lot], other
    if other == lot or lots.size[other] == 0:
        lots.cluster[other] = target
        lots.own[other] = own_distance(graph.moves, lots.row[lot], target)
        arrival = lots.used[1]
        lots.used[1] += 1
        lots.arrived_lot[arrival] = other
        lots.arrived_next[arrival] = last_arrival[target]
        last_arrival[target] = arrival
    if other != lot:
        lots.size[lot] -= num
        lots.size[other] += num
