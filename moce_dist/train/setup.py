"""Build the training state of one rank: data plan, model, groups, engine and resume point."""

import hashlib
import logging
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moce_dist.config import Config, ParallelConfig
from moce_dist.data.columns import open_table
from moce_dist.data.kept import KeptSamples, open_kept
from moce_dist.data.plan import ORDER, Plan
from moce_dist.data.stream import StreamSpec
from moce_dist.data.table import SampleTable
from moce_dist.model.device import training_device
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.model.moce import MoceBlock, experts_from_dense
from moce_dist.model.vit import Mlp
from moce_dist.parallel.engine import Engine, EngineSpec, init_distributed
from moce_dist.parallel.groups import Topology
from moce_dist.parallel.token import insert_token_experts
from moce_dist.run.directory import Run
from moce_dist.run.files import forget_faults
from moce_dist.settings import ConfigError
from moce_dist.train.checkpoint import (
    Naming,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    part_reader,
    read_manifest,
    start_from,
    tensor_reader,
)
from moce_dist.train.job import StageJob, total_steps
from moce_dist.train.optim import optimizer_factory, parameter_groups
from moce_dist.train.outcome import Outcome
from moce_dist.train.pretrained import initial_weights
from moce_dist.train.pulse import Pulse
from moce_dist.train.routing import Router
from moce_dist.train.saver import Saver

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class TrainState:
    """Everything one rank trains with."""

    job: StageJob
    rank: int
    topology: Topology
    plan: Plan
    router: Router
    engine: Engine
    naming: Naming
    saver: Saver
    step: int = 0
    faults: int = 0
    pulse: Pulse = field(default_factory=Pulse)
    is_stopping: bool = False
    pending: Outcome | None = None
    """The newest step, if its figures have not been read yet."""

    @cached_property
    def kept(self) -> KeptSamples | None:
        """Samples of the stage's plan that stay in memory."""
        return open_kept(self.job.config.data, self.plan.table.num_samples)

    @property
    def model(self) -> MaskedAutoencoder:
        """The model inside the engine."""
        model = self.engine.module
        assert isinstance(model, MaskedAutoencoder)
        return model

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the stage."""
        return total_steps(self.job.stage_config, self.plan)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on this number of ranks."""
        return self.engine.spec.micro_batches

    def stream_spec(self, plan: Plan) -> StreamSpec:
        """Describe this rank's part of a plan."""
        config = self.job.config
        return StreamSpec(
            plan=plan,
            data=config.data,
            num_patches=config.num_patches,
            num_ranks=self.topology.num_ranks,
            rank=self.rank,
            ledger=Run(self.job.run_root).faults,
            stage=self.job.name,
            kept=self.kept if plan is self.plan else None,
        )


def holdout_table(job: StageJob) -> SampleTable | None:
    """Read the held-out images, with their assigned clusters in every stage except mae."""
    if job.holdout is None:
        return None
    if job.stage == "mae":
        return open_table(job.holdout)
    # imported late: it needs faiss and pyarrow, which a benchmark of steps does without
    from moce_dist.cluster.assignments import open_assigned

    return open_assigned(job.holdout, Run(job.run_root).holdout_clusters, job.num_clusters)


def build_state(job: StageJob) -> TrainState:
    """Build model, groups and engine and load the newest checkpoint; collective over all ranks."""
    torch.set_num_threads(job.config.parallel.threads_per_worker)
    device = join_ranks(job.config.parallel)
    # every rank makes the same plan from the same index, so no data about it is sent
    plan = job.plan()
    # chosen before the model is built, because the checkpoint holds the placement of the experts
    start = choose_together(partial(_begin, job))
    state = assemble(job, plan, centroids_of(job), device)
    _start_or_resume(state, start)
    return state


def join_ranks(parallel: ParallelConfig) -> torch.device:
    """Join the process group of all ranks; return this rank's device."""
    device = training_device(parallel)
    init_distributed(device, timedelta(seconds=parallel.patience_s))
    return device


