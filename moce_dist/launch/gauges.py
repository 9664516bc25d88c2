"""A job's figures for Prometheus, through Ray's metrics: `ray_moce_*` on a node's metrics port.

The driver reads them from the job's files, so the workers are not involved. The series, their
labels and their meaning are listed in k8s/README.md, "Watching".
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge

from moce_dist.run.files import read_faults_from
from moce_dist.train.job import Job
from moce_dist.train.metrics import METRICS_NAME

_EVERY_S = 5.0
_TAIL_BYTES = 2**18
_OF_A_LINE = {
    "images_per_second": ("images_per_s", "images a second, all ranks"),
    "loss": ("loss", "the masked autoencoder's loss"),
    "images_exchanged": ("images_exchanged", "images of a step that left their group"),
    "checkpoint_seconds": ("checkpoint_s", "from the start of a save to its publication"),
}
_WAITING, _SHARE = "data_wait_ratio", "share of the time between two lines spent waiting for images"
_LABELS = ("run", "stage")


class JobGauges:
    """The figures of one job, updated from its newest line of metrics."""

    def __init__(self, job: Job) -> None:
        """Create the gauges, with no restart counted yet."""
        self._job, self._due = job, 0.0
        self._labels = {"run": job.run_root.name, "stage": job.name}
        said = {_WAITING: _SHARE} | {name: about for name, (_, about) in _OF_A_LINE.items()}
        self._gauges = {name: Gauge(f"moce_{name}", about, _LABELS) for name, about in said.items()}
        about = "images of a step that an expert took"
        self._experts = Gauge("moce_images_per_expert", about, (*_LABELS, "layer", "expert"))
        self._faults = Gauge("moce_faults", "unreadable images so far", _LABELS)
        about = "starts again after a failure or a preemption"
        self._restarts = Gauge("moce_restarts", about, (*_LABELS, "kind"))
        self._counter = FaultCounter(job.run_root / "faults.jsonl", job.name)
        self.restarted({"failure": 0, "preemption": 0})

    def restarted(self, counts: dict[str, int]) -> None:
        """Set how often the job was restarted, by the kind of the loss."""
        for kind, count in counts.items():
            self._restarts.set(count, {**self._labels, "kind": kind})

    def report(self) -> None:
        """Update the figures, at most once in five seconds."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _EVERY_S
        self._faults.set(self._counter.count(), self._labels)
        line = newest_line(self._job.folder / METRICS_NAME)
        for name, value in line_figures(line).items():
            self._gauges[name].set(value, self._labels)
        for layer, counts in enumerate(line.get("images_per_expert", [])):
            for expert, images in enumerate(counts):
                place = {"layer": str(layer), "expert": str(expert)}
                self._experts.set(images, {**self._labels, **place})


class FaultCounter:
    """Counts a stage's lines of a `faults.jsonl` that grows, reading each line once."""

    def __init__(self, ledger: Path, stage: str) -> None:
        """Start before the first line."""
        self._ledger, self._stage = ledger, stage
        self._file, self._offset, self._found = 0, 0, 0

    def count(self) -> int:
        """Return how many lines of the stage there are now."""
        status = self._ledger.stat() if self._ledger.exists() else None
        file, size = (0, 0) if status is None else (status.st_ino, status.st_size)
        if file != self._file or size < self._offset:
            # a resumed stage writes the ledger anew, without the lines of steps that it repeats
            self._file, self._offset, self._found = file, 0, 0
        faults, self._offset = read_faults_from(self._ledger, self._offset)
        self._found += sum(fault.get("stage") == self._stage for fault in faults)
        return self._found


def line_figures(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a line of metrics by their gauge; what the line lacks is left out."""
    found = {name: line[key] for name, (key, _) in _OF_A_LINE.items() if line.get(key) is not None}
    # the line has sums over its steps, whose number is a setting
    if line.get("seconds"):
        found[_WAITING] = line["data_wait_s"] / line["seconds"]
    return found


def newest_line(path: Path) -> dict[str, Any]:
    """Read the last whole line of a file of JSON objects; {} where there is none."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        whole, _, _ = file.read().rpartition(b"\n")
    last = whole.rpartition(b"\n")[2]
    try:
        found = json.loads(last)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
