"""One task from its files to its metrics, and many of them that fail alone.

    orders --carry_out, each on its own--> outcomes --collect--> RUN/transfer/all/metrics.json

An order travels to whichever process has room for it, so it holds all that it needs.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moce_dist.cli import quiet_libraries
from moce_dist.config import Config
from moce_dist.run import Run, set_aside, write_atomic
from moce_dist.transfer.catalog import load_task
from moce_dist.transfer.instances import Instances, check_instances, read_instances
from moce_dist.transfer.request import Request
from moce_dist.transfer.results import suite_metrics
from moce_dist.transfer.scenes import Scenes, check_scenes, read_scenes
from moce_dist.transfer.tasks import Task, check_images

logger = logging.getLogger(__name__)
ALL = "all"


@dataclass(frozen=True)
class Order:
    """A request with the configuration that it is carried out under."""

    request: Request
    config: Config
    is_fresh: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of an order: its metrics, or why there are none."""

    name: str
    metrics: dict[str, Any] | None
    failure: str = ""


def list_task(request: Request) -> Task | Scenes | Instances:
    """List a task's files, checking their layout.

    Raises:
        ConfigError: see the task's reader.
    """
    if request.is_segmentation:
        return read_scenes(request.task, request.data)
    if request.is_detection:
        return read_instances(request.task, request.data)
    return load_task(request.task, request.data)


def scan(task: Task | Scenes | Instances, config: Config) -> None:
    """Read all files of a task once, so that a damaged one is known before training.

    Raises:
        ConfigError: naming the first damaged file.
    """
    if isinstance(task, Scenes):
        check_scenes(task, threads=config.data.loader_processes)
    elif isinstance(task, Instances):
        check_instances(task, threads=config.data.loader_processes)
    else:
        check_images(task, threads=config.data.loader_processes)


def carry_out(root: Path, order: Order) -> dict[str, Any]:
    """List, check, compare; return the content of metrics.json.

    Raises:
        ConfigError: the task's files are not as they should be.
    """
    run, task = Run(root), list_task(order.request)
    scan(task, order.config)
    folder = run.transfer(order.request.folder)
    if order.is_fresh and folder.exists():
        set_aside(folder)
    quiet_libraries()
    from moce_dist.transfer.compare import Comparison, compare

    return compare(Comparison(order.request, run, order.config, task))


def attempt(root: Path, order: Order) -> Outcome:
    """Carry out an order; a failure is an outcome too. The processor cores are for one worker."""
    alone = order.config.parallel.model_copy(update={"num_workers": 1, "min_workers": None})
    mine = Order(order.request, order.config.model_copy(update={"parallel": alone}), order.is_fresh)
    try:
        return Outcome(order.request.folder, carry_out(root, mine))
    except Exception as error:  # noqa: BLE001 - whatever it is, the other tasks go on
        text = " ".join(str(error).split())
        return Outcome(order.request.folder, None, f"{type(error).__name__}: {text}")


def collect(root: Path, outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Wait for all outcomes, say how each ended, and write the suite's metrics.json."""
    finished = []
    for outcome in outcomes:
        logger.info("%s: %s", outcome.name, outcome.failure or "done")
        finished.append(outcome)
    done = [outcome.metrics for outcome in finished if outcome.metrics is not None]
    metrics = suite_metrics(done, {o.name: o.failure for o in finished if o.metrics is None})
    write_atomic(Run(root).transfer(ALL) / "metrics.json", json.dumps(metrics, indent=1))
    return metrics
