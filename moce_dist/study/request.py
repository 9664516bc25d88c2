"""The YAML file of a study, checked before anything heavy is imported.

A study has a configuration, the seeds of its pre-training, arms, and downstream tasks. Each arm
changes fields of the configuration, or evaluates another backbone of the same run. Paths of data
are relative to `data`, so that one file serves wherever the images are.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from moce_dist.config import Config, SuiteEntry, load_config
from moce_dist.settings import ConfigError, Section, flatten, read_tree, validate
from moce_dist.transfer.kinds import kind_of
from moce_dist.transfer.request import Request, check_request

Split = Literal["test", "val"]


class Images(Section):
    """Numbers of images that a run's stages see, instead of the epochs of its configuration."""

    mae: int | None = Field(None, ge=1)
    """Images of stage mae."""
    moce: int | None = Field(None, ge=1)
    """Images of stages moce and control."""


class Arm(Section):
    """One way to make a task's backbone."""

    about: str = ""
    """Short description for the page."""
    backbone: str = "moce"
    """Backbone of the run to evaluate, as `jobs/transfer.py --backbone` names it."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Fields of the configuration that differ, by dotted path or nested."""
    domains: Literal["all", "own_equal_images", "own_equal_steps"] = "all"
    """all: one run on all data. Otherwise one run for every domain that tasks name, on its images
    alone. own_equal_images: on as many images as the run on all data sees of that domain.
    own_equal_steps: for as many steps as the run on all data takes."""
    against: str | None = None
    """Arm of the same cost that its differences are taken to; None: the study's `reference`."""
    continue_images: int | None = Field(None, ge=1)
    """Images of the further steps that a backbone `+own` or `+all` takes for every task."""
    seeds: tuple[int, ...] | None = None
    """Seeds of the arm; None: all of the study."""
    tasks: tuple[str, ...] | None = None
    """Names of the tasks to evaluate; None: all or, with runs per domain, those with a domain."""


class StudyTask(SuiteEntry):
    """A task; one with a domain can be evaluated on models of that domain."""

    domain: str = ""
    """Folder of the pre-training data whose images are like the task's."""

    @property
    def folder(self) -> str:
        """Name of the task in the results."""
        return self.name or self.task


