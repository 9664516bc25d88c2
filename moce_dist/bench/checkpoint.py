"""What saving costs a training: a save that everybody waits for, beside one in the background.

    without    N steps
    with       save, N steps, wait for what is left of the save
    blocking   save, wait

save_stall is with - without, so it holds the copy, what the writer takes from the steps, and what
is left over at their end; save_blocking is the same save of the same state with nothing beside it.
N is `checkpoint.every_steps`, or more where steps are short: a stretch lasts at least four blocking
saves, as saves are rarer than that in any training. Two gloo ranks, or one rank on a GPU.

The model is a MoCE one whose images all stay on their rank (synthetic images, no data is read).
"""

import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moce_dist.bench.harness import Report, interleave, run_ranks
from moce_dist.config import Config
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.model.moce import LocalDispatcher
from moce_dist.parallel.engine import Engine, EngineSpec
from moce_dist.parallel.groups import Topology, expert_map
from moce_dist.parallel.placement import contiguous_placement
from moce_dist.train.checkpoint import Naming, complete_checkpoints
from moce_dist.train.optim import optimizer_factory, parameter_groups
from moce_dist.train.saver import Saver
from moce_dist.train.setup import worker_device

_STRETCH_OVER_SAVE = 4


def run(config: Config) -> Report:
    """Measure on `parallel.num_workers` processes, on one where there is a GPU to use."""
    if config.parallel.use_gpu and torch.cuda.is_available():
        parallel = config.parallel.model_copy(update={"num_workers": 1})
        config = config.model_copy(update={"parallel": parallel})
    measured = run_ranks("checkpoint:measure", config)
    stalls = [w - wo for w, wo in zip(measured["with"], measured["without"], strict=True)]
    report = Report("checkpoint", config)
    report.add_variants({"save_blocking": measured["blocking"], "save_stall": stalls})
    report.figures |= {name: measured[name] for name in ("state_gib", "steps", "step_s")}
    return report.add_ratio("save_stall", "save_blocking")


def measure(config: Config) -> dict[str, Any]:
    """Time saves and steps on this rank; collective over all ranks."""
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared, 0)
        return _measure(_Training(config, Path(shared[0])), config)


def _measure(training: "_Training", config: Config) -> dict[str, Any]:
    # the first step makes the moments, the first save the host buffers
    training.steps(1)
    training.blocking()
    save_s, step_s = (
        _seconds(action) for action in (training.blocking, partial(training.steps, 1))
    )
    needed = math.ceil(_STRETCH_OVER_SAVE * save_s / step_s)
    count = [max(config.checkpoint.every_steps, needed)]
    dist.broadcast_object_list(count, 0)
    variants: dict[str, Callable[[], None]] = {
        "without": partial(training.steps, count[0]),
        "with": partial(training.steps, count[0], is_saving=True),
        "blocking": training.blocking,
    }
    bench = config.bench
    times = interleave(variants, rounds=bench.rounds, warmup=bench.warmup_rounds)
    step_s = min(times["without"]) / count[0]
    return {**times, "steps": count[0], "step_s": step_s, "state_gib": training.state_gib()}


def _seconds(action: Callable[[], None]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


class _Training:
    """A model that takes steps on one synthetic batch, and a saver; timed calls end together."""

    def __init__(self, config: Config, folder: Path) -> None:
        torch.manual_seed(config.seed)
        self._device = worker_device(config)
        topology = Topology(dist.get_world_size(), config.parallel.num_groups)
        self._naming = _naming(config, topology)
        self._engine = _engine(config, topology, self._device)
        self._folder = folder
        self._saver = Saver(folder, topology, keep=1)
        self._step = 0
        self._inputs = _batch(config, topology, self._device)

    def steps(self, count: int, *, is_saving: bool = False) -> None:
        """Take steps; with a save that begins before the first of them and ends with the last."""
        if is_saving:
            self._save()
        for _ in range(count):
            self._engine.backward(self._engine.forward(*self._inputs).mean())
            self._engine.step()
            self._step += 1
            self._saver.poll()
        self._end()

    def blocking(self) -> None:
        """Save and wait for the end of it."""
        self._save()
        self._end()

    def state_gib(self) -> float:
        """Size of the checkpoint on disk, GiB."""
        (checkpoint,) = complete_checkpoints(self._folder)
        return sum(file.stat().st_size for file in checkpoint.iterdir()) / 2**30

    def _save(self) -> None:
        self._saver.save(self._engine, self._naming, {"step": self._step})

    def _end(self) -> None:
        self._saver.wait()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()


def _naming(config: Config, topology: Topology) -> Naming:
    shape = (len(config.moe_layers), config.moe.num_experts, config.cluster.num_clusters)
    placement = contiguous_placement(*shape, topology.num_groups)
    experts = expert_map(placement.expert_group, topology)
    return Naming(config.moe_layers, experts, topology.place(dist.get_rank()))


def _engine(config: Config, topology: Topology, device: torch.device) -> Engine:
    stage, num_experts = config.moce, config.moe.num_experts
    centroids = torch.randn(config.cluster.num_clusters, config.model.shape.width)
    local = num_experts // topology.ep_size
    model = MaskedAutoencoder(config, centroids=centroids, num_local_experts=local).to(device)
    return Engine(
        model,
        parameter_groups(model, stage, config.gate.lr_scale),
        optimizer_factory(stage),
        EngineSpec(config.parallel, topology, num_experts, stage.batch_size, stage.clip_norm),
    )


def _batch(
    config: Config, topology: Topology, device: torch.device
) -> tuple[Tensor, Tensor, LocalDispatcher, Tensor]:
    # images (b, 3, S, S), noise (b, N), routes to own experts in turn, scales (L, b)
    size, layers = config.moce.batch_size // topology.num_ranks, len(config.moe_layers)
    side, local = config.data.image_size, config.moe.num_experts // topology.ep_size
    images = torch.randn(size, 3, side, side, device=device)
    noise = torch.rand(size, config.num_patches, device=device)
    routes = (torch.arange(size, device=device) % local).repeat(layers, 1)
    return images, noise, LocalDispatcher(routes, local), torch.ones(layers, size, device=device)
