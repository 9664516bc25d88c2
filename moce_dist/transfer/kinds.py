"""The kinds of task. A new kind is a folder and a line here.

A kind is a subclass of `tasks.Task`, which lists and checks images, and a working module with the
functions of `Work`. The working module imports torch; it is loaded only to fit or predict.
"""

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from moce_dist.settings import ConfigError
from moce_dist.transfer.classification.task import Classification
from moce_dist.transfer.detection.task import Detection
from moce_dist.transfer.segmentation.task import Segmentation
from moce_dist.transfer.tasks import Item, Task

if TYPE_CHECKING:
    from torch import nn

    from moce_dist.transfer.drawing import PredictOptions
    from moce_dist.transfer.fit import Fitted, Trial
    from moce_dist.transfer.saved import Spec

KINDS: list[tuple[type[Task], str]] = [
    (Classification, "moce_dist.transfer.classification.finetune"),
    (Segmentation, "moce_dist.transfer.segmentation.fit"),
    (Detection, "moce_dist.transfer.detection.fit"),
]


class Work(Protocol):
    """The functions that the working module of a kind must have."""

    def fit(self, task: Any, trial: "Trial") -> "Fitted":
        """Fit a backbone to a task and measure it on the test images.

        Collective over the ranks of the machine if the protocol trains on several ranks.
        """

    def build(self, spec: "Spec") -> "nn.Module":
        """Build the model of a fit with newly initialised weights."""

    def predict(
        self, model: "nn.Module", spec: "Spec", images: Sequence[Item], options: "PredictOptions"
    ) -> Iterator[dict[str, Any]]:
        """Yield one record per image, with `error` if it is unreadable.

        The model is already on its device.

        Raises:
            ConfigError: the options lack something.
        """


def task_names() -> list[str]:
    """List the values that `--task` accepts."""
    return [name for kind, _ in KINDS for name in kind.names]


def kind_of(task: str) -> type[Task]:
    """Return the kind of a task.

    Raises:
        ConfigError: there is no such task.
    """
    for kind, _ in KINDS:
        if task in kind.names:
            return kind
    raise ConfigError(f"--task {task}: must be one of {', '.join(task_names())}")


def kind_named(name: str) -> tuple[type[Task], Work]:
    """Return a kind by the name that tasks and fitted models give it, and its working module.

    Raises:
        ValueError: there is no such kind.
    """
    for kind, module in KINDS:
        if kind.kind == name:
            return kind, cast(Work, import_module(module))
    raise ValueError(f"unknown kind {name}")