class StudyConfig(Section):
    """One study."""

    title: str = ""
    """Heading of the page."""
    base: str | None = None
    """YAML of a pre-training, relative to the study's file; `config` overrides its fields."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of the configuration."""
    data: str = ""
    """Folder below which relative paths of data.source and of the tasks lie."""
    images: Images = Images()
    """Images of the stages; by default the epochs of the configuration decide."""
    num_images: int | None = Field(None, ge=1)
    """Number of training images of data.source, for a dry run without the data."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """Seeds of the pre-training, and of the fits on top of it."""
    arms: dict[str, Arm] = Field(min_length=1)
    """What is compared, by name."""
    reference: str = "control"
    """Arm that differences are taken to, unless an arm names another."""
    tasks: tuple[StudyTask, ...] = Field(min_length=1)
    """Downstream tasks."""
    protocols: tuple[str, ...] = ("knn", "linear")
    """Protocols of tasks that name none."""
    draws: int = Field(10_000, ge=100)
    """Draws of the bootstrap."""
    flop_per_s: float | None = Field(None, gt=0)
    """Floating-point operations per second of a worker in training, for the hours of a dry run."""


def read_study(path: Path, overrides: Sequence[str] = (), data: str | None = None) -> StudyConfig:
    """Read a study's YAML with `a.b=value` overrides and check everything that it asks for.

    `data` replaces the folder of the data.

    Raises:
        ConfigError: naming every field that is wrong.
    """
    study = validate(StudyConfig, read_tree(path, overrides))
    update: dict[str, Any] = {"data": study.data if data is None else data}
    if study.base is not None:
        update["base"] = str(path.parent / study.base)
    study = study.model_copy(update=update)
    for field, names in (("tasks", [task.folder for task in study.tasks]), ("seeds", study.seeds)):
        if len(set(names)) != len(names):
            raise ConfigError(f"{field}: two are equal; every one needs its own name or value")
    if study.reference not in study.arms:
        raise ConfigError(
            f"reference = {study.reference!r}: must be one of {', '.join(study.arms)}"
        )
    for name, arm in study.arms.items():
        _check_arm(study, name, arm)
    return study


def _check_arm(study: StudyConfig, name: str, arm: Arm) -> None:
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ConfigError(f"arms.{name}: a name has letters, digits and . _ + -")
    if arm.against is not None and arm.against not in study.arms.keys() - {name}:
        raise ConfigError(f"arms.{name}.against: {arm.against} is no other arm of the study")
    if arm.domains != "all":
        if not arm_config(study, arm).data.source.startswith("folder:"):
            raise ConfigError(f"arms.{name}.domains: data.source must be a folder of domains")
        if not any(task.domain for task in study.tasks):
            raise ConfigError(f"arms.{name}.domains: no task names a domain")
    for field, found, known in (
        ("tasks", arm.tasks or (), [task.folder for task in study.tasks]),
        ("seeds", arm.seeds or (), study.seeds),
    ):
        if unknown := [each for each in found if each not in known]:
            raise ConfigError(f"arms.{name}.{field}: {unknown[0]} is none of the study's {field}")
    if not tasks_of(study, arm):
        raise ConfigError(f"arms.{name}: has no task")
    if arm.seeds == ():
        raise ConfigError(f"arms.{name}.seeds: names none")
    for task in tasks_of(study, arm):
        try:
            config = arm_config(study, arm, overrides=task.set)
            check_request(task_request(study, task, arm), config)
        except ConfigError as error:
            raise ConfigError(f"arms.{name}, task {task.folder}: {error}") from None


def partners_of(study: StudyConfig) -> dict[str, str | None]:
    """Return, per arm, the arm that its differences are taken to; None for the reference."""
    return {
        name: arm.against or (None if name == study.reference else study.reference)
        for name, arm in study.arms.items()
    }


def tasks_of(study: StudyConfig, arm: Arm) -> list[StudyTask]:
    """List the tasks of an arm; an arm with a run per domain has only tasks with a domain."""
    of_arm = [task for task in study.tasks if arm.domains == "all" or task.domain]
    return of_arm if arm.tasks is None else [task for task in of_arm if task.folder in arm.tasks]


def arm_config(
    study: StudyConfig,
    arm: Arm,
    fields: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Return an arm's configuration, with more fields by dotted path and `a.b=value` overrides.

    Raises:
        ConfigError: naming the mistakes.
    """
    changes = {**flatten(study.config), **flatten(arm.set), **(fields or {})}
    texts = [f"{path}={json.dumps(value)}" for path, value in changes.items()]
    config = load_config(study.base, [*texts, *overrides])
    kind, _, path = config.data.source.partition(":")
    if not study.data or kind not in ("folder", "index"):
        return config
    source = f"{kind}:{Path(study.data, path).absolute()}"
    return config.model_copy(update={"data": config.data.model_copy(update={"source": source})})


def task_request(study: StudyConfig, task: StudyTask, arm: Arm, split: Split = "test") -> Request:
    """Make the request of an arm on a task."""
    kind = kind_of(task.task)
    usual = tuple(name for name in study.protocols if kind.takes(name, task.task))
    if not usual and not task.protocol and any(kind.takes(p, "") for p in study.protocols):
        given = ", ".join(study.protocols)
        raise ConfigError(f"tasks, {task.folder}: takes none of {given}; give it a protocol")
    wanted = task.protocol or usual or tuple(kind.protocols)
    data = None
    if kind.needs_data(task.task):
        data = Path(study.data, task.data or task.folder).absolute()
    name = task.folder if split == "test" else f"{task.folder}-{split}"
    further = arm.continue_images
    return Request(
        *(task.task, data, (arm.backbone,), wanted, 1, None),
        name=name if further is None else f"{name}-{further}",
        continue_images=further,
    )


def json_schema() -> dict[str, Any]:
    """JSON schema of a study, for completion in editors."""
    schema = StudyConfig.model_json_schema()
    schema["properties"]["config"]["$ref"] = "../schema.json"
    return schema
