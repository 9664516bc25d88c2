"""Time a step of MoCE, of the dense model and of the token-routed one, at equal active FLOPs.

The variants named by `moe.kind` use the same model, loop and engine on the same ranks; they differ
in that field and in precision. A step consists of routing table, forward, backward, gradient
reduction and optimiser step. The baselines are what a user would write for the dense model: torch's
DistributedDataParallel, FSDP2's `fully_shard` of every block, and DeepSpeed's own reduction. They
use a fused optimiser and log nothing. On GPUs all three overlap their collectives with the passes;
on CPUs only DDP does, because the other two overlap by streams of the device. The figures
`fsdp2_apart` and `deepspeed_apart` say whether they train the same model as DDP: the distance of
their weights to DDP's at the end, over the distance that DDP's have gone.

On a GPU the forward and backward pass of the dense model is also timed by itself, beside the
largest rate of matrix products: the terms `utilisation` and `bf16_tflops` of a budget.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from benches.harness import Report, interleave, run_ranks
from benches.peaks import finish, mean_seconds, product_tflops
from benches.settings import BenchConfig, make_bench_config
from benches.synthetic import synthetic_batches, synthetic_state
from moce_dist.config import Config, legal_worker_counts
from moce_dist.cost.budget import utilisation
from moce_dist.data.images import normalise
from moce_dist.model.device import choose_device
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.model.moce import Experts
from moce_dist.parallel.deepspeed_import import deepspeed
from moce_dist.train.loop import step_metrics, train_step
from moce_dist.train.optim import parameter_groups
from moce_dist.train.setup import TrainState, prepare_blocks

Kind = Literal["dense", "cluster", "token"]
KINDS: tuple[Kind, ...] = ("dense", "cluster", "token")
Baseline = Literal["ddp", "fsdp2", "deepspeed"]
BASELINES: tuple[Baseline, ...] = ("ddp", "fsdp2", "deepspeed")
RATIOS = (("cluster", "dense"), ("cluster", "token"), *(("dense", name) for name in BASELINES))
Step = Callable[[Tensor, Tensor], None]
"""Takes a step on normalised images (B, 3, S, S) and their noise (B, N)."""
_BUCKET_BYTES = 25 << 20
"""What DDP reduces at once; DeepSpeed's default is so large that nothing overlaps."""


def run(config: BenchConfig) -> Report:
    """Measure on `parallel.num_workers` ranks without Ray; on GPUs, on at most one per GPU."""
    config = on_gpus(config, torch.cuda.device_count())
    result = run_ranks("step:measure", config)
    report = Report("step", config).add_variants(result["times"])
    for suffix in ("", "_bf16"):
        for over, under in RATIOS:
            report.add_ratio(f"{over}{suffix}", f"{under}{suffix}")
    report.figures, report.terms = result["figures"], result["terms"]
    return report


def on_gpus(config: BenchConfig, gpus: int) -> BenchConfig:
    """Reduce the ranks to the largest legal number that has a GPU each; 0 GPUs change nothing."""
    parallel = config.parallel
    if not parallel.use_gpu or not 0 < gpus < parallel.num_workers:
        return config
    batch_size = math.gcd(config.mae.batch_size, config.moce.batch_size)
    legal = legal_worker_counts(parallel.num_groups, batch_size, parallel.micro_batches, gpus)
    parallel = parallel.model_copy(update={"num_workers": max(legal)})
    return config.model_copy(update={"parallel": parallel})


def variant(config: BenchConfig, kind: Kind, precision: str) -> BenchConfig:
    """Return the configuration of one variant."""
    tree = copy.deepcopy(config.model_dump(mode="json"))
    tree["moe"]["kind"], tree["parallel"]["precision"] = kind, precision
    return make_bench_config(tree)


def measure(config: BenchConfig) -> dict[str, Any]:
    """Time the variants on this rank; collective over all ranks."""
    device = choose_device(config.parallel)
    states = {
        f"{kind}{suffix}": synthetic_state(variant(config, kind, precision), device)
        for precision, suffix in (("fp32", ""), ("bf16", "_bf16"))
        for kind in KINDS
    }
    figures = exchange_figures(states["cluster_bf16"])
    count = config.bench.rounds + config.bench.warmup_rounds
    steps = {name: stepper(state, count) for name, state in states.items()}
    start, models = _weights(states["dense"].model), {}
    for suffix in ("", "_bf16"):
        for baseline in BASELINES:
            name = f"{baseline}{suffix}"
            steps[name], models[name] = baseline_stepper(states[f"dense{suffix}"], count, baseline)
    times = interleave(steps, rounds=config.bench.rounds, warmup=config.bench.warmup_rounds)
    ends = {baseline: _weights(models[baseline]) for baseline in BASELINES}
    figures |= {f"{name}_apart": _apart(start, ends["ddp"], ends[name]) for name in BASELINES[1:]}
    terms = compute_terms(config, device) if device.type == "cuda" else {}
    return {"times": times, "figures": figures, "terms": terms}


def _weights(model: nn.Module) -> Tensor:
    whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters())
    return torch.cat([p.detach().flatten() for p in whole])


def _apart(start: Tensor, end: Tensor, other: Tensor) -> float:
    return float((other - end).norm() / (end - start).norm())


