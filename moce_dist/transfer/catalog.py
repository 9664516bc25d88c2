"""Which name of a classification task is read by whom."""

from collections.abc import Callable
from pathlib import Path

from moce_dist.data.sources import TASKS as SAMPLE_TASKS
from moce_dist.transfer.official import OFFICIAL, official_task
from moce_dist.transfer.tars import tar_task
from moce_dist.transfer.tasks import Task, image_folder, sample_task

TASKS: dict[str, Callable[[str, Path | None], Task]] = {
    **dict.fromkeys(SAMPLE_TASKS, sample_task),
    "imagefolder": image_folder,
    "webdataset": tar_task,
    **dict.fromkeys(OFFICIAL, official_task),
}


def load_task(name: str, data: Path | None, evaluate: str = "test") -> Task:
    """Return a classification task, its folders and labels checked.

    `evaluate` is the split that tests; any but `test` is a folder of `imagefolder`.

    Raises:
        ConfigError: see the task's reader.
    """
    if name == "imagefolder" and evaluate != "test":
        return image_folder(name, data, (evaluate,))
    return TASKS[name](name, data)
