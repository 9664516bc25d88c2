"""Ray actors that keep their state from one sweep over the data to the next.

Items are dealt out in turn: of W workers, worker w gets items w, w + W, ... So in every sweep a
block of rows goes to the same worker, which still has its file open or, on a GPU, still holds the
rows. A worker that has none left takes the last item of the longest queue. A worker that dies is
replaced and its items are queued again; until the new one has started, the others do them.

    2 workers, 7 items   worker 0: 0 2 4 6    worker 1: 1 3 5, then 6 if worker 0 has not begun it

Results come in the order of the items, so they do not depend on which worker did what.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import (
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from moce_dist.config import ParallelConfig
from moce_dist.launch.tasks import connect, gets_gpu, needs_ray
from moce_dist.run.tasks import Result, Shared, T, Workers, map_here

_DEATHS = (RayActorError, OutOfMemoryError)
_IN_HAND = 2
"""Items assigned to a worker at a time, so that it need not wait for the next one."""
_AHEAD = 16
"""How far items may run ahead of the first unfinished one, per worker."""
_START_S = 60
"""Seconds to wait for all workers; then those that have started begin."""
_MAX_LOSSES = 3
"""Lost workers per sweep, relative to the number of workers, above which the sweep fails."""


@contextmanager
def hold_actors(parallel: ParallelConfig) -> Iterator[Workers]:
    """Hold `parallel.num_workers` workers; one without a cluster is this process.

    Each worker gets a GPU, if the cluster has any and `parallel` allows it.

    Raises:
        ConfigError: `parallel.use_gpu` is true, and this process has none and is to do the work.
    """
    has_gpu = gets_gpu(parallel)
    device = "cuda" if has_gpu else "cpu"
    if not needs_ray(parallel):
        # torch takes seconds to import
        from moce_dist.model.device import check_gpu

        check_gpu(parallel)
        try:
            yield Workers(map_here, device)
        finally:
            if has_gpu:
                _free_device()
        return
    connect(parallel)
    pool = ActorPool(parallel, gpu=has_gpu)
    try:
        yield Workers(pool, device)
    finally:
        pool.dismiss()


def _free_device() -> None:
    # later work of this process needs the memory
    import torch

    from moce_dist.cluster.blocks import residents
    from moce_dist.cluster.nearest import gpu_resources
    from moce_dist.features.extract import cached_encoder

    cached_encoder.cache_clear()
    residents.cache_clear()
    gpu_resources.cache_clear()
    torch.cuda.empty_cache()


class _Worker:
    """One worker; it keeps what all items of a sweep share until the next sweep."""

    def __init__(self) -> None:
        self._sweep, self._job = -1, (None, None)

    def greet(self) -> None:
        """Return nothing; the answer shows that the worker has started."""

    def do(self, sweep: int, job: list[Any], item: Any) -> Any:
        """Apply the function of a sweep to the shared value and an item."""
        if sweep != self._sweep:
            self._sweep, self._job = sweep, ray.get(job[0])
        function, shared = self._job
        assert function is not None
        return function(shared, item)


class ActorPool:
    """Workers with state, started at the first call (`run/tasks.py`, `MapTasks`)."""

    def __init__(self, parallel: ParallelConfig, *, gpu: bool) -> None:
        self.num_workers, self._gpu = parallel.num_workers, gpu
        self.patience_s = parallel.start_timeout_s
        """Seconds after which an answer that has not come shows that there is no worker."""
        self._workers: dict[int, Any] = {}
        self._greetings: dict[Any, Any] = {}
        self._sweeps = self._losses = 0

    def __call__(
        self, function: Callable[[Shared, T], Result], shared: Shared, items: Sequence[T], /
    ) -> Iterator[Result]:
        """Return `[function(shared, item) for item in items]`.

        Raises:
            Exception: the first error of the function, as it was raised.
            RuntimeError: workers died too often, or none has started.
        """
        if not items:
            return iter(())
        self._start()
        self._sweeps += 1
        self._losses = 0
        return _Sweep(self, self._sweeps, [ray.put((function, shared))], items).results()

    def _start(self) -> None:
        if not self._workers:
            for number in range(self.num_workers):
                self._hire(number)
            self._wait()

    def _hire(self, number: int) -> None:
        hired = ray.remote(_Worker).options(
            num_cpus=1, num_gpus=int(self._gpu), scheduling_strategy="SPREAD"
        )
        self._workers[number] = worker = hired.remote()
        self._greetings[worker.greet.remote()] = worker

    def _wait(self) -> None:
        # otherwise the first worker to start would take the blocks of all others
        expected, longest = self.greetings, self.patience_s
        come, _ = ray.wait(expected, num_returns=len(expected), timeout=min(_START_S, longest))
        if not come:
            come, _ = ray.wait(expected, timeout=max(longest - _START_S, 0))
        if not come:
            self.give_up()
        for greeting in come:
            self.hear(greeting)

    def give_up(self) -> None:
        """End all workers, as none has started.

        Raises:
            RuntimeError: always.
        """
        self.dismiss()
        needs = "a CPU and a GPU" if self._gpu else "a CPU"
        raise RuntimeError(f"no worker has started in {self.patience_s:g} s; each needs {needs}")

    @property
    def greetings(self) -> list[Any]:
        """Greetings that workers have not answered yet."""
        return list(self._greetings)

    def present(self) -> dict[int, Any]:
        """Return the workers that have started, by number."""
        coming = list(self._greetings.values())
        return {n: worker for n, worker in self._workers.items() if worker not in coming}

    def hear(self, greeting: Any) -> None:
        """Record a worker's answer to its greeting."""
        worker = self._greetings.pop(greeting)
        try:
            ray.get(greeting)
        except _DEATHS as error:
            self.replace(worker, error)

    def replace(self, worker: Any, error: RayError) -> None:
        """Replace a worker that died, unless that was done already."""
        places = [number for number, at in self._workers.items() if at == worker]
        if not places:
            return
        self._losses += 1
        if self._losses > _MAX_LOSSES * self.num_workers:
            raise RuntimeError(f"workers died {self._losses} times, the last one: {error}")
        self._hire(places[0])

    def dismiss(self) -> None:
        """End all workers."""
        for worker in self._workers.values():
            ray.kill(worker)
        self._workers, self._greetings = {}, {}


