"""What the workers of a stage leave in files, and who reads it to tell a person how they get on."""

import json
import logging
import time
from typing import Any

from moce_dist.run import read_jsonl, write_atomic
from moce_dist.train.job import StageJob, TooManyFaultsError, plan_of, total_steps

FAILED = "failed.json"
"""In a stage's folder: the error that ended the training, and that trying again would not cure."""
LOG = "log.txt"
"""In a stage's folder: what workers have to say."""
log = logging.getLogger(__name__)


def error_left(job: StageJob) -> str | None:
    """Return the error that workers of a stage left, if any."""
    failed = job.folder / FAILED
    return str(json.loads(failed.read_text())["error"]) if failed.exists() else None


def leave_error(job: StageJob, error: Exception) -> None:
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


def log_to_file(job: StageJob, level: int) -> None:
    """Write what this process logs into the stage's folder."""
    job.folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(job.folder / LOG)
    handler.setLevel(level)
    ours = logging.getLogger("moce_dist")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)


class Follower:
    """Tells a person how a stage gets on, from what its workers leave in files."""

    def __init__(self, job: StageJob, *, every_s: float = 10.0) -> None:
        self._every_s, self._due = every_s, time.monotonic() + every_s
        self._stage = job.stage
        self._metrics, self._log = job.folder / "metrics.jsonl", job.folder / LOG
        self._total = total_steps(job.stage_config, plan_of(job))
        self._last = max((line["step"] for line in read_jsonl(self._metrics)), default=-1)
        self._position = self._log.stat().st_size if self._log.exists() else 0

    def report(self) -> None:
        """Pass on new lines of the workers' log, and from time to time how far the training is."""
        self.report_log()
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + self._every_s
        metrics = read_jsonl(self._metrics)
        if metrics and metrics[-1]["step"] != self._last:
            self._last = metrics[-1]["step"]
            log.info("%s", self._line(metrics[-1]))

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

    def _line(self, metrics: dict[str, Any]) -> str:
        left = (self._total - metrics["step"] - 1) * metrics["images_seen"] / (metrics["step"] + 1)
        seconds = int(left / max(metrics["images_per_s"], 1e-9))
        return (
            f"{self._stage}: step {metrics['step'] + 1} of {self._total}, "
            f"loss {metrics['loss']:.4f}, "
            f"{metrics['images_per_s']:.0f} images/s, {seconds // 60}:{seconds % 60:02d} left"
        )
