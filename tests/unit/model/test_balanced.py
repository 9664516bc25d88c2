"""The balanced assignment against SciPy's, whose matrix repeats every column."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from moce_dist.config import GateConfig
from moce_dist.model.balanced import balanced
from moce_dist.model.gate import layer_table


def best_total(scores):
    """Greatest sum of scores at ceil(K / E) rows a column."""
    share = -(-scores.shape[0] // scores.shape[1])
    slots = np.repeat(scores, share, axis=1)
    return slots[linear_sum_assignment(slots, maximize=True)].sum()


@pytest.mark.parametrize("kind", ["normal", "skewed", "ties", "one_column_wanted"])
def test_total_is_the_greatest_at_equal_shares(kind):
    draws = np.random.default_rng(0)
    for _ in range(60):
        num_rows, num_columns = draws.integers(1, 40), draws.integers(1, 9)
        scores = draws.standard_normal((num_rows, num_columns))
        if kind == "skewed":
            scores += 5 * draws.standard_normal(num_columns)
        elif kind == "ties":
            scores = np.round(scores)
        elif kind == "one_column_wanted":
            scores[:, 0] += 100
        table = balanced(scores)
        total = scores[np.arange(num_rows), table].sum()
        assert total == pytest.approx(best_total(scores), abs=1e-9)
        assert np.bincount(table, minlength=num_columns).max() <= -(-num_rows // num_columns)
        assert (balanced(scores.copy()) == table).all()


def test_rows_in_their_best_columns_stay_where_these_have_room():
    scores = np.random.default_rng(1).standard_normal((9, 3))
    scores[np.arange(9), np.arange(9) % 3] = 10
    assert (balanced(scores) == np.arange(9) % 3).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_count_as_0(value):
    scores = np.random.default_rng(1).standard_normal((9, 3))
    scores[::2, 0] = value
    scores[4] = value
    assert (balanced(scores) == balanced(np.where(np.isfinite(scores), scores, 0))).all()
    assert np.bincount(balanced(np.full((9, 3), value))).tolist() == [3, 3, 3]


def test_no_rows_have_no_columns():
    assert balanced(np.empty((0, 4))).shape == (0,)


def test_each_group_shares_its_own_clusters_equally():
    # 8 clusters in group 0, 4 in group 1, two experts each: no cluster leaves its group
    draws = np.random.default_rng(2)
    scores, groups = draws.standard_normal((12, 4)), np.array([0] * 8 + [1] * 4)
    scores[:, 3] += 9
    table = layer_table(scores, GateConfig(assign="balanced", groups="shared"), groups, 2)
    assert (table // 2 == groups).all()
    assert np.bincount(table).tolist() == [4, 4, 2, 2]
    for group in (0, 1):
        rows, own = np.flatnonzero(groups == group), slice(2 * group, 2 * group + 2)
        total = scores[rows, table[rows]].sum()
        assert total == pytest.approx(best_total(scores[rows, own]), abs=1e-9)
