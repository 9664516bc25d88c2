"""The line that a person reads: loss, images a second, time left, and waiting where it matters."""

import json
from functools import cached_property

import pytest

from moce_dist.config import make_config
from moce_dist.train.job import StageJob


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
