"""The door to Ray (the other is `crew.py`): map a function over items, run a job on its workers.

A running cluster is used when RAY_ADDRESS names one, as in `ray job submit`; else an embedded one
is started in this process and ends with it. What runs on the workers knows nothing of Ray and
reports through files of the run directory, so a job looks the same under plain torchrun.

When a worker is lost, all start again from the newest checkpoint, on as many nodes as there are
then: `elastic.py` decides, and Ray neither restarts nor resizes anything by itself.
A node that drains, room for more workers, or SIGTERM to the driver stop the training between two
steps, with its state saved; so does the drain of the driver's own node, which the driver leaves.
A rank that stands still is killed, which is a loss like any other. An error of the training itself
is not tried again; it reaches the driver through the desk, not a disk.
"""

import json
import logging
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from ray.exceptions import RayError, RayTaskError
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import get_current_placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moce_dist import environment, lease
from moce_dist.config import ParallelConfig
from moce_dist.elastic import (
    GROUP_LABEL,
    Budgets,
    Desk,
    Ending,
    Host,
    Wanted,
    answers,
    cause_of,
    heed_sigterm,
    short_stop,
    wait_for_seats,
)
from moce_dist.follow import Follower, Job, failure_of, log_to_file
from moce_dist.mapping import Item, Result, Shared
from moce_dist.parallel.groups import Station, free_port, rank_order
from moce_dist.pulse import Pulse, Sign
from moce_dist.run import StoppedError

log = logging.getLogger(__name__)
_OBJECT_STORE_BYTES = 256 * 2**20
_LOOK_EVERY_S = 1.0
_GROW_EVERY_S = 30.0
_BEATS_A_S = 100
"""Signs of life of all ranks that the desk takes in a second."""


def connect(parallel: ParallelConfig) -> None:
    """Join the running Ray cluster, or start an embedded one with a CPU for every worker."""
    if ray.is_initialized():
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        with environment.joining_a_cluster():
            ray.init(**quiet)
        return
    log.info("ray: starting an embedded cluster (set RAY_ADDRESS to use a running one)")
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, parallel.num_workers),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        _temp_dir=environment.ray_folder(),
        **quiet,
    )


def needs_ray(parallel: ParallelConfig) -> bool:
    """Tell whether work is spread by Ray: with several workers, or when a cluster is named."""
    return parallel.num_workers > 1 or bool(os.environ.get("RAY_ADDRESS"))


def uses_gpu(parallel: ParallelConfig) -> bool:
    """Tell whether workers ask for a GPU; `auto` asks when the cluster has one."""
    if parallel.use_gpu == "auto":
        return ray.cluster_resources().get("GPU", 0) > 0
    return parallel.use_gpu


def map_tasks(
    function: Callable[..., Result],
    items: Iterable[Any],
    *,
    parallel: ParallelConfig,
    gpu: bool = False,
    shared: Sequence[Any] = (),
) -> Iterator[Result]:
    """Apply a module-level function to items on `num_workers` workers; results in the items' order.

    The function is called as `function(*shared, item)`; what is shared reaches every node once.
    A task whose worker died is run again elsewhere. With one worker and no cluster it runs here.

    Raises:
        Exception: the first error of the function, as it was raised.
    """
    if not needs_ray(parallel):
        yield from (function(*shared, item) for item in items)
        return
    connect(parallel)
    common = [ray.put(value) for value in shared]
    gpus = 1 if gpu and uses_gpu(parallel) else 0
    task = ray.remote(function).options(num_cpus=1, num_gpus=gpus, max_retries=3)
    window: deque[Any] = deque()
    try:
        for item in items:
            window.append(task.remote(*common, item))
            if len(window) > 2 * parallel.num_workers:
                yield ray.get(window.popleft())
        while window:
            yield ray.get(window.popleft())
    except RayTaskError as error:
        raise error.cause from None


def map_shared(
    parallel: ParallelConfig,
    function: Callable[[Shared, Item], Result],
    shared: Shared,
    items: Sequence[Item],
    /,
) -> Iterator[Result]:
    """`map_tasks` in the form that chapters ask for (`mapping.MapTasks`)."""
    return map_tasks(function, items, parallel=parallel, shared=(shared,))


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
    wanted = Wanted(job.name, parallel, job.batch_size, resource)
    look = partial(live_hosts, resource)
    budgets, follower = Budgets(job.name, parallel), Follower(job)
    if warning := short_stop(os.environ):
        log.warning("%s", warning)
    while True:
        labels = wait_for_seats(wanted, look, is_terminated)
        log.info("%s: %d of %d workers", job.name, len(labels), parallel.num_workers)
        start = Start(job, wanted, labels)
        ending = start.run(follower, is_terminated)
        if failure := ray.get(start.desk.failure.remote()):
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
        reached = ray.get(start.desk.reached.remote())
        line = budgets.charge(is_preemption=bool(lost), cause=ending.cause, reached=reached)
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


