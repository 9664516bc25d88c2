"""Training on Ray Train's workers, started again as often as it takes: the driver's side.

What runs on the workers knows nothing of Ray and reports through files of the run directory, so a
job looks the same under plain torchrun. A crew keeps its workers from one job to the next
(`worker.py`), since starting them costs more than a small job.

When a worker is lost, all start again from the newest checkpoint, on as many nodes as there are
then: `nodes.py` decides, and Ray neither restarts nor resizes anything by itself.
A node that drains, room for more workers, or SIGTERM to the driver stop the training between two
steps, with its state saved; so does the drain of the driver's own node, which the driver leaves.
A rank that stands still is killed, which is a loss like any other. An error of the training itself
is not tried again; it reaches the driver through the status board, not a disk.
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
from moce_dist.launch.job import Follower, Job, heed_sigterm, short_stop
from moce_dist.launch.nodes import GROUP_LABEL, Host, Requirements, answers, wait_for_seats
from moce_dist.launch.status import Ending, LossBudget, StatusBoard, cause_of
from moce_dist.launch.tasks import SEAT, connect, needs_ray, seat_resource
from moce_dist.launch.worker import fit
from moce_dist.run import lease
from moce_dist.run.directory import StoppedError
from moce_dist.train.pulse import Pulse

log = logging.getLogger(__name__)
_LOOK_EVERY_S = 1.0
_GROW_EVERY_S = 30.0
_LEAVE_S = 30.0
_OTHER_CALLS = 100
"""Calls that a status board takes at a time, besides those of ranks that wait for a job."""


def train(job: Job) -> None:
    """Run a job to its end on workers of its own; see `Crew.train`."""
    with hold_crew() as crew:
        crew.train(job)


@contextmanager
def hold_crew() -> Iterator["Crew"]:
    """Hold a crew whose workers stay from one job to the next, until the end of the block."""
    crew = Crew()
    try:
        yield crew
        crew.dismiss()
    finally:
        # after an error nobody waits for workers in the middle of a job
        crew.dismiss(wait_s=0)


class Crew:
    """Workers that carry out jobs one after the other; hired for the first, again after a loss."""

    def __init__(self) -> None:
        self._start: Attempt | None = None

    def train(self, job: Job) -> None:
        """Run a job to its end, on as many workers as there is room for.

        Raises:
            ConfigError: the cluster's labels do not fit the groups.
            RuntimeError: with the error that the workers left; or nodes or workers were missing for
                too long or too often.
            StoppedError: this process got SIGTERM, or its node drains; the state is saved.
        """
        if "RANK" in os.environ or not needs_ray(job.parallel):
            with heed_sigterm() as is_terminated:
                job.run(Pulse(is_terminated))
            return
        connect(job.parallel)
        with heed_sigterm() as is_terminated, _asking_for_room(job.parallel):
            self._supervise(job, lambda: is_terminated() or _is_leaving())

    def make_room(self) -> None:
        """Let the workers go if they hold CPUs or GPUs that other work needs."""
        if self._start is not None and self._start.resource != SEAT:
            self.dismiss()

    def dismiss(self, *, wait_s: float = _LEAVE_S) -> None:
        """Let the workers go, and wait so long at most until their seats are free."""
        if self._start is not None:
            # Ray may be gone already
            with suppress(RayError, RuntimeError):
                self._start.dismiss(wait_s)
        self._start = None

    def _supervise(self, job: Job, is_terminated: Callable[[], bool]) -> None:
        parallel = job.parallel
        # known once: when the last node with a GPU is lost, training waits for one
        resource = seat_resource(parallel)
        wanted = Requirements(job.name, parallel, job.batch_size, resource)
        look = partial(live_hosts, resource)
        budgets, follower = LossBudget(job.name, parallel), Follower(job)
        gauges = JobGauges(job)
        if warning := short_stop(os.environ):
            log.warning("%s", warning)
        while True:
            if self._start is None or not self._start.can_take(wanted):
                self.dismiss()
                labels = wait_for_seats(wanted, look, is_terminated)
                self._start = Attempt(job, wanted, labels)
            start = self._start
            log.info("%s: %d of %d workers", job.name, start.size, parallel.num_workers)
            ending = start.run(job, (follower, gauges), is_terminated)
            if ending.is_finished:
                return
            self._start = None
            if failure := ray.get(start.board.failure.remote()):
                raise RuntimeError(failure.text)
            if is_terminated():
                why = "this node drains" if _is_leaving() else "SIGTERM"
                raise StoppedError(f"{why}; {ending.cause}")
            if ending.is_saved and start.has_room_for_more:
                log.info("%s: there is room for more workers", job.name)
                continue
            start.free_seats()
            lost = start.hosting() - {host.node for host in look()}
            reached = ray.get(start.board.reached.remote())
            line = budgets.charge(is_preemption=bool(lost), cause=ending.cause, reached=reached)
            gauges.restarted({"failure": budgets.failures, "preemption": budgets.preemptions})
            log.warning("%s", line)


@contextmanager
def _asking_for_room(parallel: ParallelConfig) -> Iterator[None]:
    """Have an autoscaler, where there is one, bring and keep a place for every worker."""
    from ray.autoscaler.sdk import request_resources

    resource = seat_resource(parallel)
    request_resources(bundles=[{resource: 1}] * parallel.num_workers)
    try:
        yield
    finally:
        # what was asked for would stay asked for
        with suppress(RayError, RuntimeError):
            request_resources(bundles=[])


def _is_leaving() -> bool:
    """Tell whether the node of this process drains: in Kubernetes the head's pod is to go."""
    return ray.get_runtime_context().get_node_id() in cluster_state.get_draining_nodes()


