"""Run the pieces of a study in parallel: a ready piece goes to a free worker, until all are done.

A line of `pieces.jsonl` records that a piece was finished, how long it took, and its artefact. A
piece whose line and artefact are still valid is not started again. `progress.json` holds the
progress of the study.
"""

import json
import logging
import multiprocessing
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, NamedTuple

from moce_dist.config import ParallelConfig, identity
from moce_dist.launch.job import heed_sigterm
from moce_dist.run import lease
from moce_dist.run.artefacts import artefact_id, fingerprint, is_complete, read_marker
from moce_dist.run.directory import StoppedError
from moce_dist.run.files import read_jsonl, write_atomic, write_jsonl
from moce_dist.run.names import typed
from moce_dist.settings import ConfigError
from moce_dist.study.plan import Piece, StudyPlan
from moce_dist.study.work import (
    PieceOutcome,
    carry_out,
    carry_out_alone,
    carry_out_quietly,
    prepare,
)

log = logging.getLogger(__name__)
_WATCH_S = 0.2
_REPORT_S = 300.0
_MOST_PIECES = 64


def piece_fingerprint(piece: Piece) -> str:
    """Fingerprint what a piece makes; its task's files count by number, size and time."""
    request, transfer = piece.request, None
    if request is not None:
        transfer = [
            request.task,
            request.backbones,
            request.protocols,
            request.continue_images,
            piece.config.transfer.flat(),
            _stamp(request.data),
        ]
    return fingerprint([piece.id, identity(piece.config), transfer])


@cache
def _stamp(folder: Path | None) -> list[float] | None:
    if folder is None:
        return None
    found, seen = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(where)) in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            # a link may lead nowhere
            with suppress(OSError):
                found.append(os.stat(os.path.join(where, name)))
    return [len(found), sum(s.st_size for s in found), max((s.st_mtime for s in found), default=0)]


