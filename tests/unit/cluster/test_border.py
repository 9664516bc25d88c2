"""Balance that sees only rows between clusters: the same labels as with all rows at hand."""

from dataclasses import replace

import numpy as np
import pytest
from mixtures import brute_force, matrix_of, mixture

from moce_dist.cluster import settle as settling
from moce_dist.cluster.balance import FixedRows, Sizes, ascend
from moce_dist.cluster.candidates import Candidates, margins_of
from moce_dist.cluster.exact import Finish, finish
from moce_dist.cluster.kmeans import Lloyd, State, draw_sample, kmeans
from moce_dist.cluster.matrix import Matrix
from moce_dist.cluster.settle import settle
from moce_dist.config import ClusterConfig


def lloyd_of(tmp_path, rows, config):
    matrix = matrix_of(tmp_path / "features", rows, block_rows=512)
    sample = draw_sample(matrix, config.num_clusters, 0, tmp_path / "sample.npy")
    return Lloyd(matrix, sample, config)


def with_border(lloyd, num_rows):
    return replace(lloyd, config=lloyd.config.model_copy(update={"border_rows": num_rows}))


def listed(found, prices):
    """Rows, candidates in the order of prices: what a search brings."""
    ids = np.argsort(found - prices, axis=1, kind="stable").astype(np.int32)
    return Candidates(ids, np.take_along_axis(found, ids, axis=1).astype(np.float32))


