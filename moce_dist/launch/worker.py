"""What runs on the workers: Ray Train around them, ranks in order, one job after the other.

Workers stay when a job is finished and wait for the next one, with their imports, process group and
expert groups behind them. Who hands jobs out is the driver (`training.py`); the status board is
where they meet.

Of Ray Train three helpers stay away, each a process of its own: one asks an autoscaler for room and
one frees the seats of a controller that died, which the driver does; one hands out Ray's data sets,
and there are none.
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

# a site's 0 would mean the first version of Ray Train, which this module does not know
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

from moce_dist.launch.job import Job, failure_of, log_to_file
from moce_dist.launch.nodes import GROUP_LABEL
from moce_dist.launch.status import Ending, Sign, cause_of
from moce_dist.launch.tasks import SEAT
from moce_dist.parallel.groups import Station, free_port, rank_order
from moce_dist.run import lease
from moce_dist.run.directory import StoppedError
from moce_dist.train.pulse import Pulse

_BEAT_EVERY_S = 1.0
_BEATS_A_S = 100
"""Signs of life of all ranks that the status board takes in a second."""


class _DriversRoom(FixedScalingPolicy):  # type: ignore[misc]
    """A fixed number of workers, for which the driver asks an autoscaler."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Start no process that asks as well."""

    def _maybe_send_resource_request(self) -> None:
        pass


class _Trainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray Train's own, without the helpers that the driver does without."""

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        parts["scaling_policy"] = _DriversRoom(self.scaling_config)
        unwanted = PlacementGroupCleanerCallback | DatasetsCallback
        parts["callbacks"] = [each for each in parts["callbacks"] if not isinstance(each, unwanted)]
        return super()._initialize_and_run_controller(**parts)


def fit(job: Job, resource: str, labels: list[str], board: Any, leases: Any) -> Ending:
    """Run Ray Train with one worker for each label, until they are dismissed; say how it ended.

    `job` is the first of their jobs; the others come by way of the board.
    """
    parallel = job.parallel
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(parallel.start_timeout_s)
    # the driver asks who drains; Ray's own watcher would end the workers while they save
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
    except Exception as error:  # noqa: BLE001 - Ray's own, over whatever the workers met
        return Ending(cause=cause_of(error))
    return Ending(is_finished=True) if cause is None else Ending(is_saved=True, cause=cause)


def join(timeout_s: float) -> None:
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


def _work(config: dict[str, Any]) -> str | None:
    """Carry out job after job; None when there are no more, else what was said on leaving early."""
    board = config["board"]
    # a driver that stands still cannot tell its workers that another has taken the run over
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
    # engines refer to themselves, and the next job needs the memory
    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


@contextmanager
def _watched(board: Any, rank: int) -> Iterator[Pulse]:
    """Tell the board in the background that this rank is alive, and hear whether it is to stop."""
    asked, is_over = threading.Event(), threading.Event()
    pulse = Pulse(asked.is_set)
    every_s = max(_BEAT_EVERY_S, int(os.environ["WORLD_SIZE"]) / _BEATS_A_S)

    def beat() -> None:
        # without a driver there is no board, and soon no worker
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