@dataclass
class Journal:
    """`pieces.jsonl`: the finished pieces, with their fingerprints, artefacts and seconds."""

    path: Path
    lines: dict[str, dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.lines = {line["piece"]: line for line in read_jsonl(self.path)}

    def holds(self, piece: Piece) -> bool:
        """Tell whether a piece with this fingerprint was finished, and its artefact is intact."""
        line, marker = self.lines.get(piece.id), read_marker(piece.folder)
        if line is None or marker is None or line["of"] != piece_fingerprint(piece):
            return False
        needed = line.get("needs", {}).items()  # journals of version 0.1 do not have them
        if any(self._artefact(need) != artefact for need, artefact in needed):
            return False
        return line["artefact"] == artefact_id(piece.folder) and is_complete(
            piece.folder, marker["inputs"]
        )

    def _artefact(self, piece_id: str) -> str | None:
        return self.lines.get(piece_id, {}).get("artefact")

    def enter(self, piece: Piece, outcome: PieceOutcome) -> None:
        """Record a finished piece; if it was finished before, the longer time is kept."""
        before = self.lines.get(piece.id)
        of, seconds = piece_fingerprint(piece), outcome.seconds
        if before is not None and before["of"] == of:
            seconds = max(seconds, before["seconds"])
        self.lines[piece.id] = {
            "piece": piece.id,
            "of": of,
            "artefact": artefact_id(piece.folder),
            "needs": {need: self._artefact(need) for need in piece.stages},
            "seconds": round(seconds, 3),
            "machine": platform.node(),
            "time": time.strftime("%FT%TZ", time.gmtime()),
        }
        write_jsonl(self.path, self.lines.values())

    def seconds(self, piece_id: str) -> float | None:
        """Return the seconds that a piece took; None before it was finished."""
        line = self.lines.get(piece_id)
        return None if line is None else float(line["seconds"])


def _begin_process(leases: list[tuple[Path, str]], gpus: "Queue[str] | None") -> None:
    """Take a GPU, and end when the parent is gone or has lost the lease of the study's folder."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_S)
        os._exit(1)

    # SIGINT goes to the whole process group; the parent decides what has to end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()
    lease.watch(leases)
    if gpus is not None:
        # CUDA reads it when it is first used, which is later
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()


class _Pool(NamedTuple):
    """How pieces are carried out: what starts one, how many at a time, whether SIGTERM came."""

    submit: Callable[[Piece], Future[PieceOutcome]]
    lanes: int
    is_terminated: Callable[[], bool]


@contextmanager
def _hold_pool(plan: StudyPlan, jobs: int) -> Iterator[_Pool]:
    """Choose where pieces are carried out; those that still run at an error are ended."""
    parallel = plan.pieces[0].config.parallel
    if os.environ.get("RAY_ADDRESS") and parallel.num_workers == 1:
        from moce_dist.launch.tasks import connect, hold_tasks

        connect(parallel)
        with (
            heed_sigterm() as is_terminated,
            hold_tasks(parallel, carry_out_alone, lease.held()) as start,
        ):
            yield _Pool(start, _MOST_PIECES, is_terminated)
    elif jobs > 1:
        # a process reads it when it first imports a numerical library
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        spawn, gpus = multiprocessing.get_context("spawn"), None
        # a cluster shares out its own
        if not os.environ.get("RAY_ADDRESS") and (visible := visible_gpus(parallel)):
            if parallel.num_workers > 1:
                raise ConfigError(
                    f"--jobs {jobs}: pieces of {parallel.num_workers} workers would share GPUs; "
                    "start a Ray cluster and set RAY_ADDRESS, or take --jobs 1"
                )
            gpus = spawn.Queue()
            for number in range(jobs):
                gpus.put(visible[number % len(visible)])
        processes = ProcessPoolExecutor(jobs, spawn, _begin_process, (lease.held(), gpus))
        with heed_sigterm() as is_terminated:
            try:
                yield _Pool(
                    lambda piece: processes.submit(carry_out_quietly, piece), jobs, is_terminated
                )
                processes.shutdown()
            except BaseException:
                end_processes(multiprocessing.active_children())
                processes.shutdown(cancel_futures=True)
                raise
    else:
        # in this process, where training heeds SIGTERM itself and all else ends at once
        yield _Pool(_carry_out_here, 1, lambda: False)


def visible_gpus(parallel: ParallelConfig) -> list[str]:
    """List the GPUs that processes may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if not parallel.use_gpu or not (count := torch.cuda.device_count()):
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not named:
        return [str(number) for number in range(count)]
    # a process sees a single slice of a GPU, however many are named
    return named.split(",") if named.startswith("MIG-") else named.split(",")[:count]


def _carry_out_here(piece: Piece) -> Future[PieceOutcome]:
    future: Future[PieceOutcome] = Future()
    future.set_result(carry_out(piece))
    return future


def end_processes(children: list[BaseProcess]) -> None:
    """Send SIGTERM to processes until all have ended."""
    # one in training takes SIGTERM as the request to save its state, then lives on without work
    while alive := [child for child in children if child.is_alive()]:
        for child in alive:
            child.terminate()
        connection.wait([child.sentinel for child in alive], timeout=1.0)


class Runner:
    """Carry out a plan's pieces; `report` is called now and then, after a piece has finished."""

    def __init__(self, plan: StudyPlan, out: Path, report: Callable[[], None]) -> None:
        """Start with the pieces that were finished before."""
        self.plan, self.out, self.report = plan, out, report
        self.journal = Journal(out / "pieces.jsonl")
        self.done: set[str] = set()
        for piece in plan.pieces:  # a piece comes after those that it needs
            if self.done.issuperset(piece.stages) and self.journal.holds(piece):
                self.done.add(piece.id)
        self.failed: dict[str, str] = {}
        self.running: dict[Future[PieceOutcome], tuple[Piece, float]] = {}
        self._lanes, self._told_at, self._reported_at = 1, 0.0, time.monotonic()

    def run(self, jobs: int) -> None:
        """Carry out all remaining pieces; those that need a failed piece are not started.

        Raises:
            StoppedError: SIGTERM came; the pieces that ran go on from what they have saved.
        """
        if len(self.done) == len(self.plan.pieces):
            return
        with _hold_pool(self.plan, jobs) as pool:
            self._lanes = pool.lanes
            while True:
                while len(self.running) < pool.lanes and (piece := self._next()) is not None:
                    self._tell(f"{piece.id} starts")
                    prepare(piece, self.plan.runs[piece.run].config)
                    self.running[pool.submit(piece)] = (piece, time.monotonic())
                if not self.running:
                    return
                finished, _ = wait(self.running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in finished:
                    if not (pool.is_terminated() and future.exception()):
                        self._finish(future)
                if pool.is_terminated():
                    raise StoppedError("SIGTERM; the pieces that ran are not finished")

    def _next(self) -> Piece | None:
        under_way = {piece.id for piece, _ in self.running.values()}
        for piece in self.plan.pieces:
            if piece.id in self.done or piece.id in self.failed or piece.id in under_way:
                continue
            if lacking := [need for need in piece.needs if need in self.failed]:
                self.failed[piece.id] = f"{lacking[0]} failed"
            elif all(need in self.done for need in piece.needs):
                return piece
        return None

    def _finish(self, future: Future[PieceOutcome]) -> None:
        piece, started = self.running.pop(future)
        try:
            outcome = future.result()
        except BrokenProcessPool:
            raise RuntimeError(f"{piece.id}: its process was killed; is memory short?") from None
        except StoppedError:
            raise
        except Exception as error:  # noqa: BLE001 - of Ray, when a worker was lost too often
            outcome = PieceOutcome(piece.id, time.monotonic() - started, typed(error))
        if outcome.failure:
            self.failed[piece.id] = outcome.failure
            self._tell(f"{piece.id} failed: {outcome.failure}")
            return
        self.done.add(piece.id)
        self.journal.enter(piece, outcome)
        self._tell(f"{piece.id} took {outcome.seconds:.0f} s")
        if time.monotonic() - self._reported_at > _REPORT_S:
            self.report()
            self._reported_at = time.monotonic()

    def _tell(self, what: str) -> None:
        left = self.seconds_left()
        number = f"{len(self.done)} of {len(self.plan.pieces)}"
        ahead = "" if left is None else f", about {timedelta(seconds=round(left))} left"
        log.info("study: %s%s: %s", number, ahead, what)
        progress = {
            "pieces": len(self.plan.pieces),
            "done": len(self.done),
            "running": [piece.id for piece, _ in self.running.values()],
            "failed": self.failed,
            "seconds_left": left,
            "time": time.strftime("%FT%TZ", time.gmtime()),
        }
        write_atomic(self.out / "progress.json", json.dumps(progress, indent=1))

    def seconds_left(self) -> float | None:
        """Estimate the remaining time by finished pieces of each sort; None if a sort has none."""
        took: dict[str, list[float]] = {}
        for piece in self.plan.pieces:
            if piece.id in self.done and self._size(piece):
                seconds = self.journal.lines[piece.id]["seconds"]
                took.setdefault(_sort(piece), []).append(seconds / self._size(piece))
        over = self.done | self.failed.keys()
        # a stage without steps takes next to no time
        left = [p for p in self.plan.pieces if p.id not in over and self._size(p)]
        if any(_sort(piece) not in took for piece in left):
            return None
        expected = [self._size(p) * sum(t := took[_sort(p)]) / len(t) for p in left]
        now = time.monotonic()
        spent = sum(now - started for _, started in self.running.values())
        return max(0.0, sum(expected) - spent) / min(self._lanes, max(1, len(left)))

    def _size(self, piece: Piece) -> float:
        if piece.request is not None:
            return len(piece.request.backbones)
        return self.plan.runs[piece.run].cost((piece.kind,)).flop


def _sort(piece: Piece) -> str:
    """Name the sort of a piece; the time of pieces of one sort is proportional to their size."""
    if piece.request is not None:
        return piece.request.folder
    return piece.kind if piece.kind in ("features", "cluster") else "training"
