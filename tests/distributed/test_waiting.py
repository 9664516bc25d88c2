"""Between two logged steps the host waits for the device at few places, and these are known."""

OPTIONS = [
    "parallel.num_workers=1", "logging.every_steps=1000", "checkpoint.every_steps=1000",
    "parallel.replan_steps=1000",
]  # fmt: skip
ON_THE_HOST = {
    # clusters and their counts come of the plan, routing tables from other hosts
    "train/loop.py:train_step", "train/loop.py:forward", "train/outcome.py:planned",
    "parallel/exchange.py:__init__",
    # a loader's work, without processes of its own
    "data/resize.py:resize",
}  # fmt: skip


def waits(pools, run, *more, planted=None):
    (places,) = pools(1).run(
        "reads_between_logged_steps", run=str(run), overrides=[*OPTIONS, *more], planted=planted
    )
    return {place: count for place, count in places.items() if place not in ON_THE_HOST}


def test_a_dense_step_waits_once_for_the_step_before(pools, own_run):
    assert waits(pools, own_run, "moe.kind=dense") == {"train/outcome.py:read": 1}


def test_a_step_with_experts_waits_for_nothing_more(pools, own_run):
    # the routing table was made beside the step before
    assert waits(pools, own_run) == {"train/outcome.py:read": 1}


def test_planted_look_at_a_value_is_counted(pools, own_run):
    found = waits(pools, own_run, planted="norm")
    assert found.pop("train/outcome.py:read") == 1
    assert sum(found.values()) == 1
