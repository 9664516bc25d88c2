"""The only door to Ray: map a function over items, run a training stage on Ray Train.

A running cluster is used when there is one (RAY_ADDRESS, which `ray job submit` sets); else an
embedded one is started in this process and ends with it. What runs on the workers knows nothing
of Ray and reports through files of the run directory, so a stage looks the same under plain
torchrun.

A worker that dies is replaced, all workers start again, and training resumes from its newest
checkpoint (`parallel.max_failures` times). An error of the training itself is not tried again: it
is left in `failed.json`, and workers that find one leave at once. What workers have to say goes
through `log.txt` of the stage.
"""

import json
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import ray
import ray.train
from ray.exceptions import RayTaskError
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from moce_dist.config import ConfigError, ParallelConfig
from moce_dist.parallel.groups import Station, Topology, natural_key, rank_order
from moce_dist.run import read_jsonl, write_atomic
from moce_dist.train.job import StageJob, TooManyFaultsError, plan_of, total_steps

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")
log = logging.getLogger(__name__)
GROUP_LABEL = "moce.dist/expert-group"
"""Ray node label that names the expert group of a node."""
_FAILED = "failed.json"
_LOG = "log.txt"
_OBJECT_STORE_BYTES = 256 * 2**20


def connect(parallel: ParallelConfig) -> None:
    """Join the running Ray cluster, or start an embedded one with a CPU for every worker."""
    if ray.is_initialized():
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
        return
    log.info("ray: starting an embedded cluster (set RAY_ADDRESS to use a running one)")
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, parallel.num_workers),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        # the path of a checkout is long, and Ray's sockets must stay below 108 characters
        _temp_dir=os.environ.get("RAY_TMPDIR"),
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
    """`map_tasks` as the sweeps of a clustering call it (`cluster.blocks.MapBlocks`)."""
    return map_tasks(function, items, parallel=parallel, shared=(shared,))


def train(job: StageJob) -> None:
    """Run a training stage on `num_workers` workers and wait for its end.

    Raises:
        RuntimeError: with the error that the workers left, or that workers were lost too often.
    """
    (job.folder / _FAILED).unlink(missing_ok=True)
    if "RANK" in os.environ or not needs_ray(job.config.parallel):
        _pretrain(job)
        return
    connect(job.config.parallel)
    parallel = job.config.parallel
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(parallel.start_timeout_s)
    trainer = DataParallelTrainer(
        _train_worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=parallel.num_workers,
            use_gpu=uses_gpu(parallel),
            label_selector=label_selectors(parallel),
        ),
        run_config=ray.train.RunConfig(
            name=job.stage,
            storage_path=str(job.run_root / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=parallel.max_failures),
        ),
    )
    _fit(trainer, Follower(job))
    if error := _error_left(job):
        raise RuntimeError(error)


def _fit(trainer: DataParallelTrainer, follower: "Follower") -> None:
    errors: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001 - Ray's own, over whatever the workers met
            errors.append(error)

    # not in the main thread, where Ray would take over SIGINT, for good and with exit status 0;
    # a daemon, because after an interruption nobody waits for what Ray makes of it
    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(follower.every_s)
            follower.report(with_progress=thread.is_alive())
    except BaseException:
        ray.shutdown()
        raise
    if errors:
        raise RuntimeError(follower.reason(errors[0])) from None


def label_selectors(parallel: ParallelConfig) -> list[dict[str, str]] | None:
    """Choose a node label per worker, neighbours on one group; None when no node has a label.

    Raises:
        ConfigError: the cluster has more or fewer labels than the expert groups need places.
    """
    labels = {
        node["Labels"][GROUP_LABEL]
        for node in ray.nodes()
        if node["Alive"] and GROUP_LABEL in node["Labels"]
    }
    if not labels:
        return None
    topology = Topology(parallel.num_workers, parallel.num_groups)
    if len(labels) != topology.ep_size:
        raise ConfigError(
            f"parallel.num_groups ({parallel.num_groups}) on {parallel.num_workers} workers needs "
            f"{topology.ep_size} values of the node label {GROUP_LABEL}; the cluster has "
            f"{sorted(labels, key=natural_key)}"
        )
    names = sorted(labels, key=natural_key)
    return [{GROUP_LABEL: names[topology.place(rank)]} for rank in range(parallel.num_workers)]


