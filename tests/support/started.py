"""Real jobs on a few hundred real images: started as a user starts them, killed as a machine dies.

Fixtures of tests/end_to_end and tests/faults, which share one finished run, whichever process of
the session they run in.

Every process that a job leaves behind carries the job's mark in its environment, Ray's own
processes and the decoding processes of a worker too; so they are found however they were started.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from in_process import run_here

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 500
MARK = "MOCE_TEST_MARK"
CONFIG = """
data: {image_size: 32, holdout_fraction: 0.05, shard_bytes: 65536, loader_processes: 0}
model: {size: tiny, width: 32, depth: 4, num_heads: 2, patch_size: 8,
        decoder_width: 16, decoder_depth: 1, decoder_num_heads: 2}
moe: {num_experts: 4, layers: [1, 3]}
cluster: {num_clusters: 8}
mae: {epochs: 20, warmup_epochs: 1, batch_size: 32, base_lr: 1e-3}
moce: {epochs: 15, warmup_epochs: 1, batch_size: 32, base_lr: 1e-3}
parallel: {num_workers: 2, num_groups: 2, precision: fp32, replan_steps: 7}
checkpoint: {every_steps: 20}
logging: {every_steps: 1, tensorboard: false}
"""


def heed_interrupts():
    """Undo what a shell does to its background jobs, which is to ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Job:
    """One job of jobs/, or a torchrun of it, as a process with a mark."""

    def __init__(self, *command, env=None):
        self.mark = uuid.uuid4().hex
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        environment |= {MARK: self.mark, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= env or {}
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=heed_interrupts,  # noqa: PLW1509 - sets a signal, takes no lock
        )

    def finish(self, timeout_s=TIMEOUT_S):
        """Wait for the end; return exit status, stdout, stderr."""
        try:
            out, err = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill_all()
            out, err = self.process.communicate()
            pytest.fail(f"the job did not end within {timeout_s} s:\n{out}\n{err}")
        return Result(self.process.returncode, out, err)

    def descendants(self):
        """All live processes that carry the mark, the job itself left out."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_ours = process.environ().get(MARK) == self.mark
                is_alive = process.status() != psutil.STATUS_ZOMBIE
                if is_ours and is_alive and process.pid != self.process.pid:
                    found.append(process)
        return found

    def workers(self, name="RayTrainWorker"):
        """Ray's processes that do the work, by the name that Ray gives them."""
        return [p for p in self.descendants() if name in " ".join(_command(p))]

    def helpers(self):
        """Command lines of Ray's processes and of Python processes that the job started.

        Libraries look for others at import (`ldconfig`): such short processes are not meant, nor
        is a fork of the job itself on its way to one.
        """
        own = tuple(self.process.args)
        commands = {tuple(_command(p)) for p in self.descendants()} - {own, ()}
        return {c for c in commands if Path(c[0]).name.startswith(("python", "ray", "gcs_server"))}

    def wait_until(self, condition, what, timeout_s=TIMEOUT_S):
        """Wait for a moment in the job's life."""
        end = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill_all()
                pytest.fail(f"the job was over before: {what}\n{self.process.communicate()}")
            time.sleep(0.02)

    def assert_nothing_stays(self, timeout_s=20):
        """Fail when processes of the job outlive it by more than some seconds."""
        end = time.monotonic() + timeout_s
        while (left := self.descendants()) and time.monotonic() < end:
            time.sleep(0.2)
        names = [" ".join(_command(p))[:120] for p in left]
        self.kill_all()
        assert not names

    def kill_all(self):
        """End the job and everything that it started."""
        for process in [self.process, *self.descendants()]:
            with contextlib.suppress(psutil.Error, OSError):
                process.send_signal(signal.SIGKILL)


def _command(process):
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


class Result:
    """How a job ended."""

    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err

    @property
    def error(self):
        """The last line of stderr, which is the one that matters."""
        lines = self.err.strip().splitlines()
        return lines[-1] if lines else ""

    def assert_done(self):
        """Fail with all that the job said unless it ended well."""
        assert self.status == 0, f"exit {self.status}\n{self.out}\n{self.err}"
        return self

    def assert_refused(self, status, *parts):
        """Fail unless the job ended with `status` and one error line that has all `parts`."""
        assert self.status == status, f"exit {self.status}\n{self.out}\n{self.err}"
        assert self.error.startswith("error: "), self.err
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert errors == [self.error], self.err
        assert "Traceback" not in self.err, self.err
        for part in parts:
            assert str(part) in self.error, f"{part!r} is not in {self.error!r}"
        return self


