"""Wrap the model in DeepSpeed's engine: expert-parallel groups, ZeRO, clipping, state by name.

What DeepSpeed's engine requires, and where it is wrong (version 0.19.8):

- Expert parameters carry `allreduce = False` and the name of their group. The engine treats a model
  as MoE only if one of its modules is of DeepSpeed's MoE class, so a bare marker is attached.
- Replicas of an expert are neighbouring ranks: `use_data_before_expert_parallelism`.
- The groups that it makes have torch's default timeout, so they are made here.
- With loss = R / B * (sum over own images), all gradients are those of the global mean.
- At ZeRO-0 it sums all gradients after the backward pass; reduction.py sums them during it instead.
- At ZeRO-0 its clipping mixes up the norms of the ranks, so the norm is computed and applied here.
- At ZeRO-1 and 2 it links only the first parameter group's optimiser state to parameters, so the
  link is made again before state is read or written.

Letters: R ranks, B images of a step, G expert groups.
"""

import atexit
import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from moce_dist.config import ParallelConfig
from moce_dist.cost.sizes import BUCKET_BYTES
from moce_dist.model.moce import is_expert, is_stacked
from moce_dist.parallel.deepspeed_import import (
    CPU_Accelerator,
    CUDA_Accelerator,
    MoE,
    deepspeed,
    deepspeed_groups,
    get_accelerator,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    set_accelerator,
    split_params_into_different_moe_groups_for_optimizer,
)
from moce_dist.parallel.groups import Topology
from moce_dist.parallel.reduction import GradientReducer, in_backward_order
from moce_dist.parallel.rendezvous import agree_on_device, fresh_store, new_host_group
from moce_dist.run.environment import bind_ranks, shorten_sockets

