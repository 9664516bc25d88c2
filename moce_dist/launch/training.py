"""Training on Ray Train's workers, started again as often as it takes.

What runs on the workers knows nothing of Ray and reports through files of the run directory, so a
job looks the same under plain torchrun.

When a worker is lost, all start again from the newest checkpoint, on as many nodes as there are
then: `nodes.py` decides, and Ray neither restarts nor resizes anything by itself.
A node that drains, room for more workers, or SIGTERM to the driver stop the training between two
steps, with its state saved; so does the drain of the driver's own node, which the driver leaves.
A rank that stands still is killed, which is a loss like any other. An error of the training itself
is not tried again; it reaches the driver through the status board, not a disk.
"""

import json
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

# a site's 0 would mean the first version of Ray Train, which this module does not know
os.environ["RAY_TRAIN_V2_ENABLED"] = "1"

import ray
import ray.train
from ray._private.state import available_resources_per_node
from ray._private.state import state as cluster_state
from ray.exceptions import RayError
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import get_current_placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moce_dist.config import ParallelConfig
from moce_dist.launch.gauges import JobGauges
from moce_dist.launch.job import Follower, Job, failure_of, heed_sigterm, log_to_file, short_stop
from moce_dist.launch.nodes import GROUP_LABEL, Host, Requirements, answers, wait_for_seats
from moce_dist.launch.status import Ending, LossBudget, Sign, StatusBoard, cause_of
from moce_dist.launch.tasks import connect, needs_ray, uses_gpu
from moce_dist.parallel.groups import Station, free_port, rank_order
from moce_dist.run import lease
from moce_dist.run.directory import StoppedError
from moce_dist.train.pulse import Pulse

log = logging.getLogger(__name__)
_LOOK_EVERY_S = 1.0
_GROW_EVERY_S = 30.0
_BEATS_A_S = 100
"""Signs of life of all ranks that the status board takes in a second."""


def train(job: Job) -> None:
    """Run a job to its end, on as many workers as there is room for.

    Raises:
        ConfigError: the cluster's labels do not fit the groups.
        RuntimeError: with the error that the workers left; or nodes or workers were missing for too
            long or too often.
        StoppedError: this process got SIGTERM, or its node drains; the state is saved.
    """
    if "RANK" in os.environ or not needs_ray(job.parallel):
        with heed_sigterm() as is_terminated:
            job.run(Pulse(is_terminated))
        return
    connect(job.parallel)
    with heed_sigterm() as is_terminated, _asking_for_room(job.parallel):
        _supervise(job, lambda: is_terminated() or _is_leaving())


@contextmanager
def _asking_for_room(parallel: ParallelConfig) -> Iterator[None]:
    """Have an autoscaler, where there is one, bring and keep a place for every worker."""
    from ray.autoscaler.sdk import request_resources

    resource = "GPU" if uses_gpu(parallel) else "CPU"
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


def _supervise(job: Job, is_terminated: Callable[[], bool]) -> None:
    parallel = job.parallel
    # known once: when the last node with a GPU is lost, training waits for one
    resource = "GPU" if uses_gpu(parallel) else "CPU"
    wanted = Requirements(job.name, parallel, job.batch_size, resource)
    look = partial(live_hosts, resource)
    budgets, follower = LossBudget(job.name, parallel), Follower(job)
    gauges = JobGauges(job)
    if warning := short_stop(os.environ):
        log.warning("%s", warning)
    while True:
        labels = wait_for_seats(wanted, look, is_terminated)
        log.info("%s: %d of %d workers", job.name, len(labels), parallel.num_workers)
        start = Attempt(job, wanted, labels)
        ending = start.run((follower, gauges), is_terminated)
        if failure := ray.get(start.board.failure.remote()):
            raise RuntimeError(failure.text)
        if ending.is_finished:
            return
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
    """One start of all workers, from the newest checkpoint until they are done or lost."""

    def __init__(self, job: Job, wanted: Requirements, labels: list[str]) -> None:
        """Begin a start of one worker for each label."""
        self._wanted, self._labels = wanted, labels
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.board = ray.remote(StatusBoard).options(num_cpus=0, scheduling_strategy=here).remote()
        # in a process of its own: here Ray Train would take over SIGINT, and a thread of it that is
        # still waiting when Ray is shut down would end this process with the wrong exit status
        fit = ray.remote(_fit).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
        self._ending = fit.remote(job, wanted.resource, labels, self.board, lease.held())
        self._grow_at = time.monotonic() + _GROW_EVERY_S
        self.has_room_for_more = False

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
        self, followers: tuple[Follower, JobGauges], is_terminated: Callable[[], bool]
    ) -> Ending:
        """Follow the workers to their end, however it comes."""
        killed: list[str] = []
        while not ray.wait([self._ending], timeout=_LOOK_EVERY_S)[0]:
            if is_terminated() or self._is_draining() or self._can_grow():
                self.board.stop.remote()
            killed = killed or self._kill_who_stands_still()
            for follower in followers:
                follower.report()
        followers[0].report_log()
        if killed:
            return Ending(cause="; ".join(killed))
        try:
            return ray.get(self._ending)
        except RayError as error:
            return Ending(cause=cause_of(error))

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
        is_full = len(self._labels) == self._wanted.parallel.num_workers
        if is_full or time.monotonic() < self._grow_at:
            return self.has_room_for_more
        self._grow_at = time.monotonic() + _GROW_EVERY_S
        mine = Counter(ray.get(self.board.nodes.remote()))
        hosts = [
            replace(host, slots=host.slots + mine[host.node])
            for host in live_hosts(self._wanted.resource)
        ]
        best = self._wanted.best_seats(hosts)
        self.has_room_for_more = best is not None and len(best) > len(self._labels)
        return self.has_room_for_more


