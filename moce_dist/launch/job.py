"""A job on workers: why it may fail, how it is followed, how it is asked to stop."""

import errno
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from moce_dist.cli import FinalError
from moce_dist.run.names import one_line, typed
from moce_dist.settings import ConfigError
from moce_dist.train.job import Job, StageJob, TooManyFaultsError
from moce_dist.train.pulse import Pulse

LOG = "log.txt"
"""File in a job's folder with the workers' log."""
log = logging.getLogger(__name__)
_EVERY_S = 10.0
_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
_STOP_WAIT_S = 60
_OF_A_NETWORK = {
    getattr(errno, name)
    for name in ("ENETDOWN", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH", "ESTALE", "EIO")
}
_FULL = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)]


@dataclass(frozen=True)
class PretrainJob(StageJob):
    """A stage of pre-training as a job of workers."""

    def run(self, pulse: Pulse) -> None:
        """Train the stage to its end; collective over all ranks."""
        # the driver needs no DeepSpeed
        from moce_dist.train.loop import pretrain

        pretrain(self, pulse)


@dataclass(frozen=True)
class Failure:
    """What ended a worker, in a line."""

    text: str
    kind: type[ConfigError | FinalError | RuntimeError] | None
    """The error that it is for the driver; None if a retry may help."""


def failure_of(error: Exception) -> Failure:
    """Tell errors of the training itself from those that a lost worker causes in the others.

    A wrong request, figures that are not finite, too many unreadable images, a full or read-only
    disk and too little shared memory are final. A broken connection may recover, and so may most
    RuntimeErrors, which torch raises for many causes. Other errors end the job, and may be cured by
    other machines.
    """
    says_enough = isinstance(error, ValueError | OSError | ArithmeticError | RuntimeError)
    text = one_line(error) if says_enough else typed(error)
    if isinstance(error, ConfigError):
        return Failure(text, ConfigError)
    if isinstance(error, ArithmeticError | TooManyFaultsError) or any(s in text for s in _FULL):
        return Failure(text, FinalError)
    is_lost = isinstance(error, RuntimeError | ConnectionError | TimeoutError)
    if is_lost or (isinstance(error, OSError) and error.errno in _OF_A_NETWORK):
        return Failure(text, None)
    return Failure(text, RuntimeError)


@contextmanager
def log_to_file(job: Job, level: int) -> Iterator[None]:
    """Also write this process's log into the job's folder."""
    job.folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(job.folder / LOG)
    handler.setLevel(level)
    ours = logging.getLogger("moce_dist")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        handler.close()


class Follower:
    """Logs the progress of a job, from the files that its workers write."""

    def __init__(self, job: Job) -> None:
        self._job, self._log = job, job.folder / LOG
        self._due = time.monotonic() + _EVERY_S
        self._said = job.progress()
        self._position = self._log.stat().st_size if self._log.exists() else 0

    def report(self) -> None:
        """Pass on new lines of the workers' log, and every ten seconds the progress."""
        self.report_log()
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _EVERY_S
        # after a restart there may be no line yet
        if (line := self._job.progress()) and line != self._said:
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


def short_stop(environment: Mapping[str, str]) -> str:
    """Warn if `ray job stop` would kill this job before its state is saved; else return "".

    Ray's default is 3 s between SIGTERM and SIGKILL.
    """
    wait = environment.get(_STOP_WAIT, "3")
    is_long = wait.isdecimal() and int(wait) >= _STOP_WAIT_S
    if is_long or "RAY_JOB_CONFIG_JSON_ENV_VAR" not in environment:
        return ""
    return (
        f"{_STOP_WAIT} ({wait}) is less than {_STOP_WAIT_S} s: `ray job stop` kills this job "
        "before a large checkpoint is written; set it to 120 in the head's environment, or in "
        "the env_vars of the job's runtime environment"
    )


@contextmanager
def heed_sigterm() -> Iterator[Callable[[], bool]]:
    """Catch SIGTERM during the block; yield a function that tells whether it came.

    If it came and the block ends without an error, it is passed on to the handler of before.
    """
    # no Event: a handler that interrupts itself would wait for its lock
    asked: list[int] = []

    def is_asked() -> bool:
        return bool(asked)

    if threading.current_thread() is not threading.main_thread():
        yield is_asked
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    try:
        yield is_asked
    finally:
        # None if the earlier handler was not set from Python
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
    if asked:
        signal.raise_signal(signal.SIGTERM)
