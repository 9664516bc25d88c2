"""Jobs that are interrupted or killed: the same command goes on, and nothing stays behind.

At equal ranks and one thread what is learned equals that of the run which nothing interrupted, bit
for bit: metrics, routing, weights, moments.
"""

import contextlib
import os
import re
import signal
import subprocess

import pytest

from moce_dist.run.artefacts import read_marker

BEFORE = {
    "ingest": (),
    "mae": ("ingested",),
    "features": ("ingested", "mae"),
    "moce": ("ingested", "mae", "features", "clusters", "shards"),
}
STAGE = {"ingest": "mae", "mae": "mae", "features": "cluster", "moce": "moce"}
CONTROLLER = "TrainController"
WORKER = {"mae": "RayTrainWorker", "features": "_Worker", "moce": "RayTrainWorker"}
# (moment, what is killed, overrides); decoding processes must not outlive their worker either
CHEAP = [("moce", "SIGINT", ()), ("features", "SIGTERM", ()), ("moce", "worker", ())]
STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -signal.SIGKILL}
FULL = [
    (moment, how, ("data.loader_processes=1",) if moment == "mae" else ())
    for moment in BEFORE
    for how in ("SIGINT", "SIGTERM", "SIGKILL", "worker")
    if (moment, how) not in {("ingest", "worker"), *(case[:2] for case in CHEAP)}
] + [("moce", "controller", ())]


def has_come(run, moment):
    """Tell whether a run is in the middle of a stage."""
    if moment == "ingest":
        return (run / "ingested" / "train-000001.tar").exists()
    if moment == "features":
        return any((run / "features").glob("*.npy"))
    return any((run / moment / "checkpoints").glob("step_*"))


def strike(job, moment, how):
    """Kill a worker, or send the driver a signal."""
    if how in ("worker", "controller"):
        victims = job.workers(CONTROLLER if how == "controller" else WORKER[moment])
        assert victims, f"there was no {how} to kill"
        victims[0].kill()
    else:
        job.process.send_signal(signal.Signals[how])


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.npy")}


def assert_same(run, finished, moment, learned):
    if moment == "features":
        assert files_of(run / "features") == files_of(finished / "features")
        assert files_of(run / "clusters") == files_of(finished / "clusters")
        assert read_marker(run / "shards")["files"] == read_marker(finished / "shards")["files"]
        return
    if moment == "ingest":
        there = read_marker(finished / "ingested")["files"]
        assert read_marker(run / "ingested")["files"] == there
    assert learned(run / STAGE[moment]) == learned(finished / STAGE[moment])


@pytest.mark.parametrize(
    ("moment", "how", "overrides"),
    [*CHEAP, *(pytest.param(*case, marks=pytest.mark.long) for case in FULL)],
)
def test_the_same_command_goes_on(
    moment, how, overrides, start, arguments, part_of, learned, finished
):
    run = part_of(*BEFORE[moment])
    command = (*arguments(run, *overrides), "--stage", STAGE[moment])
    job = start("pretrain", *command)
    job.wait_until(lambda: has_come(run, moment), moment)
    strike(job, moment, how)
    result = job.finish()
    job.assert_nothing_stays()
    expected = STATUS.get(how, 0)
    assert result.status == expected, result.err
    if how == "SIGINT":
        assert result.error.startswith("interrupted; the same command continues")
    if how == "SIGTERM":
        assert result.error.startswith("stopped: ") and "same command continues" in result.error
    if expected:
        again = start("pretrain", *command)
        result = again.finish().assert_done()
        again.assert_nothing_stays()
    if moment in ("mae", "moce"):
        assert f"{moment}: resuming at step" in result.err
    assert_same(run, finished, moment, learned)


@pytest.mark.long
def test_a_rank_that_is_stopped_is_named_killed_and_the_stage_ends_with_the_same_bits(
    start, arguments, part_of, learned, finished
):
    run = part_of(*BEFORE["moce"])
    job = start("pretrain", *arguments(run, "parallel.step_timeout_s=15"), "--stage", "moce")
    job.wait_until(lambda: has_come(run, "moce"), "moce")
    job.workers()[-1].suspend()
    result = job.finish().assert_done()
    job.assert_nothing_stays()
    said = r"moce: rank [01] on node [\d.]+ \(process \d+\) stands still: no sign of life for 1\d s"
    assert re.search(f"{said}; it is killed", result.err), result.err
    assert "moce: failure 1 of at most 3: rank" in result.err
    assert "moce: resuming at step" in result.err
    assert learned(run / "moce") == learned(finished / "moce")


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a disk of its own")
def test_a_disk_that_fills_ends_the_job_at_once_and_with_space_the_same_command_goes_on(
    start, arguments, tmp_path, learned, finished
):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk], check=True)
    try:
        run = disk / "run"
        command = (*arguments(run), "--stage", "mae")
        job = start("pretrain", *command)
        job.wait_until(lambda: has_come(run, "mae"), "mae")
        with contextlib.suppress(OSError), (disk / "fill").open("wb", 0) as file:
            while True:
                file.write(bytes(4096))
        result = job.finish()
        result.assert_refused(3, "No space left on device", run)
        assert "failure 1 of" not in result.err
        (disk / "fill").unlink()
        result = start("pretrain", *command).finish().assert_done()
        assert "mae: resuming at step" in result.err
        assert learned(run / "mae") == learned(finished / "mae")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_killed_ingest_starts_again(start, run_job, arguments, tmp_path, finished):
    run = tmp_path / "run"
    command = (*arguments(run, "parallel.num_workers=1", "mae.epochs=1"), "--stage", "mae")
    job = start("pretrain", *command)
    job.wait_until(lambda: has_come(run, "ingest"), "ingest")
    job.process.kill()
    assert job.finish().status == -signal.SIGKILL
    run_job("pretrain", *command).assert_done()
    there = read_marker(finished / "ingested")["files"]
    assert read_marker(run / "ingested")["files"] == there
