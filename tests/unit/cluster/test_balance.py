"""Prices by coordinate ascent: never worse for the dual, balanced in the end, none above 0."""

import numpy as np
import pytest

from moce_dist.cluster.balance import ascend, largest_size
from moce_dist.cluster.edges import Candidates
from moce_dist.config import ClusterConfig


def dual(distances, prices, largest):
    return (distances - prices[:, None]).min(axis=0).sum() + largest * prices.sum()


def counts_of(distances, prices):
    best = (distances - prices[:, None]).argmin(axis=0)
    return np.bincount(best, minlength=len(prices))


def ascended(distances, prices, *, largest, rounds, num=None):
    """Ascend on the `num` best clusters of every row of distances (K, s); all by default."""
    num = num or len(prices)
    ids = np.argsort(distances.T - prices, axis=1, kind="stable")[:, :num].astype(np.int32)
    found = Candidates(ids, np.take_along_axis(distances.T, ids, axis=1))
    return ascend(found, prices, largest=largest, rounds=rounds).prices


def crowd(num_clusters, num_rows, seed=0):
    """Distances (K, s) of which the first clusters are nearest to most rows."""
    draws = np.random.default_rng(seed)
    distances = draws.random((num_clusters, num_rows)) + np.arange(num_clusters)[:, None] * 0.2
    return distances.astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
def test_prices_balance_a_crowd_within_a_hundredth(seed):
    distances = crowd(6, 600, seed)
    before = counts_of(distances, np.zeros(6))
    prices = ascended(distances, np.zeros(6), largest=100, rounds=30)
    assert before.max() > 200
    assert np.maximum(counts_of(distances, prices) - 100, 0).sum() <= 6
    assert prices.max() <= 0


def test_dual_rises_with_every_round():
    distances = crowd(8, 400)
    values = [
        dual(distances, ascended(distances, np.zeros(8), largest=50, rounds=rounds), 50)
        for rounds in range(6)
    ]
    assert values == sorted(values)


def test_clusters_that_share_far_rows_do_not_underbid_each_other_forever():
    # two clusters at a lump that only they are near; the third is far away, at 100
    draws = np.random.default_rng(0)
    near = draws.random((2, 300)).astype(np.float32) * 0.01
    distances = np.vstack([near, np.full((1, 300), 100, np.float32) + near[:1]])
    prices = ascended(distances, np.zeros(3), largest=100, rounds=10)
    assert counts_of(distances, prices).max() <= 110
    assert prices[:2] == pytest.approx(-100, abs=1)


def test_nothing_is_charged_where_there_is_room():
    distances = crowd(3, 90)
    assert ascended(distances, np.zeros(3), largest=90, rounds=5).tolist() == [0, 0, 0]
    assert ascended(distances[:1], np.zeros(1), largest=30, rounds=5).tolist() == [0]


@pytest.mark.parametrize(
    ("balance", "rows", "largest"), [("exact", 100, 34), ("soft", 100, 36), ("off", 100, 100)]
)
def test_largest_sizes(balance, rows, largest):
    assert largest_size(rows, 3, ClusterConfig(balance=balance, soft_bound=1.1)) == largest
