"""Loader processes that a parent does not wait for in vain: the one door to torch's DataLoader.

A loader process that dies, or cannot hand over a batch because shared memory is full, would be
waited for until its time is over, or for ever: torch's own thread that hands batches over prints
the error and drops the batch. Here the process says why and ends, and its parent looks every
second.
"""

import ctypes
import errno
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.queues import Queue
from typing import Any

from torch.utils.data import DataLoader, Dataset

CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
"""Loader processes share what their parent has mapped, however the parent itself was started."""
_LOOK_EVERY_S = 1
_PR_SET_PDEATHSIG = 1
_END = object()
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where the system has it


def load(
    dataset: Dataset[Any],
    processes: int,
    *,
    stall_s: float | None = None,
    at_end: Callable[[], None] = lambda: None,
    **options: Any,
) -> Generator[Any]:
    """Yield what a DataLoader makes of a data set; with 0 processes it is made here.

    `at_end` is called before processes are asked to end, should they wait for something else.

    Raises:
        OSError: shared memory is too small for the batches.
        RuntimeError: a process died, or nothing came for `stall_s` seconds.
        Exception: what a process met.
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
        # else torch's handler of SIGCHLD raises the error of a dead process again, anywhere
        loader._shutdown_workers()


@contextmanager
def in_shared_memory() -> Iterator[None]:
    """Name shared memory where making something in it fails: locks and queues lie there.

    Raises:
        OSError: it is too small.
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
        except Exception as error:  # noqa: BLE001 - what a process met has its own type
            if "DataLoader timed out" not in str(error) or not reasons.empty():
                raise _explain(error, reasons, loader) from None
        if stall_s is not None and time.monotonic() - begin >= stall_s:
            message = f"the loader delivered nothing for data.stall_timeout_s ({stall_s:g} s)"
            raise RuntimeError(message)


def _begin(reasons: Any, _: int) -> None:
    """Prepare a loader process: it ends with its parent, and with a batch that it cannot give."""
    # it asks for its parent only between batches; a stalled read would outlive it
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def give_up(error: Exception, _: Any) -> None:
        reasons.put(" ".join(str(error).split()))
        os._exit(1)

    # a hook for libraries; who has it must be a subclass, or the only one in its process
    Queue._on_queue_feeder_error = staticmethod(give_up)  # type: ignore[attr-defined]


def _explain(error: Exception, reasons: Any, loader: Any) -> Exception:
    if "in DataLoader worker process" in str(error):
        # of a traceback of the process the last line says it all
        _, _, text = str(error).strip().splitlines()[-1].partition(": ")
        return type(error)(text)
    reason = reasons.get() if not reasons.empty() else ""
    has_bus_error = any(process.exitcode == -signal.SIGBUS for process in loader._workers)
    if has_bus_error or "shared memory" in reason or "</torch_" in reason:
        return _too_small()
    if reason:
        return RuntimeError(f"a loader process ended: {reason}")
    if isinstance(error, OSError | EOFError):
        # a tensor's file is fetched from the process that made it: that one was gone by then
        for process in loader._workers:
            process.join(_LOOK_EVERY_S)
            if process.exitcode:
                message = f"DataLoader worker (pid {process.pid}) exited unexpectedly"
                return RuntimeError(f"{message}, status {process.exitcode}")
    return error