@contextlib.contextmanager
def ending_jobs():
    """Start jobs by their command line; those that still run at the end are ended."""
    jobs = []

    def begin(*command, env=None):
        jobs.append(Job(sys.executable, *command, env=env))
        return jobs[-1]

    try:
        yield begin
    finally:
        for job in jobs:
            job.kill_all()


@pytest.fixture
def start():
    """Start jobs in the background; whatever a test leaves running is ended after it."""
    with ending_jobs() as begin:
        yield lambda job, *rest, env=None: begin(ROOT / "jobs" / f"{job}.py", *rest, env=env)


@pytest.fixture(scope="session")
def run_job():
    """Run a job to its end; nothing of it stays, however it ended."""

    def run(job, *arguments, env=None):
        with ending_jobs() as begin:
            return begin(ROOT / "jobs" / f"{job}.py", *arguments, env=env).finish()

    return run


@pytest.fixture(scope="session")
def ask():
    """Run a job that is refused, or only plans, in this process: no interpreter has to start."""

    def run(job, *arguments):
        done = run_here(job, *arguments)
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def start_torchrun():
    """Start jobs/pretrain.py on several processes without Ray; ended after the test."""
    with ending_jobs() as begin:

        def begin_ranks(num_processes, *arguments, flags=("--standalone",)):
            launcher = ["-m", "torch.distributed.run", *flags]
            command = [f"--nproc-per-node={num_processes}", "--", ROOT / "jobs" / "pretrain.py"]
            return begin(*launcher, *command, *arguments)

        yield begin_ranks


@pytest.fixture
def torchrun(start_torchrun):
    """Run jobs/pretrain.py on several processes without Ray to its end."""
    return lambda num_processes, *arguments: start_torchrun(num_processes, *arguments).finish()


@pytest.fixture(scope="session")
def shared_once(tmp_path_factory):
    """Make a folder once for all processes of the session: `shared_once(name, make)`, its path."""
    base = tmp_path_factory.getbasetemp()
    # each process of a distributed session has a folder in that of the session
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name, make):
        folder, done = root / name, root / f"{name}.made"
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                # whoever was here before has failed, and said so
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                done.touch()
        return folder

    return once


def _write_images(root):
    from moce_dist.samples import sets

    for name in ("digits", "silhouettes"):
        images = sets.task(name).train
        (root / name).mkdir(parents=True)
        for number in range(150):
            image = images[number * len(images) // 150]
            (root / name / f"{number:04d}.png").write_bytes(image.content)


@pytest.fixture(scope="session")
def images(shared_once):
    """300 real images in two class folders: handwritten digits and silhouettes of animals."""
    return shared_once("images", _write_images)


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """A configuration file: width 32, depth 4, 4 experts in 2 layers, 2 groups on 2 workers."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def arguments(config, images):
    """Arguments of jobs/pretrain.py for a run directory, with overrides."""

    def make(run, *overrides, source=None):
        named = source or f"folder:{images}"
        pairs = [x for o in (f"data.source={named}", *overrides) for x in ("--set", o)]
        return ["--config", config, "--run", run, *pairs]

    return make


@pytest.fixture(scope="session")
def finished(shared_once, run_job, arguments):
    """A run that nothing interrupted, on 2 Ray Train workers; nobody may change it."""
    return shared_once("finished", lambda root: run_job("pretrain", *arguments(root)).assert_done())


@pytest.fixture
def part_of(finished, tmp_path):
    """Copy the named artefacts of the finished run into a new run directory."""

    def copy(*names):
        root = tmp_path / "run"
        root.mkdir()
        shutil.copy(finished / "config.yaml", root)
        for name in names:
            shutil.copytree(finished / name, root / name)
        return root

    return copy


@pytest.fixture(scope="session")
def read_metrics():
    """Lines of a stage's metrics.jsonl; their steps must increase."""

    def read(folder):
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        metrics = [json.loads(line) for line in lines]
        steps = [line["step"] for line in metrics]
        assert all(a < b for a, b in pairwise(steps)), steps
        return metrics

    return read


@pytest.fixture(scope="session")
def learned(read_metrics):
    """What a stage learned: metrics without times, and the last checkpoint's digests."""

    def read(folder):
        timed = ("images_per_s", "seconds", "data_wait_s", "save_s", "checkpoint_s")
        metrics = [{k: v for k, v in m.items() if k not in timed} for m in read_metrics(folder)]
        last = max(folder.glob("checkpoints/step_*"))
        digests = json.loads((last / "manifest.json").read_text())["files"]
        return {"metrics": metrics, "checkpoint": last.name, "digests": digests}

    return read
