"""Sweeps against NumPy: priced search, sums, objective, blocks; off mode against FAISS itself."""

import resource
from dataclasses import replace

import faiss
import numpy as np
import pytest
import torch
from mixtures import brute_force, matrix_of, mixture

from moce_dist.cluster.blocks import group_blocks, open_features
from moce_dist.cluster.kmeans import (
    Lloyd,
    State,
    draw_rows,
    draw_sample,
    kmeans,
    save_state,
    split_empty,
    state_request,
)
from moce_dist.cluster.nearest import (
    build_index,
    make_base,
    open_index,
    search,
    search_index,
    squared_distances,
)
from moce_dist.cluster.settle import settle
from moce_dist.cluster.sweeps import SweepTask, add_rows, add_sorted_rows, sum_group
from moce_dist.config import ClusterConfig
from moce_dist.run.tasks import map_here


def with_ones(rows):
    """Rows (x, 1) as a search takes them."""
    return torch.from_numpy(np.hstack([rows, np.ones((len(rows), 1))]).astype(np.float32))


@pytest.mark.parametrize("shift", [0.0, 40.0])
def test_priced_search_is_brute_force_argmin(shift):
    draws = np.random.default_rng(0)
    rows = draws.standard_normal((500, 9)).astype(np.float32) + np.float32(shift)
    centroids, prices = draws.standard_normal((11, 9)) + shift, draws.standard_normal(11) * 3
    augmented = with_ones(rows)
    found = search(augmented, torch.from_numpy(make_base(centroids, prices)), num=11)
    expected = brute_force(rows, centroids) - prices
    order = np.sort(expected, axis=1)
    taken = np.take_along_axis(expected, found.ids.numpy(), axis=1)
    np.testing.assert_allclose(taken, order, atol=0.02 if shift else 1e-4)
    squares = (rows.astype(np.float64) ** 2).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.priced.numpy() + squares, order, atol=0.02 if shift else 1e-4)


def test_a_search_beyond_float32_is_refused():
    # the ids of FAISS would be -1
    rows = with_ones(np.full((3, 4), -1e20))
    with pytest.raises(RuntimeError, match="too large for a search in float32"):
        search(rows, torch.full((2, 5), 1e20), num=2)


def test_iterations_of_other_features_are_not_continued(tmp_path):
    matrix = replace(matrix_of(tmp_path / "features", mixture(300, 4, 3)), content="sha256")
    config, file = ClusterConfig(num_clusters=3, iterations=5), tmp_path / "state.npz"
    sample = draw_sample(matrix, 3, 0, tmp_path / "sample.npy")
    done = State(np.ones((3, 4)), np.zeros(3), 4, 1.0, is_done=True)
    save_state(file, done, state_request(matrix, config, 0))
    assert kmeans(Lloyd(matrix, sample, config), seed=0, state_file=file).iteration == 4
    save_state(file, done, state_request(replace(matrix, content="another"), config, 0))
    assert kmeans(Lloyd(matrix, sample, config), seed=0, state_file=file).iteration != 4


@pytest.mark.parametrize(("recall", "num"), [(0.6, 1), (0.9, 1), (0.9, 8), (0.99, 8)])
def test_index_finds_the_share_that_is_asked_for_on_other_rows_too(recall, num):
    draws = np.random.default_rng(0)
    # few dimensions hold most of the variance, as in features; prices are of its size
    scales = 0.7 ** np.arange(24)
    rows, centroids = (draws.standard_normal((n, 24)) * scales for n in (1500, 12_000))
    prices = draws.standard_normal(12_000) * 0.1
    augmented = with_ones(rows)
    index = build_index(augmented[:500], centroids, prices, num=num, recall=recall)
    assert index is not None
    others = augmented[500:]
    found = search_index(others, open_index(index), num=num).ids
    best = search(others, torch.from_numpy(make_base(centroids, prices)), num=num).ids
    share = np.mean([len(np.intersect1d(a, b)) / num for a, b in zip(found, best, strict=True)])
    assert share > recall - 0.02
    least = build_index(augmented[:500], centroids, prices, num=num, recall=0.01)
    few = search_index(others, open_index(least), num=num).ids
    assert not torch.equal(few[:, 0], best[:, 0])


