"""metrics.jsonl, one line per logged step, truncated on resume; trackers get the same figures."""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moce_dist.run import lease
from moce_dist.run.files import naming, read_jsonl, write_jsonl
from moce_dist.train.trackers import Tracker

METRICS_NAME = "metrics.jsonl"


class MetricsLog:
    """Writer of a stage's metrics; only rank 0 makes one."""

    def __init__(self, folder: Path, *, start_step: int, trackers: Sequence[Tracker] = ()) -> None:
        """Continue the log of `folder`, dropping lines of steps that will be run again."""
        self._path = folder / METRICS_NAME
        kept = [line for line in read_jsonl(self._path) if line["step"] < start_step]
        write_jsonl(self._path, kept)
        self._trackers = trackers

    def write(self, metrics: dict[str, Any]) -> None:
        """Append one line; `metrics["step"]` must be greater than any before.

        A figure that is not finite is written as null, because JSON cannot express it.
        """
        metrics = _finite(metrics)
        lease.check()
        with naming(self._path), self._path.open("a") as file:
            file.write(json.dumps(metrics, allow_nan=False) + "\n")
        scalars = {
            name: value
            for name, value in metrics.items()
            if isinstance(value, int | float) and name != "step"
        }
        for tracker in self._trackers:
            tracker.write(metrics["step"], scalars)

    def close(self) -> None:
        """Let the trackers finish their files."""
        for tracker in self._trackers:
            tracker.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def training_seconds(metrics: Iterable[Mapping[str, Any]]) -> float:
    """Sum the seconds of training between the logged steps of a stage, without interruptions."""
    seen, total = 0, 0.0
    for line in metrics:
        # lines of earlier versions have only the rate
        rate = max(line["images_per_s"], 1e-9)
        total += line.get("seconds", (line["images_seen"] - seen) / rate)
        seen = line["images_seen"]
    return total


class Clock:
    """Time between two logged steps, split into waiting for data, saving, and the rest."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._images = 0
        self.data_wait_s = 0.0
        self._save_s = 0.0

    def wait(self, seconds: float) -> None:
        """Add time spent waiting for a batch."""
        self.data_wait_s += seconds

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Add the time of the block, in which training waits for a save."""
        before = time.perf_counter()
        yield
        self._save_s += time.perf_counter() - before

    def count(self, images: int) -> None:
        """Add the images of a finished step."""
        self._images += images

    def lap(self) -> dict[str, float]:
        """Return images/s, seconds, and those of data wait and of saving, since the last lap."""
        elapsed = time.perf_counter() - self._start
        lap = {
            "images_per_s": round(self._images / elapsed, 2),
            "seconds": round(elapsed, 4),
            "data_wait_s": round(self.data_wait_s, 4),
            "save_s": round(self._save_s, 4),
        }
        self.__init__()  # type: ignore[misc]
        return lap
