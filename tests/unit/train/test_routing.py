"""When a move of experts pays, in the figures of ViT-B."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moce_dist.config import load_config
from moce_dist.cost.sizes import expert_bytes, image_bytes
from moce_dist.model.gate import Gate
from moce_dist.parallel.groups import Topology
from moce_dist.parallel.placement import plan_placement
from moce_dist.train.routing import Router


def router(ranks=4, total_steps=1000):
    config = load_config(None, ["moce.batch_size=400", "parallel.replan_steps=100"])
    return Router(config, Topology(ranks, 4), np.full(10, 8000), total_steps=total_steps)


def test_bytes_of_an_expert_and_of_an_image():
    config = load_config(None)
    assert image_bytes(config) == 50 * 768 * 2
    assert expert_bytes(config) == (2 * 768 * 3072 + 3072 + 768) * 12
    assert expert_bytes(load_config(None, ["moce.optimizer=sgd"])) * 3 == expert_bytes(config)


def test_a_move_must_repay_its_bytes_until_the_next_plan():
    # an interval of 100 steps is half an epoch, so an epoch's saving must be twice the bytes
    images = expert_bytes(load_config(None)) / (4 * image_bytes(load_config(None)))
    assert 180 < images < 190
    assert router().move_cost(0) == pytest.approx(2 * images)
    # two replicas of each expert move twice the bytes; half an interval is left to repay them
    assert router(ranks=8).move_cost(0) == pytest.approx(4 * images)
    assert router().move_cost(950) == pytest.approx(4 * images)
    assert router().move_cost(1000) == math.inf


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_placement_by_number_is_counted_between_places_as_exchanges_are(ranks):
    config = load_config(None, ["moe.num_experts=8", "moe.layers=[1, 3]"])
    topology = Topology(ranks, 4)
    made = Router(config, topology, np.full(16, 100), total_steps=10)
    made.table = np.random.default_rng(0).integers(8, size=(2, 16))
    counts = np.full(16, 4)
    # every rank reads the clusters that placement by number gives to its place
    clusters = np.repeat(np.arange(16), 4).reshape(topology.ep_size, -1)
    homes = np.arange(8) // (8 // topology.ep_size)
    travel = sum(
        (homes[row[clusters]] != np.arange(len(clusters))[:, None]).sum() for row in made.table
    )
    assert made.contiguous.images_exchanged(made.table, counts) == pytest.approx(travel)
    assert travel > 0 or ranks == 1


@pytest.fixture
def one_rank():
    # a fit that was tested before in this process has left its group of one
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()
    else:
        assert dist.get_world_size() == 1
        yield


def test_noise_moves_no_expert_of_a_gate_that_does_not_change(one_rank):
    flags = ["moe.layers=[1, 3]", "gate.noise=1", "gate.noise_fraction=1", "moce.batch_size=4096"]
    config = load_config(None, [*flags, "parallel.replan_steps=100"])
    made = Router(config, Topology(1, 4), np.full(64, 5000), total_steps=10_000)
    gate = Gate(2, 8, torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))
    tables, plans = [], []
    for step in range(0, 600, 100):
        made.decide(gate, step)
        made.replan(gate, step)
        tables.append(made.table)
        plans.append(made.placement)
    changed = np.mean([(table != tables[0]).mean() for table in tables[1:]])
    assert changed > 0.3, "the noise changes many routes"
    assert all((plan.expert_group == plans[0].expert_group).all() for plan in plans)
    assert all((plan.shares == plans[0].shares).all() for plan in plans)
    # a plan from the table of one step suits that step, and the others less
    sizes = np.full(64, 5000)
    others = [[table for table in tables if table is not one] for one in tables]
    of_steps = [plan_placement(one, sizes, num_experts=8, num_groups=4) for one in tables]

    def exchanged(plans):
        pairs = zip(plans, others, strict=True)
        return sum(plan.images_exchanged(table, sizes) for plan, rest in pairs for table in rest)

    assert exchanged(plans) < 0.95 * exchanged(of_steps)