def _fit(job: Job, resource: str, labels: list[str], board: Any, leases: Any) -> Ending:
    """Run Ray Train with one worker for each label; say how it ended."""
    parallel = job.parallel
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(parallel.start_timeout_s)
    # the driver asks who drains; Ray's own watcher would end the workers while they save
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    selectors = [{GROUP_LABEL: label} for label in labels if label]
    trainer = DataParallelTrainer(
        _train_worker,
        train_loop_config={"job": job, "board": board, "leases": leases},
        scaling_config=ray.train.ScalingConfig(
            num_workers=len(labels), use_gpu=resource == "GPU", label_selector=selectors or None
        ),
        run_config=ray.train.RunConfig(
            name=job.name,
            storage_path=str(job.run_root / "ray"),
            failure_config=ray.train.FailureConfig(controller_failure_limit=0),
        ),
    )
    try:
        cause = trainer.fit().return_value
    except Exception as error:  # noqa: BLE001 - Ray's own, over whatever the workers met
        return Ending(cause=cause_of(error))
    return Ending(is_finished=True) if cause is None else Ending(is_saved=True, cause=cause)


def _join(timeout_s: float) -> None:
    """Agree on ranks ordered by (group, node, local rank); set what torch.distributed reads.

    Ray regroups ranks by node, so its rank says nothing of the group: every worker reads the label
    of its own node, and all learn everybody's through a store at Ray's rank 0.
    """
    from torch._C._distributed_c10d import TCPStore

    context, runtime = ray.train.get_context(), ray.get_runtime_context()
    size, mine = context.get_world_size(), context.get_world_rank()
    here = ray.util.get_node_ip_address()
    host, port = broadcast_from_rank_zero((here, free_port()))
    store = TCPStore(host, port, size, mine == 0, timedelta(seconds=timeout_s))
    group = runtime.get_node_labels().get(GROUP_LABEL, "")
    station = Station(group, runtime.get_node_id(), context.get_local_rank())
    store.set(f"station/{mine}", json.dumps([*station, here, free_port()]))
    found = [json.loads(store.get(f"station/{worker}")) for worker in range(size)]
    order = rank_order([Station(*entry[:3]) for entry in found])
    *_, master, master_port = found[order[0]]
    # Ray shows a worker only its own GPU, so that is number 0 for every one of them
    os.environ.update(RANK=str(order.index(mine)), WORLD_SIZE=str(size), LOCAL_RANK="0")
    os.environ.update(MASTER_ADDR=master, MASTER_PORT=str(master_port))
    # the store must outlive its last reader
    store.set(f"done/{mine}", "")
    if mine == 0:
        store.wait([f"done/{worker}" for worker in range(size)])


def _train_worker(config: dict[str, Any]) -> str | None:
    """Train on one worker; None at the end of the job, else what was said on leaving it early."""
    job, board = config["job"], config["board"]
    # a driver that stands still cannot tell its workers that another has taken the run over
    lease.watch(config["leases"])
    node = ray.get_runtime_context().get_node_id()
    ray.get(board.arrive.remote(node, get_current_placement_group()))
    _join(job.parallel.start_timeout_s)
    rank = int(os.environ["RANK"])
    ray.get(board.join.remote(rank, Sign(node, ray.util.get_node_ip_address(), os.getpid(), 0.0)))
    try:
        log_to_file(job, logging.INFO if rank == 0 else logging.WARNING)
        job.run(_watch(board, rank))
    except StoppedError as stopped:
        return str(stopped)
    except Exception as error:
        with suppress(RayError):
            ray.get(board.leave.remote(rank, failure_of(error)))
        raise
    finally:
        board.leave.remote(rank)
    return None


def _watch(board: Any, rank: int) -> Pulse:
    """Tell the board in the background that this rank is alive, and hear whether it is to stop."""
    asked = threading.Event()
    pulse = Pulse(asked.is_set)
    every_s = max(_LOOK_EVERY_S, int(os.environ["WORLD_SIZE"]) / _BEATS_A_S)

    def beat() -> None:
        # without a driver there is no board, and soon no worker
        with suppress(RayError):
            while True:
                if ray.get(board.beat.remote(rank, pulse.beat())):
                    asked.set()
                time.sleep(every_s)

    threading.Thread(target=beat, name="watch", daemon=True).start()
    return pulse
