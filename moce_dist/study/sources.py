"""The data of a study: data sets that are ingested once, or counted for a dry run; its tasks.

    data.source --ingest--> OUT/data/NAME
    folders of the tasks --list--> OUT/tasks.json

Tasks are fitted last, days after the start. So their files are listed first, and missing or wrong
ones refuse the study before anything is made. Images are decoded only when a task is carried out.
"""

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from moce_dist.config import Config
from moce_dist.data.columns import open_index
from moce_dist.data.shards import INDEX_NAME, Shard
from moce_dist.data.sources import list_folder
from moce_dist.run.artefacts import fingerprint, read_marker
from moce_dist.run.names import and_more
from moce_dist.settings import ConfigError
from moce_dist.study.plan import Source
from moce_dist.study.request import Arm, Split, StudyConfig, arm_config, task_request, tasks_of
from moce_dist.transfer.suite import list_task

LISTED = "tasks.json"


class TaskList(NamedTuple):
    """The tasks of a study, listed."""

    times: dict[str, int]
    """Modification time, ns, of the folder of every task whose files are right, by what was read;
    0 if the task has its own images."""
    missing: list[str]
    """An error line for every task whose data are not here."""


def list_tasks(study: StudyConfig, split: Split, out: Path) -> TaskList:
    """List the files of every task that an arm evaluates, without reading any image.

    A task that `OUT/tasks.json` says was right is not listed again while the modification time of
    its folder is the same.

    Raises:
        ConfigError: naming the first task whose data are here and wrong, and its folder.
    """
    record = out / LISTED
    known = json.loads(record.read_text()) if record.is_file() else {}
    times: dict[str, int] = {}
    missing, wrong = list[str](), list[str]()
    used = {task.folder for arm in study.arms.values() for task in tasks_of(study, arm)}
    for task in (task for task in study.tasks if task.folder in used):
        request = task_request(study, task, Arm(), split)
        config = arm_config(study, Arm(), {"transfer.evaluate": split}, task.set)
        data, evaluate = request.data, config.transfer.evaluate
        key = fingerprint([request.task, None if data is None else str(data), evaluate])
        is_here = data is not None and data.is_dir()
        time = data.stat().st_mtime_ns if data is not None and is_here else 0
        try:
            if time != times.get(key, known.get(key)):
                list_task(request, config)
            times[key] = time
        except ConfigError as error:
            where = "" if data is None or str(data) in str(error) else f" in {data}"
            (wrong if is_here else missing).append(f"tasks, {task.folder}{where}: {error}")
    if wrong:
        raise ConfigError(f"{wrong[0]}{and_more([*wrong, *missing])}")
    return TaskList(times, missing)


def _folder(out: Path, name: str, config: Config) -> Path:
    return config.index or out / "data" / name


def _count(shards: Iterable[Shard]) -> int:
    return sum(shard.num_samples for shard in shards)


def make_sources(wanted: Mapping[str, Config], out: Path) -> dict[str, Source]:
    """Ingest the data sets of a study that are not there yet.

    Raises:
        ConfigError: a source is wrong or too damaged.
    """
    from moce_dist.data.ingest import ingest
    from moce_dist.launch.tasks import map_tasks
    from moce_dist.samples import sets

    found: dict[str, Source] = {}
    for name, config in wanted.items():
        folder, source = _folder(out, name, config), config.data.source
        if config.index is not None:
            shards = open_index(folder).shards
        else:
            ledger = out / "faults.jsonl"
            tasks = partial(map_tasks, config.parallel)
            shards = ingest(source, folder, config.data, ledger, tasks, mix=sets.pretrain).shards
        found[name] = Source(name, folder, _count(shards))
    return found


def count_sources(
    wanted: Mapping[str, Config], out: Path, assumed: int | None
) -> dict[str, Source]:
    """Count the training images of a study's data sets without reading them.

    A data set that is not available is taken to have `assumed` images.

    Raises:
        ConfigError: a data set is not available, and `assumed` is None.
    """
    found = {}
    for name, config in wanted.items():
        folder, source = _folder(out, name, config), config.data.source
        if read_marker(folder) is not None or (folder / INDEX_NAME).is_file():
            number = _count(open_index(folder).shards)
        elif source.startswith("folder:") and Path(source.removeprefix("folder:")).is_dir():
            files = list_folder(Path(source.removeprefix("folder:"))).files
            number = round(len(files) * (1 - config.data.holdout_fraction))
        elif assumed is not None:
            number = assumed
        else:
            raise ConfigError(f"num_images: is needed, as {source} cannot be counted here")
        found[name] = Source(name, folder, number)
    return found
