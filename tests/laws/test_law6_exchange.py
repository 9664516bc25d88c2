"""Law 6: nothing is dropped or split; no collective without need; idle experts take part."""

import numpy as np
import pytest
import torch

from moce_dist.parallel.exchange import layer_routes


def overrides(ranks, groups, *more):
    return [f"parallel.num_workers={ranks}", f"parallel.num_groups={groups}", *more]


def test_step_with_nothing_to_exchange_runs_no_collective(pools, clustered_run):
    # one expert in one layer: every placement is local on one group
    options = overrides(2, 1, "moe.num_experts=1")
    for result in pools(2).run(
        "exchange_collectives", run=str(clustered_run), overrides=options, placement="planned"
    ):
        assert result["metrics"]["images_exchanged"] == 0
        assert result["calls"] == 0


@pytest.mark.parametrize(
    ("ranks", "groups", "precision"),
    [(2, 2, "fp32"), (2, 2, "bf16"), (4, 2, "fp32"), (2, 4, "fp32")],
)
def test_step_with_images_to_exchange_counts_what_travels(
    pools, clustered_run, ranks, groups, precision
):
    options = overrides(ranks, groups, f"parallel.precision={precision}")
    results = pools(ranks).run(
        "exchange_collectives", run=str(clustered_run), overrides=options, placement="scrambled"
    )
    exchanged = results[0]["metrics"]["images_exchanged"]
    assert exchanged > 0
    for result in results:
        assert result["metrics"]["images_exchanged"] == exchanged
        assert 0 < result["calls"] <= 2 * 4  # layers; there and back, forward and backward
    tokens, width = 4 + 1, 32
    size = {"fp32": 4, "bf16": 2}[precision]
    found = results[0]["metrics"]["bytes_exchanged"]
    assert found == exchanged * tokens * width * size * 4
    assert found == sum(result["bytes"] for result in results)


def test_every_image_reaches_one_expert(pools, clustered_run):
    options = overrides(4, 4)
    results = pools(4).run(
        "exchange_collectives", run=str(clustered_run), overrides=options, placement="scrambled"
    )
    keys = [key for result in results for key in result["keys"]]
    assert len(set(keys)) == len(keys) == 16
    for row in results[0]["metrics"]["images_per_expert"]:
        assert sum(row) == 16


def test_experts_without_images_train_on(pools, clustered_run):
    # six clusters' worth of images go to one expert a layer when the gate has no say
    options = overrides(4, 4, "gate.noise=0", "moe.num_experts=8", "parallel.zero_stage=2")
    results = pools(4).run(
        "take_steps", run=str(clustered_run), overrides=options, placement="scrambled", steps=3
    )
    idle = [min(row) for m in results[0]["metrics"] for row in m["images_per_expert"]]
    assert min(idle) == 0
    assert np.isfinite([m["loss"] for m in results[0]["metrics"]]).all()


def test_routes_of_two_places_spelt_out():
    # place 0 reads images for (place, slot): (0,1) (1,0) (0,0); place 1: (0,0) (1,1) (1,0)
    place = np.array([[0, 1, 0], [0, 1, 1]])
    slot = np.array([[1, 0, 0], [0, 1, 0]])
    (first,), (second,) = (layer_routes(place[None], slot[None], own, 2) for own in (0, 1))
    # images 2 (slot 0) and 0 (slot 1) stay, sorted by slot; image 1 leaves, place 1's image 0 comes
    assert first.outward.tolist() == [2, 0, 1]
    assert first.stay_counts == [1, 1] and first.send_counts == [0, 1]
    assert first.receive_counts == [0, 1] and first.arrived_counts == [1, 0]
    assert first.home.tolist() == [1, 2, 0]
    assert second.outward.tolist() == [2, 1, 0]
    assert second.receive_counts == [1, 0] and second.arrived_counts == [1, 0]
    assert first.is_exchanging and second.is_exchanging


def test_layers_are_planned_together_as_each_by_itself():
    # place 1 gets slots 0 and 1 of place 0, and 0 of place 2; in the second layer nothing travels
    place = np.array([[[1, 1], [1, 1], [1, 2]], [[0, 0], [1, 1], [2, 2]], [[0, 0], [1, 1], [2, 1]]])
    slot = np.array([[[1, 0], [0, 0], [0, 0]], [[1, 0], [0, 1], [0, 0]], [[1, 1], [0, 1], [0, 1]]])
    together = layer_routes(place, slot, 1, 2)
    for layer, routes in enumerate(together):
        (alone,) = layer_routes(place[layer, None], slot[layer, None], 1, 2)
        for mine, theirs in zip(routes, alone, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert [routes.is_exchanging for routes in together] == [True, False, True]
    assert [routes.by_expert.tolist() for routes in together] == [[0, 2, 1], [], [0]]
    assert [routes.by_arrival.tolist() for routes in together] == [[0, 2, 1], [], [0]]


@pytest.mark.parametrize("seed", range(5))
def test_dispatch_then_combine_is_the_identity_over_places(seed):
    draws = np.random.default_rng(seed)
    places, images, slots = 3, 7, 2
    place = draws.integers(0, places, (2, places, images))
    slot = draws.integers(0, slots, (2, places, images))
    plans = [layer_routes(place, slot, own, slots) for own in range(places)]
    for layer, routes in enumerate(zip(*plans, strict=True)):
        check_delivery(place[layer], slot[layer], routes)


def check_delivery(place, slot, routes):
    places, slots = len(place), slot.max() + 1
    x = torch.arange(place.size).reshape(place.shape)
    ordered = [
        x[own][r.outward].split([sum(r.stay_counts), sum(r.send_counts)])
        for own, r in enumerate(routes)
    ]
    # deliver by hand what the collective would
    outgoing = [leave.split(r.send_counts) for (_, leave), r in zip(ordered, routes, strict=True)]
    for own, r in enumerate(routes):
        arrived = torch.cat([outgoing[p][own] for p in range(places)])
        assert r.receive_counts == [len(outgoing[p][own]) for p in range(places)]
        stay, leave = ordered[own]
        parts = (stay.split(r.stay_counts), arrived[r.by_expert].split(r.arrived_counts))
        expected = [sorted(x[place == own][slot[place == own] == s].tolist()) for s in range(slots)]
        found = [sorted(torch.cat(rows).tolist()) for rows in zip(*parts, strict=True)]
        assert found == expected
        # what combine does: everything that stays or returns finds its old position
        assert torch.equal(torch.cat([stay, leave])[r.home], x[own])
        assert torch.equal(arrived[r.by_expert][r.by_arrival], arrived)