def _join(timeout_s: float) -> None:
    """Agree on ranks ordered by (group, node, local rank); set what torch.distributed reads.

    Ray regroups ranks by node, so its rank says nothing of the group: every worker reads the label
    of its own node, and all learn everybody's through a store at Ray's rank 0.
    """
    from torch._C._distributed_c10d import TCPStore

    context, runtime = ray.train.get_context(), ray.get_runtime_context()
    size, mine = context.get_world_size(), context.get_world_rank()
    here = ray.util.get_node_ip_address()
    host, port = broadcast_from_rank_zero((here, _free_port()))
    store = TCPStore(host, port, size, mine == 0, timedelta(seconds=timeout_s))
    group = runtime.get_node_labels().get(GROUP_LABEL, "")
    station = Station(group, runtime.get_node_id(), context.get_local_rank())
    store.set(f"station/{mine}", json.dumps([*station, here, _free_port()]))
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


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("", 0))
        return int(server.getsockname()[1])


def _error_left(job: StageJob) -> str | None:
    failed = job.folder / _FAILED
    return str(json.loads(failed.read_text())["error"]) if failed.exists() else None


def _is_final(error: Exception) -> bool:
    # when a worker is lost, the others meet errors of the connection: those are worth another try
    if isinstance(error, TooManyFaultsError):
        return True
    return not isinstance(error, RuntimeError | ConnectionError | TimeoutError)


def _train_worker(config: dict[str, Any]) -> None:
    job: StageJob = config["job"]
    if _error_left(job):
        return
    context = ray.train.get_context()
    _join(job.config.parallel.start_timeout_s)
    _log_to_file(job, logging.INFO if context.get_world_rank() == 0 else logging.WARNING)
    try:
        _pretrain(job)
    except Exception as error:
        if _is_final(error):
            write_atomic(job.folder / _FAILED, json.dumps({"error": _one_line(error)}))
        raise


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    says_enough = isinstance(error, ValueError | OSError | ArithmeticError | RuntimeError)
    return text if says_enough else f"{type(error).__name__}: {text}"


def _log_to_file(job: StageJob, level: int) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(job.folder / _LOG)
    handler.setLevel(level)
    ours = logging.getLogger("moce_dist")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)


def _pretrain(job: StageJob) -> None:
    from moce_dist.train.loop import pretrain

    pretrain(job)


class Follower:
    """Tells a person how a stage gets on, from what its workers leave in files."""

    def __init__(self, job: StageJob, *, every_s: float = 10.0) -> None:
        self.every_s = every_s
        self._job, self._stage = job, job.stage
        self._metrics, self._log = job.folder / "metrics.jsonl", job.folder / _LOG
        self._total = total_steps(job.stage_config, plan_of(job))
        self._last = max((line["step"] for line in read_jsonl(self._metrics)), default=-1)
        self._position = self._log.stat().st_size if self._log.exists() else 0

    def report(self, *, with_progress: bool = True) -> None:
        """Pass on new lines of the workers' log, and how far the training is."""
        for line in self._new_lines():
            log.info("%s", line)
        metrics = read_jsonl(self._metrics) if with_progress else []
        if metrics and metrics[-1]["step"] != self._last:
            self._last = metrics[-1]["step"]
            log.info("%s", self._line(metrics[-1]))

    def reason(self, error: BaseException) -> str:
        """Say in a line why the stage ended."""
        return _error_left(self._job) or f"{self._stage}: {' '.join(str(error).split())}"

    def _new_lines(self) -> list[str]:
        if not self._log.exists():
            return []
        with self._log.open("rb") as file:
            file.seek(self._position)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._position += len(whole) + len(newline)
        return whole.decode(errors="replace").splitlines()

    def _line(self, metrics: dict[str, Any]) -> str:
        left = (self._total - metrics["step"] - 1) * metrics["images_seen"] / (metrics["step"] + 1)
        seconds = int(left / max(metrics["images_per_s"], 1e-9))
        return (
            f"{self._stage}: step {metrics['step'] + 1} of {self._total}, "
            f"loss {metrics['loss']:.4f}, "
            f"{metrics['images_per_s']:.0f} images/s, {seconds // 60}:{seconds % 60:02d} left"
        )