class Start:
    """One start of all workers, from the newest checkpoint until they are done or lost."""

    def __init__(self, job: Job, wanted: Wanted, labels: list[str]) -> None:
        """Begin a start of one worker for each label."""
        self._wanted, self._labels = wanted, labels
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.desk = ray.remote(Desk).options(num_cpus=0, scheduling_strategy=here).remote()
        # in a process of its own: here Ray Train would take over SIGINT, and a thread of it that is
        # still waiting when Ray is shut down would end this process with the wrong exit status
        fit = ray.remote(_fit).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
        self._ending = fit.remote(job, wanted.resource, labels, self.desk, lease.held())
        self._grow_at = time.monotonic() + _GROW_EVERY_S
        self.has_room_for_more = False

    def hosting(self) -> set[str]:
        """Return the nodes on which workers arrived."""
        return set(ray.get(self.desk.nodes.remote()))

    def free_seats(self) -> None:
        """Give back what the workers held, when whoever does that for Ray Train is gone as well.

        Ray's own cleaner asks the dashboard, which an embedded cluster has not.
        """
        if (seats := ray.get(self.desk.seats.remote())) is not None:
            remove_placement_group(seats)

    def run(self, follower: Follower, is_terminated: Callable[[], bool]) -> Ending:
        """Follow the workers to their end, however it comes."""
        killed: list[str] = []
        while not ray.wait([self._ending], timeout=_LOOK_EVERY_S)[0]:
            if is_terminated() or self._is_draining() or self._can_grow():
                self.desk.stop.remote()
            killed = killed or self._kill_who_stands_still()
            follower.report()
        follower.report_log()
        if killed:
            return Ending(cause="; ".join(killed))
        try:
            return ray.get(self._ending)
        except RayError as error:
            return Ending(cause=cause_of(error))

    def _kill_who_stands_still(self) -> list[str]:
        timeout_s = self._wanted.parallel.step_timeout_s
        found = ray.get(self.desk.standing_still.remote(timeout_s))
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
        mine = Counter(ray.get(self.desk.nodes.remote()))
        hosts = [
            replace(host, slots=host.slots + mine[host.node])
            for host in live_hosts(self._wanted.resource)
        ]
        best = self._wanted.best_seats(hosts)
        self.has_room_for_more = best is not None and len(best) > len(self._labels)
        return self.has_room_for_more


def _fit(job: Job, resource: str, labels: list[str], desk: Any, leases: Any) -> Ending:
    """Run Ray Train with one worker for each label; say how it ended."""
    parallel = job.parallel
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(parallel.start_timeout_s)
    # the driver asks who drains; Ray's own watcher would end the workers while they save
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    selectors = [{GROUP_LABEL: label} for label in labels if label]
    trainer = DataParallelTrainer(
        _train_worker,
        train_loop_config={"job": job, "desk": desk, "leases": leases},
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
    job, desk = config["job"], config["desk"]
    # a driver that stands still cannot tell its workers that another has taken the run over
    lease.watch(config["leases"])
    node = ray.get_runtime_context().get_node_id()
    ray.get(desk.arrive.remote(node, get_current_placement_group()))
    _join(job.parallel.start_timeout_s)
    rank = int(os.environ["RANK"])
    ray.get(desk.join.remote(rank, Sign(node, ray.util.get_node_ip_address(), os.getpid(), 0.0)))
    try:
        log_to_file(job, logging.INFO if rank == 0 else logging.WARNING)
        job.run(_watch(desk, rank))
    except StoppedError as stopped:
        return str(stopped)
    except Exception as error:
        with suppress(RayError):
            ray.get(desk.leave.remote(rank, failure_of(error)))
        raise
    finally:
        desk.leave.remote(rank)
    return None


def _watch(desk: Any, rank: int) -> Pulse:
    """Tell the desk in the background that this rank is alive, and hear whether it is to stop."""
    asked = threading.Event()
    pulse = Pulse(asked.is_set)
    every_s = max(_LOOK_EVERY_S, int(os.environ["WORLD_SIZE"]) / _BEATS_A_S)

    def beat() -> None:
        # without a driver there is no desk, and soon no worker
        with suppress(RayError):
            while True:
                if ray.get(desk.beat.remote(rank, pulse.beat())):
                    asked.set()
                time.sleep(every_s)

    threading.Thread(target=beat, name="watch", daemon=True).start()
    return pulse
