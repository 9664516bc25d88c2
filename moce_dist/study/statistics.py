"""Means, deviations and intervals over seeds and tasks.

Results of one protocol are a table (S, T) of seeds and tasks. Arms of one seed saw the same images
in the same order, so a difference to the reference is first taken cell by cell.

A mean is over a complete rectangle of seeds and tasks, so that every seed has the same tasks. If
cells are missing, it is the rectangle that keeps the most values. Here each dot is a missing cell:

             tasks a b c d
    seed 0         x x x x     kept: seeds 0, 1, 2 and tasks a, b, c, which is 9 of 11 values;
    seed 1         x x x .     seeds without a missing cell would be seed 0 alone
    seed 2         x x x .
    seed 3         x . . .

The interval of a mean over seeds and tasks comes from a bootstrap that draws whole rows (seeds) and
whole columns (tasks) with replacement. A task is drawn for all seeds at once, because a task that
suits an arm does so in every seed. Drawing tasks separately for every seed would treat the S T
values as independent, and give intervals that are too narrow. With few seeds any percentile
interval is too narrow: of a single task with five seeds a 95 % interval covers 83 %, with three
74 %. It allows for other seeds and other tasks. For the tasks at hand, Student's t interval of the
seeds' means allows for other seeds, and covers 95 % however few they are.

Letters: S seeds, T tasks, R draws, N sets of seeds.

Source: Owen 2007, The pigeonhole bootstrap, Annals of Applied Statistics 1(2), for tables of two
factors.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from moce_dist.arrays import Float64

Table = Float64
_LEVEL = (0.025, 0.975)
_MOST_SETS = 4096


class Spread(NamedTuple):
    """A mean, its deviation over seeds, and a 95 % interval; these two are None for one seed.

    The interval is the bootstrap's; of a single task it is Student's t interval over seeds.
    """

    mean: float
    std: float | None
    low: float | None
    high: float | None
    half: float | None
    """Half the width of the 95 % interval over seeds alone; None for one seed."""
    num_seeds: int
    num_tasks: int


def bootstrap(table: Table, draws: int) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of a table (S, T) by R draws, the same in every call.

    None if the table has fewer than two values.
    """
    if table.size < 2:
        return None
    rng = np.random.default_rng(0)
    seeds, tasks = (
        rng.multinomial(count, np.full(count, 1 / count), size=draws) / count
        for count in table.shape
    )
    means = np.einsum("rs,st,rt->r", seeds, table, tasks)
    low, high = np.quantile(means, _LEVEL)
    return float(low), float(high)


def rectangle(table: Table) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the rows and columns of the complete rectangle of a table (S, T) with most values.

    Of rectangles with equally many values it is one with the most seeds, then the one with the
    earliest seeds. Both index arrays are empty if the table has no value.

    The seeds of a largest rectangle are exactly those that all of its tasks have. The candidates
    are therefore the seeds of each task, and all intersections of these. Of more than 4096
    candidates those with the most values are kept; up to there the result is exact.
    """
    has = np.logical_not(np.isnan(table))
    sets = np.zeros((1, len(table)), dtype=bool)  # (N, S), the best last
    for seeds in np.unique(has, axis=1).T:
        sets = np.unique(np.vstack([sets, seeds, sets & seeds]), axis=0)
        num_missing = sets.astype(np.int64) @ np.logical_not(has)  # (N, T)
        num_seeds = sets.sum(axis=1)
        num_values = num_seeds * (num_missing == 0).sum(axis=1)
        # the sort is stable, and of equals `unique` has put the earliest seeds last
        sets = sets[np.lexsort((num_seeds, num_values))[-_MOST_SETS:]]
    rows = np.flatnonzero(sets[-1])
    return rows, np.flatnonzero(has[rows].all(axis=0) & has.any(axis=0))


def spread(table: Table, draws: int) -> Spread | None:
    """Describe a table (S, T) by its largest complete rectangle; None if it has no value.

    The deviation is the sample standard deviation of the seeds' means.
    """
    whole = table[np.ix_(*rectangle(table))]
    if not whole.size:
        return None
    means = whole.mean(axis=1)
    std = float(means.std(ddof=1)) if len(means) > 1 else None
    if std is None:
        return Spread(float(means.mean()), None, None, None, None, *whole.shape)
    half = float(stdtrit(len(means) - 1, _LEVEL[1])) * std / len(means) ** 0.5
    interval = bootstrap(whole, draws) if whole.shape[1] > 1 else None
    low, high = interval or (float(means.mean()) - half, float(means.mean()) + half)
    return Spread(float(means.mean()), std, low, high, half, *whole.shape)
