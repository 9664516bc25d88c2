"""Find or start a Ray cluster, and map functions over items on its workers.

A running cluster is used when RAY_ADDRESS names one, as in `ray job submit`; else an embedded one
is started in this process and ends with it.
"""

import functools
import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from moce_dist.config import ParallelConfig
from moce_dist.run import environment
from moce_dist.run.tasks import Result, Shared, T

log = logging.getLogger(__name__)
_OBJECT_STORE_BYTES = 256 * 2**20
_CANCEL_S = 30
_LATE = "timed out during startup"
"""Words of Ray's error on a machine that is too busy to start a node in time."""
SEAT = "moce_seat"
"""Resource that a training worker takes from an embedded cluster without GPUs, instead of a CPU.

The driver does one thing at a time, so workers that wait for their next job need no CPU.
"""


def connect(parallel: ParallelConfig) -> None:
    """Join the running Ray cluster, or start an embedded one with a CPU for every worker."""
    if not ray.is_initialized():
        with _own_sigterm():
            _connect(parallel)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's handler of SIGTERM, which Ray replaces by a silent exit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    try:
        yield
    except SystemExit:
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _connect(parallel: ParallelConfig) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        with environment.joining_a_cluster():
            ray.init(**quiet)
        return
    log.info("ray: starting an embedded cluster (set RAY_ADDRESS to use a running one)")
    room = max(os.cpu_count() or 1, parallel.num_workers)
    start = functools.partial(
        ray.init,
        address="local",
        num_cpus=room,
        resources={SEAT: room},
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        _temp_dir=environment.ray_folder(),
        **quiet,
    )
    try:
        start()
    except Exception as error:
        # Ray gives its node 30 s, which cannot be set; what is left of the first ends with us
        if _LATE not in str(error):
            raise
        log.warning("ray: the embedded cluster was not there in 30 s; trying once more")
        start()


def needs_ray(parallel: ParallelConfig) -> bool:
    """Tell whether work is spread by Ray: with several workers, or when a cluster is named."""
    return parallel.num_workers > 1 or bool(os.environ.get("RAY_ADDRESS"))


def gets_gpu(parallel: ParallelConfig) -> bool:
    """Tell whether a worker gets a GPU; `auto` asks for one where this process or Ray has any."""
    if not needs_ray(parallel):
        # torch takes seconds to import, and nothing else here needs it
        import torch

        return bool(parallel.use_gpu) and torch.cuda.is_available()
    connect(parallel)
    if parallel.use_gpu == "auto":
        return ray.cluster_resources().get("GPU", 0) > 0
    return parallel.use_gpu


def seat_resource(parallel: ParallelConfig) -> str:
    """Name the resource that a training worker takes one of: a GPU, a seat, or a CPU."""
    if gets_gpu(parallel):
        return "GPU"
    return SEAT if SEAT in ray.cluster_resources() else "CPU"


def map_tasks(
    parallel: ParallelConfig,
    function: Callable[[Shared, T], Result],
    shared: Shared,
    items: Iterable[T],
    /,
) -> Iterator[Result]:
    """Apply a module-level function to items on `num_workers` workers; results in the items' order.

    With `parallel` bound this is a `MapTasks` (`run/tasks.py`). The shared value is sent to a node
    once. A task whose worker died is run again elsewhere. With one worker and no cluster it runs
    here. When the iteration ends early, tasks that run are ended and waited for.

    Raises:
        Exception: the first error of the function, as it was raised.
    """
    if not needs_ray(parallel):
        yield from (function(shared, item) for item in items)
        return
    connect(parallel)
    start = _starter(function, parallel, shared, gpu=False)
    window: deque[Any] = deque()
    try:
        for item in items:
            window.append(start(item))
            if len(window) > 2 * parallel.num_workers:
                yield _first(window)
        while window:
            yield _first(window)
    except RayTaskError as error:
        raise error.cause from None
    finally:
        # no task may write after the caller has cleaned up
        _end(window)


def _first(window: deque[Any]) -> Any:
    # it stays in the window until its result has come, so that an interruption ends it, too
    result = ray.get(window[0])
    window.popleft()
    return result


@contextmanager
def hold_tasks(
    parallel: ParallelConfig, function: Callable[[Shared, T], Result], shared: Shared, /
) -> Iterator[Callable[[T], Future[Result]]]:
    """Yield what starts `function(shared, item)` on a worker of the cluster, as a future.

    Each task has a GPU, if the cluster has any and `parallel` allows it. A task whose worker died
    is run again elsewhere; a future raises RayError when that is over. Tasks that still run at the
    end of the block are ended and waited for.
    """
    connect(parallel)
    start, started = _starter(function, parallel, shared, gpu=True), []

    def submit(item: T) -> Future[Result]:
        started.append(start(item))
        future: Future[Result] = started[-1].future()
        return future

    try:
        yield submit
    finally:
        _end(started)


def _starter(
    function: Callable[..., Any], parallel: ParallelConfig, shared: Any, *, gpu: bool
) -> Callable[[Any], Any]:
    common = ray.put(shared)
    gpus = 1 if gpu and gets_gpu(parallel) else 0
    # a process that has used a GPU keeps memory of it; 0: any number of calls
    remote = ray.remote(max_calls=1 if gpus else 0)(function)
    task = remote.options(num_cpus=1, num_gpus=gpus, max_retries=3)
    return lambda item: task.remote(common, item)


def _end(tasks: Sequence[Any]) -> None:
    with suppress(RayError):
        _, left = ray.wait(list(tasks), num_returns=len(tasks), timeout=0) if tasks else ([], [])
        for task in left:
            ray.cancel(task, force=True)
        if left:
            ray.wait(left, num_returns=len(left), timeout=_CANCEL_S)
