"""A job of several ranks, and a training stage as one; small, because ranks read the rest."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from moce_dist.config import Config, ParallelConfig, StageConfig
from moce_dist.data.columns import open_table
from moce_dist.data.plan import Plan
from moce_dist.run.directory import StageName
from moce_dist.run.files import read_jsonl
from moce_dist.train.metrics import METRICS_NAME
from moce_dist.train.pulse import Pulse

_NOTABLE_WAIT = 0.1
"""Share of the time spent waiting for images above which `progress` mentions it."""


class TooManyFaultsError(RuntimeError):
    """More of the data is unreadable than the configuration allows; a retry would not help."""


class Job(Protocol):
    """Training that several ranks run together; it is sent to them, so it is small.

    It may be restarted on another number of ranks, and resumes from what it has saved.
    """

    @property
    def name(self) -> str:
        """Name of the job."""

    @property
    def run_root(self) -> Path:
        """The run that it belongs to."""

    @property
    def folder(self) -> Path:
        """Where it writes."""

    @property
    def parallel(self) -> ParallelConfig:
        """Number of workers, and their groups."""

    @property
    def batch_size(self) -> int:
        """Images of a step, which every number of workers below the full one must divide."""

    def run(self, pulse: Pulse) -> None:
        """Run the job on this rank.

        Raises:
            StoppedError: `pulse` asked one rank to stop; the state is saved.
        """

    def progress(self) -> str:
        """Describe the progress in a line; "" if the log shows it, or if it is unknown."""


Train = Callable[[Job], None]
"""Runs a job to its end on all ranks."""


@dataclass(frozen=True)
class StageJob:
    """Which stage of which run, on which shards.

    `start` is the checkpoint of another run whose weights the stage starts from. In stage
    control `config` is that of a model without experts.
    """

    config: Config
    run_root: Path
    stage: StageName
    index: str
    holdout: str | None = None
    start: str | None = None
    steps_before: int = 0
    """Optimiser steps of other stages behind the weights that this one starts from."""

    def __post_init__(self) -> None:
        config = self.config.without_experts if self.stage == "control" else self.config
        # a worker runs in another folder
        object.__setattr__(self, "config", config.with_absolute_init)

    @property
    def name(self) -> str:
        """Name of the job: its stage."""
        return self.stage

    @property
    def folder(self) -> Path:
        """Where the stage writes."""
        return self.run_root / self.stage

    @property
    def parallel(self) -> ParallelConfig:
        """Number of workers, and their groups."""
        return self.config.parallel

    @property
    def stage_config(self) -> StageConfig:
        """Optimisation of this stage."""
        return self.config.mae if self.stage == "mae" else self.config.moce

    @property
    def num_clusters(self) -> int:
        """Clusters K of the images; 1 in stage mae, which has none."""
        return 1 if self.stage == "mae" else self.config.cluster.num_clusters

    @property
    def batch_size(self) -> int:
        """Images of a step; every legal number of workers divides it."""
        return self.stage_config.batch_size

    def plan(self) -> Plan:
        """Read the shards' index and plan the stage's steps.

        Raises:
            ConfigError: there is no index.
        """
        table = open_table(self.index, self.num_clusters)
        return Plan(table, self.batch_size, self.config.seed)

    @cached_property
    def total_steps(self) -> int:
        """Optimiser steps of the stage."""
        return total_steps(self.stage_config, self.plan())

    def progress(self) -> str:
        """Describe the progress by the newest line of the metrics; "" before the first."""
        metrics = read_jsonl(self.folder / METRICS_NAME)
        if not metrics:
            return ""
        last, before = metrics[-1], (metrics[-2] if len(metrics) > 1 else {"images_seen": 0})
        left = (self.total_steps - last["step"] - 1) * last["images_seen"] / (last["step"] + 1)
        rate = max(last["images_per_s"], 1e-9)
        seconds = int(left / rate)
        waiting = last["data_wait_s"] * rate / max(1, last["images_seen"] - before["images_seen"])
        note = f", {waiting:.0%} of it waiting for images" if waiting > _NOTABLE_WAIT else ""
        return (
            f"{self.name}: step {last['step'] + 1} of {self.total_steps}, "
            f"loss {last['loss']:.4f}, "
            f"{last['images_per_s']:.0f} images/s, {seconds // 60}:{seconds % 60:02d} left{note}"
        )


@dataclass(frozen=True)
class MoreSteps(StageJob):
    """Further training of a model without experts, outside the stages, from weights at `start`.

    It uses all images, or with `quotas` (K,) that many of every cluster per epoch: a task's own
    steps. `out` is its folder in the run, `epochs` its length.
    """

    out: str = ""
    epochs: float = 1.0
    quotas: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """Name of the job: its folder in the run."""
        return self.out

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.run_root / self.out

    @property
    def stage_config(self) -> StageConfig:
        """Optimisation of these steps."""
        return self.config.transfer.continued.stage(self.config.moce, self.epochs)

    def plan(self) -> Plan:
        """Plan the steps; see `StageJob.plan`."""
        whole = super().plan()
        return whole if self.quotas is None else replace(whole, quotas=np.array(self.quotas))


def total_steps(stage: StageConfig, plan: Plan) -> int:
    """Optimiser steps of a stage over a plan; 0 if the stage takes weights as they are."""
    return max(1, round(stage.epochs * plan.steps_per_epoch)) if stage.epochs else 0
