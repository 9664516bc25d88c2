"""Means and intervals against numbers made by hand and by other means."""

import itertools

import numpy as np
import pytest

from moce_dist.study.statistics import bootstrap, spread

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