class _Sweep:
    """The items of one call: queued, running and done."""

    def __init__(self, pool: ActorPool, number: int, job: list[Any], items: Sequence[Any]) -> None:
        self._pool, self._number, self._job, self._items = pool, number, job, items
        count = pool.num_workers
        self._queues = [deque(range(w, len(items), count)) for w in range(count)]
        self._running: dict[Any, tuple[int, Any, int]] = {}
        self._in_hand: Counter[int] = Counter()
        self._done: dict[int, Any] = {}

    def results(self) -> Iterator[Any]:
        """Yield the results in order."""
        for wanted in range(len(self._items)):
            while wanted not in self._done:
                self._give_out(wanted + _AHEAD * len(self._queues))
                self._take_in()
            yield self._done.pop(wanted)

    def _give_out(self, limit: int) -> None:
        present = self._pool.present()
        for number, worker in present.items():
            for _ in range(self._in_hand[number], _IN_HAND):
                if (item := self._next(number, limit, present)) is None:
                    break
                reference = worker.do.remote(self._number, self._job, self._items[item])
                self._running[reference] = (number, worker, item)
                self._in_hand[number] += 1

    def _next(self, number: int, limit: int, present: Collection[int]) -> int | None:
        own = self._queues[number]
        if own and own[0] < limit:
            return own.popleft()
        # the item that is wanted first may be queued for a worker that has not started
        absent = [queue for n, queue in enumerate(self._queues) if queue and n not in present]
        if absent and (first := min(absent)) and first[0] < limit:
            return first.popleft()
        longest = max(self._queues, key=len)
        return longest.pop() if longest and longest[-1] < limit else None

    def _take_in(self) -> None:
        come = ray.wait([*self._running, *self._pool.greetings], timeout=self._pool.patience_s)[0]
        if not come and not self._running:
            self._pool.give_up()
        for reference in come:
            if reference not in self._running:
                self._pool.hear(reference)
                continue
            worker, item = self._take(reference)
            try:
                self._done[item] = ray.get(reference)
            except RayTaskError as error:
                raise error.cause from None
            except ObjectLostError:
                # its node is gone, and with it the result
                self._put_back([item])
            except _DEATHS as error:
                lost = [r for r, (_, at, _) in self._running.items() if at == worker]
                self._put_back([item, *(self._take(r)[1] for r in lost)])
                self._pool.replace(worker, error)

    def _take(self, reference: Any) -> tuple[Any, int]:
        """Take an item off the running ones; return its worker and itself."""
        number, worker, item = self._running.pop(reference)
        self._in_hand[number] -= 1
        return worker, item

    def _put_back(self, items: list[int]) -> None:
        for item in sorted(items, reverse=True):
            self._queues[item % len(self._queues)].appendleft(item)
