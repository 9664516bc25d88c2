"""Prices by coordinate ascent: never worse for the dual, and sizes are right in the end."""

import numpy as np
import pytest

from moce_dist.cluster.balance import Ascent, FixedRows, Sizes, allowed_sizes, ascend, fitted
from moce_dist.cluster.candidates import Candidates
from moce_dist.config import ClusterConfig


def dual(distances, prices, sizes):
    charges, pays = np.minimum(prices, 0).sum(), np.maximum(prices, 0).sum()
    priced = (distances - prices[:, None]).min(axis=0).sum()
    return priced + sizes.largest * charges + sizes.smallest * pays


def counts_of(distances, prices):
    best = (distances - prices[:, None]).argmin(axis=0)
    return np.bincount(best, minlength=len(prices))


def ascended(distances, prices, sizes, *, rounds, num=None):
    """Ascend on the `num` best clusters of every row of distances (K, s); all by default."""
    num = num or len(prices)
    ids = np.argsort(distances.T - prices, axis=1, kind="stable")[:, :num].astype(np.int32)
    found = Candidates(ids, np.take_along_axis(distances.T, ids, axis=1))
    return ascend(found, prices, sizes, rounds=rounds).prices


def crowd(num_clusters, num_rows, seed=0):
    """Distances (K, s) of which the first clusters are nearest to most rows."""
    draws = np.random.default_rng(seed)
    distances = draws.random((num_clusters, num_rows)) + np.arange(num_clusters)[:, None] * 0.2
    return distances.astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
def test_prices_balance_a_crowd_within_a_hundredth(seed):
    distances = crowd(6, 600, seed)
    before = counts_of(distances, np.zeros(6))
    prices = ascended(distances, np.zeros(6), Sizes(0, 100), rounds=30)
    assert before.max() > 200
    assert np.maximum(counts_of(distances, prices) - 100, 0).sum() <= 6
    assert prices.max() <= 0


@pytest.mark.parametrize("sizes", [Sizes(0, 50), Sizes(50, 51), Sizes(50, 50)])
def test_dual_rises_with_every_round(sizes):
    distances = crowd(8, 400 + (sizes.largest > 50) * 3)
    values = [
        dual(distances, ascended(distances, np.zeros(8), sizes, rounds=rounds), sizes)
        for rounds in range(6)
    ]
    assert values == sorted(values)


def test_clusters_that_share_far_rows_do_not_underbid_each_other_forever():
    # two clusters at a lump that only they are near; the third is far away, at 100
    draws = np.random.default_rng(0)
    near = draws.random((2, 300)).astype(np.float32) * 0.01
    distances = np.vstack([near, np.full((1, 300), 100, np.float32) + near[:1]])
    prices = ascended(distances, np.zeros(3), Sizes(0, 100), rounds=10)
    assert counts_of(distances, prices).max() <= 110
    assert prices[:2] == pytest.approx(-100, abs=1)


def test_nothing_is_charged_where_there_is_room():
    distances = crowd(3, 90)
    assert ascended(distances, np.zeros(3), Sizes(0, 90), rounds=5).tolist() == [0, 0, 0]
    assert ascended(distances[:1], np.zeros(1), Sizes(0, 30), rounds=5).tolist() == [0]


@pytest.mark.parametrize("num", [6, 3])
def test_a_cluster_that_is_too_small_pays_until_its_size_is_right(num):
    # the last cluster is far from all rows, so it is in no list of the first search
    draws = np.random.default_rng(1)
    distances = draws.random((6, 603)).astype(np.float32)
    distances[5] += 2
    prices, sizes = np.zeros(6), Sizes(100, 101)
    for _ in range(12):
        prices = ascended(distances, prices, sizes, rounds=30, num=num)
    counts = counts_of(distances, prices)
    assert np.maximum(counts - 101, 0).sum() <= 6 and np.maximum(100 - counts, 0).sum() <= 6
    assert prices[5] > 1 and (prices < 0).sum() <= 3


