"""What a step of the real loop sends: every collective of every thread is counted."""

import pytest

LAYERS = 2
OPTIONS = [
    "parallel.num_workers=2", "logging.every_steps=1000", "parallel.replan_steps=1000",
    "checkpoint.every_steps=1000",
]  # fmt: skip


def collectives(pools, run, *more, **arguments):
    overrides = [*OPTIONS, *more]
    return pools(2).run("collectives_of_steps", run=str(run), overrides=overrides, **arguments)


def test_a_dense_step_sums_its_gradients_and_its_figures(pools, own_run):
    for found in collectives(pools, own_run, "moe.kind=dense"):
        assert len(found["steps"]) > 15 and found["aside"] == 0
        for counts in found["steps"]:
            assert counts == {"allreduce": found["buckets"] + 1}


@pytest.mark.parametrize("groups", [1, 2])
def test_experts_add_a_table_from_host_to_host_and_the_exchange(pools, own_run, groups):
    first, second = collectives(pools, own_run, f"parallel.num_groups={groups}")
    steps = len(first["steps"])
    # rank 0 sends the table from a thread beside the training
    assert steps - 1 <= first["aside"] <= steps + 1 and second["aside"] == 0
    exchanges = set()
    for sending, receiving in zip(first["steps"], second["steps"], strict=True):
        exchanged = sending.pop("all_to_all_single", 0)
        assert receiving.pop("all_to_all_single", 0) == exchanged
        assert sending == {"allreduce": first["buckets"] + 1}
        assert receiving == {"allreduce": second["buckets"] + 1, "broadcast": 1}
        exchanges.add(exchanged)
    # there and back, forward and backward, in layers from which an image travels
    assert exchanges <= {0} if groups == 1 else {4 * n for n in range(LAYERS + 1)}
    assert max(exchanges) > 0 or groups == 1


def test_a_planted_collective_is_counted(pools, own_run):
    found, _ = collectives(pools, own_run, "moe.kind=dense", planted=True)
    assert found["steps"][0] == {"allreduce": found["buckets"] + 1, "barrier": 1}
