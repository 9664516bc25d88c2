"""Status of a start of the workers: where they run, which ranks hang, how it ended.

Workers report to a status board, and the driver looks at it every second:

    rank 0   step 41, for 310 s      waits for rank 1 in a collective
    rank 1   step 40, for 312 s      is behind: it hangs, and is killed

    rank 2   no beat for 305 s       its process is stopped: it hangs, whatever the others do

Only if no rank is silent are ranks compared by step, and not while a loop rests
(`train/pulse.py`). Nothing here knows Ray.
"""

import asyncio
import re
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moce_dist.config import ParallelConfig
from moce_dist.launch.job import Failure
from moce_dist.train.pulse import Beat

_MEDIANS = 10
_FIRST = 4
_MISSED_BEATS = 5
"""Steps by which the last beats of two starts that end at the same step may differ."""


@dataclass(frozen=True)
class Sign:
    """A rank's last beat, when it came (seconds of this host's clock), and where the rank runs."""

    node: str
    address: str
    process: int
    at: float
    beat: Beat = field(default_factory=Beat)


def standing_still(signs: Mapping[int, Sign], timeout_s: float, now: float) -> dict[int, str]:
    """Find the ranks that hang, each with a line that says so.

    No rank counts as hanging before `timeout_s`, nor before ten times the longest median step. In
    the first step, in which models are compiled, it is four times `timeout_s`.
    """
    limit = max([timeout_s, *(_MEDIANS * sign.beat.median_s for sign in signs.values())])
    silent = {rank: now - sign.at for rank, sign in signs.items() if now - sign.at > limit}
    if silent:
        return {r: _say(r, signs[r], f"no sign of life for {s:.0f} s") for r, s in silent.items()}
    ages = {
        rank: sign.beat.age_s + now - sign.at
        for rank, sign in signs.items()
        if sign.beat.age_s is not None
    }
    if not all(sign.beat.median_s for sign in signs.values()):
        limit = max(limit, _FIRST * timeout_s)
    # the others may be waiting for a rank that rests
    if len(ages) < len(signs) or max(ages.values(), default=0.0) <= limit:
        return {}
    last = min(sign.beat.step for sign in signs.values())
    return {
        rank: _say(rank, sign, f"in step {last} of {sign.beat.loop} for {ages[rank]:.0f} s")
        for rank, sign in signs.items()
        if sign.beat.step == last
    }


def _say(rank: int, sign: Sign, what: str) -> str:
    return f"rank {rank} on node {sign.address} (process {sign.process}) stands still: {what}"


class StatusBoard:
    """Exchange between driver and workers: jobs, progress, failures, requests to stop.

    Jobs follow each other: failures, steps and requests to stop are those of the newest one.
    """

    def __init__(self, num_ranks: int = 1) -> None:
        """Begin without workers and without a job."""
        self._num_ranks = num_ranks
        self._jobs: list[Any] = []
        self._finished: set[int] = set()
        self._is_dismissed = False
        self._news = asyncio.Event()
        self._nodes: list[str] = []
        self._signs: dict[int, Sign] = {}
        self._reached: dict[str, int] = {}
        self._failures: list[Failure] = []
        self._seats: Any = None
        self._is_stopping = False

    def arrive(self, node: str, seats: Any) -> None:
        """Note that a worker runs on a node, in the placement group that all workers share."""
        self._nodes.append(node)
        self._seats = seats

    def seats(self) -> Any:
        """Return the placement group of the workers; None before the first has arrived."""
        return self._seats

    def nodes(self) -> list[str]:
        """List the nodes of the workers, one entry per worker."""
        return self._nodes

    def join(self, rank: int, sign: Sign) -> None:
        """Note that a rank is about to begin."""
        self._signs[rank] = replace(sign, at=time.monotonic())

    def beat(self, rank: int, beat: Beat) -> bool:
        """Record a rank's beat; tell whether the workers are to stop."""
        if rank in self._signs:
            self._signs[rank] = replace(self._signs[rank], at=time.monotonic(), beat=beat)
        if beat.step >= 0:
            self._reached[beat.loop] = max(beat.step, self._reached.get(beat.loop, -1))
        return self._is_stopping

    def leave(self, rank: int, failure: Failure | None = None) -> None:
        """Note that a rank has ended, and its failure, if any."""
        self._signs.pop(rank, None)
        if failure is not None:
            self._failures.append(failure)

    def failure(self) -> Failure | None:
        """Return the first failure that a retry would not cure; None if there is none."""
        return next((failure for failure in self._failures if failure.kind), None)

    def reached(self) -> dict[str, int]:
        """Return the last step of every loop."""
        return self._reached

    def standing_still(self, timeout_s: float) -> list[tuple[Sign, str]]:
        """List the ranks that hang, each with a line that says so."""
        found = standing_still(self._signs, timeout_s, time.monotonic())
        return [(self._signs[rank], line) for rank, line in sorted(found.items())]

    def stop(self) -> None:
        """Ask the workers to stop."""
        self._is_stopping = True

    async def carry_out(self, job: Any) -> None:
        """Hand out a job; return when all ranks have finished it."""
        self._jobs.append(job)
        self._finished, self._failures, self._reached = set(), [], {}
        self._is_stopping = False
        self._news.set()
        await self._until(lambda: len(self._finished) == self._num_ranks)

    async def next_job(self, number: int) -> Any:
        """Wait for the job of that number, counted from 0; None when there will be none."""
        await self._until(lambda: self._is_dismissed or number < len(self._jobs))
        return self._jobs[number] if number < len(self._jobs) else None

    def finish(self, rank: int) -> None:
        """Note that a rank has finished the newest job."""
        self._finished.add(rank)
        self._news.set()

    def dismiss(self) -> None:
        """Tell the workers that there are no more jobs."""
        self._is_dismissed = True
        self._news.set()

    async def _until(self, is_true: Callable[[], bool]) -> None:
        # all methods run on one thread, so nothing changes between the test and the wait
        while not is_true():
            self._news.clear()
            await self._news.wait()


