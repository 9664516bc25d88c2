"""Workers that keep what they have from one sweep over the data to the next: a crew of Ray actors.

Items are dealt out like cards: worker w gets numbers w, w + W, ..., so in every sweep a block of
rows goes to the same worker, which still has its file open or, on a GPU, the rows themselves. Who
has done all of its own takes the last one of whoever has most left. A worker that dies is replaced,
and its items go back; while a new one is on its way, the others do them.

    2 workers, 7 items   worker 0: 0 2 4 6    worker 1: 1 3 5, then 6 if worker 0 has not begun it

Results come in the order of the items, so who did what decides nothing.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from moce_dist.config import ParallelConfig
from moce_dist.launch import connect, needs_ray, uses_gpu
from moce_dist.mapping import Item, Result, Shared, Workers, map_here

_IN_HAND = 2
"""Items that a worker has at a time, so that it need not wait for the next one."""
_AHEAD = 16
"""Items for each worker that may be done before the first one that is not."""
_START_S = 60
"""How long the work waits for all workers; then those that are there begin, seconds."""
_MAX_LOSSES = 3
"""Losses of workers, for each of them, after which the work is given up."""


@contextmanager
def hold_crew(parallel: ParallelConfig, *, gpu: bool = False) -> Iterator[Workers]:
    """Hold `parallel.num_workers` workers; with one and no cluster the work is done here.

    With `gpu` each has one of the cluster's GPUs, where it has any and `parallel` allows.
    """
    if not needs_ray(parallel):
        yield Workers(map_here, _own_device(parallel) if gpu else "cpu")
        return
    connect(parallel)
    has_gpu = gpu and uses_gpu(parallel)
    crew = Crew(parallel, gpu=has_gpu)
    try:
        yield Workers(crew, "cuda" if has_gpu else "cpu")
    finally:
        crew.dismiss()


def _own_device(parallel: ParallelConfig) -> str:
    # seconds to import, and nothing else here needs it
    import torch

    return "cuda" if parallel.use_gpu and torch.cuda.is_available() else "cpu"


class _Worker:
    """One worker: keeps what all items of a sweep share until the next sweep."""

    def __init__(self) -> None:
        self._sweep, self._job = -1, (None, None)

    def greet(self) -> None:
        """Answer, which a worker does that has started."""

    def do(self, sweep: int, job: list[Any], item: Any) -> Any:
        """Apply the function of a sweep to what is shared and an item."""
        if sweep != self._sweep:
            self._sweep, self._job = sweep, ray.get(job[0])
        function, shared = self._job
        assert function is not None
        return function(shared, item)


class Crew:
    """Workers with state, started when they are needed first (`mapping.MapTasks`)."""

    def __init__(self, parallel: ParallelConfig, *, gpu: bool) -> None:
        self.num_workers, self._gpu = parallel.num_workers, gpu
        self._start_timeout_s = parallel.start_timeout_s
        self._workers: list[Any] = []
        self._greetings: dict[Any, int] = {}
        self._sweeps = self._losses = 0

    def __call__(
        self, function: Callable[[Shared, Item], Result], shared: Shared, items: Sequence[Item], /
    ) -> Iterator[Result]:
        """Return `[function(shared, item) for item in items]`.

        Raises:
            Exception: the first error of the function, as it was raised.
            RuntimeError: workers died again and again, or none has started.
        """
        self._start()
        self._sweeps += 1
        return _Sweep(self, self._sweeps, [ray.put((function, shared))], items).results()

    def _start(self) -> None:
        if not self._workers:
            self._workers = [None] * self.num_workers
            for number in range(self.num_workers):
                self._hire(number)
            self._wait()

    def _hire(self, number: int) -> None:
        hired = ray.remote(_Worker).options(
            num_cpus=1, num_gpus=int(self._gpu), scheduling_strategy="SPREAD"
        )
        self._workers[number] = hired.remote()
        self._greetings[self._workers[number].greet.remote()] = number

    def _wait(self) -> None:
        # else the first one to come would take the blocks of all others
        expected, longest = self.greetings, self._start_timeout_s
        come, _ = ray.wait(expected, num_returns=len(expected), timeout=min(_START_S, longest))
        if not come:
            come, _ = ray.wait(expected, timeout=max(longest - _START_S, 0))
        if not come:
            needs = "a CPU and a GPU" if self._gpu else "a CPU"
            raise RuntimeError(f"no worker has started in {longest:g} s; each needs {needs}")
        for greeting in come:
            self.hear(greeting)

    @property
    def greetings(self) -> list[Any]:
        """What workers have not yet answered."""
        return list(self._greetings)

    def present(self) -> list[int]:
        """Return the numbers of the workers that have started."""
        return sorted(set(range(len(self._workers))) - set(self._greetings.values()))

    def hear(self, greeting: Any) -> None:
        """Take note of a worker's answer."""
        number = self._greetings.pop(greeting)
        try:
            ray.get(greeting)
        except RayActorError as error:
            self.replace(number, error)

    def replace(self, number: int, error: RayActorError) -> None:
        """Start another worker in the place of one that died."""
        self._losses += 1
        if self._losses > _MAX_LOSSES * len(self._workers):
            raise RuntimeError(f"workers died {self._losses} times, the last one: {error}")
        self._hire(number)

    def do(self, number: int, sweep: int, job: list[Any], item: Any) -> Any:
        """Give a worker an item; return the reference to its result."""
        return self._workers[number].do.remote(sweep, job, item)

    def dismiss(self) -> None:
        """End all workers."""
        for worker in self._workers:
            ray.kill(worker)
        self._workers, self._greetings = [], {}


class _Sweep:
    """Items of one call: who has which of them, and what is done."""

    def __init__(self, crew: Crew, number: int, job: list[Any], items: Sequence[Any]) -> None:
        self._crew, self._number, self._job, self._items = crew, number, job, items
        count = crew.num_workers
        self._queues = [deque(range(w, len(items), count)) for w in range(count)]
        self._running: dict[Any, tuple[int, int]] = {}
        self._done: dict[int, Any] = {}

    def results(self) -> Iterator[Any]:
        """Yield the results in order."""
        for wanted in range(len(self._items)):
            while wanted not in self._done:
                self._give_out(wanted + _AHEAD * len(self._queues))
                self._take_in()
            yield ray.get(self._done.pop(wanted))

    def _give_out(self, limit: int) -> None:
        for number in self._crew.present():
            in_hand = sum(worker == number for worker, _ in self._running.values())
            for _ in range(in_hand, _IN_HAND):
                if (item := self._next(number, limit)) is None:
                    break
                reference = self._crew.do(number, self._number, self._job, self._items[item])
                self._running[reference] = (number, item)

    def _next(self, number: int, limit: int) -> int | None:
        own = self._queues[number]
        if own:
            return own.popleft() if own[0] < limit else None
        longest = max(self._queues, key=len)
        return longest.pop() if longest and longest[-1] < limit else None

    def _take_in(self) -> None:
        for reference in ray.wait([*self._running, *self._crew.greetings])[0]:
            if reference not in self._running:
                self._crew.hear(reference)
                continue
            number, item = self._running.pop(reference)
            try:
                ray.get(reference)
            except RayTaskError as error:
                raise error.cause from None
            except RayActorError as error:
                self._lose(number, item, error)
            else:
                self._done[item] = reference

    def _lose(self, number: int, item: int, error: RayActorError) -> None:
        lost = [item, *(i for worker, i in self._running.values() if worker == number)]
        self._running = {r: at for r, at in self._running.items() if at[0] != number}
        self._queues[number].extendleft(sorted(lost, reverse=True))
        self._crew.replace(number, error)
