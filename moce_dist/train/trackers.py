"""Optional output of a training stage: figures for experiment trackers, and step profiles.

Nothing is sent anywhere. All files lie in the stage's folder:

    tensorboard/   event files
    wandb/         offline runs under one id; `wandb sync` uploads them
    mlflow/        one run of an experiment; `mlflow ui --backend-store-uri` shows it
    profile/       on request, of some steps: a trace of torch's profiler, for Perfetto or
                   chrome://tracing, and a table of operations sorted by self time
"""

import hashlib
import importlib.util
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from moce_dist.config import LoggingConfig
from moce_dist.settings import ConfigError


class Tracker(Protocol):
    """Takes the scalars of logged steps."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take the figures of a step."""

    def close(self) -> None:
        """Finish the files."""


def check_trackers(logging: LoggingConfig) -> None:
    """Refuse trackers whose package is not installed.

    Raises:
        ConfigError: naming the tracker and how to install it.
    """
    for name in logging.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"logging.trackers: {name} is not installed: pip install -e '.[{name}]'"
            )


def open_trackers(
    logging: LoggingConfig, folder: Path, *, start_step: int, settings: Mapping[str, Any]
) -> list[Tracker]:
    """Open the trackers of the stage at `folder`; `settings` is the run's configuration.

    Raises:
        ConfigError: one is not installed.
    """
    check_trackers(logging)
    opened: list[Tracker] = [_TensorBoard(folder, start_step)] if logging.tensorboard else []
    if "wandb" in logging.trackers:
        opened.append(_WandB(folder, settings))
    if "mlflow" in logging.trackers:
        opened.append(_MLflow(folder, settings))
    return opened


class _TensorBoard:
    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        name = f"{folder.parent.name}-{folder.name}"
        # other runs may have folders of the same names
        own = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:8]
        self._run = wandb.init(
            mode="offline",
            dir=str(folder),
            project="moce_dist",
            name=name,
            id=f"{name}-{own}",
            config=dict(settings),
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        # a file store needs no server, but MLflow requires this opt-in
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._client, self._metric = MlflowClient((folder / "mlflow").as_uri()), Metric
        self._logged = -1
        found = self._client.get_experiment_by_name(folder.parent.name)
        experiment = (
            found.experiment_id if found else self._client.create_experiment(folder.parent.name)
        )
        runs = self._client.search_runs([experiment])
        if runs:
            # an interrupted stage continues its own run
            self._run_id = runs[0].info.run_id
            self._logged = self._newest_step()
            return
        self._run_id = self._client.create_run(experiment, run_name=folder.name).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in settings.items()]
        for start in range(0, len(params), 100):
            self._client.log_batch(self._run_id, params=params[start : start + 100])

    def _newest_step(self) -> int:
        # its file store appends, so steps that run again would be there twice
        run = self._client.get_run(self._run_id)
        histories = (
            self._client.get_metric_history(self._run_id, name) for name in run.data.metrics
        )
        return max((each.step for history in histories for each in history), default=-1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if step <= self._logged:
            return
        metrics = [self._metric(name, value, 0, step) for name, value in scalars.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


log = logging.getLogger(__name__)
_ROWS = 40


class StepProfile:
    """Profiles the steps from `steps[0]` until before `steps[1]`, if these are given."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None) -> None:
        """Write into `folder`/profile; without `steps`, do nothing."""
        self._folder, self._steps = folder / "profile", steps
        self._running: Any = None

    def at(self, step: int) -> None:
        """Note that `step` is about to begin: a profile starts or ends here."""
        if self._steps is None:
            return
        if self._running is None and step == self._steps[0] < self._steps[1]:
            # torch takes seconds to import, and checking a request does not need it
            from torch.profiler import profile

            self._running = profile()
            self._running.start()
        elif self._running is not None and step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """End the running profile, if any, and write it."""
        if self._running is None or self._steps is None:
            return
        import torch

        self._running.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps_{self._steps[0]}-{self._steps[1] - 1}.json.gz"
        self._running.export_chrome_trace(str(path))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self._running.key_averages().table(sort_by=order, row_limit=_ROWS)
        path.with_name(path.name.removesuffix(".json.gz") + ".txt").write_text(table)
        self._running = None
        log.info("profile: %s", path)
