"""One order of images: exactly once, even paces, independent of everything but seed and epoch."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from moce_dist.data.plan import ORDER, PADDING, Plan, cluster_order, quotas_of
from moce_dist.data.table import Runs, SampleTable


def table(sizes):
    cluster = np.repeat(np.arange(len(sizes)), sizes)
    n = len(cluster)
    zeros = np.zeros(n, np.int64)
    return SampleTable(["a.tar"], [f"k{i}" for i in range(n)], *[zeros] * 5, cluster)


def epoch_steps(plan, epoch):
    first = epoch * plan.steps_per_epoch
    return [plan.step_ids(first + t) for t in range(plan.steps_per_epoch)]


def epoch_order(plan, epoch):
    ids = np.concatenate(epoch_steps(plan, epoch))
    return ids[ids != PADDING]


def test_every_sample_once_an_epoch_and_the_tail_is_padded():
    plan = Plan(table([7, 5, 11]), batch_size=5, seed=0)
    for epoch in (0, 1, 7):
        steps = epoch_steps(plan, epoch)
        used = Counter(int(i) for ids in steps for i in ids)
        assert used.pop(PADDING) == 2
        assert used == Counter(range(23))
        assert all((ids != PADDING).all() for ids in steps[:-1])


def test_the_order_is_that_of_its_version():
    # other numbers need another ORDER: a checkpoint must not go on in them
    plan = Plan(table([7, 5, 11]), 5, seed=3)
    found = [plan.step_ids(step).tolist() for step in (0, 6)]
    assert (ORDER, found) == (2, [[20, 0, 7, 15, 4], [22, 8, 20, 1, 15]])


@pytest.mark.parametrize("sizes", [[100, 50, 25, 25], [33] * 6, [1000, 3, 1]])
def test_every_prefix_holds_each_cluster_at_its_share(sizes):
    plan = Plan(table(sizes), batch_size=16, seed=3)
    clusters = plan.table.cluster[epoch_order(plan, 2)]
    n = len(clusters)
    for stop in range(16, n, 16):
        used = np.bincount(clusters[:stop], minlength=len(sizes))
        assert (np.abs(used - stop * np.array(sizes) / n) <= 1 + len(sizes) / 2).all()


def test_steps_hold_equal_clusters_equally():
    plan = Plan(table([40] * 8), batch_size=16, seed=1)
    for ids in epoch_steps(plan, 0):
        assert np.bincount(plan.table.cluster[ids], minlength=8).tolist() == [2] * 8


def test_batches_are_not_neighbours_of_a_tar():
    plan = Plan(table([4000]), batch_size=100, seed=0)
    neighbours = sum(int((np.diff(np.sort(ids)) == 1).sum()) for ids in epoch_steps(plan, 0))
    by_chance = 3999 * 99 / 3999  # pairs (i, i + 1) times the chance that both are in one batch
    assert neighbours == pytest.approx(by_chance, rel=0.35)


def test_order_changes_with_epoch_and_seed_only():
    plan = Plan(table([30, 30]), batch_size=4, seed=0)
    again = Plan(table([30, 30]), batch_size=6, seed=0)
    assert (epoch_order(plan, 3) == epoch_order(again, 3)).all()
    assert (epoch_order(plan, 3) != epoch_order(plan, 4)).any()
    assert (epoch_order(plan, 3) != epoch_order(Plan(plan.table, 4, seed=1), 3)).any()


def test_cursors_count_what_was_used():
    plan = Plan(table([6, 4]), batch_size=4, seed=0)
    assert plan.cursors(0) == [0, 0]
    steps = epoch_steps(plan, 1)
    used = np.bincount(plan.table.cluster[np.concatenate(steps[:2])], minlength=2)
    assert plan.cursors(plan.steps_per_epoch + 2) == used.tolist()


def test_clusters_without_samples_count_0_and_change_no_order():
    some = table([6, 0, 4])
    more = replace(some, num_clusters=6)
    assert more.cluster_sizes.tolist() == [6, 0, 4, 0, 0, 0]
    plan = Plan(more, batch_size=4, seed=0)
    assert Counter(epoch_order(plan, 1).tolist()) == Counter(range(10))
    assert plan.cursors(2)[3:] == [0, 0, 0] and sum(plan.cursors(2)) == 8


@pytest.mark.parametrize(
    ("shares", "sizes", "batch", "expected"),
    [
        # as many epochs' samples as the fullest cluster allows: 40 / 0.5 = 80
        ([0.5, 0.25, 0.25], [40, 40, 40], 8, [40, 20, 20]),
        # in whole batches: 80 is no multiple of 32
        ([0.5, 0.25, 0.25], [40, 40, 40], 32, [32, 16, 16]),
        # an empty cluster gives its share to the others, one without a share gives nothing
        ([0.5, 0.5, 0.0], [0, 10, 10], 5, [0, 10, 0]),
        # a batch at least: the small cluster gives all it has, the other the rest
        ([0.9, 0.1], [3, 100], 16, [3, 13]),
        ([1.0, 0.0], [3, 100], 16, [3, 0]),
        # largest remainders of 3.5, 2.1 and 1.4
        ([0.5, 0.3, 0.2], [4, 100, 100], 7, [4, 2, 1]),
    ],
)
def test_quotas_follow_shares(shares, sizes, batch, expected):
    assert quotas_of(np.array(shares), np.array(sizes), batch).tolist() == expected


def test_quotas_without_any_sample_are_refused():
    with pytest.raises(ValueError, match="no cluster with a share"):
        quotas_of(np.array([1.0, 0.0]), np.array([0, 5]), 4)


def test_epochs_of_quotas_use_no_sample_twice_and_a_cluster_up_before_it_repeats():
    samples = table([12, 10, 7])
    plan = Plan(samples, 4, 0, np.array([6, 2, 0]))
    assert plan.epoch_samples == 8 and plan.steps_per_epoch == 2
    orders = [epoch_order(plan, epoch) for epoch in range(10)]
    for order in orders:
        assert np.bincount(samples.cluster[order], minlength=3).tolist() == [6, 2, 0]
        assert len(set(order.tolist())) == 8
    first = np.concatenate(orders[:2])
    assert set(first[samples.cluster[first] == 0]) == set(range(12))
    fifth = np.concatenate(orders[:5])
    assert set(fifth[samples.cluster[fifth] == 1]) == set(range(12, 22))
    # and then in another order; what it is does not depend on what was asked before
    assert orders[2].tolist() != orders[0].tolist()
    again = Plan(samples, 4, 0, np.array([6, 2, 0]))
    assert epoch_order(again, 7).tolist() == orders[7].tolist()
    assert plan.cursors(3) == [3, 1, 0] and plan.cursors(4) == [0, 0, 0]


def test_quotas_of_all_samples_are_a_whole_epoch():
    samples = table([12, 10])
    order = epoch_order(Plan(samples, 4, 0, samples.cluster_sizes), 3)
    assert sorted(order.tolist()) == list(range(22))


@pytest.mark.parametrize("sizes", [[7, 5, 11], [1000, 3, 1], [1], [0, 2, 0, 3], [4000], [13] * 40])
@pytest.mark.parametrize("batch", [1, 5, 64])
def test_steps_and_cursors_are_those_of_all_samples_sorted_by_time(sizes, batch):
    plan = Plan(table(sizes), batch, seed=3)
    counts = plan.table.cluster_sizes
    for epoch in (0, 2):
        clusters = np.repeat(np.arange(len(counts)), counts)
        times = np.concatenate([(np.arange(n) + 0.5) / n for n in counts if n])
        turn = np.argsort(cluster_order(3, epoch, len(counts)))[clusters]
        expected = clusters[np.lexsort((turn, times))]
        assert plan.table.cluster[epoch_order(plan, epoch)].tolist() == expected.tolist()
        for step in range(0, plan.steps_per_epoch, 7):
            used = np.bincount(expected[: step * batch], minlength=len(counts)).tolist()
            assert plan.cursors(epoch * plan.steps_per_epoch + step) == used


def test_a_rank_looks_up_its_own_slots_as_all_are_looked_up():
    plan = Plan(table([7, 5, 0, 11]), 6, seed=1)
    for step in range(2 * plan.steps_per_epoch):
        ids, order = plan.step_ids(step), plan.step_order(step)
        for slots in ([5, 0], [3], []):
            assert plan.ids_at(order, np.array(slots, int)).tolist() == ids[slots].tolist()
        assert np.where(ids == PADDING, PADDING, plan.table.cluster[ids]).tolist() == (
            order.clusters.tolist()
        )


def test_a_step_of_many_samples_costs_no_more_than_of_few():
    many = Runs(np.arange(64), np.full(64, 10**10))
    nothing = np.zeros(1, np.int64)
    samples = SampleTable(["a.tar"], range(64 * 10**10), many, *[nothing] * 4, many, [], 64)
    plan = Plan(samples, 256, seed=0)
    ids = plan.step_ids(plan.steps_per_epoch // 2)
    assert len(set(ids.tolist())) == 256
    assert np.bincount(many[ids], minlength=64).tolist() == [4] * 64
    assert sum(plan.cursors(10**9)) == 256 * 10**9
