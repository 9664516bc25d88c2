"""However a training ends while a checkpoint is being written, it ends with its own status.

Nothing that is half-written or not finite counts, and the next start removes it.
"""

import resource
import signal

import pytest

SLOW = "../tests/faults/slow_writer"
QUICK = ("parallel.num_workers=1", "mae.epochs=2", "mae.warmup_epochs=0")


@pytest.fixture
def command(arguments, tmp_path):
    """Arguments of stage mae alone, in this process, with a save after every second step."""

    def make(*overrides, run="run"):
        named = arguments(tmp_path / run, *QUICK, *overrides)
        return (*named, "--stage", "mae", "--set", "checkpoint.every_steps=2")

    return make


def in_flight(run):
    return [*(run / "mae" / "checkpoints").glob(".step_*/rank-*")]


def published(run):
    return sorted(p.name for p in (run / "mae" / "checkpoints").glob("step_*"))


def assert_quiet(result):
    for noise in ("FATAL", "Traceback", "terminate called"):
        assert noise not in result.err


@pytest.mark.parametrize(("how", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_a_checkpoint_is_written(start, run_job, command, tmp_path, how, status):
    run = tmp_path / "run"
    # enough steps that the second save waits for the first
    job = start(SLOW, *command("mae.epochs=100"))
    job.wait_until(lambda: in_flight(run), "a checkpoint in flight")
    job.process.send_signal(signal.Signals[how])
    result = job.finish()
    assert result.status == status, result.err
    assert_quiet(result)
    if how == "SIGINT":
        assert in_flight(run) and not published(run)
    again = run_job("pretrain", *command("mae.epochs=100")).assert_done()
    assert ("resuming at step" in again.err) == (how == "SIGTERM")
    assert not in_flight(run)


@pytest.mark.parametrize(("rate", "figure"), [("1e6", "gradient norm"), ("1e12", "loss")])
def test_a_figure_that_is_not_finite_while_a_checkpoint_is_written(
    start, command, tmp_path, rate, figure
):
    run = tmp_path / "run"
    # the first step ruins the weights; they are numbers, and are being written
    job = start(SLOW, *command(f"mae.base_lr={rate}"), "--set", "checkpoint.every_steps=1")
    result = job.finish()
    result.assert_refused(1, f"FloatingPointError: mae: {figure} is nan at step 1")
    assert_quiet(result)
    assert not published(run)
    assert "NaN" not in (run / "mae" / "metrics.jsonl").read_text()


def test_a_full_disk_ends_the_training_and_with_space_the_same_command_ends_the_same(
    start, run_job, command, tmp_path, learned
):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**22, before[1]))
    try:
        job = start(SLOW, *command())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    result = job.finish()
    folder = tmp_path / "run" / "mae" / "checkpoints"
    result.assert_refused(1, f"OSError: {folder}: checkpoint not written", "File too large")
    assert_quiet(result)
    assert not [*folder.iterdir()]
    for name in ("run", "whole"):
        run_job("pretrain", *command(run=name)).assert_done()
    assert learned(tmp_path / "run" / "mae") == learned(tmp_path / "whole" / "mae")
