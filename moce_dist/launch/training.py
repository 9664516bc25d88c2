"""The driver's side of training on Ray Train's workers, with restarts after losses.

The training code on the workers knows nothing of Ray and reports through files in the run
directory, so a job behaves the same under plain torchrun. A crew keeps its workers from one job to
the next (`worker.py`), because starting them takes longer than a small job.

After the loss of a worker, all workers start again from the newest checkpoint, on the nodes that
are left. `nodes.py` chooses them; Ray restarts and resizes nothing by itself. The training stops
between two steps, with its state saved, when a node drains, when there is room for more workers or
when the driver gets SIGTERM. It also does when the driver's own node drains, and the driver then
exits. A rank that hangs is killed, which counts as a loss. An error of the training itself is not
retried; it reaches the driver through the status board, not through a file.
"""

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

import ray
from ray._private.state import available_resources_per_node
from ray._private.state import state as cluster_state
from ray.exceptions import RayError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moce_dist.config import ParallelConfig
from moce_dist.launch.gauges import JobGauges
from moce_dist.launch.job import Follower, heed_sigterm, short_stop
from moce_dist.launch.nodes import GROUP_LABEL, Host, Requirements, answers, wait_for_seats
from moce_dist.launch.status import Ending, LossBudget, StatusBoard, cause_of
from moce_dist.launch.tasks import SEAT, connect, needs_ray, seat_resource
from moce_dist.launch.worker import fit, release_memory
from moce_dist.run import lease
from moce_dist.run.directory import StoppedError
from moce_dist.train.job import Job
from moce_dist.train.pulse import Pulse

log = logging.getLogger(__name__)
_LOOK_EVERY_S = 1.0
_GROW_EVERY_S = 30.0
_LEAVE_S = 30.0
_OTHER_CALLS = 100
"""Calls that a status board serves at a time, in addition to ranks that wait for a job."""


def train(job: Job) -> None:
    """Run a job to its end on workers of its own; see `Crew.train`."""
    with hold_crew() as crew:
        crew.train(job)


@contextmanager
def hold_crew() -> Iterator["Crew"]:
    """Hold a crew that keeps its workers from one job to the next until the end of the block."""
    crew = Crew()
    try:
        yield crew
        crew.dismiss()
    finally:
        # after an error, do not wait for workers that are in the middle of a job
        crew.dismiss(wait_s=0)


class Crew:
    """Workers that run jobs one after the other; started for the first, and again after a loss."""

    def __init__(self) -> None:
        self._start: Attempt | None = None

    def train(self, job: Job) -> None:
        """Run a job to its end, on as many workers as there is room for.

        Raises:
            ConfigError: the cluster's labels do not fit the groups, or a rank refuses the request.
            FinalError: the training failed on a rank, and would fail again.
            RuntimeError: nodes were missing for too long, or workers were lost too often.
            StoppedError: this process got SIGTERM, or its node drains; the state is saved.
        """
        if "RANK" in os.environ or not needs_ray(job.parallel):
            with heed_sigterm() as is_terminated:
                job.run(Pulse(is_terminated))
                release_memory()
            return
        connect(job.parallel)
        with heed_sigterm() as is_terminated, _asking_for_room(job.parallel):
            self._supervise(job, lambda: is_terminated() or _is_leaving())

    def make_room(self) -> None:
        """Dismiss the workers if they hold CPUs or GPUs that other work needs."""
        if self._start is not None and self._start.resource != SEAT:
            self.dismiss()

    def dismiss(self, *, wait_s: float = _LEAVE_S) -> None:
        """Dismiss the workers; wait at most `wait_s` seconds until their seats are free."""
        if self._start is not None:
            # Ray may be gone already
            with suppress(RayError, RuntimeError):
                self._start.dismiss(wait_s)
        self._start = None

    def _supervise(self, job: Job, is_terminated: Callable[[], bool]) -> None:
        parallel = job.parallel
        # a rank may get the GPU on which this process made something before
        release_memory()
        # decided once: when the last node with a GPU is lost, training waits for another one
        resource = seat_resource(parallel)
        wanted = Requirements(job.name, parallel, job.batch_size, resource)
        look = partial(live_hosts, resource, parallel)
        budgets, follower = LossBudget(job.name, parallel), Follower(job)
        around: set[str] = set()
        gauges = JobGauges(job)
        if warning := short_stop(os.environ):
            log.warning("%s", warning)
        while True:
            if self._start is None or not self._start.can_take(wanted):
                self.dismiss()
                labels = wait_for_seats(wanted, look, is_terminated)
                around = {host.node for host in look()}
                self._start = Attempt(job, wanted, labels)
            start = self._start
            log.info("%s: %d of %d workers", job.name, start.size, parallel.num_workers)
            ending = start.run(job, (follower, gauges), is_terminated)
            if ending.is_finished:
                return
            self._start = None
            if failure := ray.get(start.board.failure.remote()):
                assert failure.kind is not None
                raise failure.kind(failure.text)
            if is_terminated():
                why = "this node drains" if _is_leaving() else "SIGTERM"
                raise StoppedError(f"{why}; {ending.cause}")
            if ending.is_saved and start.has_room_for_more:
                log.info("%s: there is room for more workers", job.name)
                continue
            start.free_seats()
            lost = start.hosting(around) - {host.node for host in look()}
            if ending.is_saved and not lost:
                log.info("%s: the room for more workers, or the drain, is over", job.name)
                continue
            reached = ray.get(start.board.reached.remote())
            line = budgets.charge(is_preemption=bool(lost), cause=ending.cause, reached=reached)
            gauges.restarted({"failure": budgets.failures, "preemption": budgets.preemptions})
            log.warning("%s", line)


