"""One driver a run: two that start together, one that is stopped and replaced."""

import signal
import sys
import time

import pytest
from started import ROOT, Job

from moce_dist.run.lease import LOCK

ALONE = ("parallel.num_workers=1", "parallel.num_groups=1", "mae.epochs=60")
STEPS = 60 * 9
SHORT_LEASE = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT / "jobs")!r})
from moce_dist.run import lease
lease.EVERY_S, lease.STALE_S = 0.5, 4.0
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "gap_s", [0.3, *(pytest.param(gap, marks=pytest.mark.long) for gap in (0, 4))]
)
def test_of_two_drivers_of_a_run_one_is_refused(gap_s, tmp_path, start, arguments, read_metrics):
    run = tmp_path / "run"
    command = (*arguments(run, *ALONE), "--stage", "mae")
    first = start("pretrain", *command)
    time.sleep(gap_s)
    second = start("pretrain", *command)
    done, refused = sorted((first.finish(), second.finish()), key=lambda result: result.status)
    # standard output is the job's own: DeepSpeed warns there when it looks for a device itself
    assert "WARNING" not in done.assert_done().out
    refused.assert_refused(2, run, "is in use by process", "since")
    assert len(read_metrics(run / "mae")) == STEPS and not (run / LOCK).exists()


@pytest.mark.long
@pytest.mark.parametrize("overrides", [ALONE, ("mae.epochs=60",)])
def test_driver_that_was_stopped_and_replaced_leaves(overrides, tmp_path, arguments, read_metrics):
    run = tmp_path / "run"
    job = ROOT / "jobs" / "pretrain.py"
    command = [sys.executable, "-c", SHORT_LEASE, job, *arguments(run, *overrides)]
    first = second = Job(*command, "--stage", "mae")
    try:
        first.wait_until((run / "mae" / "metrics.jsonl").exists, "training")
        first.process.send_signal(signal.SIGSTOP)
        time.sleep(5)
        second = Job(*command, "--stage", "mae")
        second.wait_until(lambda: f'"pid": {second.process.pid},' in (run / LOCK).read_text(), LOCK)
        first.process.send_signal(signal.SIGCONT)
        first.finish().assert_refused(1, run, f"was taken over by process {second.process.pid}")
        second.finish().assert_done()
    finally:
        first.kill_all()
        second.kill_all()
    assert len(read_metrics(run / "mae")) == STEPS
