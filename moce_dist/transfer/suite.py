"""One task from its files to its metrics, or many tasks that fail independently.

    orders --carry_out, each on its own--> outcomes --collect--> RUN/transfer/all/metrics.json

An order is sent to any process that has room for it, so it holds all that it needs. If there is
only one order, its fits may be trained on many ranks: they are a job that is sent to all ranks. The
rest of it is the driver's part, which a driver without a GPU leaves to a worker.
"""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moce_dist.cli import quiet_libraries
from moce_dist.config import Config, ParallelConfig
from moce_dist.run.directory import STAGES, Run, set_aside
from moce_dist.run.environment import is_first_process
from moce_dist.run.files import write_atomic
from moce_dist.run.lease import hold
from moce_dist.run.names import typed
from moce_dist.settings import ConfigError
from moce_dist.train.job import Job, Train
from moce_dist.train.pulse import Pulse
from moce_dist.transfer.continuing import FurtherJob, TransferJob, further_jobs
from moce_dist.transfer.kinds import kind_of
from moce_dist.transfer.request import Request, base_of, further_of
from moce_dist.transfer.results import Ledger, suite_metrics
from moce_dist.transfer.tasks import Task

logger = logging.getLogger(__name__)
ALL = "all"


@dataclass(frozen=True)
class Order:
    """A request with the configuration that it is carried out under."""

    request: Request
    config: Config
    is_fresh: bool = False


@dataclass(frozen=True)
class TaskOutcome:
    """The result of an order: its metrics, or the reason why there are none."""

    name: str
    metrics: dict[str, Any] | None
    failure: str = ""


def list_task(request: Request, config: Config) -> Task:
    """List a task's files, checking their layout.

    Raises:
        ConfigError: see the task's reader.
    """
    return kind_of(request.task).open(request.task, request.data, config.transfer.evaluate)


@dataclass(frozen=True)
class FitsJob(TransferJob):
    """The trained fits of a request, as they are sent to the ranks.

    Ranks that torchrun started know neither `stages`, `choices` nor `ledger`; rank 0 sends them.
    """

    request: Request
    stages: dict[str, Any] | None = None
    """The checkpoints that the driver opened (`choosing.py`, `TrainedStage`), by stage."""
    choices: dict[str, dict[str, Any]] | None = None
    ledger: Ledger | None = None

    @property
    def parallel(self) -> ParallelConfig:
        """Number of workers; dense models have no groups."""
        return self.config.parallel.model_copy(update={"num_groups": 1})

    @property
    def name(self) -> str:
        """Name of the job, made from that of the task's folder."""
        return f"transfer-{self.request.folder}"

    @property
    def folder(self) -> Path:
        """Folder of the task's results."""
        return self.place.transfer(self.request.folder)

    @property
    def batch_size(self) -> int:
        """Images of a step; any number of workers below the full one must divide it."""
        return kind_of(self.request.task).batch_size(self.config.transfer)

    def run(self, pulse: Pulse) -> None:
        """Train the remaining fits on this rank; collective over all ranks."""
        from moce_dist.transfer.compare import Comparison, train_fits
        from moce_dist.transfer.ranks import from_first, join

        machine = join(self.config)
        if machine.rank > 0:
            logging.getLogger("moce_dist").setLevel(logging.WARNING)
        stages, choices, ledger = from_first((self.stages, self.choices, self.ledger), machine)
        task = list_task(self.request, self.config)
        comparison = Comparison(self.request, self.place, self.config, task, machine, stages)
        comparison.chooser.choices.update(choices or {})
        comparison.pulse = pulse
        assert ledger is not None
        train_fits(comparison, ledger)

    def progress(self) -> str:
        """Return nothing: a fit logs its own progress."""
        return ""


def train_here(job: Job) -> None:
    """Run a job to its end in this process."""
    job.run(Pulse())


def carry_out(
    run: Run, order: Order, train: Train = train_here, stages: dict[str, Any] | None = None
) -> dict[str, Any]:
    """List, check and compare; return the content of metrics.json, or {} on ranks other than 0.

    `stages` are checkpoints that another process opened, as in `FitsJob`.

    Raises:
        ConfigError: the task's files are missing or wrong.
    """
    job = FitsJob(run, order.config, order.request)
    quiet_libraries()
    if not is_first_process():
        for further in further_jobs(run, order.config, order.request).values():
            train(further)
        train(job)
        return {}
    task = list_task(order.request, order.config)
    with hold(job.folder):
        notes = task.scan(threads=order.config.data.loader_processes)
        if order.is_fresh:
            set_aside(job.folder)
        from moce_dist.transfer.compare import Comparison, compare

        comparison = Comparison(order.request, run, order.config, task, stages=stages)
        comparison.take_further_steps(train)

        def train_fits(ledger: Ledger) -> None:
            chooser = comparison.chooser
            train(replace(job, stages=chooser.stages, choices=chooser.choices, ledger=ledger))

        return {**compare(comparison, train_fits), "notes": notes}


