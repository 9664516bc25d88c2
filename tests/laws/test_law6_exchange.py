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


def test_step_with_images_to_exchange_counts_what_travels(pools, clustered_run):
    options = overrides(2, 2)
    results = pools(2).run(
        "exchange_collectives", run=str(clustered_run), overrides=options, placement="scrambled"
    )
    exchanged = results[0]["metrics"]["images_exchanged"]
    assert exchanged > 0
    for result in results:
        assert result["metrics"]["images_exchanged"] == exchanged
        assert 0 < result["calls"] <= 2 * 4  # layers; there and back, forward and backward
    tokens, width = 4 + 1, 32
    assert results[0]["metrics"]["bytes_exchanged"] == exchanged * tokens * width * 4 * 4


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
    first, second = (layer_routes(place, slot, own, 2) for own in (0, 1))
    # images 2 (slot 0) and 0 (slot 1) stay, sorted by slot; image 1 leaves, place 1's image 0 comes
    assert first.stay.tolist() == [2, 0] and first.stay_counts == [1, 1]
    assert first.leave.tolist() == [1] and first.send_counts == [0, 1]
    assert first.receive_counts == [0, 1] and first.arrived_counts == [1, 0]
    assert first.home.tolist() == [1, 2, 0]
    assert second.stay.tolist() == [2, 1] and second.leave.tolist() == [0]
    assert second.receive_counts == [1, 0] and second.arrived_counts == [1, 0]
    assert first.is_exchanging and second.is_exchanging


@pytest.mark.parametrize("seed", range(5))
def test_dispatch_then_combine_is_the_identity_over_places(seed):
    draws = np.random.default_rng(seed)
    places, images, slots = 3, 7, 2
    place = draws.integers(0, places, (places, images))
    slot = draws.integers(0, slots, (places, images))
    x = torch.arange(places * images).reshape(places, images)
    routes = [layer_routes(place, slot, own, slots) for own in range(places)]
    # deliver by hand what the collective would
    outgoing = [dict(enumerate(x[p][r.leave].split(r.send_counts))) for p, r in enumerate(routes)]
    for own, r in enumerate(routes):
        arrived = torch.cat([outgoing[p][own] for p in range(places)])
        assert r.receive_counts == [len(outgoing[p][own]) for p in range(places)]
        parts = (x[own][r.stay].split(r.stay_counts), arrived[r.by_expert].split(r.arrived_counts))
        expected = [sorted(x[place == own][slot[place == own] == s].tolist()) for s in range(slots)]
        found = [sorted(torch.cat(rows).tolist()) for rows in zip(*parts, strict=True)]
        assert found == expected
        # what combine does: everything that stays or returns finds its old position
        returned = torch.cat([x[own][r.stay], x[own][r.leave]])[r.home]
        assert torch.equal(returned, x[own])
