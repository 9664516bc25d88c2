"""The exact finish against SciPy's assignment on replicated places; prices against brute force."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from moce_dist.cluster.balance import Sizes, allowed_sizes
from moce_dist.cluster.candidates import Candidates, choose
from moce_dist.cluster.exact import dual_bound, finish
from moce_dist.config import ClusterConfig

FAR = 1e9


def cost_by_scipy(distances):
    """Least cost with sizes floor(n / K) or ceil(n / K): blanks fill the optional places."""
    num_rows, num_clusters = distances.shape
    quotient, rest = divmod(num_rows, num_clusters)
    if rest == 0:
        places = np.repeat(distances, quotient, axis=1)
        return places[linear_sum_assignment(places)].sum()
    places = np.repeat(distances, quotient + 1, axis=1)
    optional = np.arange(places.shape[1]) % (quotient + 1) == quotient
    blanks = np.where(optional, 0.0, FAR)
    places = np.vstack([places, np.tile(blanks, (num_clusters - rest, 1))])
    return places[linear_sum_assignment(places)].sum()


def candidates_of(distances, num):
    """A search: the `num` best clusters under given prices."""

    def search(prices):
        ids = np.argsort(distances - prices, axis=1, kind="stable")[:, :num].astype(np.int32)
        return Candidates(ids, np.take_along_axis(distances, ids, axis=1))

    return search


def finished(distances, num, prices=None):
    prices = np.zeros(distances.shape[1]) if prices is None else prices
    search = candidates_of(distances, num)
    sizes = allowed_sizes(*distances.shape, ClusterConfig(balance="exact"))
    return finish(search(prices), prices, search, sizes)


def cost_of(distances, labels):
    return distances[np.arange(len(labels)), labels].sum()


@pytest.mark.parametrize("seed", range(12))
def test_cost_is_scipys_with_all_clusters_as_candidates(seed):
    draws = np.random.default_rng(seed)
    num_rows, num_clusters = int(draws.integers(9, 120)), int(draws.integers(1, 9))
    distances = draws.random((num_rows, num_clusters)) + draws.random(num_clusters) * 2
    prices = draws.standard_normal(num_clusters) * (seed % 3)
    done = finished(distances, num_clusters, prices)
    counts = np.bincount(done.labels, minlength=num_clusters)
    assert counts.max() - counts.min() <= 1
    expected = cost_by_scipy(distances)
    assert cost_of(distances, done.labels) == pytest.approx(expected, abs=1e-9)
    priced = (distances - done.prices).min(axis=1).sum()
    assert dual_bound(done.prices, priced, num_rows) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("prices", [np.zeros(5), np.array([0.0, 3.0, -2.0, 0.5, 0.1])])
def test_bound_holds_at_any_prices(prices):
    distances = np.random.default_rng(1).random((43, 5))
    priced = (distances - prices).min(axis=1).sum()
    assert dual_bound(prices, priced, 43) <= cost_by_scipy(distances) + 1e-12


def test_one_image_moves_along_the_cheap_path_and_not_straight():
    #   0 -> 2 straight costs 9; 0 -> 1 costs 1 and then 1 -> 2 costs 2
    distances = np.array([[0, 1, 9], [0, 5, 9], [5, 0, 2], [9, 9, 0]], float)[[0, 1, 1, 2, 2, 3]]
    done = finished(distances, 3)
    assert done.labels.tolist() == [1, 0, 0, 2, 1, 2]
    assert done.num_moves == 1


def test_ties_go_to_the_lower_row():
    done = finished(np.tile([[0.0, 1.0]], (4, 1)), 2)
    assert done.labels.tolist() == [1, 1, 0, 0]


def test_which_clusters_are_larger_is_part_of_the_optimum():
    # four rows, all nearest to cluster 2: it keeps two places although it comes last
    distances = np.tile([[1.0, 1.0, 0.0]], (4, 1))
    done = finished(distances, 3)
    assert np.bincount(done.labels).tolist() == [1, 1, 2]


def test_candidates_that_do_not_connect_are_found_by_a_search():
    # two far groups: no row of the first has a candidate in the second
    draws = np.random.default_rng(0)
    near, far = draws.random((60, 4)), 100 + draws.random((60, 4))
    distances = np.block([[near, far], [far[:20], near[:20]]])
    done = finished(distances, 3)
    counts = np.bincount(done.labels, minlength=8)
    assert counts.tolist() == [10] * 8
    assert done.num_searches > 0
    assert cost_of(distances, done.labels) == pytest.approx(cost_by_scipy(distances), rel=1e-3)


def test_equal_images_end_soon_and_in_equal_sizes():
    done = finished(np.zeros((20_003, 7)), 7)
    counts = np.bincount(done.labels, minlength=7)
    assert (counts.min(), counts.max()) == (2857, 2858)


@pytest.mark.parametrize("num", [5, 24])
def test_masses_of_identical_images_move_in_bulk(num):
    # nine of ten images are one point; with few candidates further ones are searched
    draws = np.random.default_rng(3)
    centroids, points = draws.standard_normal((24, 4)), draws.standard_normal((2000, 4))
    points[draws.permutation(2000)[:1800]] = points[0]
    distances = np.square(points[:, None] - centroids).sum(axis=2)
    done = finished(distances, num)
    counts = np.bincount(done.labels, minlength=24)
    assert counts.max() - counts.min() <= 1
    assert done.num_moves > 1600 and done.num_paths < done.num_moves / 3
    assert done.num_searches < 24
    if num == 24:
        expected = cost_by_scipy(distances)
        assert cost_of(distances, done.labels) == pytest.approx(expected, rel=1e-12)


def test_twins_that_are_not_quite_alike_do_not_move_together():
    # the last bit of a distance decides which one goes
    distances = np.tile([[0.0, 1.0]], (4, 1))
    distances[2, 1] = distances[3, 1] = np.nextafter(1.0, 0)
    assert finished(distances, 2).labels.tolist() == [0, 0, 1, 1]


def test_twins_by_their_candidates_alone_part_when_a_search_tells_them_apart():
    # clusters 0 and 1 are equally far from all rows; only 2 and 3, which are searched, differ
    draws = np.random.default_rng(5)
    distances = np.hstack([np.tile([[0.0, 0.5]], (80, 1)), 10 + draws.random((80, 2))])
    done = finished(distances, 2)
    assert done.num_searches > 0
    assert np.bincount(done.labels).tolist() == [20] * 4
    assert cost_of(distances, done.labels) == pytest.approx(cost_by_scipy(distances), rel=0.01)
    rows = np.arange(80)
    chosen = [rows[done.labels == cluster] for cluster in (2, 3)]
    assert distances[chosen[0], 2].mean() < distances[:, 2].mean() - 0.1
    assert distances[chosen[1], 3].mean() < distances[:, 3].mean() - 0.1


def test_a_cluster_that_candidates_name_twice_counts_once():
    # as an index does whose lists hold too few
    distances = np.random.default_rng(4).random((90, 6))

    def search(prices):
        found = candidates_of(distances, 6)(prices)
        again = [np.repeat(part[:, :1], 3, axis=1) for part in found]
        return Candidates(*(np.hstack([a, part]) for a, part in zip(again, found, strict=True)))

    done = finish(search(np.zeros(6)), np.zeros(6), search, Sizes(15, 15))
    assert np.bincount(done.labels).tolist() == [15] * 6
    assert cost_of(distances, done.labels) == pytest.approx(cost_by_scipy(distances), abs=1e-9)


def test_soft_sizes_stay_within_the_bound_and_leave_the_rest_alone():
    distances = np.array([[0.0, 1.0, 3.0]] * 6 + [[3.0, 0.0, 1.0]] * 2)
    search = candidates_of(distances, 3)
    done = finish(search(np.zeros(3)), np.zeros(3), search, Sizes(0, 4))
    assert np.bincount(done.labels, minlength=3).tolist() == [4, 4, 0]


def test_choice_is_brute_force_argmin():
    draws = np.random.default_rng(2)
    distances, prices = draws.random((50, 6)), draws.standard_normal(6)
    nearest = candidates_of(distances, 6)(np.zeros(6))
    assert (choose(nearest, prices) == (distances - prices).argmin(axis=1)).all()
