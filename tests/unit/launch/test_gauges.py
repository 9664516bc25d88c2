"""What the driver tells Prometheus follows from the newest whole line of metrics."""

import json

import pytest

from moce_dist.launch.gauges import FaultCounter, line_figures, newest_line
from moce_dist.run.files import forget_faults, record_fault


def test_newest_whole_line_is_read_from_the_end_of_a_long_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert newest_line(path) == {}
    path.write_text('{"step": 0, "lo')
    assert newest_line(path) == {}
    lines = [json.dumps({"step": step, "rest": "x" * 200}) for step in range(3000)]
    path.write_text("\n".join(lines) + '\n{"step": 3000, "lo')
    assert newest_line(path)["step"] == 2999


@pytest.mark.parametrize("steps", [1, 20])
def test_share_of_waiting_does_not_depend_on_the_steps_of_a_line(steps):
    line = {"images_per_s": 64.0, "seconds": 2.0 * steps, "data_wait_s": 0.5 * steps, "loss": 0.25}
    assert line_figures(line | {"checkpoint_s": None}) == {
        "images_per_second": 64.0,
        "loss": 0.25,
        "data_wait_ratio": 0.25,
    }


def test_a_line_without_times_has_no_share():
    assert line_figures({}) == {} and line_figures({"loss": 1.0}) == {"loss": 1.0}


def test_faults_are_counted_once_and_those_of_repeated_steps_are_forgotten(tmp_path):
    ledger = tmp_path / "faults.jsonl"
    counter, found = FaultCounter(ledger, "mae"), []
    for step in (1, 2, 3):
        found.append(counter.count())
        record_fault(ledger, stage="mae", step=step)
        record_fault(ledger, stage="features")
    found.append(counter.count())
    forget_faults(ledger, "mae", 2)
    assert [*found, counter.count()] == [0, 1, 2, 3, 1]