def test_a_border_is_what_brute_force_finds(tmp_path):
    rows = mixture(3000, 6, 12)
    matrix = matrix_of(tmp_path / "features", rows, block_rows=256)
    centred = rows - matrix.view.mean
    centroids, prices = centred[:9].astype(np.float64), np.linspace(-1, 2, 9)
    priced = brute_force(centred, centroids) - prices
    first, second = np.sort(priced, axis=1)[:, :2].T
    reach = float(np.quantile(second - first, 0.2))
    border = matrix.border(centroids, prices, 4, reach)
    assert (border.labels == priced.argmin(axis=1)).all()
    inside = np.flatnonzero(second - first <= reach)
    assert len(np.setxor1d(border.rows, inside)) <= 2 and len(border.rows) > 500
    outside = np.setdiff1d(np.arange(3000), border.rows)
    counts = np.bincount(border.labels[outside], minlength=9)
    assert border.settled.tolist() == counts.tolist()
    again = matrix.candidates(centroids, prices, 4, border.rows)
    assert (again.ids == border.found.ids).all()
    assert (again.distances == border.found.distances).all()
    np.testing.assert_allclose(
        margins_of(again, prices), (second - first)[border.rows], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("balance", ["exact", "soft"])
@pytest.mark.parametrize("num_rows", [2500, 700])
def test_labels_are_those_of_all_rows_at_hand(tmp_path, monkeypatch, balance, num_rows):
    rows = mixture(12_000, 8, 30, seed=3, spread=1.5)
    config = ClusterConfig(num_clusters=10, balance=balance, iterations=6, soft_bound=1.02)
    lloyd = lloyd_of(tmp_path, rows, config)
    state = kmeans(lloyd, seed=0, state_file=tmp_path / "state.npz")
    expected = settle(lloyd, state)
    held, border = [], Matrix.border

    def noted(*given):
        held.append(border(*given))
        return held[-1]

    monkeypatch.setattr(Matrix, "border", noted)
    found = settle(with_border(lloyd, num_rows), state)
    assert held and all(len(each.rows) < 2 * num_rows for each in held)
    sizes, cost = np.bincount(found.labels, minlength=10), expected.figures["cost"]
    if balance == "exact":
        np.testing.assert_array_equal(found.labels, expected.labels)
        assert sizes.tolist() == [1200] * 10
        assert found.figures["cost"] == pytest.approx(cost, rel=1e-12)
    else:
        # only exact sizes are finished to the optimum
        assert sizes.max() <= 1224 and found.figures["cost"] == pytest.approx(cost, rel=2e-3)


def test_masses_of_one_point_are_all_between_clusters(tmp_path):
    # a third of all rows is one point: wherever it is divided, all of it stands on the border
    rows = mixture(6000, 4, 12, seed=1)
    rows[np.random.default_rng(0).permutation(6000)[:2000]] = rows[17]
    lloyd = lloyd_of(tmp_path, rows, ClusterConfig(num_clusters=8, iterations=4))
    state = kmeans(lloyd, seed=0, state_file=tmp_path / "state.npz")
    expected, found = settle(lloyd, state), settle(with_border(lloyd, 600), state)
    assert np.bincount(found.labels).tolist() == [750] * 8
    assert found.figures["cost"] == pytest.approx(expected.figures["cost"], rel=1e-9)
    bound = found.figures["cost_lower_bound"]
    assert found.figures["cost"] == pytest.approx(bound, rel=1e-6)


def blobs(num_clusters, seed):
    """Tight and far apart, so that hardly any row is between two, of unequal sizes."""
    draws = np.random.default_rng(seed)
    centres = draws.standard_normal((num_clusters, 1)) * 100
    groups = draws.choice(num_clusters, 4483, p=draws.dirichlet(np.ones(num_clusters)))
    return (centres[groups] + 0.01 * draws.standard_normal((4483, 1))).astype(np.float32)


@pytest.mark.parametrize("seed", [4, 26, 41, 44, 45])
def test_a_border_that_is_too_narrow_grows_until_the_finish_is_right(tmp_path, seed):
    config = ClusterConfig(num_clusters=7, iterations=5)
    lloyd = lloyd_of(tmp_path, blobs(7, seed), config)
    state = kmeans(lloyd, seed=0, state_file=tmp_path / "state.npz")
    settled = settle(with_border(lloyd, 1), state)
    sizes = np.bincount(settled.labels, minlength=7)
    assert sizes.max() - sizes.min() <= 1
    figures = settled.figures
    assert figures["cost"] == pytest.approx(figures["cost_lower_bound"], rel=1e-4)


@pytest.mark.parametrize("balance", ["exact", "soft"])
def test_one_cluster_has_no_border(tmp_path, balance):
    config = ClusterConfig(num_clusters=1, iterations=2, balance=balance, border_rows=1)
    lloyd = lloyd_of(tmp_path, mixture(300, 2, 3), config)
    state = kmeans(lloyd, seed=0, state_file=tmp_path / "state.npz")
    assert settle(lloyd, state).labels.tolist() == [0] * 300


def test_few_distinct_points(tmp_path):
    draws = np.random.default_rng(3)
    rows = draws.standard_normal((6, 2)).astype(np.float32)[draws.integers(0, 6, 3000)]
    for num_clusters in (2, 5, 8):
        config = ClusterConfig(num_clusters=num_clusters, iterations=3, border_rows=1)
        lloyd = lloyd_of(tmp_path, rows, config)
        file = tmp_path / f"{num_clusters}.npz"
        state = kmeans(lloyd, seed=0, state_file=file)
        sizes = np.bincount(settle(lloyd, state).labels, minlength=num_clusters)
        assert sizes.max() - sizes.min() <= 1


def test_a_finish_of_no_rows_tells_whether_the_others_fit():
    nothing = Candidates(np.zeros((0, 2), np.int32), np.zeros((0, 2), np.float32))
    done = finish(nothing, np.zeros(2), lambda _: nothing, Sizes(4, 5), np.array([4, 5]))
    assert done is not None and not len(done.labels)
    assert finish(nothing, np.zeros(2), lambda _: nothing, Sizes(4, 5), np.array([3, 6])) is None


def test_soft_prices_charge_only_for_what_is_full(tmp_path):
    rows = np.random.default_rng(1).standard_normal((15_365, 2)) ** 3
    config = ClusterConfig(num_clusters=6, iterations=5, balance="soft", soft_bound=1.1)
    lloyd = lloyd_of(tmp_path, rows.astype(np.float32), config)
    state = kmeans(lloyd, seed=1, state_file=tmp_path / "state.npz")
    expected, found = settle(lloyd, state), settle(with_border(lloyd, 400), state)
    assert found.figures["cost"] <= 1.01 * expected.figures["cost"]
    sizes = np.bincount(found.labels, minlength=6)
    assert sizes.max() <= 2816


def test_a_small_sample_is_corrected_by_the_sizes_of_all_rows(tmp_path, monkeypatch):
    # 640 of 96,000 rows: every cluster of the sample is off by a tenth, by more than a step mends
    lloyd = lloyd_of(tmp_path, mixture(96_000, 3, 12, seed=2), ClusterConfig(num_clusters=10))
    state = State(lloyd.first_state(0).centroids, np.zeros(10))
    held, border = [], Matrix.border

    def noted(*given):
        held.append(len(border(*given).rows))
        return border(*given)

    monkeypatch.setattr(Matrix, "border", noted)
    settled = settle(with_border(lloyd, 640), state)
    assert np.bincount(settled.labels).tolist() == [9600] * 10
    assert max(held) < 20_000 and len(held) < 20
    figures = settled.figures
    assert figures["cost"] == pytest.approx(figures["cost_lower_bound"], rel=1e-6)


def test_prices_that_start_far_off_get_there_step_by_step(tmp_path):
    rows = mixture(5000, 6, 10, seed=5)
    lloyd = lloyd_of(tmp_path, rows, ClusterConfig(num_clusters=6, iterations=3))
    centroids = kmeans(lloyd, seed=0, state_file=tmp_path / "state.npz").centroids
    start = State(centroids, np.array([0.0, 40.0, -30.0, 5.0, 0.0, -80.0]))
    sizes = np.bincount(settle(with_border(lloyd, 500), start).labels)
    assert sizes.max() - sizes.min() <= 1


def test_rows_that_stay_count_as_places_taken():
    draws = np.random.default_rng(2)
    distances = draws.random((900, 5)) + np.arange(5) * 0.15
    prices = np.zeros(5)
    margins = margins_of(
        Candidates(listed(distances, prices).ids, listed(distances, prices)[1]), prices
    )
    between = margins <= 0.5
    stays = distances[~between].argmin(axis=1)
    fixed = FixedRows(np.bincount(stays, minlength=5), 0.5)
    found = listed(distances[between], prices)
    sizes = Sizes(180, 180)
    done = ascend(found, prices, sizes, rounds=40, fixed=fixed)
    counts = np.bincount((distances - done.prices).argmin(axis=1), minlength=5)
    # within its reach the ascent of the border is that of all rows, and so is what it reports
    assert np.ptp(done.prices) <= 0.5
    assert done.excess == max(np.maximum(counts - 180, 0).sum(), np.maximum(180 - counts, 0).sum())
    assert done.excess < done.excess_before


def test_no_price_moves_further_than_lets_the_others_stay():
    distances = np.hstack([np.zeros((300, 1)), 5 + np.random.default_rng(0).random((300, 2))])
    fixed = FixedRows(np.array([300, 0, 0]), 0.25)
    done = ascend(
        listed(distances, np.zeros(3)), np.zeros(3), Sizes(200, 200), rounds=9, fixed=fixed
    )
    assert 0.2 < np.ptp(done.prices) <= 0.25 and done.prices.argmin() == 0


def test_a_cluster_whose_rows_all_stay_is_no_endless_search():
    distances = np.array([[0.0, 1.0], [0.1, 1.0]])
    found = Candidates(np.tile(np.array([[1, 0]], np.int32), (2, 1)), distances[:, ::-1].copy())
    asked = []

    def search(prices):
        asked.append(prices)
        return found

    settled = np.array([6, 0])
    done = finish(found, np.array([-5.0, 0.0]), search, Sizes(4, 4), settled)
    assert done is None and asked


@pytest.mark.parametrize("price", [None, np.nan, -np.inf])
def test_without_finite_prices_the_search_ends(tmp_path, monkeypatch, price):
    def no_finish(found, prices, *given):
        moved = prices + np.array([price or 0.0, 0, 0])
        return price and Finish(found.ids[:, 0].astype(np.int64), moved, 0, 0, 0)

    lloyd = lloyd_of(tmp_path, mixture(300, 2, 3), ClusterConfig(num_clusters=3, iterations=2))
    state = kmeans(lloyd, seed=0, state_file=tmp_path / "state.npz")
    monkeypatch.setattr(settling, "finish", no_finish)
    with pytest.raises(RuntimeError, match="no finite prices"):
        settle(lloyd, state)
