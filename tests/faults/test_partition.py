"""Two hosts that lose sight of each other: the run goes on where its driver is and learns the same.

A host is a network namespace with a raylet and a label; their link is taken down, and comes back
while the run goes on without the other host, whose rank must not write any more.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from benches.exchange import missing, two_hosts
from started import ROOT, Job

from moce_dist.launch.nodes import GROUP_LABEL

from .test_elastic import READY, assert_learned_the_same, last_step

RAY = Path(sys.executable).parent / "ray"
HEAD = "10.77.0.1:6399"
HANG_S = 300

pytestmark = [
    pytest.mark.many,
    pytest.mark.skipif(missing() is not None, reason=f"NOT TESTED: {missing()}"),
]


def on(host, *command):
    """Start a process on a host."""
    env = {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": HEAD}
    return Job("ip", "netns", "exec", host, *command, env=env)


def raylet(host, number, *flags):
    return on(
        host, RAY, "start", "--block", f"--node-ip-address=10.77.0.{number}", "--num-cpus=1",
        f"--labels={GROUP_LABEL}=g{number - 1}", "--object-store-memory=268435456", *flags,
    )  # fmt: skip


def turn(host, how):
    subprocess.run(["ip", "-n", host, "link", "set", "eth0", how], check=True)


def alive(host):
    """How many nodes the head sees, asked on a host that reaches it."""
    done = on(host, RAY, "status", f"--address={HEAD}").finish()
    return sum("node_" in x for x in done.out.partition("Pending:")[0].splitlines())


def test_a_run_goes_on_beside_a_host_that_is_cut_off_and_comes_back(
    arguments, part_of, finished, read_metrics
):
    run, jobs = part_of(*READY), []
    with two_hosts() as hosts:
        here, there = hosts.names
        try:
            jobs.append(raylet(here, 1, "--head", "--port=6399", "--include-dashboard=false"))
            jobs[0].wait_until(lambda: alive(here) == 1, "the head")
            jobs.append(raylet(there, 2, f"--address={HEAD}"))
            jobs[0].wait_until(lambda: alive(here) == 2, "the other host")
            flags = arguments(
                run, "parallel.min_workers=1", "parallel.step_timeout_s=15",
                "parallel.max_failures=0", "parallel.micro_batches=4",
            )  # fmt: skip
            job = on(here, sys.executable, ROOT / "jobs" / "pretrain.py", *flags, "--stage", "moce")
            jobs.append(job)
            job.wait_until(lambda: last_step(run) >= 30, "step 30")
            log = run / "moce" / "metrics.jsonl"
            before, begin = log.stat().st_ino, time.monotonic()
            turn(there, "down")
            # a start writes the log anew
            job.wait_until(
                lambda: log.stat().st_ino != before and last_step(run) > 30, "a step without it"
            )
            took = time.monotonic() - begin
            turn(there, "up")
            result = job.finish().assert_done()
        finally:
            for each in reversed(jobs):
                each.kill_all()
    sys.stdout.write(f"from the cut to the next step: {took:.1f} s\n")
    assert "moce: 2 of 2 workers" in result.err and "moce: 1 of 2 workers" in result.err
    assert "moce: preemption 1 of at most 1000" in result.err
    assert_learned_the_same(run, finished, read_metrics)
    assert took < HANG_S
