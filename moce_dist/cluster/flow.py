"""The compiled loops of `exact.py`: shortest paths over clusters, and the moves along them.

A lot is all twins that are in one cluster; a row without twins is a lot of its own. An edge of the
graph is the lot that is cheapest to move from one cluster to another. The edges of a cluster are
computed when a search reaches it. They stay valid until a lot enters or leaves the cluster, because
their costs do not depend on prices. All edges are stored in one pool, which is emptied when full.

    cluster 3   began with lots 17, 4, 92     edges  -> 8  by lot 17, +0.02
                arrived    lots 55, 8                -> 11 by lot 55, +0.07

All functions run on one thread in a fixed order: equal input gives equal bits.

Letters: n rows, m candidates per row, K clusters; the pool of blanks is node K.
"""

from heapq import heappop, heappush
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moce_dist.arrays import Float64, Int32, Int64
from moce_dist.compiled import compiled

NONE = -1
DONE, STUCK, FULL = 0, 1, 2
"""How `move_surplus` ends: all surplus is moved, no path leads on, no memory is left for lots."""


class Moves(NamedTuple):
    """Where rows can go: candidates (n, m), and further moves `bounds[i]` to `bounds[i + 1]`.

    Rows are ordered by their first cluster, so that the loops read memory in order; `numbers` (n,)
    are their original row numbers. Twins use the entries of their lowest row.
    """

    numbers: Int64
    ids: Int32
    distances: NDArray[Any]
    bounds: Int64
    further_ids: Int64
    further_distances: Float64


class Lots(NamedTuple):
    """Lowest twin, cluster, size and distance of each lot; `next` is a ring of the twins' lots.

    An arrival is an entry in a linked list of the lots that came to a cluster: `arrived_lot`, and
    the arrival before it. Arrays have spare room; `used` (2,) counts the lots and the arrivals.
    """

    row: Int64
    cluster: Int64
    size: Int64
    own: Float64
    next: Int64
    arrived_lot: Int64
    arrived_next: Int64
    used: Int64


class LotLists(NamedTuple):
    """The lots that clusters began with, and the last arrival of each cluster, (K,).

    Cluster k began with `lots[bounds[k]:bounds[k + 1]]`.
    """

    bounds: Int64
    lots: Int64
    last_arrival: Int64


class Edges(NamedTuple):
    """The pool of edges; those of cluster k are `begin[k]` to `end[k]`, -1 if not computed.

    `best` and `best_lot` (K,) are scratch space to collect a cluster's edges by target; `used` (1,)
    is where the pool ends.
    """

    target: Int64
    cost: Float64
    lot: Int64
    begin: Int64
    end: Int64
    best: Float64
    best_lot: Int64
    used: Int64


class Sides(NamedTuple):
    """Prices of clusters and pool, (K + 1,); surplus and blanks of clusters, (K,).

    A negative surplus is room.
    """

    prices: Float64
    surplus: Int64
    has_blank: NDArray[np.bool_]


class Frontier(NamedTuple):
    """What a search has reached: distance, previous node and moving lot of every node, (K + 1,).

    `reached` lists the nodes reached, and `nodes` (2,) holds the nearest cluster with room and the
    length of that list. `nearest` (1,) is the distance of that cluster.
    """

    distance: Float64
    previous: Int64
    lot: Int64
    reached: Int64
    nearest: Float64
    nodes: Int64


class Log(NamedTuple):
    """Moves of twins, (row, source, target, number) each, and counts of entries, moves, paths.

    A lot does not say which of its twins moved; `exact.py` replays the entries.
    """

    entries: Int64
    counts: Int64


class Graph(NamedTuple):
    """The whole state of the search and the moves."""

    moves: Moves
    lots: Lots
    lists: LotLists
    edges: Edges
    sides: Sides
    frontier: Frontier
    log: Log


@compiled
def own_distance(moves: Any, row: Any, cluster: Any) -> Any:
    """Return the distance of a row to a cluster; infinity if no move of the row leads there."""
    for place in range(moves.ids.shape[1]):
        if moves.ids[row, place] == cluster:
            return np.float64(moves.distances[row, place])
    for at in range(moves.bounds[row], moves.bounds[row + 1]):
        if moves.further_ids[at] == cluster:
            return moves.further_distances[at]
    return np.inf


@compiled
def measure_lots(moves: Any, lots: Any) -> None:
    """Write the distance of every lot to its cluster."""
    for lot in range(lots.used[0]):
        lots.own[lot] = own_distance(moves, lots.row[lot], lots.cluster[lot])


