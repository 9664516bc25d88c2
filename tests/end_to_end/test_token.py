"""A cluster that asks for a token: jobs and nodes without it are refused, with it a job completes.

Head and nodes are what `ray start` makes on a machine each, the job is what `ray job submit` sends.
"""

import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from started import ROOT, Job

from moce_dist.launch.nodes import GROUP_LABEL
from moce_dist.parallel.groups import free_port

RAY = Path(sys.executable).parent / "ray"
READY = ("ingested", "mae", "features", "clusters", "shards")
OPEN = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}


class Guarded:
    """A head without CPUs and the nodes that have joined it, all of them `ray start`."""

    def __init__(self, folder):
        self.right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.address, self.dashboard = f"127.0.0.1:{free_port()}", free_port()
        self.url = f"http://127.0.0.1:{self.dashboard}"
        port = self.address.rpartition(":")[2]
        self._jobs = []
        self._start(
            self.right, "--head", f"--port={port}", f"--dashboard-port={self.dashboard}",
            f"--temp-dir={folder}", "--num-cpus=0", "--include-dashboard=true",
        )  # fmt: skip
        self._wait(lambda: self.status(self.right) == 200, "the head's dashboard")

    def _start(self, who, *flags):
        common = ["--block", "--node-ip-address=127.0.0.1", "--object-store-memory=268435456"]
        self._jobs.append(Job(RAY, "start", *common, *flags, env=who))
        return self._jobs[-1]

    def _wait(self, condition, what):
        end = time.monotonic() + 120
        while not condition():
            for job in (self._jobs[0], self._jobs[-1]):
                assert job.process.poll() is None, job.process.communicate()
            assert time.monotonic() < end, f"waited two minutes for: {what}"
            time.sleep(0.2)

    def join(self, who, group):
        """Start a node with one CPU and a group label."""
        label = f"--labels={GROUP_LABEL}={group}"
        return self._start(who, f"--address={self.address}", "--num-cpus=1", label)

    def join_both(self):
        """Start a node of each group with the token, one after the other: they share an address."""
        for number, group in enumerate(("g0", "g1")):
            self.join(self.right, group)
            self._wait(lambda number=number: self.nodes() == number + 2, f"the node of {group}")
        trial = ("job", "submit", "--", "true")
        self._wait(lambda: self.command(self.right, *trial)[0] == 0, "an agent that takes jobs")

    def command(self, who, *words, timeout_s=300):
        """Run `ray ...` as somebody; exit status and all that it said."""
        done = subprocess.run(
            [RAY, *words],
            env={**os.environ, **who, "RAY_API_SERVER_ADDRESS": self.url},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        return done.returncode, done.stdout + done.stderr

    def status(self, who):
        """HTTP status of the list of jobs; 0 when nobody answers."""
        token = who["RAY_AUTH_TOKEN"]
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(f"{self.url}/api/jobs/", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def nodes(self):
        """How many nodes are alive, as the head says to one who has the token."""
        status, said = self.command(self.right, "status", f"--address={self.address}")
        assert status == 0, said
        active = said.partition("Active:")[2].partition("Pending:")[0]
        return sum("node_" in line for line in active.splitlines())

    def stop(self):
        for job in self._jobs:
            job.kill_all()


@pytest.fixture
def guarded(tmp_path_factory):
    # a path of a socket is short
    folder = tmp_path_factory.mktemp("r")
    cluster = Guarded(folder)
    yield cluster
    cluster.stop()


@pytest.mark.long
def test_without_the_token_jobs_and_nodes_are_refused_and_with_it_a_job_completes(
    guarded, arguments, part_of, learned, finished
):
    run = part_of(*READY)
    pretrain = [sys.executable, ROOT / "jobs" / "pretrain.py", *arguments(run), "--stage", "moce"]
    submit = ("job", "submit", "--", *map(str, pretrain))
    for who in (OPEN, guarded.wrong):
        assert guarded.status(who) in (401, 403)
        status, said = guarded.command(who, *submit)
        assert status != 0 and "AuthenticationError" in said, said
        result = guarded.join(who, "g0").finish(timeout_s=120)
        assert result.status != 0, (result.out, result.err)
    assert guarded.nodes() == 1 and not (run / "moce").exists()
    guarded.join_both()
    status, said = guarded.command(guarded.right, *submit, timeout_s=500)
    assert status == 0 and "succeeded" in said, said
    assert "moce: 2 of 2 workers" in said
    assert learned(run / "moce") == learned(finished / "moce")


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_the_quickstart_is_submitted_to_two_labelled_nodes_with_a_token(guarded, tmp_path):
    """All that `make pretrain` runs, every command a job of its own; the nodes share the folder."""
    guarded.join_both()
    run = tmp_path / "quickstart"

    def submit(name, *words):
        command = map(str, (sys.executable, ROOT / "jobs" / f"{name}.py", *words))
        status, said = guarded.command(
            guarded.right, "job", "submit", "--", *command, timeout_s=1800
        )
        assert status == 0 and "succeeded" in said, said
        return said

    said = submit("pretrain", "--run", run)
    for stage in ("mae", "moce", "control"):
        assert f"{stage}: 2 of 2 workers" in said and (run / stage / "COMPLETE").exists()
    for task in ("digits", "silhouettes", "climate"):
        submit("transfer", "--task", task, "--run", run, "--protocol", "knn,linear")
        assert (run / "transfer" / task / "metrics.json").exists()
    submit("report", run)
    page = (run / "report.html").read_text()
    for task in ("digits", "silhouettes", "climate"):
        assert f"Results of {task}" in page, task