class _NeededError(Exception):
    """A job has to be trained before an order can go on."""

    def __init__(self, job: FitsJob | FurtherJob) -> None:
        self.job = job


def advance(
    run: Run, order: Order, stages: dict[str, Any], trained: Sequence[Path]
) -> FitsJob | FurtherJob | dict[str, Any]:
    """Carry out an order up to its next training, and return the job; at its end, the metrics.

    What was finished is found again by the next call, under the same `stages`. `trained` has the
    folders of the jobs that calls before have returned.

    Raises:
        ConfigError: see `carry_out`.
    """

    def hand_back(job: Job) -> None:
        assert isinstance(job, FitsJob | FurtherJob)
        if job.folder not in trained:
            raise _NeededError(job)

    try:
        return carry_out(run, order, hand_back, stages)
    except _NeededError as needed:
        return needed.job


def carry_out_away(
    run: Run, order: Order, train: Train, call: Callable[..., Any]
) -> dict[str, Any]:
    """Carry out an order like `carry_out`, with all but the training elsewhere.

    `call(job, function, *arguments)` calls a function in another process, which may write where
    this one does.

    Raises:
        ConfigError: the task's files are missing or wrong.
    """
    job, trained = FitsJob(run, order.config, order.request), list[Path]()
    quiet_libraries()
    task = list_task(order.request, order.config)
    from moce_dist.transfer.choosing import open_stage

    with hold(job.folder):
        if order.is_fresh:
            # damaged data are refused before results are set aside
            task.scan(threads=order.config.data.loader_processes)
            order = _begun(run, order)
        stages = {name: open_stage(run, name) for name in STAGES}
        while not isinstance(found := call(job, advance, run, order, stages, trained), dict):
            # further steps have a lock of their own, as in `take_further_steps`
            with hold(found.folder.parent if isinstance(found, FurtherJob) else found.folder):
                train(found)
            trained.append(found.folder)
    return found


def prepare(run: Run, orders: Sequence[Order], train: Train) -> list[Order]:
    """Take the further steps that tasks of a suite share, before the tasks run in parallel.

    Sets aside what is to be made anew, and returns orders that do not: one that is attempted again,
    because its node was lost, goes on.

    Raises:
        ConfigError: the run lacks the stage that they start from.
    """
    orders = [_begun(run, order) for order in orders]
    for order in orders:
        for name, job in further_jobs(run, order.config, order.request).items():
            if further_of(name) == "all":
                from moce_dist.transfer.further import take_shared_steps

                assert order.request.continue_images is not None
                take_shared_steps(job, base_of(name), order.request.continue_images, train)
    return orders


def _begun(run: Run, order: Order) -> Order:
    folder = run.transfer(order.request.folder)
    if not order.is_fresh or not folder.exists():
        return replace(order, is_fresh=False)
    try:
        list_task(order.request, order.config)
        with hold(folder):
            set_aside(folder)
    except ConfigError:
        # its attempt will fail likewise, and keep its results
        return order
    return replace(order, is_fresh=False)


def attempt(run: Run, order: Order) -> TaskOutcome:
    """Carry out an order with a single worker; a failure is returned as an outcome.

    The worker takes the micro-batches of all workers, so that it holds no more images at once.
    """
    config, parallel = order.config, order.config.parallel
    # batch normalisation needs two images in a micro-batch
    most = max(1, kind_of(order.request.task).batch_size(config.transfer) // 2)
    parts = min(parallel.num_workers * parallel.micro_batches, most)
    alone = parallel.model_copy(
        update={"num_workers": 1, "min_workers": None, "micro_batches": parts}
    )
    order = replace(order, config=config.model_copy(update={"parallel": alone}))
    try:
        return TaskOutcome(order.request.folder, carry_out(run, order))
    except Exception as error:  # noqa: BLE001 - whatever it is, the other tasks go on
        return TaskOutcome(order.request.folder, None, typed(error))


def collect(run: Run, outcomes: Iterable[TaskOutcome]) -> dict[str, Any]:
    """Wait for all outcomes, log how each ended, and write the suite's metrics.json."""
    finished = []
    for outcome in outcomes:
        logger.info("%s: %s", outcome.name, outcome.failure or "done")
        finished.append(outcome)
    done = [outcome.metrics for outcome in finished if outcome.metrics is not None]
    metrics = suite_metrics(done, {o.name: o.failure for o in finished if o.metrics is None})
    write_atomic(run.transfer(ALL) / "metrics.json", json.dumps(metrics, indent=1))
    return metrics
