"""Many seeded faults of all kinds over one MoCE run: `make test-faults`.

Two raylets with a CPU each are two nodes. A seed draws what happens next and after how many further
steps; what is lost is brought back by whoever would bring it back: the driver by the same command,
a node by a new one. At the end the run equals the one that nothing disturbed, bit for bit.

Two processes that import what a rank imports are timed before, because no restart is faster than
that. A stopped rank is noticed after `parallel.step_timeout_s`, SILENCE_S here.

MOCE_FAULTS says how many (50), MOCE_FAULTS_SEED the seed (0), MOCE_FAULTS_OUT a file for figures.
"""

import contextlib
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from started import MARK

from .test_elastic import READY, Nodes, checkpoints, last_step, lose, workers_on

EVERY = 10
GROUPS = ("g0", "g1")
COUNT = int(os.environ.get("MOCE_FAULTS", "50"))
# per fault up to 12 steps until it comes, and what a restart repeats
EPOCHS = max(15, COUNT * 2)
SILENCE_S = 10
HANG_S = 60
KINDS = ("rank", "loader", "stop", "drain", "node", "driver", "sigterm")
OVERRIDES = (
    f"moce.epochs={EPOCHS}",
    f"checkpoint.every_steps={EVERY}",
    "parallel.max_failures=1000",
    f"parallel.step_timeout_s={SILENCE_S}",
    # slow steps, so that few of them pass while a node is made
    "parallel.micro_batches=4",
    "data.loader_processes=1",
)


class Disturbed:
    """A run whose ranks, loaders, nodes and driver are struck, and the time until its next step."""

    def __init__(self, run, begin):
        self.run, self._begin = run, begin
        self.cluster = Nodes()
        self.nodes = {group: self.cluster.add(group) for group in GROUPS}
        self.job = self._start()

    def _start(self):
        return self._begin("pretrain", env={"RAY_ADDRESS": self.cluster.cluster.address})

    def is_over(self):
        return self.job.process.poll() is not None

    def wait_for_step(self, step):
        """Wait for a step of the run, or for its end; tell whether the step came."""
        while last_step(self.run) < step and not self.is_over():
            time.sleep(0.05)
        return not self.is_over()

    def prepare(self, kind, victim):
        """Make what takes the place of a node that will go: Ray must not place the ranks there."""
        self._gone = self.nodes[victim]
        if kind in ("drain", "node"):
            self.nodes[victim] = self.cluster.add(victim)

    def strike(self, kind, victim):
        """Do what the fault does, and start a driver again; tell when it was, None if not done."""
        if kind in ("rank", "stop", "loader"):
            ranks = workers_on(self.nodes[victim])
            processes = loaders_of(ranks[0]) if ranks and kind == "loader" else ranks
            if not processes:
                return None
        now = time.monotonic()
        if kind in ("rank", "stop", "loader"):
            processes[0].send_signal(signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
        elif kind == "node":
            lose(self._gone)
        elif kind == "drain":
            self.cluster.drain(self._gone, seconds=60)
        else:
            self.job.process.send_signal(signal.SIGTERM if kind == "sigterm" else signal.SIGKILL)
            self.job.finish()
            self.job = self._start()
        return now


def loaders_of(rank):
    """A rank's loader processes: its forks."""
    return [child for child in rank.children() if "RayTrainWorker" in " ".join(child.cmdline())]


IMPORTS = {
    "ranks": ("import ray.train, moce_dist.train.loop", 2),
    "driver": ("import ray.train, moce_dist.pipeline", 1),
}


def import_seconds(rounds=3):
    """Seconds in which the ranks, all at once, and a driver import what they need; medians."""
    found = {}
    for who, (code, count) in IMPORTS.items():
        times = []
        for _ in range(rounds):
            begin = time.monotonic()
            command = [sys.executable, "-c", code]
            starting = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(count)]
            assert not any(process.wait() for process in starting)
            times.append(time.monotonic() - begin)
        found[who] = statistics.median(times)
    return found


def above_imports(fault, importing):
    """Seconds of a fault that are not imports; a new driver imports before its ranks do."""
    is_driver = fault["kind"] in ("driver", "sigterm")
    return fault["seconds"] - importing["ranks"] - is_driver * importing["driver"]


def inode(path):
    return path.stat().st_ino if path.exists() else None


def recovered(run, before, resumed):
    """Tell whether a start after the fault has logged a step: it writes the log anew."""
    path = run / "moce" / "metrics.jsonl"
    return inode(path) != before and last_step(run) >= max(checkpoints(run), default=resumed)


