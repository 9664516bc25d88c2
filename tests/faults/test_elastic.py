"""Elastic and failing workers on real nodes: raylets that a test starts, kills and drains.

A node is a raylet with one CPU and a label, so two nodes are two places. What is learned may differ
from the uninterrupted run of two workers by rounding only.
"""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster
from started import Job

from moce_dist.launch.nodes import GROUP_LABEL

RAY = Path(sys.executable).parent / "ray"
READY = ("ingested", "mae", "features", "clusters", "shards")
# as in k8s/base/raycluster.yaml
DRAIN = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "120"}


class Nodes:
    """A cluster: a head without CPUs, and nodes that come and go."""

    def __init__(self):
        head = {"num_cpus": 0, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)

    def add(self, group, cpus=1):
        return self.cluster.add_node(num_cpus=cpus, labels={GROUP_LABEL: group})

    def drain(self, node, seconds):
        """Announce the end of a node, as its SIGTERM handler does in Kubernetes."""
        subprocess.run(
            [
                RAY, "drain-node", "--address", self.cluster.address, "--node-id", node.node_id,
                "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test",
                "--deadline-remaining-seconds", str(seconds),
            ],
            check=True,
            capture_output=True,
        )  # fmt: skip


def raylet(node):
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def workers_on(node):
    return [p for p in raylet(node).children() if "RayTrainWorker" in " ".join(p.cmdline())]


