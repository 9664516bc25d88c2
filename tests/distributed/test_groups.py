"""Process groups: how long ranks wait in them, and in which order NCCL launches."""

import pytest
from ranks import Pool

PATIENCE_S = 5000


@pytest.fixture
def fresh():
    """Two ranks without process groups."""
    pool = Pool(2)
    yield pool
    pool.kill()


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_all_groups_wait_for_the_configured_time_and_launch_in_order(fresh, own_run, zero_stage):
    overrides = [
        "parallel.num_workers=2", f"parallel.start_timeout_s={PATIENCE_S}",
        f"parallel.zero_stage={zero_stage}",
    ]  # fmt: skip
    for found in fresh.run("process_groups", run=str(own_run), overrides=overrides):
        # all ranks thrice: torch's group, DeepSpeed's clone, for tables and for saves on the host;
        # those that exchange images, and those that hold the same experts
        assert found["timeouts"] == [PATIENCE_S] * 6
        assert found["order"] == "1"
