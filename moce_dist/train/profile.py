"""A profile of some steps of a stage, on demand: torch profiler's trace, and a table of its sums.

STAGE/profile/steps_100-103.json.gz     for Perfetto or chrome://tracing
STAGE/profile/steps_100-103.txt         operations by their own time
"""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger(__name__)
_ROWS = 40


class StepProfile:
    """Profiles the steps from `first` up to before `end`, where these are asked for."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None) -> None:
        """Write into `folder`; without `steps` nothing is done."""
        self._folder, self._steps = folder / "profile", steps
        self._running: profile | None = None

    def at(self, step: int) -> None:
        """Note that `step` is about to begin: a profile starts or ends here."""
        if self._steps is None:
            return
        if self._running is None and step == self._steps[0] < self._steps[1]:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._running = profile(activities=activities)
            self._running.start()
        elif self._running is not None and step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write what was profiled; nothing where no profile runs."""
        if self._running is None or self._steps is None:
            return
        self._running.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps_{self._steps[0]}-{self._steps[1] - 1}.json.gz"
        self._running.export_chrome_trace(str(path))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self._running.key_averages().table(sort_by=order, row_limit=_ROWS)
        path.with_name(path.name.removesuffix(".json.gz") + ".txt").write_text(table)
        self._running = None
        log.info("profile: %s", path)
