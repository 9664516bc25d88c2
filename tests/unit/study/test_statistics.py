"""Means and intervals against numbers made by hand and by other means."""

import itertools

import numpy as np
import pytest

from moce_dist.study.statistics import bootstrap, rectangle, spread

DRAWS = 40_000


def every_draw(table):
    """Means of all equally likely draws of seeds and tasks of a table, one by one."""
    seeds, tasks = table.shape
    return [
        sum(table[s, t] for s in rows for t in columns) / (seeds * tasks)
        for rows in itertools.product(range(seeds), repeat=seeds)
        for columns in itertools.product(range(tasks), repeat=tasks)
    ]


def test_interval_is_that_of_all_draws():
    table = np.random.default_rng(3).normal(size=(4, 4))
    exact = np.quantile(every_draw(table), (0.025, 0.975))
    assert bootstrap(table, DRAWS) == pytest.approx(exact, abs=0.05)
    assert exact[1] - exact[0] > 1


def test_a_task_is_drawn_for_all_seeds():
    """Tasks drawn anew for each seed would halve this interval: every seed has the same values."""
    table = np.tile([1.0, 0.0, 0.0, -1.0], (4, 1))
    low, high = bootstrap(table, DRAWS)
    rng = np.random.default_rng(0)
    anew = [np.mean([rng.choice(table[0], 4).mean() for _ in range(4)]) for _ in range(4000)]
    wrong = np.quantile(anew, (0.025, 0.975))
    assert (low, high) == (-0.75, 0.75)
    assert high - low > 1.8 * (wrong[1] - wrong[0])


def test_a_seed_is_drawn_for_all_tasks():
    table = np.tile([[0.4], [0.0], [-0.4]], (1, 50))
    # one draw of 27 takes the last seed three times
    assert bootstrap(table, DRAWS) == pytest.approx((-0.4, 0.4))


def test_spread_by_hand():
    # means of the seeds: .2, .4, .6
    found = spread(np.array([[0.1, 0.3], [0.5, 0.3], [0.6, 0.6]]), 1000)
    assert found.mean == pytest.approx(0.4)
    assert found.std == pytest.approx(0.2)
    assert (found.num_seeds, found.num_tasks) == (3, 2)
    assert 0.1 <= found.low < 0.4 < found.high <= 0.6
    # t of two degrees of freedom at 97.5 %, by the printed tables
    assert found.half == pytest.approx(4.303 * 0.2 / 3**0.5, rel=1e-3)


def test_interval_of_one_task_covers_what_it_says():
    draws = np.random.default_rng(1)
    found = [spread(draws.normal(size=(3, 1)), 1000) for _ in range(600)]
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    assert 0.92 < covered < 0.98
    assert all(one.high - one.mean == pytest.approx(one.half) for one in found)


def test_one_seed_has_neither_deviation_nor_interval():
    found = spread(np.array([[0.1, 0.3]]), 1000)
    assert found == (pytest.approx(0.2), None, None, None, None, 1, 2)


def test_a_seed_without_all_tasks_is_left_out():
    found = spread(np.array([[0.1, 0.3], [0.9, np.nan], [0.3, 0.5]]), 1000)
    assert (found.mean, found.num_seeds) == (pytest.approx(0.3), 2)
    assert spread(np.array([[np.nan]]), 1000) is None


def without(shape, *cells):
    """Make a table of random values in which these cells are missing."""
    table = np.random.default_rng(5).normal(size=shape)
    for seed, task in cells:
        table[seed, task] = np.nan
    return table


def kept(table):
    rows, columns = rectangle(table)
    return rows.tolist(), columns.tolist()


def test_a_task_of_one_seed_costs_that_task_only():
    table = without((5, 10), *((seed, 9) for seed in range(1, 5)))
    assert kept(table) == ([0, 1, 2, 3, 4], list(range(9)))
    found, means = spread(table, 1000), table[:, :9].mean(axis=1)
    assert (found.num_seeds, found.num_tasks) == (5, 9)
    assert (found.mean, found.std) == pytest.approx((means.mean(), means.std(ddof=1)))
    assert found.low < found.mean < found.high


def test_two_missing_cells_in_a_cross():
    # 5 seeds x 8 tasks, 4 x 9 and 3 x 10: 40, 36 and 30 values
    assert kept(without((5, 10), (0, 1), (1, 0))) == ([0, 1, 2, 3, 4], list(range(2, 10)))
    # the same with two tasks: no task is in all seeds; 4 x 1 and 3 x 2 values
    assert kept(without((5, 2), (0, 1), (1, 0))) == ([2, 3, 4], [0, 1])
    # neither two seeds nor two tasks are complete: one value is left
    assert kept(without((2, 2), (0, 1), (1, 0))) == ([0], [0])


def test_of_as_many_values_the_seeds_are_kept():
    # two values each: both seeds with task 2, or one seed with two tasks
    assert kept(without((2, 3), (0, 1), (1, 0))) == ([0, 1], [2])
    # one of two seeds must go: the later one
    assert kept(without((3, 1), (1, 0))) == ([0, 2], [0])
    assert kept(without((2, 4), (0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (1, 3))) == ([0], [3])


def most_values(table):
    """Return values and seeds of the largest complete rectangle, from all sets of seeds."""
    sizes = [(0, 0)]
    for count in range(1, len(table) + 1):
        for rows in itertools.combinations(range(len(table)), count):
            complete = ~np.isnan(table[list(rows)]).any(axis=0)
            sizes.append((count * int(complete.sum()), count))
    return max(sizes)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
def test_no_complete_rectangle_has_more_values(share):
    draws = np.random.default_rng(7)
    for _ in range(40):
        shape = draws.integers(1, 7, size=2)
        table = np.where(draws.random(shape) < share, np.nan, draws.random(shape))
        rows, columns = rectangle(table)
        whole = table[np.ix_(rows, columns)]
        assert not np.isnan(whole).any()
        most, num_seeds = most_values(table)
        assert whole.size == most and (not most or len(rows) == num_seeds)
        found = spread(table, 100)
        assert found is None if not most else found.mean == pytest.approx(whole.mean())


def test_every_seed_lacks_another_task():
    """There are 2**24 sets of seeds to choose from: too many to try them all."""
    rows, columns = rectangle(without((24, 24), *((i, i) for i in range(24))))
    assert len(rows) == len(columns) == 12 and not set(rows) & set(columns)