@contextmanager
def _asking_for_room(parallel: ParallelConfig) -> Iterator[None]:
    """Ask an autoscaler, if there is one, to provide a place for every worker in this block."""
    from ray.autoscaler.sdk import request_resources

    resource = seat_resource(parallel)
    request_resources(bundles=[{resource: 1}] * parallel.num_workers)
    try:
        yield
    finally:
        # the request would otherwise stay in force
        with suppress(RayError, RuntimeError):
            request_resources(bundles=[])


def _is_leaving() -> bool:
    """Tell whether the node of this process drains; in Kubernetes that is the head's pod."""
    return ray.get_runtime_context().get_node_id() in cluster_state.get_draining_nodes()


def live_hosts(resource: str, parallel: ParallelConfig) -> list[Host]:
    """List the nodes that are alive, not draining, and reachable.

    Their labels are left out where there is one group only, as in fits of a task.
    """
    free, draining = available_resources_per_node(), cluster_state.get_draining_nodes()
    return [
        Host(
            node["NodeID"],
            node["NodeManagerAddress"],
            node["Labels"].get(GROUP_LABEL, "") if parallel.num_groups > 1 else "",
            int(free.get(node["NodeID"], {}).get(resource, 0)),
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in draining and answers(node)
    ]


class Attempt:
    """One start of all workers, from the newest checkpoint until they are lost or dismissed."""

    def __init__(self, job: Job, wanted: Requirements, labels: list[str]) -> None:
        """Start one worker per label; `job` is their first job."""
        self._wanted, self.size, self.resource = wanted, len(labels), wanted.resource
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board = ray.remote(StatusBoard).options(
            num_cpus=0, scheduling_strategy=here, max_concurrency=2 * self.size + _OTHER_CALLS
        )
        self.board = board.remote(self.size)
        # in a separate process: in this one Ray Train would take over SIGINT, and a thread of it
        # that still waits at Ray's shutdown would end this process with the wrong exit status
        beside = ray.remote(fit).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
        self._ending = beside.remote(job, wanted.resource, labels, self.board, lease.held())
        self._grow_at = time.monotonic() + _GROW_EVERY_S
        self.has_room_for_more = False

    def can_take(self, wanted: Requirements) -> bool:
        """Tell whether another job can use these workers: same settings, full number, all alive."""
        is_over = bool(ray.wait([self._ending], timeout=0)[0])
        is_same = wanted.parallel == self._wanted.parallel
        is_full = self.size == wanted.parallel.num_workers
        return is_same and is_full and not is_over and not self._is_draining()

    def dismiss(self, wait_s: float) -> None:
        """Tell the workers that there are no more jobs; wait at most `wait_s` s for their end."""
        self.board.dismiss.remote()
        ray.wait([self._ending], timeout=wait_s)

    def hosting(self, around: set[str]) -> set[str]:
        """Return the nodes on which workers arrived, and `around` until all have."""
        arrived = ray.get(self.board.nodes.remote())
        return set(arrived) if len(arrived) == self.size else {*arrived, *around}

    def free_seats(self) -> None:
        """Free the resources of the workers, in case Ray Train's controller is gone as well.

        Ray's own cleaner needs the dashboard, which an embedded cluster does not have.
        """
        if (seats := ray.get(self.board.seats.remote())) is not None:
            remove_placement_group(seats)

    def run(
        self, job: Job, followers: tuple[Follower, JobGauges], is_terminated: Callable[[], bool]
    ) -> Ending:
        """Let the workers run a job and follow it to its end; return how it ended."""
        killed: list[str] = []
        finished = self.board.carry_out.remote(job)
        while not (over := ray.wait([self._ending, finished], timeout=_LOOK_EVERY_S)[0]):
            if is_terminated() or self._is_draining() or self._can_grow():
                self.board.stop.remote()
            killed = killed or self._kill_who_stands_still()
            for follower in followers:
                follower.report()
        followers[0].report_log()
        try:
            if over[0] == finished:
                ray.get(finished)
                return Ending(is_finished=True)
            return Ending(cause="; ".join(killed)) if killed else ray.get(self._ending)
        except RayError as error:
            return Ending(cause="; ".join(killed) or cause_of(error))

    def _kill_who_stands_still(self) -> list[str]:
        timeout_s = self._wanted.parallel.step_timeout_s
        found = ray.get(self.board.standing_still.remote(timeout_s))
        for sign, line in found:
            log.warning("%s: %s; it is killed", self._wanted.name, line)
            there = NodeAffinitySchedulingStrategy(sign.node, soft=False)
            # by a task on its node, because a stopped process does not react to Ray
            kill = ray.remote(lambda process: os.kill(process, signal.SIGKILL))
            kill.options(num_cpus=0, scheduling_strategy=there).remote(sign.process)
        return [line for _, line in found]

    def _is_draining(self) -> bool:
        draining = cluster_state.get_draining_nodes()
        return bool(draining and self.hosting(set()) & draining.keys())

    def _can_grow(self) -> bool:
        is_full = self.size == self._wanted.parallel.num_workers
        if is_full or time.monotonic() < self._grow_at:
            return self.has_room_for_more
        self._grow_at = time.monotonic() + _GROW_EVERY_S
        mine = Counter(ray.get(self.board.nodes.remote()))
        hosts = [
            replace(host, slots=host.slots + mine[host.node])
            for host in live_hosts(self._wanted.resource, self._wanted.parallel)
        ]
        best = self._wanted.best_seats(hosts)
        self.has_room_for_more = best is not None and len(best) > self.size
        return self.has_room_for_more