def test_an_index_that_would_look_at_most_clusters_is_not_used():
    # in many dimensions alike no list is nearer than another
    draws = np.random.default_rng(1)
    rows, centroids = draws.standard_normal((200, 60)), draws.standard_normal((5000, 60))
    assert build_index(with_ones(rows), centroids, np.zeros(5000), num=8, recall=0.99) is None


def test_search_leaves_the_number_of_threads_as_it_was():
    before = faiss.omp_get_max_threads()
    search(torch.ones(3, 3), torch.zeros(2, 3), num=1)
    assert faiss.omp_get_max_threads() == before


def test_distances_keep_their_digits_far_from_the_origin():
    rows = torch.tensor([[1e4, 1e4 + 1]])
    centroids = torch.tensor([[0.0, 0.0], [1e4, 1e4]], dtype=torch.float64)
    assert squared_distances(rows, centroids, torch.tensor([1])).tolist() == [1.0]


def test_sums_objective_and_means_are_numpys(tmp_path):
    rows = mixture(700, 5, 4)
    matrix = matrix_of(tmp_path / "features", rows)
    centred = rows - matrix.view.mean
    centroids = centred[:6].astype(np.float64)
    prices = np.linspace(-1, 1, 6)
    sums = matrix.sums(centroids, prices)
    labels = (brute_force(centred, centroids) - prices).argmin(axis=1)
    assert sums.counts.tolist() == np.bincount(labels, minlength=6).tolist()
    expected = brute_force(centred, centroids)[np.arange(700), labels]
    assert matrix.objective(sums, centroids) == pytest.approx(expected.sum(), rel=1e-9)
    for cluster, mean in enumerate(sums.means(centroids)):
        np.testing.assert_allclose(mean, centred[labels == cluster].astype(float).mean(0))
    firsts, parts = zip(*matrix.distances(centroids, labels), strict=True)
    assert list(firsts) == list(np.cumsum([0, *map(len, parts)])[:-1])
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-12)
    fixed = matrix.sums(centroids, np.zeros(6), labels)
    assert (fixed.sums == sums.sums).all() and (fixed.counts == sums.counts).all()


def test_many_clusters_are_searched_in_as_many_tasks_as_few(tmp_path, monkeypatch):
    """Sums of many clusters are large, so there are few of them; their bits stay the same."""
    matrix = matrix_of(tmp_path / "features", mixture(2000, 3, 6), block_rows=16)
    centroids, prices = np.random.default_rng(1).standard_normal((6, 3)), np.linspace(0, 1, 6)
    limit = "moce_dist.cluster.blocks._GROUP_SUMS_BYTES"
    monkeypatch.setattr(limit, 10 * centroids.nbytes)
    called = []

    def counting(function, shared, items):
        called.append((function.__name__, len(items)))
        return map_here(function, shared, items)

    counted = replace(matrix, map_blocks=counting)
    sums = counted.sums(centroids, prices)
    assert called == [("nearest_of_group", len(group_blocks(matrix.files.blocks(16)))),
                      ("sum_group", 10)]  # fmt: skip
    groups = group_blocks(matrix.files.blocks(16), centroids.nbytes)
    at_once = [sum_group(matrix.sweep(centroids, prices), SweepTask(group)) for group in groups]
    assert (sum(part.sums for part in at_once) == sums.sums).all()