def lose(node):
    """End a node as the loss of its machine does: with everything that runs on it, at once."""
    first = raylet(node)
    # found before, because children of a dead process are nobody's
    for process in (first, *first.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture
def nodes(monkeypatch):
    # a token that lies in the home directory must not make the head refuse the others
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    found = Nodes()
    yield found
    found.cluster.shutdown()


@pytest.fixture
def join(nodes):
    """Start nodes as a worker's pod does: by `ray start --block`, which drains upon SIGTERM."""
    started = []

    def begin(group):
        command = [
            RAY, "start", "--block", f"--address={nodes.cluster.address}", "--num-cpus=1",
            "--node-ip-address=127.0.0.1", f"--labels={GROUP_LABEL}={group}",
            "--object-store-memory=268435456",
        ]  # fmt: skip
        started.append(Job(*command, env=DRAIN))
        return started[-1]

    yield begin
    for job in started:
        job.kill_all()


@pytest.fixture
def pretrain(nodes, start, arguments):
    """Start stage moce of a run on the nodes."""

    def begin(run, *overrides):
        command = (*arguments(run, *overrides), "--stage", "moce")
        return start("pretrain", *command, env={"RAY_ADDRESS": nodes.cluster.address})

    return begin


def last_step(run):
    path = run / "moce" / "metrics.jsonl"
    return path.read_text().count("\n") - 1 if path.exists() else -1


def checkpoints(run):
    return sorted(int(p.name[5:]) for p in (run / "moce" / "checkpoints").glob("step_*"))


def assert_learned_the_same(run, finished, read_metrics):
    """Every step once, in order; losses to rounding, the routing tables exactly."""
    mine, whole = read_metrics(run / "moce"), read_metrics(finished / "moce")
    assert [m["step"] for m in mine] == [m["step"] for m in whole]
    for one, other in zip(mine, whole, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["images_per_expert"] == other["images_per_expert"]
    tables = sorted((finished / "moce" / "routing").iterdir())
    assert tables
    for path in tables:
        assert (run / "moce" / "routing" / path.name).read_text() == path.read_text()


def test_a_lost_node_leaves_a_smaller_run_that_learns_the_same(
    nodes, pretrain, part_of, finished, read_metrics
):
    nodes.add("g0")
    victim, run = nodes.add("g1"), part_of(*READY)
    job = pretrain(run, "parallel.min_workers=1", "parallel.max_failures=0")
    job.wait_until(lambda: last_step(run) >= 30, "step 30")
    assert len(workers_on(victim)) == 1
    lose(victim)
    result = job.finish().assert_done()
    assert "moce: 2 of 2 workers" in result.err and "moce: 1 of 2 workers" in result.err
    assert "moce: preemption 1 of at most 1000" in result.err
    assert_learned_the_same(run, finished, read_metrics)


@pytest.mark.long
def test_a_node_that_is_lost_before_its_workers_arrive_is_no_failure_of_them(
    nodes, pretrain, part_of
):
    nodes.add("g0")
    victim, run = nodes.add("g1"), part_of(*READY)
    job = pretrain(run, "parallel.min_workers=1", "parallel.max_failures=0")
    # the workers' processes exist and import for seconds before they arrive
    job.wait_until(lambda: workers_on(victim), "a worker on the node")
    lose(victim)
    result = job.finish().assert_done()
    assert "moce: preemption 1 of at most 1000" in result.err and last_step(run) == 134


@pytest.mark.long
def test_a_draining_node_gets_a_checkpoint_first_and_another_start_takes_all_nodes(
    nodes, pretrain, part_of, finished, read_metrics
):
    nodes.add("g0")
    victim, run = nodes.add("g1"), part_of(*READY)
    job = pretrain(run, "parallel.min_workers=1", "parallel.max_failures=0", "checkpoint.keep=9")
    job.wait_until(lambda: last_step(run) >= 25, "step 25")
    nodes.drain(victim, seconds=120)
    job.wait_until(lambda: set(checkpoints(run)) - {20, 40, 60, 80, 100, 120}, "a checkpoint")
    (saved,) = set(checkpoints(run)) - {20, 40, 60, 80, 100, 120}
    job.wait_until(lambda: last_step(run) > saved, "going on alone")
    job.process.send_signal(signal.SIGTERM)
    result = job.finish()
    assert result.status == 128 + signal.SIGTERM, result.err
    assert result.error.startswith("stopped: SIGTERM; moce: state saved at step")
    assert "moce: preemption 1 of at most 1000: moce: state saved at step" in result.err
    assert f"moce: resuming at step {saved} of" in result.err
    assert "moce: 1 of 2 workers" in result.err
    nodes.add("g1")
    result = pretrain(run, "parallel.min_workers=1").finish().assert_done()
    assert "moce: 2 of 2 workers" in result.err and "moce: 1 of 2 workers" not in result.err
    assert_learned_the_same(run, finished, read_metrics)


@pytest.mark.long
def test_sigterm_to_a_node_saves_the_step_and_a_new_node_goes_on_with_the_same_bits(
    nodes, join, pretrain, part_of, finished, learned
):
    nodes.add("g0")
    victim, run = join("g1"), part_of(*READY)
    job = pretrain(run, "parallel.max_failures=0", "checkpoint.keep=9")
    job.wait_until(lambda: last_step(run) >= 10, "step 10")
    victim.process.terminate()
    join("g1")
    result = job.finish().assert_done()
    said = r"moce: preemption 1 of at most 1000: moce: state saved at step (\d+) of 135"
    (saved,) = re.findall(said, result.err)
    assert f"moce: resuming at step {saved} of 135" in result.err
    assert int(saved) in checkpoints(run)
    assert "preemption 2 of" not in result.err and "1 of 2 workers" not in result.err
    assert learned(run / "moce") == learned(finished / "moce")
    # it goes as soon as it is idle, before its time is over
    assert "Local node finished draining" in victim.finish(timeout_s=100).err
    victim.assert_nothing_stays()


@pytest.mark.long
def test_a_node_that_comes_back_is_taken_in(nodes, pretrain, part_of, finished, read_metrics):
    nodes.add("g0")
    run = part_of(*READY)
    # one image at a time makes steps slow: the driver looks for more room every half minute
    job = pretrain(run, "parallel.min_workers=1", "parallel.micro_batches=16")
    job.wait_until(lambda: last_step(run) >= 1, "a step")
    nodes.add("g1")
    result = job.finish().assert_done()
    assert "there is room for more workers" in result.err
    assert "moce: 2 of 2 workers" in result.err and "moce: preemption" not in result.err
    assert_learned_the_same(run, finished, read_metrics)


@pytest.mark.long
def test_workers_that_keep_dying_exceed_the_budget_of_failures(nodes, pretrain, part_of):
    nodes.add("g0")
    victim, run = nodes.add("g1"), part_of(*READY)
    job = pretrain(run, "parallel.max_failures=1", "checkpoint.every_steps=5")
    for _ in range(2):
        step = last_step(run)
        job.wait_until(lambda step=step: last_step(run) > step and workers_on(victim), "training")
        workers_on(victim)[0].kill()
        time.sleep(3)
    job.finish().assert_refused(1, "moce: 2 failures, more than parallel.max_failures (1) allows")


def test_nodes_without_room_end_in_an_error_that_names_them(nodes, pretrain, part_of):
    nodes.add("g0", cpus=2)
    nodes.add("g1", cpus=1)
    run, begin = part_of(*READY), time.monotonic()
    job = pretrain(run, "parallel.num_workers=4", "parallel.start_timeout_s=8")
    job.finish().assert_refused(
        1, "moce: no room within parallel.start_timeout_s (8 s)",
        f"2 values of the node label {GROUP_LABEL} are needed, each with 2 free CPU",
        f"{GROUP_LABEL}=g0 on ", "has 2 free CPU", f"{GROUP_LABEL}=g1 on ", "has 1 free CPU",
    )  # fmt: skip
    assert time.monotonic() - begin < 400


@pytest.mark.long
def test_sigterm_under_torchrun_saves_and_the_same_command_goes_on(
    start_torchrun, torchrun, arguments, part_of, learned, finished
):
    run = part_of(*READY)
    command = (*arguments(run), "--stage", "moce")
    job = start_torchrun(2, *command)
    job.wait_until(lambda: last_step(run) >= 25, "step 25")
    job.process.terminate()
    result = job.finish()
    job.assert_nothing_stays()
    (saved,) = set(checkpoints(run)) - {20, 40, 60, 80, 100, 120}
    said = f"stopped: moce: state saved at step {saved} of 135; the same command continues"
    # torchrun itself ends by an exception, whatever the status of its ranks
    assert result.status == 1 and result.err.splitlines().count(said) == 2, result.err
    torchrun(2, *command).assert_done()
    assert learned(run / "moce") == learned(finished / "moce")


@pytest.mark.long
def test_a_lost_node_leaves_a_smaller_fit_that_goes_on(nodes, start, part_of, images, tmp_path):
    for path in images.glob("*/*.png"):
        folder = tmp_path / ("val" if int(path.stem) % 3 == 0 else "train") / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    nodes.add("g0")
    victim, run = nodes.add("g1"), part_of(*READY, "moce")
    overrides = (
        "parallel.min_workers=1", "parallel.max_failures=0", "transfer.save_every_steps=20",
        "transfer.finetune.epochs=12", "transfer.finetune.batch_size=16",
    )  # fmt: skip
    flags = ["--run", run, "--task", "imagefolder", "--data", tmp_path, "--protocol", "finetune"]
    flags += ["--backbone", "moce", *(x for o in overrides for x in ("--set", o))]
    job = start("transfer", *flags, env={"RAY_ADDRESS": nodes.cluster.address})
    folder = run / "transfer" / "imagefolder"
    state = folder / "models" / "moce-finetune-0" / "state.safetensors"
    job.wait_until(state.exists, "a saved state")
    assert len(workers_on(victim)) == 1
    lose(victim)
    result = job.finish().assert_done()
    assert "2 of 2 workers" in result.err and "1 of 2 workers" in result.err
    assert "preemption 1 of at most 1000" in result.err and "goes on after step" in result.err
    (row,) = json.loads((folder / "metrics.json").read_text())["results"]
    assert row["value"] > 0.5
