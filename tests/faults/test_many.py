"""Faults over one MoCE run: four in a fixed order, and many seeded ones of all kinds.

Two raylets with a CPU each are two nodes. What is lost is brought back by whoever would bring it
back: the driver by the same command, a node by a new one. At the end the run equals the one that
nothing disturbed, bit for bit. Of the many, which `make test-faults` runs, a seed draws what
happens next and after how many further steps.

The law of repeated work: no more than one checkpoint interval is run again. A start resumes at the
newest checkpoint that is there when the old start ends, or at a newer one, and at most EVERY steps
before the last step made. While a checkpoint is being written, that is EVERY steps before it was
begun, so that the steps made since then come on top. After a drain or SIGTERM none is run again.

Two processes that import what a rank imports are timed before, because no restart is faster than
that. A stopped rank is noticed after `parallel.step_timeout_s`, SILENCE_S here.

MOCE_FAULTS says how many (50), MOCE_FAULTS_SEED the seed (0), MOCE_FAULTS_OUT a file for figures.
"""

import contextlib
import json
import math
import os
import random
import re
import shutil
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
# a checkpoint of the current step comes first
SAVED_FIRST = ("drain", "sigterm")
# so many faults that none of the kinds may be missing
ALL_KINDS_FROM = 30
# (kind, group of the victim, further steps until it comes)
FOUR = (("rank", "g0", 12), ("loader", "g1", 5), ("driver", "g0", 5), ("stop", "g1", 5))
OVERRIDES = (
    f"checkpoint.every_steps={EVERY}",
    "parallel.max_failures=1000",
    f"parallel.step_timeout_s={SILENCE_S}",
    "data.loader_processes=1",
)
# slow steps, so that few of them pass while a node is made
LONG = (*OVERRIDES, f"moce.epochs={EPOCHS}", "parallel.micro_batches=4")


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
            time.sleep(0.02)
        return not self.is_over()

    def prepare(self, kind, victim):
        """Make what takes the place of a node that will go: Ray must not place the ranks there."""
        self._gone = self.nodes[victim]
        if kind in ("drain", "node"):
            self.nodes[victim] = self.cluster.add(victim)

    def victims(self, kind, victim):
        """Wait for the processes of a kind on a node."""
        found, end = [], time.monotonic() + 10
        while not found:
            assert time.monotonic() < end, f"{kind}: there is none on {victim}"
            # one that ends meanwhile is none
            with contextlib.suppress(psutil.Error):
                found = workers_on(self.nodes[victim])
                found = loaders_of(found[0]) if found and kind == "loader" else found
        return found

    def strike(self, kind, victim):
        """Do what the fault does, and start a driver again; return when it was."""
        is_process = kind in ("rank", "stop", "loader")
        processes = self.victims(kind, victim) if is_process else []
        now = time.monotonic()
        if is_process:
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

    def endure(self, faults):
        """Strike with one fault after the other; yield what each did, as soon as it is over."""
        done = 0
        for kind, victim, further in faults:
            self.prepare(kind, victim)
            # beyond every step made so far: a driver gives up when nothing is gained
            if not self.wait_for_step(done + further):
                return
            recovery = Recovery(self.run)
            begin = self.strike(kind, victim)
            while not recovery.is_over():
                assert not self.is_over(), self.job.process.communicate()
                assert time.monotonic() - begin < 600, f"{kind}: no step for ten minutes"
                time.sleep(0.02)
            yield {"kind": kind, "seconds": time.monotonic() - begin, **recovery.figures()}
            done = recovery.done


class Recovery:
    """What a run had done when a fault ended its start, and where the next start goes on."""

    def __init__(self, run):
        self._run, self._metrics, self._log = run, run / "moce/metrics.jsonl", run / "moce/log.txt"
        self._before, self._position = inode(self._metrics), self._log.stat().st_size
        self.done = self.newest = 0

    def is_over(self):
        """Tell whether a start after the fault has logged a step; until then, watch the old one."""
        done, newest = last_step(self._run) + 1, max(checkpoints(self._run), default=0)
        # a start writes the log anew
        if inode(self._metrics) == self._before:
            self.done, self.newest = max(done, self.done), newest
            return False
        return last_step(self._run) >= self.resumed()

    def resumed(self):
        """Return the step that the next start resumed at, as it says itself; 0 if it says none."""
        with self._log.open("rb") as file:
            file.seek(self._position)
            said = re.findall(rb"moce: resuming at step (\d+) of", file.read())
        return min(map(int, said), default=0)

    def figures(self):
        """Return steps done, newest checkpoint, where it resumed, and what the law speaks of."""
        # the first step after it has been made, so that it has been begun
        begun = (self.done - 1) // EVERY * EVERY
        return {
            "done": self.done,
            "newest": self.newest,
            "resumed": self.resumed(),
            "repeated": self.done - self.resumed(),
            "while_writing": self.done - begun if self.newest < begun else 0,
        }


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


