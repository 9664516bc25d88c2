"""The line that a person reads: loss, images a second, time left, and waiting where it matters."""

import json
from contextlib import nullcontext
from functools import cached_property
from types import SimpleNamespace

import pytest

from moce_dist.config import make_config
from moce_dist.train.job import StageJob, TooManyFaultsError
from moce_dist.train.loop import stop_if_too_many_faults


class Hundred(StageJob):
    """A stage of a hundred steps, whose plan nobody needs."""

    @cached_property
    def total_steps(self):
        return 100


@pytest.mark.parametrize(("wait", "note"), [(0.3, ""), (2.5, ", 25% of it waiting for images")])
def test_line_tells_of_waiting_above_a_tenth(tmp_path, wait, note):
    job = Hundred(make_config({}), tmp_path, "mae", "index")
    assert job.progress() == ""
    job.folder.mkdir()
    lines = [
        {"step": step, "images_seen": 64 * (step + 1), "loss": 0.5, "images_per_s": 64.0}
        | {"data_wait_s": wait if step else 0.0}
        for step in (29, 39)
    ]
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert job.progress() == f"mae: step 40 of 100, loss 0.5000, 64 images/s, 1:00 left{note}"


@pytest.mark.parametrize(
    ("limit", "faults", "stops"),
    [(0.1, 8, False), (0.1, 11, True), (0.0, 1, True), (0.0, 0, False)],
)
def test_a_limit_of_0_bears_no_fault(limit, faults, stops, tmp_path):
    plan = SimpleNamespace(steps_per_epoch=10, epoch_samples=100, batch_size=10)
    data = SimpleNamespace(data=SimpleNamespace(max_fault_fraction=limit))
    job = SimpleNamespace(config=data, run_root=tmp_path)
    state = SimpleNamespace(plan=plan, step=10, faults=faults, job=job)
    with pytest.raises(TooManyFaultsError) if stops else nullcontext():
        stop_if_too_many_faults(state)