def choose_together(choose: Callable[[], T]) -> T:
    """Return on all ranks what rank 0 chooses; collective.

    Ranks that verified checkpoints each for itself would take different ones after an error of one
    rank's disk.
    """
    if not dist.is_initialized():
        return choose()
    chosen: list[Any] = [choose() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(chosen, 0)
    found: T = chosen[0]
    return found


def _begin(job: StageJob) -> Path | None:
    # faults of steps that run again are recorded anew; no rank may do that before
    chosen = latest_checkpoint(job.folder / "checkpoints")
    step = 0 if chosen is None else read_manifest(chosen)["step"]
    forget_faults(Run(job.run_root).faults, job.name, step)
    forget_faults(Run(job.run_root).faults, f"{job.name}-holdout", 0)
    return chosen


def assemble(
    job: StageJob, plan: Plan, centroids: Tensor | None, device: torch.device
) -> TrainState:
    """Build untrained model, groups and engine for a plan; collective over all ranks.

    `centroids` is (K, D) if clusters choose the experts, else None.
    """
    config, stage, rank = job.config, job.stage_config, dist.get_rank()
    topology = Topology(dist.get_world_size(), config.parallel.num_groups)
    clusters = plan.table.num_clusters if centroids is None else len(centroids)
    sizes = np.pad(plan.table.cluster_sizes, (0, max(0, clusters - len(plan.table.cluster_sizes))))
    router = Router(config, topology, sizes, total_steps=total_steps(stage, plan))
    model = MaskedAutoencoder(
        config,
        centroids=centroids if config.moe.kind == "cluster" else None,
        num_local_experts=config.moe.num_experts // topology.ep_size,
    )
    if job.stage == "moce" and config.moe.kind == "token":
        insert_token_experts(model, config, topology.ep_size)
    model.to(device)
    prepare_blocks([*model.blocks, *model.decoder_blocks], config.parallel)
    engine = Engine(
        model,
        parameter_groups(model, stage, config.gate, config.moe),
        optimizer_factory(stage),
        EngineSpec(
            config.parallel, topology, config.moe.num_experts, stage.batch_size, stage.clip_norm
        ),
    )
    naming = Naming(config.moe_layers, router.experts, topology.place(rank))
    saver = Saver(job.folder / "checkpoints", topology, keep=config.checkpoint.keep)
    return TrainState(job, rank, topology, plan, router, engine, naming, saver)


def prepare_blocks(blocks: Iterable[Any], parallel: ParallelConfig) -> None:
    """Checkpoint activations of blocks and compile them, in place; names do not change.

    In blocks with experts, checkpointing covers the attention and the experts, compilation only the
    attention. Neither covers the routing: its collectives must run once, and its shapes change with
    every step.
    """
    for block in blocks:
        # the MLP of this package, or timm's
        is_dense = hasattr(block.mlp, "fc1")
        if parallel.compile:
            # before it is recomputed: torch compiles nothing around `checkpoint`
            part = block if is_dense else block.attn
            part.forward = torch.compile(part.forward, dynamic=False)
        if parallel.activation_checkpointing:
            for part in [block] if is_dense else [block.attn, *expert_modules(block)]:
                part.forward = partial(checkpoint, part.forward, use_reentrant=False)


def expert_modules(block: nn.Module) -> list[nn.Module]:
    """Return the modules of a block that compute its experts and their shared part."""
    if isinstance(block, MoceBlock):
        shared = block.mlp.shared
        return [block.mlp.experts] if shared is None else [block.mlp.experts, shared]
    return [module for module in block.get_submodule("mlp").modules() if isinstance(module, Mlp)]


def _start_or_resume(state: TrainState, start: Path | None) -> None:
    job, router, gate = state.job, state.router, state.model.gate
    manifest: dict[str, Any] | None = None
    if start is not None:
        manifest = read_manifest(start)
        if (order := manifest.get("order", 1)) != ORDER:
            raise ConfigError(
                f"{start}: was written by a version with another order of images (order {order}, "
                f"this one has {ORDER}): finish the run with that version, or begin anew (--fresh)"
            )
        router.restore(manifest)
    elif gate is not None:
        if job.start is not None:
            # the first table and the placement of the experts follow from this weight
            checkpoint = Path(job.start)
            weight = tensor_reader(checkpoint)("weight/gate.weight")
            if weight is None:
                raise ConfigError(f"{checkpoint}: has no gate to go on from")
            gate.weight.data.copy_(weight)
        router.regroup(gate, 0)
        router.decide(gate, 0)
        router.replan(gate)
    state.naming = Naming(job.config.moe_layers, router.experts, state.topology.place(state.rank))
    if start is not None and manifest is not None:
        load_checkpoint(start, state.engine, state.naming)
        state.step, state.faults = manifest["step"], manifest["faults"]
        expected = state.plan.cursors(state.step)
        assert manifest["cursors"] == expected, "the plan of the stream changed under a checkpoint"
        log.info("%s: resuming at step %d of %d", job.name, state.step, state.total_steps)
        return
    if job.start is not None:
        log.info("%s: starting from the weights of %s", job.name, job.start)
        start_from(Path(job.start), state.engine, state.naming)
        _load_positions(state, tensor_reader(Path(job.start)))
        return
    read = {f"weight/{name}": tensor for name, tensor in first_weights(job).items()}.get
    state.engine.load_state(part_reader(read, state.naming), step=0)
    _load_positions(state, read)


def _load_positions(state: TrainState, read: Callable[[str], Tensor | None]) -> None:
    # position embeddings are fixed here, but weights from elsewhere may have learnt them
    for name in ("pos_embed", "decoder_pos_embed"):
        if (found := read(f"weight/{name}")) is not None:
            getattr(state.model, name).copy_(found)


def first_weights(job: StageJob) -> dict[str, Tensor]:
    """Return the weights that a stage starts from without a checkpoint of its own, by global name.

    Collective over all ranks, if there are any. Experts share memory; see `experts_from_dense`.

    Raises:
        ConfigError: the run has no undamaged checkpoint of stage mae, or `model.init` cannot be
            read, does not fit the model, or is not the same on all hosts.
    """
    config = job.config
    if job.stage == "mae":
        return _equal_weights(config)
    mae = choose_together(partial(latest_checkpoint, job.run_root / "mae" / "checkpoints"))
    if mae is None and (job.run_root / "mae").exists():
        raise ConfigError(f"{job.run_root / 'mae'}: holds no undamaged checkpoint to start from")
    dense = _equal_weights(config) if mae is None else load_weights(mae)
    layers, experts = config.moe_layers, config.moe.num_experts
    return experts_from_dense(
        dense, layers, experts, shared_units=config.shared_units, has_base=config.has_base
    )


def _equal_weights(config: Config) -> dict[str, Tensor]:
    # every rank reads `model.init` on its own host, where the file may be another one; replicas
    # that began with different weights would never become equal
    weights = initial_weights(config)
    if config.model.init is None or not dist.is_initialized():
        return weights
    digest = hashlib.sha256()
    for tensor in weights.values():
        digest.update(tensor.contiguous().numpy().data)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (digest.hexdigest()[:12], socket.gethostname()))
    hosts: dict[str, set[str]] = {}
    for sha256, host in found:
        hosts.setdefault(sha256, set()).add(host)
    if len(hosts) > 1:
        where = "; ".join(f"{sha256} on {', '.join(sorted(on))}" for sha256, on in hosts.items())
        raise ConfigError(f"model.init ({config.model.init}): differs between hosts: {where}")
    return weights


def centroids_of(job: StageJob) -> Tensor | None:
    """Read the centroids (K, D) that the gate of a stage sees; None for a stage without a gate."""
    if job.stage != "moce" or job.config.moe.kind != "cluster":
        return None
    path = Run(job.run_root).clusters / "centroids.npy"
    return torch.from_numpy(np.load(path, allow_pickle=False)).float()
