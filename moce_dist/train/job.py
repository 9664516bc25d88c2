"""A training stage as it is sent to the workers: small, and everything else is read from disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moce_dist.config import Config, StageConfig
from moce_dist.data.plan import Plan, sample_table
from moce_dist.data.shards import read_index

HOLDOUT_TABLE = "holdout.parquet"


class TooManyFaultsError(RuntimeError):
    """More of the data is unreadable than the configuration allows; trying again is no use."""


@dataclass(frozen=True)
class StageJob:
    """Which stage of which run, on which shards."""

    config: Config
    run_root: Path
    stage: Literal["mae", "moce"]
    index: str
    holdout: str | None = None

    @property
    def folder(self) -> Path:
        """Where the stage writes."""
        return self.run_root / self.stage

    @property
    def stage_config(self) -> StageConfig:
        """Optimisation of this stage."""
        return self.config.mae if self.stage == "mae" else self.config.moce


def plan_of(job: StageJob) -> Plan:
    """Read the shards' index and plan the stage's steps.

    Raises:
        ConfigError: there is no index.
    """
    table = sample_table(read_index(job.index))
    return Plan(table, job.stage_config.batch_size, job.config.seed)


def total_steps(stage: StageConfig, plan: Plan) -> int:
    """Optimiser steps of a stage over a plan."""
    return max(1, round(stage.epochs * plan.steps_per_epoch))
