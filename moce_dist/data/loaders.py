"""Loader processes whose failure the parent notices: the only code that uses torch's DataLoader.

By default a parent waits until the timeout, or for ever, for a loader process that died or could
not send a batch because shared memory is full: the thread that sends batches prints the error and
drops the batch. Here the process reports the reason and exits, and its parent looks every second.
"""

import ctypes
import errno
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.queues import Queue
from typing import Any

from torch.utils.data import DataLoader, Dataset

from moce_dist.run.names import one_line

CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
"""Fork, so that loader processes share what their parent has mapped, however it was started."""
_LOOK_EVERY_S = 1
_PR_SET_PDEATHSIG = 1
_END = object()
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the system's name


def load(
    dataset: Dataset[Any],
    processes: int,
    *,
    stall_s: float | None = None,
    at_end: Callable[[], None] = lambda: None,
    **options: Any,
) -> Generator[Any]:
    """Yield the batches of a DataLoader; with 0 processes they are made in this process.

    `at_end` is called before the processes are asked to exit, to end their other waits.

    Raises:
        OSError: shared memory is too small for the batches.
        RuntimeError: a process died, or delivered nothing for `stall_s` seconds.
        Exception: an exception that a process raised.
    """
    if processes == 0:
        yield from DataLoader(dataset, **options)
        return
    options |= {"num_workers": processes, "timeout": _LOOK_EVERY_S}
    options["multiprocessing_context"] = CONTEXT
    with in_shared_memory():
        reasons: Any = CONTEXT.SimpleQueue()
        loader: Any = iter(DataLoader(dataset, worker_init_fn=partial(_begin, reasons), **options))
    try:
        while (batch := _next(loader, reasons, stall_s)) is not _END:
            yield batch
    finally:
        at_end()
        # otherwise torch's SIGCHLD handler may raise the error of a dead process again at any time
        loader._shutdown_workers()


@contextmanager
def in_shared_memory() -> Iterator[None]:
    """Name shared memory in the error if a lock or queue does not fit in it.

    Raises:
        OSError: shared memory is too small.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        raise _too_small() from None


def _too_small() -> OSError:
    return OSError(
        errno.ENOSPC,
        "shared memory is too small for the batches of loader processes: give it more "
        "(docker run --shm-size, an emptyDir of medium Memory), or lower "
        "data.loader_processes or data.prefetch_batches",
        _SHARED_MEMORY,
    )


def _next(loader: Any, reasons: Any, stall_s: float | None) -> Any:
    begin = time.monotonic()
    while True:
        try:
            return next(loader, _END)
        except Exception as error:  # noqa: BLE001 - a process may raise any type
            if "DataLoader timed out" not in str(error) or not reasons.empty():
                raise _explain(error, reasons, loader) from None
        if stall_s is not None and time.monotonic() - begin >= stall_s:
            message = f"the loader delivered nothing for data.stall_timeout_s ({stall_s:g} s)"
            raise RuntimeError(message)


def _begin(reasons: Any, _: int) -> None:
    """Make a loader process exit when its parent dies or a batch cannot be sent."""
    # torch checks for the parent only between batches; a stalled read would outlive the parent
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def give_up(error: Exception, _: Any) -> None:
        reasons.put(one_line(error))
        os._exit(1)

    # a hook for subclasses; it can be set on the class, as the process uses no other such queues
    Queue._on_queue_feeder_error = staticmethod(give_up)  # type: ignore[attr-defined]


def _explain(error: Exception, reasons: Any, loader: Any) -> Exception:
    is_raised = "in DataLoader worker process" in str(error)
    if is_raised:
        # the text is the process's traceback; it ends with type and message, of one line or more
        head = rf"^(?:\w+\.)*{type(error).__name__}:? ?"
        reason = one_line(re.split(head, str(error), flags=re.MULTILINE)[-1])
    else:
        reason = reasons.get() if not reasons.empty() else ""
    has_bus_error = any(process.exitcode == -signal.SIGBUS for process in loader._workers)
    # the process itself allocates a batch that it collates, the thread that sends it any other
    if has_bus_error or "shared memory" in reason or "</torch_" in reason:
        return _too_small()
    if is_raised:
        return type(error)(reason)
    if reason:
        return RuntimeError(f"a loader process ended: {reason}")
    if isinstance(error, OSError | EOFError):
        # the parent gets a tensor's file from the process that made it; that process had exited
        for process in loader._workers:
            process.join(_LOOK_EVERY_S)
            if process.exitcode:
                message = f"DataLoader worker (pid {process.pid}) exited unexpectedly"
                return RuntimeError(f"{message}, status {process.exitcode}")
    return error
