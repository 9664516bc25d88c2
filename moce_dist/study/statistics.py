"""Means, deviations and intervals over seeds and tasks.

Results of one protocol are a table (S, T) of seeds and tasks. Arms of one seed saw the same images
in the same order, so a difference to the reference is taken cell by cell first.

The interval of a mean over seeds and tasks is that of a bootstrap which draws seeds and tasks with
replacement, both for the whole table: a task that is drawn is drawn for all seeds, as a task that
suits an arm does so in every seed. Drawing tasks anew for every seed would treat S T values as that
many independent ones, and give intervals that are too narrow. Of few seeds any percentile interval
is too narrow: with three, 95 % are rather 80 %.

Letters: S seeds, T tasks, R draws.

Source: Owen 2007, The pigeonhole bootstrap, Annals of Applied Statistics 1(2), for tables of two
factors.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]
_LEVEL = (0.025, 0.975)


class Spread(NamedTuple):
    """A mean, its deviation over seeds, and a 95 % interval; what one seed cannot tell is None."""

    mean: float
    std: float | None
    low: float | None
    high: float | None
    num_seeds: int
    num_tasks: int


def bootstrap(table: Table, draws: int) -> tuple[float, float] | None:
    """Interval of 95 % of the mean of a table (S, T), by R draws; the same one for every call.

    None where there is nothing to draw from: a single value.
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


def spread(table: Table, draws: int) -> Spread | None:
    """Describe a table (S, T) by the seeds that have all tasks; None when there is none.

    The deviation is that of the seeds' means, of the sample.
    """
    whole = table[~np.isnan(table).any(axis=1)]
    if not whole.size:
        return None
    means = whole.mean(axis=1)
    std = float(means.std(ddof=1)) if len(means) > 1 else None
    low, high = (bootstrap(whole, draws) if len(means) > 1 else None) or (None, None)
    return Spread(float(means.mean()), std, low, high, *whole.shape)
