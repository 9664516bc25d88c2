"""What a submitted job meets: its wrapper, a head without a GPU, and a head that goes.

The clusters are Ray's own, of raylets on this machine.
"""

import json
import signal
import sys
import time
from pathlib import Path

import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ray.job_submission import JobStatus, JobSubmissionClient

from moce_dist.launch.nodes import GROUP_LABEL
from moce_dist.parallel.groups import free_port

ROOT = Path(__file__).parents[2]
READY = ("ingested", "mae", "features", "clusters", "shards")


@pytest.fixture
def head(monkeypatch):
    """A head without CPUs, and its dashboard."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # on the usual port the agent of another test's cluster may listen, which takes none of its jobs
    agent = {"dashboard_agent_listen_port": free_port(), "dashboard_port": free_port()}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True, **agent}
    )
    yield cluster
    cluster.shutdown()


def finish(client, *words, timeout_s=200):
    """Submit a command as KubeRay does, wait for its end; status and log."""
    address = {"RAY_API_SERVER_ADDRESS": client.get_address()}
    command = " ".join(str(word) for word in (sys.executable, ROOT / "k8s" / "run.py", *words))
    job = client.submit_job(entrypoint=command, runtime_env={"env_vars": address})
    end = time.monotonic() + timeout_s
    while not client.get_job_status(job).is_terminal() and time.monotonic() < end:
        time.sleep(0.5)
    return client.get_job_status(job), client.get_job_logs(job)


def test_only_what_another_try_would_not_cure_ends_a_submitted_job_for_good(head, tmp_path):
    client = JobSubmissionClient(f"http://{head.webui_url}")
    pretrain = ROOT / "jobs" / "pretrain.py"
    wrong = finish(client, pretrain, "--set", "moe.experts=4")
    # KubeRay takes a stopped job for complete, and tries a failed one again
    assert wrong[0] == JobStatus.STOPPED, wrong
    assert "error: moe.experts = 4: unknown key" in wrong[1]
    assert "the request is wrong, so the job is stopped and not tried again" in wrong[1]
    script = tmp_path / "job.py"
    script.write_text("raise SystemExit(3)")
    final = finish(client, script)
    assert final[0] == JobStatus.STOPPED, final
    assert "another try would fail in the same way, so the job is stopped" in final[1]
    script.write_text("raise SystemExit(1)")
    assert finish(client, script)[0] == JobStatus.FAILED
    quickstart = ("--config", ROOT / "configs" / "quickstart.yaml")
    right = finish(client, pretrain, *quickstart, "--run", tmp_path / "run", "--dry-run")
    assert right[0] == JobStatus.SUCCEEDED and str(tmp_path / "run") in right[1]


def test_a_head_without_a_gpu_leaves_the_images_of_a_task_to_a_worker(
    head, start, part_of, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    # said to be there: what it would compute, the node's processor does
    head.add_node(num_cpus=2, num_gpus=1)
    run = part_of(*READY, "moce")
    few = [f"transfer.{part}" for part in ("max_train=64", "finetune.epochs=1")]
    sets = [word for part in (*few, "parallel.num_workers=1") for word in ("--set", part)]
    command = ("--run", run, "--task", "digits", "--protocol", "knn,finetune", "--backbone", "moce")
    job = start("transfer", *command, *sets, env={"RAY_ADDRESS": head.address})
    result = job.finish().assert_done()
    log = (run / "transfer" / "digits" / "log.txt").read_text()
    for protocol in ("knn", "finetune"):
        (said,) = [line for line in log.splitlines() if line.startswith(f"moce {protocol} seed 0")]
        assert result.err.count(said) == 1
    metrics = json.loads((run / "transfer" / "digits" / "metrics.json").read_text())
    assert {row["protocol"] for row in metrics["results"]} == {"knn", "finetune"}


def test_a_driver_whose_node_drains_has_its_workers_save_and_leaves(
    head, start, arguments, part_of, tmp_path
):
    head.add_node(num_cpus=1, labels={GROUP_LABEL: "g0"})
    head.add_node(num_cpus=1, labels={GROUP_LABEL: "g1"})
    run = part_of(*READY)
    command = (*arguments(run, "checkpoint.every_steps=1000"), "--stage", "moce")
    job = start("pretrain", *command, env={"RAY_ADDRESS": head.address})
    metrics = run / "moce" / "metrics.jsonl"
    job.wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 10, "a step")
    assert asked_for(head) == [{"CPU": 1}, {"CPU": 1}]
    # what a pod's SIGTERM does to the head: `ray start --block` announces its end
    drain(head, head.head_node)
    result = job.finish()
    assert result.status == 128 + signal.SIGTERM, result.err
    assert result.error.startswith("stopped: this node drains; moce: state saved at step")
    assert len(list((run / "moce" / "checkpoints").glob("step_*"))) == 1
    assert asked_for(head) == []


def asked_for(cluster):
    """What an autoscaler is asked to bring, as Ray keeps it."""
    kept = GcsClient(address=cluster.address).internal_kv_get(b"autoscaler_resource_request")
    return json.loads(kept)


def drain(cluster, node, seconds=150):
    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    deadline_ms = int((time.time() + seconds) * 1000)
    GcsClient(address=cluster.address).drain_node(node.node_id, reason, "test", deadline_ms)