def live_hosts(resource: str) -> list[Host]:
    """Look at the nodes that are there and will stay: not draining, and answering."""
    free, draining = available_resources_per_node(), cluster_state.get_draining_nodes()
    return [
        Host(
            node["NodeID"],
            node["NodeManagerAddress"],
            node["Labels"].get(GROUP_LABEL, ""),
            int(free.get(node["NodeID"], {}).get(resource, 0)),
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in draining and answers(node)
    ]


class Attempt:
    """One start of all workers, from the newest checkpoint until they are lost or dismissed."""

    def __init__(self, job: Job, wanted: Requirements, labels: list[str]) -> None:
        """Begin a start of one worker for each label, for `job` first."""
        self._wanted, self.size, self.resource = wanted, len(labels), wanted.resource
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board = ray.remote(StatusBoard).options(
            num_cpus=0, scheduling_strategy=here, max_concurrency=2 * self.size + _OTHER_CALLS
        )
        self.board = board.remote(self.size)
        # in a process of its own: here Ray Train would take over SIGINT, and a thread of it that is
        # still waiting when Ray is shut down would end this process with the wrong exit status
        beside = ray.remote(fit).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
        self._ending = beside.remote(job, wanted.resource, labels, self.board, lease.held())
        self._grow_at = time.monotonic() + _GROW_EVERY_S
        self.has_room_for_more = False

    def can_take(self, wanted: Requirements) -> bool:
        """Tell whether another job can have these workers: all that it wants, and all alive."""
        is_over = bool(ray.wait([self._ending], timeout=0)[0])
        is_same = wanted.parallel == self._wanted.parallel
        is_full = self.size == wanted.parallel.num_workers
        return is_same and is_full and not is_over and not self._is_draining()

    def dismiss(self, wait_s: float) -> None:
        """Tell the workers that there are no more jobs; wait so long at most for their end."""
        self.board.dismiss.remote()
        ray.wait([self._ending], timeout=wait_s)

    def hosting(self) -> set[str]:
        """Return the nodes on which workers arrived."""
        return set(ray.get(self.board.nodes.remote()))

    def free_seats(self) -> None:
        """Give back what the workers held, when whoever does that for Ray Train is gone as well.

        Ray's own cleaner asks the dashboard, which an embedded cluster has not.
        """
        if (seats := ray.get(self.board.seats.remote())) is not None:
            remove_placement_group(seats)

    def run(
        self, job: Job, followers: tuple[Follower, JobGauges], is_terminated: Callable[[], bool]
    ) -> Ending:
        """Have the workers carry out a job and follow them to its end, however it comes."""
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
            # by a task, because a stopped process does not hear what Ray says to it
            kill = ray.remote(lambda process: os.kill(process, signal.SIGKILL))
            kill.options(num_cpus=0, scheduling_strategy=there).remote(sign.process)
        return [line for _, line in found]

    def _is_draining(self) -> bool:
        draining = cluster_state.get_draining_nodes()
        return bool(draining and self.hosting() & draining.keys())

    def _can_grow(self) -> bool:
        is_full = self.size == self._wanted.parallel.num_workers
        if is_full or time.monotonic() < self._grow_at:
            return self.has_room_for_more
        self._grow_at = time.monotonic() + _GROW_EVERY_S
        mine = Counter(ray.get(self.board.nodes.remote()))
        hosts = [
            replace(host, slots=host.slots + mine[host.node])
            for host in live_hosts(self._wanted.resource)
        ]
        best = self._wanted.best_seats(hosts)
        self.has_room_for_more = best is not None and len(best) > self.size
        return self.has_room_for_more
