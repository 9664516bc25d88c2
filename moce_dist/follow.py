"""A job of several workers, what they leave in files, and who tells a person how they get on."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from moce_dist.config import ParallelConfig
from moce_dist.run import write_atomic
from moce_dist.train.job import TooManyFaultsError

FAILED = "failed.json"
"""In a job's folder: the error that ended the training, and that trying again would not cure."""
LOG = "log.txt"
"""In a job's folder: what workers have to say."""
log = logging.getLogger(__name__)


class Job(Protocol):
    """Training that workers carry out together; it is sent to them, so it is small.

    It may be started again on another number of workers, and goes on from what it has saved.
    """

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def run_root(self) -> Path:
        """The run that it belongs to."""

    @property
    def folder(self) -> Path:
        """Where it writes."""

    @property
    def parallel(self) -> ParallelConfig:
        """How many workers there are to be, and in which groups."""

    @property
    def batch_size(self) -> int:
        """What every number of workers below the full one must divide."""

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Carry it out on this rank.

        Raises:
            StoppedError: `should_stop` said so on one rank, and the state is saved.
        """

    def progress(self) -> str:
        """Say in a line how far it is; "" when its log says that, or nobody knows."""


def error_left(job: Job) -> str | None:
    """Return the error that workers of a job left, if any."""
    failed = job.folder / FAILED
    return str(json.loads(failed.read_text())["error"]) if failed.exists() else None


def leave_error(job: Job, error: Exception) -> None:
    """Leave an error of the training itself, unless another try may be worth it."""
    if _is_final(error):
        write_atomic(job.folder / FAILED, json.dumps({"error": _one_line(error)}))


def _is_final(error: Exception) -> bool:
    # when a worker is lost, the others meet errors of the connection: those are worth another try
    if isinstance(error, TooManyFaultsError):
        return True
    return not isinstance(error, RuntimeError | ConnectionError | TimeoutError)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    says_enough = isinstance(error, ValueError | OSError | ArithmeticError | RuntimeError)
    return text if says_enough else f"{type(error).__name__}: {text}"


def log_to_file(job: Job, level: int) -> None:
    """Write what this process logs into the job's folder."""
    job.folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(job.folder / LOG)
    handler.setLevel(level)
    ours = logging.getLogger("moce_dist")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)


class Follower:
    """Tells a person how a job gets on, from what its workers leave in files."""

    def __init__(self, job: Job, *, every_s: float = 10.0) -> None:
        self._job, self._log = job, job.folder / LOG
        self._every_s, self._due = every_s, time.monotonic() + every_s
        self._said = job.progress()
        self._position = self._log.stat().st_size if self._log.exists() else 0

    def report(self) -> None:
        """Pass on new lines of the workers' log, and from time to time how far the training is."""
        self.report_log()
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + self._every_s
        if (line := self._job.progress()) != self._said:
            self._said = line
            log.info("%s", line)

    def report_log(self) -> None:
        """Pass on new lines of the workers' log."""
        for line in self._new_lines():
            log.info("%s", line)

    def _new_lines(self) -> list[str]:
        if not self._log.exists():
            return []
        with self._log.open("rb") as file:
            file.seek(self._position)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._position += len(whole) + len(newline)
        return whole.decode(errors="replace").splitlines()
