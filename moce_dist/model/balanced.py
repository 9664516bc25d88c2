"""Assign rows to columns of equal capacity at the greatest total score, exactly.

All rows begin in their best column. From every column that holds too many, rows move along the
shortest path to a column with room; a path's length is the score that its moves lose. The edge from
one column to another is the row that loses least there. With the potentials of earlier searches no
edge is negative, and after every path the rows have the greatest total for the columns' sizes.
Every path costs a sweep over the rows, so time grows with the surplus: it is little where a gate
spreads its clusters, and seconds where most of 10,000 want one expert.

All functions run on one thread in a fixed order: equal scores give equal bits.

Letters: K rows (clusters), E columns (experts or groups); the column `num_columns` is the way out,
which every column with room reaches at no cost.

Source: Ahuja, Magnanti, Orlin 1993, Network Flows, 9.7 (successive shortest paths).
"""

from typing import Any

import numpy as np

from moce_dist.arrays import Float64, Int64
from moce_dist.compiled import compiled

_NONE = -1


def balanced(scores: Float64) -> Int64:
    """Choose a column for every row, (K,), from scores (K, E), at the greatest sum of the chosen.

    Every column takes at most ceil(K / E) rows. Which of several equally good results is chosen is
    deterministic. Scores that are not finite count as 0: the training that has them ends by the
    check of its loss.
    """
    num_rows, num_columns = scores.shape
    scores = np.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0)
    table = scores.argmax(axis=1)
    _move_surplus(np.ascontiguousarray(scores), table, -(-num_rows // num_columns))
    return table


@compiled
def _move_surplus(scores: Any, table: Any, capacity: Any) -> None:
    # moves rows in `table` until no column holds more than its capacity
    num_columns = scores.shape[1]
    sizes = np.bincount(table, minlength=num_columns)
    loss = np.full((num_columns, num_columns), np.inf)
    mover = np.full((num_columns, num_columns), _NONE)
    for row in range(len(table)):
        _offer(scores, row, table[row], loss, mover)
    potential = np.zeros(num_columns + 1)
    for source in range(num_columns):
        while sizes[source] > capacity:
            distance, previous = _search(source, sizes < capacity, loss, potential)
            potential += np.minimum(distance, distance[num_columns])
            target = previous[num_columns]
            sizes[source] -= 1
            sizes[target] += 1
            while target != source:
                column = previous[target]
                _move(scores, table, mover[column, target], target, loss, mover)
                target = column


@compiled
def _search(source: Any, has_room: Any, loss: Any, potential: Any) -> Any:
    # Dijkstra from a column to the way out; distance and previous column of all, (E + 1,). The way
    # out is always reached: any row may move to any column
    num_columns = len(loss)
    distance = np.full(num_columns + 1, np.inf)
    previous = np.full(num_columns + 1, _NONE)
    is_done = np.zeros(num_columns + 1, np.bool_)
    distance[source] = 0
    while True:
        nearest = np.where(is_done, np.inf, distance).argmin()
        if nearest == num_columns:
            return distance, previous
        is_done[nearest] = True
        for column in range(num_columns + 1):
            if is_done[column]:
                continue
            if column < num_columns:
                length = loss[nearest, column]
            else:
                length = 0.0 if has_room[nearest] else np.inf
            # rounding may leave a reduced cost a little below 0
            reduced = max(0.0, length + potential[nearest] - potential[column])
            if distance[nearest] + reduced < distance[column]:
                distance[column] = distance[nearest] + reduced
                previous[column] = nearest


@compiled
def _move(scores: Any, table: Any, row: Any, target: Any, loss: Any, mover: Any) -> None:
    # moves a row; renews the edges that it was, and offers those that it makes
    left, table[row] = table[row], target
    is_stale = mover[left] == row
    for column in range(len(is_stale)):
        if is_stale[column]:
            loss[left, column], mover[left, column] = np.inf, _NONE
    for other in range(len(table)):
        if table[other] == left:
            for column in range(len(is_stale)):
                if is_stale[column]:
                    lost = scores[other, left] - scores[other, column]
                    if lost < loss[left, column]:
                        loss[left, column], mover[left, column] = lost, other
    _offer(scores, row, target, loss, mover)


@compiled
def _offer(scores: Any, row: Any, place: Any, loss: Any, mover: Any) -> None:
    # the edges of column `place` that are shorter by this row
    for column in range(scores.shape[1]):
        lost = scores[row, place] - scores[row, column]
        if column != place and lost < loss[place, column]:
            loss[place, column], mover[place, column] = lost, row