def test_a_cluster_of_which_lists_know_nothing_pays_no_more_than_they_allow():
    # nearly all rows rank three of four clusters closely: a price far above would draw them all
    distances = np.tile(np.array([[0.0], [0.1], [0.2], [0.3]], np.float32), (1, 400))
    distances[3, :4] = 50
    distances += np.random.default_rng(2).random((4, 400)).astype(np.float32) / 100
    ids = np.argsort(distances[:3], axis=0)[:3].T.astype(np.int32)
    found = Candidates(ids, np.take_along_axis(distances.T, ids, axis=1))
    prices = ascend(found, np.zeros(4), Sizes(100, 100), rounds=5).prices
    assert 0 < prices[3] - prices[:3].min() < 1


def test_excess_is_that_of_the_rows_found_and_that_of_the_new_prices():
    distances = crowd(6, 600)
    ids = np.tile(np.arange(6, dtype=np.int32), (600, 1))
    found, sizes = Candidates(ids, distances.T.copy()), Sizes(100, 100)
    done = ascend(found, np.zeros(6), sizes, rounds=30)
    before = np.maximum(counts_of(distances, np.zeros(6)) - 100, 0).sum()
    after = np.maximum(counts_of(distances, done.prices) - 100, 0).sum()
    assert (done.excess_before, done.excess) == (before, after)
    assert after <= 6 < before


@pytest.mark.parametrize(
    ("balance", "rows", "sizes"),
    [("exact", 100, (33, 34)), ("exact", 99, (33, 33)), ("soft", 100, (0, 36)), ("off", 9, (0, 9))],
)
def test_sizes_that_a_balance_allows(balance, rows, sizes):
    assert allowed_sizes(rows, 3, ClusterConfig(balance=balance, soft_bound=1.1)) == sizes


def test_ascent_ends_when_only_a_next_search_can_help(monkeypatch):
    # nobody lists the last cluster, which pays as much as it may at once; all others are right
    distances = np.random.default_rng(0).random((4, 900)).astype(np.float32)
    distances[3] = 100
    ids = np.tile(np.arange(3, dtype=np.int32), (900, 1))
    found = Candidates(ids, distances[:3].T.copy())
    rounds, step = [], Ascent.step
    monkeypatch.setattr(Ascent, "step", lambda *given: [rounds.append(1), step(*given)])
    done = ascend(found, np.zeros(4), Sizes(225, 225), rounds=1000)
    assert 0 < len(rounds) < 30
    assert done.excess == pytest.approx(225, abs=0.05 * done.excess_before)


def test_fixed_rows_are_cut_to_what_a_cluster_holds_so_prices_stay_finite():
    distances = np.random.default_rng(0).random((4, 40)).astype(np.float32)
    found = Candidates(np.tile(np.arange(4, dtype=np.int32), (40, 1)), distances.T.copy())
    fixed = FixedRows(fitted(np.array([11, -4, -4, -3]), 10), np.inf)
    assert fixed.counts.sum() == 0 and fixed.counts.max() == 10
    done = ascend(found, np.zeros(4), Sizes(10, 10), rounds=20, fixed=fixed)
    assert np.isfinite(done.prices).all()


def test_cut_rows_go_where_there_is_room():
    draws = np.random.default_rng(0)
    for _ in range(200):
        counts = draws.integers(-30, 30, 7)
        counts[0] -= max(counts.sum() - 7 * 12, 0)
        cut = fitted(counts, 12)
        assert cut.sum() == counts.sum() and cut.max() <= 12
        assert (cut[counts <= 12] >= counts[counts <= 12]).all()
    assert fitted(np.array([3, -3]), 3).tolist() == [3, -3]
    with pytest.raises(ValueError, match="5 fixed rows do not fit 2 x 2 places"):
        fitted(np.array([5, 0]), 2)