@compiled
def move_surplus(graph: Any) -> int:
    """Move images along shortest paths until no cluster is too large; return how it ended.

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
            # potentials of successive shortest paths: g += min(distance - nearest, 0). No reduced
            # cost becomes negative, and those along the path become 0, so it can be reversed.
            for at in range(frontier.nodes[1]):
                node = frontier.reached[at]
                nearer = frontier.distance[node] - frontier.nearest[0]
                sides.prices[node] += min(nearer, 0.0)
    return DONE


@compiled
def _find_room(graph: Any, source: Any) -> None:
    # Dijkstra on reduced costs, which are never negative; stops at the nearest cluster with room
    sides, frontier = graph.sides, graph.frontier
    pool = len(sides.surplus)
    for at in range(frontier.nodes[1]):
        frontier.distance[frontier.reached[at]] = np.inf
    frontier.nearest[0] = np.inf
    frontier.nodes[0], frontier.nodes[1] = NONE, 0
    # this sentinel ends the search if no cluster with room is reached
    heap = [(np.inf, np.int64(NONE))]
    _reach(graph, heap, (source, np.int64(NONE), np.int64(NONE)), 0.0)
    while True:
        distance, node = heappop(heap)
        if distance >= frontier.nearest[0]:
            break
        if distance > frontier.distance[node]:
            continue  # outdated entry: the node was reached again at a smaller distance
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
    # a node farther than the nearest room cannot be on the shortest path
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
    edges, sides, frontier = graph.edges, graph.sides, graph.frontier
    pool, distance = len(sides.surplus), frontier.distance[node]
    if sides.has_blank[node]:
        ahead = max(sides.prices[node] - sides.prices[pool], 0.0)
        _reach(graph, heap, (np.int64(pool), node, np.int64(NONE)), distance + ahead)
    if edges.begin[node] == NONE:
        _find_edges(graph, node)
    targets, prices, reached = edges.target, sides.prices, frontier.distance
    # below 0 come rounding errors, and moves that a later search added to the candidates
    for at in range(edges.begin[node], edges.end[node]):
        target = targets[at]
        ahead = max(edges.cost[at] - prices[target] + prices[node], 0.0)
        if distance + ahead < min(reached[target], frontier.nearest[0]):
            _reach(graph, heap, (target, node, edges.lot[at]), distance + ahead)


@compiled
def _find_edges(graph: Any, node: Any) -> None:
    lots, lists, edges = graph.lots, graph.lists, graph.edges
    # a cluster has at most K edges: empty the pool where so many may not fit
    if edges.used[0] + len(edges.best) > len(edges.target):
        edges.begin[:] = NONE
        edges.used[0] = 0
    edges.begin[node] = edges.used[0]
    at, arrival = lists.bounds[node], lists.last_arrival[node]
    while at < lists.bounds[node + 1] or arrival != NONE:
        if at < lists.bounds[node + 1]:
            lot = lists.lots[at]
            at += 1
        else:
            lot = lots.arrived_lot[arrival]
            arrival = lots.arrived_next[arrival]
        if lots.cluster[lot] == node and lots.size[lot] > 0:
            _offer(graph.moves, lots, edges, lot)
    edges.end[node] = edges.used[0]
    for at in range(edges.begin[node], edges.end[node]):
        target = edges.target[at]
        edges.cost[at], edges.lot[at] = edges.best[target], edges.best_lot[target]
        edges.best[target] = np.inf


@compiled
def _offer(moves: Any, lots: Any, edges: Any, lot: Any) -> None:
    row, source, own = lots.row[lot], lots.cluster[lot], lots.own[lot]
    num = moves.ids.shape[1]
    begin, end = moves.bounds[row], moves.bounds[row + 1]
    for place in range(num + end - begin):
        if place < num:
            target = np.int64(moves.ids[row, place])
            cost = moves.distances[row, place] - own
        else:
            target = moves.further_ids[begin + place - num]
            cost = moves.further_distances[begin + place - num] - own
        best = edges.best[target]
        if target == source or cost > best:
            continue
        if best == np.inf:
            edges.target[edges.used[0]] = target
            edges.used[0] += 1
        # ties go to the lower row
        if cost < best or moves.numbers[row] < moves.numbers[lots.row[edges.best_lot[target]]]:
            edges.best[target], edges.best_lot[target] = cost, lot


@compiled
def _amount(graph: Any, source: Any) -> Any:
    # how many images can move along the whole path, and its length; with a blank on it, 1
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
    # from the far end, so that an image that arrives does not move on in the same step
    while node != source:
        previous, lot = frontier.previous[node], frontier.lot[node]
        if lot != NONE:
            if lots.size[lot] > 1 or lots.next[lot] != lot:
                entry = log.entries[log.counts[0]]
                entry[0], entry[1], entry[2], entry[3] = lots.row[lot], previous, node, num
                log.counts[0] += 1
            _move(graph, lot, node, num)
            graph.edges.begin[previous] = graph.edges.begin[node] = NONE
        elif previous == pool:
            sides.has_blank[node] = True
        elif node == pool:
            sides.has_blank[previous] = False
        node = previous
    log.counts[1] += num
    log.counts[2] += 1


@compiled
def _move(graph: Any, lot: Any, target: Any, num: Any) -> None:
    # `num` twins of `lot` join their twins' lot in the target cluster, if it exists (`other`). Else
    # the whole lot moves, or a new lot is split off where some twins stay.
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