def test_files_do_not_stay_open(tmp_path):
    for number in range(300):
        np.save(tmp_path / f"{number:03d}.npy", np.ones((2, 3), np.float32))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert open_features(tmp_path).num_rows == 600
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_blocks_cover_every_row_once_and_never_cross_files(tmp_path):
    matrix = matrix_of(tmp_path / "features", mixture(700, 2, 2), files=4, block_rows=64)
    blocks = matrix.files.blocks(64)
    assert [b.row for b in blocks] == [0, 64, 128, 175, 239, 303, 350, 414, 478, 525, 589, 653]
    assert [b.stop - b.start for b in blocks] == [64, 64, 47] * 4
    many = matrix.files.blocks(2)
    groups = group_blocks(many)
    assert len(groups) <= 256 and [b for group in groups for b in group] == many


def test_off_mode_is_as_good_as_faiss_from_the_same_centroids(tmp_path):
    rows = mixture(6000, 16, 30, spread=1.5)
    matrix = matrix_of(tmp_path / "features", rows, block_rows=1024)
    config = ClusterConfig(num_clusters=12, balance="off", iterations=10, tolerance=0)
    lloyd = Lloyd(matrix, draw_sample(matrix, 12, 0, tmp_path / "sample.npy"), config)
    first = lloyd.first_state(0).centroids + matrix.view.mean
    judge = faiss.Kmeans(16, 12, niter=10, max_points_per_centroid=10**6, min_points_per_centroid=1)
    judge.train(rows, init_centroids=first.astype(np.float32))
    theirs = brute_force(rows, judge.centroids).min(axis=1).sum()
    state = kmeans(lloyd, seed=0, state_file=tmp_path / "state.npz")
    assert state.iteration == 10
    ours = brute_force(rows - matrix.view.mean, state.centroids).min(axis=1).sum()
    assert ours <= 1.001 * theirs


def test_balance_costs_little_and_iterations_keep_sizes_near(tmp_path):
    rows = mixture(8000, 8, 12, seed=3, spread=2.0)
    matrix = matrix_of(tmp_path / "features", rows, block_rows=1024)
    config = ClusterConfig(num_clusters=8, balance="exact", iterations=10)
    lloyd = Lloyd(matrix, draw_sample(matrix, 8, 0, tmp_path / "sample.npy"), config)
    state = kmeans(lloyd, seed=0, state_file=tmp_path / "state.npz")
    counts = matrix.sums(state.centroids, lloyd.prices(state.centroids, state.prices)).counts
    assert counts.max() <= 1.1 * counts.mean()


def test_sums_in_the_order_of_a_gpu_are_the_same_sums():
    draws = np.random.default_rng(0)
    rows, labels = (
        with_ones(draws.standard_normal((900, 7))),
        torch.from_numpy(draws.integers(0, 9, 900)),
    )
    labels[labels == 4] = 5
    sums = [torch.ones(10, 8, dtype=torch.float64) for _ in range(2)]
    add_rows(sums[0], rows, labels)
    add_sorted_rows(sums[1], rows, labels)
    torch.testing.assert_close(*sums, rtol=1e-13, atol=1e-13)
    assert sums[1][4].tolist() == sums[1][9].tolist() == [1.0] * 8


def test_empty_clusters_take_half_of_the_largest():
    centroids = np.array([[1.0, 1.0], [5.0, 5.0], [9.0, 9.0]])
    split = split_empty(centroids, np.array([10.0, 0.0, 90.0]))
    assert (split[0] == centroids[0]).all()
    step = split[1] - centroids[2]
    assert (split[2] == centroids[2] - step).all()
    assert 0 < np.abs(step).max() < 0.05 and step[0] == -step[1]


