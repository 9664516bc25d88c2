"""The only door to Ray: map a function over items, run a training stage on Ray Train.

A running cluster is used when there is one (RAY_ADDRESS, which `ray job submit` sets); else an
embedded one is started in this process and ends with it. What runs on the workers knows nothing
of Ray and reports through files of the run directory, so a stage looks the same under plain
torchrun.

A worker that dies is replaced, all workers start again, and training resumes from its newest
checkpoint (`parallel.max_failures` times). An error of the training itself is not tried again: it
is left in `failed.json`, which ends the restarts at once.
"""

import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray
import ray.train
from ray.exceptions import RayTaskError
from ray.train.torch import TorchConfig, TorchTrainer

from moce_dist.config import ConfigError, ParallelConfig
from moce_dist.run import read_jsonl, write_atomic
from moce_dist.train.job import StageJob, plan_of, total_steps

Item = TypeVar("Item")
Result = TypeVar("Result")
log = logging.getLogger(__name__)
_FAILED = "failed.json"
_OBJECT_STORE_BYTES = 256 * 2**20
_FINAL = (ConfigError, FloatingPointError, OSError)


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
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    parallel: ParallelConfig,
    gpu: bool = False,
) -> Iterator[Result]:
    """Apply a module-level function to items on `num_workers` workers; results in the items' order.

    A task whose worker died is run again elsewhere. With one worker and no cluster it runs here.

    Raises:
        Exception: the first error of the function, as it was raised.
    """
    if not needs_ray(parallel):
        yield from map(function, items)
        return
    connect(parallel)
    gpus = 1 if gpu and uses_gpu(parallel) else 0
    task = ray.remote(function).options(num_cpus=1, num_gpus=gpus, max_retries=3)
    window: deque[Any] = deque()
    try:
        for item in items:
            window.append(task.remote(item))
            if len(window) > 2 * parallel.num_workers:
                yield ray.get(window.popleft())
        while window:
            yield ray.get(window.popleft())
    except RayTaskError as error:
        raise error.cause from None


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
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=parallel.num_workers, use_gpu=uses_gpu(parallel)
        ),
        torch_config=TorchConfig(backend=None),
        run_config=ray.train.RunConfig(
            name=job.stage,
            storage_path=str(job.run_root / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=parallel.max_failures),
        ),
    )
    with Follower(job):
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001 - Ray's own, over whatever the workers met
            raise RuntimeError(_reason(job, error)) from None


def _reason(job: StageJob, error: Exception) -> str:
    failed = job.folder / _FAILED
    if failed.exists():
        return str(json.loads(failed.read_text())["error"])
    return f"{job.stage}: {str(error).strip().splitlines()[0]}"


def _train_worker(config: dict[str, Any]) -> None:
    job: StageJob = config["job"]
    failed = job.folder / _FAILED
    if failed.exists():
        raise RuntimeError(json.loads(failed.read_text())["error"])
    os.environ["LOCAL_RANK"] = str(ray.train.get_context().get_local_rank())
    try:
        _pretrain(job)
    except _FINAL as error:
        if not isinstance(error, ConnectionError):
            write_atomic(failed, json.dumps({"error": f"{error}"}))
        raise


def _pretrain(job: StageJob) -> None:
    from moce_dist.train.loop import pretrain

    pretrain(job)


class Follower:
    """Tells a person how a stage gets on, from the lines that rank 0 adds to metrics.jsonl."""

    def __init__(self, job: StageJob, *, every_s: float = 10.0) -> None:
        self._path, self._stage, self._every_s = job.folder / "metrics.jsonl", job.stage, every_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._total = total_steps(job.stage_config, plan_of(job))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        last = self._last_step()
        while not self._done.wait(self._every_s):
            lines = read_jsonl(self._path)
            if lines and lines[-1]["step"] != last:
                last = lines[-1]["step"]
                log.info("%s", self._line(lines[-1]))

    def _last_step(self) -> int:
        return max((line["step"] for line in read_jsonl(self._path)), default=-1)

    def _line(self, metrics: dict[str, Any]) -> str:
        left = (self._total - metrics["step"] - 1) * metrics["images_seen"] / (metrics["step"] + 1)
        seconds = int(left / max(metrics["images_per_s"], 1e-9))
        return (
            f"{self._stage}: step {metrics['step'] + 1} of {self._total}, "
            f"loss {metrics['loss']:.4f}, "
            f"{metrics['images_per_s']:.0f} images/s, {seconds // 60}:{seconds % 60:02d} left"
        )
