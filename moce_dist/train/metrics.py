"""metrics.jsonl and TensorBoard: one line a logged step, steps increasing, cut on resume."""

import json
import math
import time
from pathlib import Path
from typing import Any

from moce_dist.run import lease
from moce_dist.run.files import naming, read_jsonl, write_atomic

METRICS_NAME = "metrics.jsonl"


class MetricsLog:
    """Writer of a stage's metrics; only rank 0 makes one."""

    def __init__(self, folder: Path, *, start_step: int, tensorboard: bool) -> None:
        """Continue the log of `folder`, dropping lines of steps that will be run again."""
        self._path = folder / METRICS_NAME
        kept = [line for line in read_jsonl(self._path) if line["step"] < start_step]
        write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step)

    def write(self, metrics: dict[str, Any]) -> None:
        """Append one line; `metrics["step"]` must be greater than any before.

        JSON has no word for a figure that is not finite: it is written as null.
        """
        metrics = _finite(metrics)
        lease.check()
        with naming(self._path), self._path.open("a") as file:
            file.write(json.dumps(metrics, allow_nan=False) + "\n")
        if self._writer is not None:
            for name, value in metrics.items():
                if isinstance(value, int | float) and name != "step":
                    self._writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        """Flush TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Clock:
    """Time between two logged steps, split into waiting for data and the rest."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._images = 0
        self.data_wait_s = 0.0

    def wait(self, seconds: float) -> None:
        """Add time spent waiting for a batch."""
        self.data_wait_s += seconds

    def count(self, images: int) -> None:
        """Add the images of a finished step."""
        self._images += images

    def lap(self) -> dict[str, float]:
        """Return images/s and data wait (s) since the last lap, and start anew."""
        elapsed = time.perf_counter() - self._start
        lap = {
            "images_per_s": round(self._images / elapsed, 2),
            "data_wait_s": round(self.data_wait_s, 4),
        }
        self.__init__()  # type: ignore[misc]
        return lap