@pytest.mark.parametrize("balance", ["off", "exact"])
def test_what_an_index_misses_is_measured(tmp_path, balance, monkeypatch):
    monkeypatch.setattr("moce_dist.cluster.nearest._FEWEST_PROBES", 1)
    rows = mixture(3000, 6, 600)
    figures, assigned = {}, {}
    for recall in (0.5, 0.9999):
        config = ClusterConfig(
            num_clusters=600, iterations=2, balance=balance, index_from=90, index_recall=recall
        )
        matrix = replace(matrix_of(tmp_path / "f", rows), index_from=90, index_recall=recall)
        lloyd = Lloyd(matrix, draw_sample(matrix, 600, 0, tmp_path / "sample.npy"), config)
        state = kmeans(lloyd, seed=0, state_file=tmp_path / f"{recall}.npz")
        settled = settle(lloyd, state)
        figures[recall], assigned[recall] = settled.figures, (state.centroids, settled)
    assert figures[0.5]["index_recall"] < 0.999 and figures[0.5]["index_excess"] > 1e-5
    better = figures[0.9999].get("index_recall", 1.0)
    assert better > 0.995 and better > figures[0.5]["index_recall"]
    sizes = np.bincount(assigned[0.5][1].labels, minlength=600)
    if balance == "exact":
        assert sizes.tolist() == [5] * 600 and "cost_lower_bound" not in figures[0.5]
    else:
        # the sample is the whole matrix here, and without prices labels are the nearest clusters
        centroids, settled = assigned[0.5]
        distances = brute_force(rows - rows.mean(axis=0), centroids)
        right = settled.labels == distances.argmin(axis=1)
        assert figures[0.5]["index_recall"] == pytest.approx(right.mean(), abs=0.02)
        found = distances[np.arange(len(rows)), settled.labels].sum()
        best = distances.min(axis=1).sum()
        assert figures[0.5]["index_excess"] == pytest.approx(found / best - 1, rel=0.5)


def test_centroids_chosen_in_rounds_are_rows_and_nearly_as_good(tmp_path, monkeypatch):
    rows = mixture(4000, 6, 40, spread=0.3)
    matrix = matrix_of(tmp_path / "features", rows, block_rows=1024)
    lloyd = Lloyd(
        matrix, draw_sample(matrix, 41, 0, tmp_path / "sample.npy"), ClusterConfig(num_clusters=41)
    )
    costs = []
    for few, many in ((41, 41), (40, 41), (40, 40)):
        monkeypatch.setattr("moce_dist.cluster.kmeans._FEW", few)
        monkeypatch.setattr("moce_dist.cluster.kmeans._MANY", many)
        first = lloyd.first_state(3).centroids
        assert (first == lloyd.first_state(3).centroids).all()
        known = {row.tobytes() for row in np.load(tmp_path / "sample.npy")}
        chosen = {row.astype(np.float32).tobytes() for row in first}
        assert len(chosen) == 41 and chosen <= known
        distances = brute_force(rows - matrix.view.mean, first)
        costs.append(distances.min(axis=1).sum())
    chance = rows[:41] - matrix.view.mean
    by_chance = brute_force(rows - matrix.view.mean, chance).min(axis=1).sum()
    best, in_rounds, drawn = costs
    assert in_rounds < 1.2 * best and drawn < min(3 * best, 0.7 * by_chance)


def test_rows_are_drawn_far_apart_and_each_once_even_of_masses(tmp_path):
    # ten far points and a mass of one: each of the ten is drawn, then any others
    rows = np.zeros((400, 3), np.float32)
    rows[::40] = 100 * np.random.default_rng(0).standard_normal((10, 3))
    matrix = matrix_of(tmp_path / "features", rows, files=1)
    sample = draw_sample(matrix, 20, 0, tmp_path / "sample.npy")
    drawn = draw_rows(sample, 20, seed=1)
    assert len(set(drawn.tolist())) == 20 and set(range(0, 400, 40)) <= set(drawn.tolist())
    assert draw_rows(sample, 20, seed=1).tolist() == drawn.tolist()
    assert draw_rows(sample, 400, seed=2).tolist() != list(range(400))
    assert sorted(draw_rows(sample, 400, seed=2).tolist()) == list(range(400))
