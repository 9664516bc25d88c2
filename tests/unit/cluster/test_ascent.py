"""The compiled loops: selection against sorting, lists, and where compiled code cannot be kept."""

import numpy as np
import pytest
from numba import njit

from moce_dist import compiled
from moce_dist.cluster import ascent
from moce_dist.cluster.ascent import make_lists
from moce_dist.cluster.candidates import Candidates


@pytest.mark.parametrize("kind", ["random", "few values", "sorted", "reversed", "equal"])
def test_a_price_between_is_that_of_sorted_limits(kind):
    draws = np.random.default_rng(0)
    for _ in range(200):
        num = int(draws.integers(2, 3000))
        size = int(draws.integers(1, num))
        limits = {
            "random": draws.random(num),
            "few values": draws.integers(0, 5, num),
            "sorted": np.sort(draws.random(num)),
            "reversed": -np.sort(draws.random(num)),
            "equal": np.ones(num),
        }[kind].astype(np.float32)
        ordered = np.sort(limits)
        expected = (ordered[size - 1] + ordered[size]) / np.float32(2)
        assert ascent.price_above(limits, size) == expected


def test_lists_by_cluster_hold_the_rows_in_order():
    ids = np.array([[2, 0], [1, 2], [2, 1]], np.int32)
    distances = np.array([[0.5, 1.0], [0.25, 2.0], [4.0, 8.0]], np.float32)
    lists = make_lists(Candidates(ids, distances), 4)
    assert lists.bounds.tolist() == [0, 1, 3, 6, 6]
    assert lists.rows.tolist() == [0, 1, 2, 0, 1, 2]
    assert lists.of_cluster.tolist() == [1.0, 0.25, 8.0, 0.5, 2.0, 4.0]


def test_a_function_is_compiled_where_nothing_can_be_kept(monkeypatch):
    def nowhere(*, cache=False, **given):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**given)

    monkeypatch.setattr(compiled, "njit", nowhere)
    doubled = compiled.compiled(lambda x: 2 * x)
    assert doubled(21) == 42 and doubled.signatures