def go_through(faults, run, begin, note=lambda log: None):
    """Run stage moce with faults to its end; return what each did, and note it meanwhile."""
    disturbed, log = Disturbed(run, begin), []
    try:
        for fault in disturbed.endure(faults):
            log.append(fault)
            note(log)
        disturbed.job.finish(timeout_s=7200).assert_done()
    finally:
        disturbed.cluster.cluster.shutdown()
    return log


def assert_little_repeated(log):
    """Fail unless the law of repeated work holds for every fault; see the top."""
    for fault in log:
        assert fault["resumed"] >= fault["newest"], fault
        allowed = EVERY + fault["while_writing"]
        assert 0 <= fault["repeated"] <= (0 if fault["kind"] in SAVED_FIRST else allowed), fault


def a_fault(**differing):
    usual = {"kind": "rank", "done": 27, "newest": 20, "resumed": 20, "repeated": 7}
    return {**usual, "while_writing": 0, **differing}


def test_the_law_of_repeated_work_finds_what_breaks_it():
    late = {"newest": 10, "resumed": 10, "repeated": 17, "while_writing": 7}
    assert_little_repeated([a_fault(), a_fault(**late), a_fault(kind="drain", repeated=0)])
    for planted in (
        # an older checkpoint than the newest, one that was never written, a drain without a save
        a_fault(resumed=10, repeated=17),
        a_fault(**late | {"newest": 0, "resumed": 0, "repeated": 27}),
        a_fault(kind="drain"),
    ):
        with pytest.raises(AssertionError):
            assert_little_repeated([planted])


def assert_no_trace(log, run, whole, learned, mark):
    assert_little_repeated(log)
    assert not (run / "faults.jsonl").exists()
    assert learned(run / "moce") == learned(whole / "moce")
    assert not still_stopped(mark)


@pytest.mark.timeout(1200)
def test_four_faults_leave_no_trace(
    start, arguments, part_of, finished, tmp_path, learned, monkeypatch
):
    # inherited by all of the nodes' processes
    monkeypatch.setenv(MARK, str(tmp_path))
    run = part_of(*READY)
    command = (*arguments(run, *OVERRIDES), "--stage", "moce")
    log = go_through(FOUR, run, lambda job, env: start(job, *command, env=env))
    assert [fault["kind"] for fault in log] == [kind for kind, *_ in FOUR]
    assert_no_trace(log, run, finished, learned, str(tmp_path))


@pytest.mark.many
@pytest.mark.timeout(0)
def test_many_faults_leave_no_trace(
    start, arguments, part_of, finished, tmp_path, learned, monkeypatch
):
    monkeypatch.setenv(MARK, str(tmp_path))
    command = lambda run: (*arguments(run, *LONG), "--stage", "moce")  # noqa: E731
    whole, run = tmp_path / "whole", part_of(*READY)
    copy_ready(finished, whole)
    for root in (whole, run):
        longer(root)
    start("pretrain", *command(whole)).finish(timeout_s=7200).assert_done()
    importing = import_seconds()
    draws = random.Random(int(os.environ.get("MOCE_FAULTS_SEED", "0")))
    faults = [
        (draws.choice(KINDS), draws.choice(GROUPS), draws.randint(1, 12)) for _ in range(COUNT)
    ]
    log = go_through(
        faults,
        run,
        lambda job, env: start(job, *command(run), env=env),
        note=lambda log: write_figures(log, importing),
    )
    sys.stdout.write(f"{json.dumps(write_figures(log, importing))}\n")
    assert [fault["kind"] for fault in log] == [kind for kind, *_ in faults]
    assert len(log) < ALL_KINDS_FROM or {fault["kind"] for fault in log} == set(KINDS)
    assert_no_trace(log, run, whole, learned, str(tmp_path))
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
        "repeated_most": max(fault["repeated"] for fault in log),
        "hangs": sum(above_imports(fault, importing) > HANG_S for fault in log),
    }
    if out := os.environ.get("MOCE_FAULTS_OUT"):
        Path(out).write_text(json.dumps({"faults": log, **figures}, indent=1))
    return figures


@pytest.mark.many
def test_a_killed_loader_process_costs_a_restart_and_no_image(
    start, arguments, part_of, learned, finished
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
    assert learned(run / "mae") == learned(finished / "mae")