@pytest.mark.many
@pytest.mark.timeout(0)
def test_many_faults_leave_no_trace(
    start, arguments, part_of, finished, tmp_path, learned, read_metrics, monkeypatch
):
    # inherited by all of the nodes' processes
    monkeypatch.setenv(MARK, str(tmp_path))
    command = lambda run: (*arguments(run, *OVERRIDES), "--stage", "moce")  # noqa: E731
    whole, run = tmp_path / "whole", part_of(*READY)
    copy_ready(finished, whole)
    for root in (whole, run):
        longer(root)
    start("pretrain", *command(whole)).finish(timeout_s=7200).assert_done()
    importing = import_seconds()
    draws, log = random.Random(int(os.environ.get("MOCE_FAULTS_SEED", "0"))), []
    disturbed = Disturbed(run, lambda job, env: start(job, *command(run), env=env))
    reached, metrics = 0, run / "moce" / "metrics.jsonl"
    try:
        while len(log) < COUNT:
            kind, victim = draws.choice(KINDS), draws.choice(GROUPS)
            disturbed.prepare(kind, victim)
            # beyond every step reached so far: a driver gives up when nothing is gained
            if not disturbed.wait_for_step(reached + draws.randint(1, 12)):
                break
            reached, before = last_step(run), inode(metrics)
            resumed = max(checkpoints(run), default=0)
            if (begin := disturbed.strike(kind, victim)) is None:
                continue
            while not recovered(run, before, resumed):
                assert not disturbed.is_over(), disturbed.job.process.communicate()
                assert time.monotonic() - begin < 600, f"{kind}: no step for ten minutes"
                time.sleep(0.05)
            took = time.monotonic() - begin
            log.append(
                {"kind": kind, "at": reached, "seconds": took, "repeated": reached - resumed}
            )
            write_figures(log, importing)
        disturbed.job.finish(timeout_s=7200).assert_done()
    finally:
        disturbed.cluster.cluster.shutdown()
    sys.stdout.write(f"{json.dumps(write_figures(log, importing))}\n")
    assert len(log) == COUNT
    assert not (run / "faults.jsonl").exists()
    assert len(read_metrics(run / "moce")) == len(read_metrics(whole / "moce"))
    # a checkpoint that was being written does not count, nor do the steps meanwhile
    assert max(fault["repeated"] for fault in log) <= 2 * EVERY
    assert learned(run / "moce") == learned(whole / "moce")
    assert not still_stopped(str(tmp_path))
    # whatever else ran on the machine may have slowed the imports down only later
    later = import_seconds()
    slowest = {who: max(importing[who], later[who]) for who in later}
    assert max(above_imports(fault, slowest) for fault in log) <= HANG_S


def still_stopped(mark):
    """Processes with a mark that SIGSTOP has left behind."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_stopped = process.status() == psutil.STATUS_STOPPED
            if is_stopped and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def copy_ready(finished, root):
    import shutil

    root.mkdir()
    shutil.copy(finished / "config.yaml", root)
    for name in READY:
        shutil.copytree(finished / name, root / name)


def longer(root):
    """Let a run be one of more epochs: they belong to its identity."""
    path = root / "config.yaml"
    head, stage, rest = path.read_text().partition("\nmoce:\n")
    assert "  epochs: 15" in rest
    path.write_text(head + stage + rest.replace("  epochs: 15", f"  epochs: {EPOCHS}", 1))


def percentile_95(values):
    """The smallest value that at least 95 % of the values do not exceed."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def write_figures(log, importing):
    """Sum up seconds from a fault to the next step, by kind and all; write what is known so far."""
    figures = {}
    for name in ("all", *KINDS):
        faults = [fault for fault in log if name in ("all", fault["kind"])]
        if faults:
            seconds = [fault["seconds"] for fault in faults]
            above = [above_imports(fault, importing) for fault in faults]
            figures[name] = {
                "count": len(faults),
                "median_s": round(statistics.median(seconds), 2),
                "p95_s": round(percentile_95(seconds), 2),
                "median_above_imports_s": round(statistics.median(above), 2),
                "p95_above_imports_s": round(percentile_95(above), 2),
            }
    figures |= {
        "import_s": {who: round(seconds, 2) for who, seconds in importing.items()},
        "repeated_steps": sum(fault["repeated"] for fault in log),
        "hangs": sum(above_imports(fault, importing) > HANG_S for fault in log),
    }
    if out := os.environ.get("MOCE_FAULTS_OUT"):
        Path(out).write_text(json.dumps({"faults": log, **figures}, indent=1))
    return figures


@pytest.mark.many
def test_a_killed_loader_process_costs_a_restart_and_no_image(
    start, arguments, part_of, read_metrics, finished
):
    run = part_of("ingested")
    overrides = ("data.loader_processes=1", "checkpoint.every_steps=5")
    job = start("pretrain", *arguments(run, *overrides), "--stage", "mae")
    path = run / "mae" / "metrics.jsonl"
    job.wait_until(lambda: path.exists() and path.read_text().count("\n") > 10, "ten steps")
    loaders = [c for worker in job.workers() for c in worker.children()]
    assert loaders, "there was no loader process to kill"
    loaders[0].kill()
    result = job.finish().assert_done()
    job.assert_nothing_stays()
    assert "mae: failure 1 of at most 3" in result.err and not (run / "faults.jsonl").exists()
    mine, whole = read_metrics(run / "mae"), read_metrics(finished / "mae")
    assert [(m["step"], m["loss"]) for m in mine] == [(m["step"], m["loss"]) for m in whole]
