"""Run what a driver does between its trainings on a worker with a GPU.

A cluster's driver may run where there is no GPU, little memory and few cores, as in the pod of a
head. What it computes itself, such as the features of a task's images, then goes to a worker:

    driver, without a GPU     call ........ train on all ranks ... call ........ end
    a worker with a GPU       |-- function                         |-- function

The worker is held during a call only, since training needs its GPU.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moce_dist.config import ParallelConfig
from moce_dist.launch.actors import hold_actors
from moce_dist.launch.job import Follower, log_to_file
from moce_dist.launch.tasks import gets_gpu
from moce_dist.run import lease
from moce_dist.run.tasks import Result
from moce_dist.train.job import Job

_LOOK_EVERY_S = 1.0


def lacks_gpu(parallel: ParallelConfig) -> bool:
    """Tell whether this process has no GPU while the workers of its cluster have."""
    import torch

    return not torch.cuda.is_available() and gets_gpu(parallel)


def call_away(job: Job, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a module-level function on a worker with a GPU; its log goes to the job's and to ours.

    A call whose worker died is made again on another one.

    Raises:
        Exception: the error of the function, as it was raised.
        RuntimeError: no worker started within `parallel.start_timeout_s`, or too many died.
    """
    alone = job.parallel.model_copy(update={"num_workers": 1, "min_workers": None})
    with _followed(job), hold_actors(alone) as workers:
        (result,) = workers.map_tasks(_call, _Call(job, function, lease.held()), [arguments])
    return result


@dataclass(frozen=True)
class _Call:
    job: Job
    function: Callable[..., Any]
    leases: list[tuple[Path, str]]


def _call(call: _Call, arguments: Sequence[Any]) -> Any:
    # the driver holds the folders, and this process writes there for it
    lease.watch(call.leases)
    with log_to_file(call.job, logging.INFO):
        return call.function(*arguments)


@contextmanager
def _followed(job: Job) -> Iterator[None]:
    """Pass on the job's log while another process writes it."""
    follower, is_over = Follower(job), threading.Event()

    def follow() -> None:
        while not is_over.wait(_LOOK_EVERY_S):
            follower.report_log()

    thread = threading.Thread(target=follow, name="follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        follower.report_log()