def compute_terms(config: BenchConfig, device: torch.device) -> dict[str, float]:
    """Measure the two terms that a budget computes a step's passes from."""
    images = config.moce.batch_size // config.parallel.num_workers // config.parallel.micro_batches
    tflops = product_tflops(device, torch.bfloat16)
    seconds = passes_s(variant(config, "dense", "bf16"), images, device)
    return {
        "bf16_tflops": tflops,
        "utilisation": utilisation(config, images, seconds, tflops),
    }


def passes_s(config: Config, images: int, device: torch.device) -> float:
    """Time a forward and backward pass of the dense model on some `images`, and nothing else."""
    model = MaskedAutoencoder(config).to(device)
    prepare_blocks([*model.blocks, *model.decoder_blocks], config.parallel)
    side = config.data.image_size
    pixels = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, device=device)
    noise = torch.rand(images, config.num_patches, device=device)

    def passes() -> None:
        model(normalise(pixels), noise).mean().backward()
        model.zero_grad()

    return mean_seconds(passes, device, 10 if device.type == "cuda" else 2)


def stepper(state: TrainState, count: int) -> Callable[[], None]:
    """Return a function that takes one step, up to `count` times, and waits for all ranks."""
    batches = iter(synthetic_batches(state, count))

    def step() -> None:
        if state.model.gate is not None:
            state.router.refresh(state.model.gate, state.step)
        train_step(state, next(batches))
        state.step += 1
        finish(state.engine.device)
        dist.barrier()

    return step


def baseline_stepper(
    state: TrainState, count: int, baseline: Baseline
) -> tuple[Callable[[], None], MaskedAutoencoder]:
    """Return a function that takes a step of the same dense model under a baseline's wrapper.

    Model, initial weights, optimiser groups and batches are those of the dense `state`. Gradients
    are reduced in the wrapper's default type, or in bf16 by the wrapper's own means. The model that
    is trained is returned too.
    """
    device, config = state.engine.device, state.job.config
    model = MaskedAutoencoder(config).to(device)
    model.load_state_dict(state.model.state_dict())
    model.train()
    take = {"ddp": _ddp, "fsdp2": _fsdp2, "deepspeed": _deepspeed}[baseline](model, config, device)
    batches = iter(synthetic_batches(state, count))

    def step() -> None:
        batch = next(batches)
        take(normalise(batch.images.to(device)), batch.noise.to(device))
        finish(device)
        dist.barrier()

    return step, model


def _fused_adamw(model: nn.Module, config: Config) -> torch.optim.AdamW:
    groups = parameter_groups(model, config.moce, config.gate, config.moe)
    return torch.optim.AdamW(groups, lr=config.moce.lr, betas=config.moce.betas, fused=True)


def _plainly(wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def take(images: Tensor, noise: Tensor) -> None:
        wrapped(images, noise).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return take


def _ddp(model: MaskedAutoencoder, config: Config, device: torch.device) -> Step:
    wrapped = DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
    if config.parallel.reduce_dtype == "bf16":
        wrapped.register_comm_hook(None, default_hooks.bf16_compress_hook)
    return _plainly(wrapped, _fused_adamw(model, config))


def _fsdp2(model: MaskedAutoencoder, config: Config, device: torch.device) -> Step:
    # the model's own autocast sets the precision, as in all variants
    reduced = torch.bfloat16 if config.parallel.reduce_dtype == "bf16" else None
    policy = MixedPrecisionPolicy(reduce_dtype=reduced)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in [*model.blocks, *model.decoder_blocks]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return _plainly(model, _fused_adamw(model, config))


def _deepspeed(model: MaskedAutoencoder, config: Config, _: torch.device) -> Step:
    # stage 0 reduces after the backward pass, stage 2 bucket by bucket during it
    engine, *_rest = deepspeed.initialize(
        model=model,
        optimizer=_fused_adamw(model, config),
        config={
            "train_batch_size": config.moce.batch_size,
            "steps_per_print": None,
            "zero_optimization": {
                "stage": 2,
                "overlap_comm": True,
                "reduce_bucket_size": _BUCKET_BYTES // 4,
                "allgather_bucket_size": _BUCKET_BYTES // 4,
            },
            "communication_data_type": config.parallel.reduce_dtype,
            "timers": {"throughput": {"enabled": False}},
            "zero_allow_untested_optimizer": True,
        },
    )

    def take(images: Tensor, noise: Tensor) -> None:
        engine.backward(engine(images, noise).mean())
        engine.step()

    return take


def exchange_figures(state: TrainState) -> dict[str, float]:
    """Take a step; count the bytes exchanged and the images that reached no expert."""
    rows = 0

    def count(_: Any, inputs: tuple[Any, ...]) -> None:
        nonlocal rows
        rows += sum(inputs[1])

    experts = [m for m in state.model.modules() if isinstance(m, Experts)]
    hooks = [module.register_forward_pre_hook(count) for module in experts]
    (batch,) = synthetic_batches(state, 1)
    metrics = step_metrics(state, train_step(state, batch))
    for hook in hooks:
        hook.remove()
    total = torch.tensor(rows, device=state.engine.device)
    dist.all_reduce(total)
    images = state.plan.batch_size
    return {
        "bytes_exchanged_per_image": metrics["bytes_exchanged"] / images,
        "images_dropped": images * len(experts) - int(total),
    }