BUCKET = BUCKET_BYTES // 4
"""Elements of ZeRO's bucket; DeepSpeed's default is a buffer of 1.9 GiB."""
MOMENTS = ("exp_avg", "exp_avg_sq")
OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class _MoeMarker(MoE):  # type: ignore[misc]
    """Tells DeepSpeed that the model has experts; holds no parameters and is never called."""

    def __init__(self, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Do nothing: the groups exist before the engine is built."""


@dataclass(frozen=True)
class EngineSpec:
    """Settings of the engine."""

    parallel: ParallelConfig
    topology: Topology
    num_experts: int
    batch_size: int
    clip_norm: float

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on this number of ranks."""
        return self.parallel.micro_batches_on(self.topology.num_ranks, self.batch_size)


def init_distributed(device: torch.device, timeout: timedelta | None = None) -> None:
    """Join the process group given by RANK, WORLD_SIZE, MASTER_ADDR, or make one of one process.

    An existing process group is kept. DeepSpeed's accelerator becomes that of `device`, whatever
    this machine has. Collective over all ranks, which wait for each other up to `timeout`; None:
    torch's default.
    """
    # DeepSpeed picks the machine's best accelerator and moves modules there, but a CPU rank on a
    # GPU machine must stay on its CPU
    if get_accelerator().device_name() != device.type:
        set_accelerator({"cpu": CPU_Accelerator, "cuda": CUDA_Accelerator}[device.type]())
    shorten_sockets()
    os.environ.setdefault("LOCAL_RANK", "0")
    # a backward pass uses several communicators at once, in an order that is equal on all ranks
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    if device.type == "cpu":
        # an inference kernel that would be compiled at first use: unused, and needs a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            bind_ranks(os.environ["MASTER_ADDR"])
            store, rank, world_size = fresh_store(timeout)
            agree_on_device(store, world_size, device.type)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=timeout
            )
        else:
            dist.init_process_group(
                backend, store=HashStore(), rank=0, world_size=1, timeout=timeout
            )
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def create_groups(
    topology: Topology, timeout: timedelta
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Create DeepSpeed's process groups; return this rank's expert-parallel and replica groups.

    Their ranks wait for each other up to `timeout`. Collective: all ranks call it equally often.
    """
    # DeepSpeed keeps groups by name as long as the process lives; a second engine shares them
    name, tables = f"ep_size_{topology.ep_size}", deepspeed_groups
    if tables._WORLD_GROUP is None:
        tables._WORLD_GROUP = dist.new_group(timeout=timeout)
    ranks, replicas = range(topology.num_ranks), topology.num_replicas
    exchanging = tables._EXPERT_PARALLEL_GROUP, tables._EXPERT_PARALLEL_GROUP_RANKS
    sharing = tables._EXPERT_DATA_PARALLEL_GROUP, tables._EXPERT_DATA_PARALLEL_GROUP_RANKS
    for (groups, members), partition in (
        (exchanging, [topology.expert_parallel_ranks(rank) for rank in ranks[:replicas]]),
        (sharing, [topology.replica_ranks(rank) for rank in ranks[::replicas]]),
    ):
        for part in partition if name not in groups else ():
            # torch sorts the ranks of a group; places ascend with ranks, so both numbers agree
            group = dist.new_group(part, timeout=timeout)
            if dist.get_rank() in part:
                groups[name], members[name] = group, part
    return exchanging[0][name], sharing[0][name]


@functools.cache  # the stages of a process share it
def _host_group(_: dist.ProcessGroup | None, timeout: timedelta) -> dist.ProcessGroup:
    return new_host_group(timeout)


atexit.register(_host_group.cache_clear)  # see `new_host_group`


def _deepspeed_config(spec: EngineSpec) -> dict[str, Any]:
    zero = spec.parallel.zero_stage
    return {
        "train_batch_size": spec.batch_size,
        "gradient_accumulation_steps": spec.micro_batches,
        "steps_per_print": None,
        "gradient_clipping": spec.clip_norm if zero else 0.0,
        "zero_optimization": {"stage": zero, "overlap_comm": False, "reduce_bucket_size": BUCKET},
        "communication_data_type": spec.parallel.reduce_dtype,
        # this timer synchronises with the device twice per micro-batch
        "timers": {"throughput": {"enabled": False}},
        # plain SGD is not on DeepSpeed's list
        "zero_allow_untested_optimizer": True,
        "use_data_before_expert_parallelism": True,
    }


class Engine:
    """One rank's training engine; every method is collective unless it says otherwise."""

    def __init__(
        self,
        module: nn.Module,
        parameter_groups: list[dict[str, Any]],
        make_optimizer: OptimizerFactory,
        spec: EngineSpec,
    ) -> None:
        """Wrap `module`, whose experts are recognised by parameter name."""
        self.module, self.spec = module, spec
        self._timeout = timedelta(seconds=spec.parallel.patience_s)
        self.expert_group, self.replica_group = create_groups(spec.topology, self._timeout)
        named = dict(module.named_parameters())
        if any(map(is_stacked, named)):
            for name, parameter in named.items():
                if is_stacked(name):
                    parameter.allreduce = False  # type: ignore[attr-defined]
                    parameter.group_name = f"ep_size_{spec.topology.ep_size}"  # type: ignore[attr-defined]
            module.add_module("moe_marker", _MoeMarker(spec.num_experts))
        local = [parameter for name, parameter in named.items() if is_expert(name)]
        shared = [parameter for name, parameter in named.items() if not is_expert(name)]
        self._shared_and_local = shared, local
        if local:
            parameter_groups = split_params_into_different_moe_groups_for_optimizer(
                parameter_groups
            )
        # the split can leave groups without parameters, which ZeRO cannot flatten
        parameter_groups = [group for group in parameter_groups if group["params"]]
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(parameter_groups),
            config=_deepspeed_config(spec),
            dist_init_required=False,
        )
        self._norm: Tensor | None = None
        self._is_spoilt = torch.zeros((), dtype=torch.bool, device=self.device)
        self.reducer: GradientReducer | None = None
        if spec.parallel.zero_stage == 0:
            self._engine.enable_backward_allreduce = False
            self.reducer = GradientReducer(
                in_backward_order(module, self.replica_group),
                dtype=torch.bfloat16 if spec.parallel.reduce_dtype == "bf16" else None,
            )

    def host_group(self) -> dist.ProcessGroup:
        """Return a group of all ranks for messages from host to host, which no device waits for."""
        return _host_group(dist.group.WORLD, self._timeout)

    @property
    def optimizer(self) -> Any:
        """The optimiser as DeepSpeed wraps it; its `param_groups` take the learning rate."""
        return self._engine.optimizer

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return torch.device(self._engine.device)

    def forward(self, *inputs: Any) -> Any:
        """Run the module on one micro-batch."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a micro-batch; on the last one of a step, reduce them."""
        if self.reducer is None:
            self._engine.backward(loss)
            return
        is_last = self._engine.is_gradient_accumulation_boundary()
        if is_last:
            self.reducer.start()
        self._engine.backward(loss / self.spec.topology.num_ranks)
        if is_last:
            self.reducer.finish()

    def agree(self, figures: Tensor) -> Tensor:
        """Sum figures (n,) float64 over all ranks; call before the `step` that updates.

        At ZeRO-0 the same collective also gives the norm of the gradient. Where the norm or the
        first sum is not finite, neither the next `step` nor any later one updates anything. So
        kernels launched before the host learns of it cannot change a weight.
        """
        if self.spec.parallel.zero_stage > 0:
            dist.all_reduce(figures)
            return figures
        shared, local = self._squares()
        sums = torch.cat([figures, local.view(1)])
        dist.all_reduce(sums)
        # replicas hold equal gradients, so the sum counts every expert num_replicas times
        self._norm = (shared + sums[-1] / self.spec.topology.num_replicas).sqrt().float()
        both = self._norm + sums[0]
        # inf - inf and nan - nan are nan, and nan != 0
        self._is_spoilt |= both - both != 0
        return sums[:-1]

    @property
    def may_update(self) -> Tensor:
        """1 () if the next `step` updates, else 0; on the device, for ZeRO-0 only."""
        return 1 - self._is_spoilt.float()

    def step(self) -> Tensor:
        """Clip, update, and return the norm () of the gradient before clipping, on the device.

        Call after every micro-batch; only the last one of a step updates, and the others return
        nan. If the norm is not finite, it is so on all ranks, and nothing is updated.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return torch.full((), math.nan)
        if self.spec.parallel.zero_stage > 0:
            # DeepSpeed updates nothing if the norm is not finite
            self._engine.step()
            return torch.tensor(float(self._engine.get_global_grad_norm()), device=self.device)
        if self._norm is None:
            self.agree(torch.zeros(1, dtype=torch.float64, device=self.device))
        norm, self._norm = self._norm, None
        assert norm is not None, "known since all agreed"
        # fused optimisers divide gradients by grad_scale, and skip the update if found_inf is 1
        if limit := self.spec.clip_norm:
            self.optimizer.grad_scale = (norm / limit).clamp_min(1.0)
        self.optimizer.found_inf = self._is_spoilt.float()
        self._engine.step()
        return norm

    def _squares(self) -> tuple[Tensor, Tensor]:
        # squared gradient norms (), float64: of the shared parameters, of the local experts
        parts = [[p.grad for p in some if p.grad is not None] for some in self._shared_and_local]
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        shared, local = (
            torch.linalg.vector_norm(
                torch.stack(torch._foreach_norm(part)), dtype=zero.dtype
            ).square()
            if part
            else zero
            for part in parts
        )
        return shared, local

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """Return a parameter's float32 weights; collective over the replicas at ZeRO-1 and 2."""
        is_whole = self.spec.parallel.zero_stage == 0
        return parameter.data if is_whole else safe_get_full_fp32_param(parameter)

    def set_weight(self, parameter: nn.Parameter, weight: Tensor) -> None:
        """Set a parameter's float32 weights; collective as `weight`."""
        parameter.data.copy_(weight)
        if self.spec.parallel.zero_stage > 0:
            safe_set_full_fp32_param(parameter, weight.to(parameter.device))

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (name, kind, tensor) of float32 weights and moments by local name.

        Of the experts only those of this rank. Kinds are `weight` and MOMENTS; moments are absent
        before the first step. Collective over the replicas at ZeRO-1 and 2.
        """
        self._link_optimizer_state()
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            yield name, "weight", self.weight(parameter)
            if self.spec.parallel.zero_stage == 0:
                moments = self.optimizer.state.get(parameter, {})
                yield from ((name, kind, moments[kind]) for kind in MOMENTS if kind in moments)
                continue
            for kind in MOMENTS if self._has_moments() else ():
                yield name, kind, safe_get_full_optimizer_state(parameter, kind)

    def load_state(self, lookup: Callable[[str, str], Tensor | None], *, step: int) -> None:
        """Set weights, and moments where `lookup(name, kind)` has them, after `step` steps."""
        with_moments = step > 0 and isinstance(self._inner_optimizer(), torch.optim.AdamW)
        if with_moments and self.spec.parallel.zero_stage and not self._has_moments():
            self._create_partitioned_moments(step)
        self._link_optimizer_state()
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                if (weight := lookup(name, "weight")) is not None:
                    self.set_weight(parameter, weight)
                found = {kind: lookup(name, kind) for kind in MOMENTS}
                for kind, moment in found.items():
                    if moment is not None and self.spec.parallel.zero_stage:
                        safe_set_full_optimizer_state(parameter, moment.to(self.device), kind)
                    elif moment is not None:
                        state = self.optimizer.state[parameter]
                        state[kind] = moment.to(self.device, copy=True)
        if self.spec.parallel.zero_stage:
            self.optimizer.update_lp_params()
        elif with_moments:
            for state in self.optimizer.state.values():
                # fused optimisers need the step count on the device of the weights
                state["step"] = torch.tensor(float(step), device=self.device)

    def _inner_optimizer(self) -> Any:
        return self.optimizer.optimizer if self.spec.parallel.zero_stage else self.optimizer

    def _has_moments(self) -> bool:
        return any(MOMENTS[0] in state for state in self._inner_optimizer().state.values())

    def _create_partitioned_moments(self, step: int) -> None:
        optimizer = self._inner_optimizer()
        # ZeRO creates its state in the first step, but loading comes before that
        for group in optimizer.param_groups:
            for flat in group["params"]:
                zeros = {kind: torch.zeros_like(flat) for kind in MOMENTS}
                counted = torch.tensor(float(step), device=flat.device)
                optimizer.state[flat] = {"step": counted, **zeros}

    def _link_optimizer_state(self) -> None:
        if self.spec.parallel.zero_stage and self._has_moments():
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def destroy(self) -> None:
        """Release hooks and buffers; the process group stays."""
        if self.reducer is not None:
            self.reducer.detach()
        with contextlib.suppress(AttributeError):
            self._engine.destroy()