@dataclass(frozen=True)
class Ending:
    """How a start of the workers ended: at the end of the job, or before, and why."""

    is_finished: bool = False
    is_saved: bool = False
    """The workers stopped when they were asked to, with their state saved."""
    cause: str = ""


def cause_of(error: Exception) -> str:
    """Say in a line what ended a start: the worker that died, else the first worker's error."""
    failures = getattr(error, "worker_failures", {})
    # Ray's error for a worker that no longer answers; the error that it wraps varies
    died = [i for i in failures.items() if type(i[1]).__name__.startswith("WorkerHealthCheck")]
    if died:
        rank, met = died[0]
        # the last line gives the exit status, or says that the machine was out of memory
        detail = textwrap.shorten(str(met).strip().splitlines()[-1], 300, placeholder=" ...")
        return f"worker {rank} died: {detail}"
    for rank, met in failures.items():
        return f"worker {rank}: {_shorten(met)}"
    return _shorten(error)


def _shorten(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")


@dataclass
class LossBudget:
    """Losses so far, counted by kind."""

    name: str
    parallel: ParallelConfig
    failures: int = 0
    preemptions: int = 0
    _reached: dict[str, int] = field(default_factory=dict)
    _last: str = ""

    def charge(self, *, is_preemption: bool, cause: str, reached: Mapping[str, int]) -> str:
        """Count a loss and return a line about it; `reached` holds the last step of every loop.

        Raises:
            RuntimeError: the loss exceeds its budget; or it has the cause of the loss before, at
                the same step: the data or the code causes it, and a restart does not help.
        """
        loops = {*reached, *self._reached}
        behind = [self._reached.get(loop, -1) - reached.get(loop, -1) for loop in loops]
        is_repeated = all(0 <= steps <= _MISSED_BEATS for steps in behind)
        self._reached = dict(reached)
        # numbers of ranks, processes and ports differ between losses of the same cause
        last, self._last = self._last, "" if is_preemption else re.sub(r"\d+", "#", cause)
        if self._last and self._last == last and is_repeated:
            raise RuntimeError(f"{self.name}: twice at the same step: {cause}")
        name = "preemptions" if is_preemption else "failures"
        count, limit = getattr(self, name) + 1, getattr(self.parallel, f"max_{name}")
        setattr(self, name, count)
        if count > limit:
            raise RuntimeError(
                f"{self.name}: {count} {name}, more than parallel.max_{name} ({limit}) allows; "
                f"the last one: {cause}"
            )
        return f"{self.name}: {name.removesuffix('s')} {count} of at most {limit}: {cause}"
