"""Which name of a classification task is read by whom."""

from collections.abc import Callable
from pathlib import Path

from moce_dist.data.sources import TASKS as SAMPLE_TASKS
from moce_dist.transfer.official import OFFICIAL, official_task
from moce_dist.transfer.tars import tar_task
from moce_dist.transfer.tasks import (
    Task,
    has_three_splits,
    image_folder,
    sample_task,
    validation_split,
)

TASKS: dict[str, Callable[[str, Path | None], Task]] = {
    **dict.fromkeys(SAMPLE_TASKS, sample_task),
    "imagefolder": image_folder,
    "webdataset": tar_task,
    **dict.fromkeys(OFFICIAL, official_task),
}


def load_task(name: str, data: Path | None, evaluate: str = "test") -> Task:
    """Return a classification task, its folders and labels checked.

    With `evaluate: val` it is measured on images that are neither trained on nor of the test: those
    of `imagefolder`'s third folder, else a fifth of the training images.

    Raises:
        ConfigError: see the task's reader.
    """
    if evaluate == "val" and name == "imagefolder" and has_three_splits(data):
        return image_folder(name, data, ("val",))
    task = TASKS[name](name, data)
    return task if evaluate == "test" else validation_split(task)
