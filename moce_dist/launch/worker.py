"""What runs on the workers: Ray Train starts them, they agree on ranks and run job after job.

Workers stay when a job is finished and wait for the next one, so that imports, process group and
expert groups are set up only once. The driver (`training.py`) hands out jobs through the status
board.

Three helper processes of Ray Train are not started. One asks an autoscaler for room and one frees
the seats of a controller that died; the driver does both. The third serves Ray's data sets, which
are not used.
"""

import gc
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import Any

# overrides a site's 0: this module needs version 2 of Ray Train
os.environ["RAY_TRAIN_V2_ENABLED"] = "1"

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import get_current_placement_group

from moce_dist.launch.job import failure_of, log_to_file
from moce_dist.launch.nodes import GROUP_LABEL
from moce_dist.launch.status import Ending, Sign, cause_of
from moce_dist.launch.tasks import SEAT
from moce_dist.parallel.groups import Station, free_port, rank_order
from moce_dist.run import lease
from moce_dist.run.directory import StoppedError
from moce_dist.train.job import Job
from moce_dist.train.pulse import Pulse

_BEAT_EVERY_S = 1.0
_BEATS_A_S = 100
"""Most heartbeats per second, of all ranks together, that are sent to the status board."""


class _DriversRoom(FixedScalingPolicy):  # type: ignore[misc]
    """A fixed number of workers; the driver asks an autoscaler for their room."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Start no process that asks an autoscaler."""

    def _maybe_send_resource_request(self) -> None:
        pass


class _Trainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray Train's trainer without the helper processes that are not needed."""

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        parts["scaling_policy"] = _DriversRoom(self.scaling_config)
        unwanted = PlacementGroupCleanerCallback | DatasetsCallback
        parts["callbacks"] = [each for each in parts["callbacks"] if not isinstance(each, unwanted)]
        return super()._initialize_and_run_controller(**parts)


def fit(job: Job, resource: str, labels: list[str], board: Any, leases: Any) -> Ending:
    """Run Ray Train with one worker per label until they are dismissed; return how it ended.

    `job` is the first of their jobs and gives the settings; workers get all jobs from the board.
    """
    parallel = job.parallel
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(parallel.start_timeout_s)
    # the driver looks for draining nodes; Ray's own watcher would end workers while they save
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    selectors = [{GROUP_LABEL: label} for label in labels if label]
    trainer = _Trainer(
        _work,
        train_loop_config={
            "board": board,
            "leases": leases,
            "start_timeout_s": parallel.start_timeout_s,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=len(labels),
            use_gpu=resource == "GPU",
            resources_per_worker={SEAT: 1} if resource == SEAT else None,
            label_selector=selectors or None,
        ),
        run_config=ray.train.RunConfig(
            name=job.name,
            storage_path=str(job.run_root / "ray"),
            failure_config=ray.train.FailureConfig(controller_failure_limit=0),
        ),
    )
    try:
        cause = trainer.fit().return_value
    except Exception as error:  # noqa: BLE001 - Ray wraps any error of the workers
        return Ending(cause=cause_of(error))
    return Ending(is_finished=True) if cause is None else Ending(is_saved=True, cause=cause)


def join(timeout_s: float) -> None:
    """Agree on ranks ordered by (group, node, local rank); set torch.distributed's variables.

    Ray orders its ranks by node, so they say nothing about groups. Every worker reads the label of
    its own node and shares it with all others through a store at Ray's rank 0.
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
    # Ray makes only its own GPU visible to a worker, so the local rank is always 0
    os.environ.update(RANK=str(order.index(mine)), WORLD_SIZE=str(size), LOCAL_RANK="0")
    os.environ.update(MASTER_ADDR=master, MASTER_PORT=str(master_port))
    # the store must outlive its last reader
    store.set(f"done/{mine}", "")
    if mine == 0:
        store.wait([f"done/{worker}" for worker in range(size)])


def _work(config: dict[str, Any]) -> str | None:
    """Run job after job; return None after the last one, or the message of an early stop."""
    board = config["board"]
    # a driver that hangs cannot tell its workers that another process has taken over the run
    lease.watch(config["leases"])
    node = ray.get_runtime_context().get_node_id()
    ray.get(board.arrive.remote(node, get_current_placement_group()))
    join(config["start_timeout_s"])
    rank = int(os.environ["RANK"])
    sign = Sign(node, ray.util.get_node_ip_address(), os.getpid(), 0.0)
    for number in count():
        job = ray.get(board.next_job.remote(number))
        if job is None:
            return None
        ray.get(board.join.remote(rank, sign))
        try:
            with log_to_file(job, logging.INFO if rank == 0 else logging.WARNING):
                _carry_out(job, board, rank)
        except StoppedError as stopped:
            return str(stopped)
        except Exception as error:
            with suppress(RayError):
                ray.get(board.leave.remote(rank, failure_of(error)))
            raise
        finally:
            board.leave.remote(rank)
        ray.get(board.finish.remote(rank))
    raise AssertionError


def _carry_out(job: Job, board: Any, rank: int) -> None:
    with _watched(board, rank) as pulse:
        job.run(pulse)
    release_memory()


def release_memory() -> None:
    """Release what a finished job held: engines contain reference cycles."""
    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


@contextmanager
def _watched(board: Any, rank: int) -> Iterator[Pulse]:
    """Send the board heartbeats of this rank in the background, and receive requests to stop."""
    asked, is_over = threading.Event(), threading.Event()
    pulse = Pulse(asked.is_set)
    every_s = max(_BEAT_EVERY_S, int(os.environ["WORLD_SIZE"]) / _BEATS_A_S)

    def beat() -> None:
        # when the board is gone, so is the driver, and this worker ends soon
        with suppress(RayError):
            while not is_over.is_set():
                if ray.get(board.beat.remote(rank, pulse.beat())):
                    asked.set()
                is_over.wait(every_s)

    thread = threading.Thread(target=beat, name="watch", daemon=True)
    thread.start()
    try:
        yield pulse
    finally:
        is_over.set()
        thread.join()
