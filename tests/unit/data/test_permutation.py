"""Keyed permutations: of any size, each value once, another one for every key."""

import numpy as np
import pytest

from moce_dist.data.plan import keys_of, permuted


def order(size, *parts):
    keys = np.repeat(keys_of(*parts), size)
    return permuted(np.arange(size), np.full(size, size), keys)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 256, 1000, 4097])
def test_every_value_once(size):
    for key in range(5):
        assert sorted(order(size, key).tolist()) == list(range(size))


def test_many_permutations_at_once_are_those_one_by_one():
    sizes = np.repeat([3, 10, 1, 500], [3, 10, 1, 500])
    places = np.concatenate([np.arange(n) for n in (3, 10, 1, 500)])
    clusters = np.repeat(np.arange(4), [3, 10, 1, 500])
    together = permuted(places, sizes, keys_of(7, 1, clusters))
    alone = [order(n, 7, 1, cluster) for cluster, n in enumerate((3, 10, 1, 500))]
    assert together.tolist() == np.concatenate(alone).tolist()


def test_keys_make_orders_that_have_nothing_in_common():
    size = 2000
    orders = [order(size, seed, epoch) for seed in range(3) for epoch in range(3)]
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            # by chance one value stands in its place, give or take
            assert (one == other).sum() < 10
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.1


def test_a_value_is_as_likely_anywhere():
    firsts = np.array([order(6, key)[0] for key in range(3000)])
    assert (np.abs(np.bincount(firsts, minlength=6) - 500) < 110).all()
