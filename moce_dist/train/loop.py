"""The training loop of all stages; it knows nothing of Ray.

    build, resume; for each step: next batch, routing table, train_step, log, save; held-out loss

The order of the lines is the order of time. A loss or a gradient that is not finite stops all ranks
together, before the weights have changed. Whoever starts the training may ask it to stop: the ranks
agree on that in the same collective, save and leave.

Letters: R ranks, b images of a rank, B images of a step, M micro-batches, L MoE layers, E experts.
"""

import json
import logging
import math
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moce_dist.data.images import normalise
from moce_dist.data.plan import Plan
from moce_dist.data.stream import Batch, BatchStream, stream
from moce_dist.model.gate import balance_loss, confidence_loss, output_scales
from moce_dist.parallel.exchange import ExpertExchange
from moce_dist.parallel.token import token_balance_loss
from moce_dist.run.directory import StoppedError
from moce_dist.run.files import write_atomic
from moce_dist.train.expert_metrics import moe_metrics
from moce_dist.train.job import StageJob, TooManyFaultsError
from moce_dist.train.metrics import Clock, MetricsLog
from moce_dist.train.migrate import replan
from moce_dist.train.optim import decay_to_mean, learning_rate, set_learning_rate
from moce_dist.train.pulse import Pulse
from moce_dist.train.setup import TrainState, build_state, holdout_table

log = logging.getLogger(__name__)
_FAULTS_BEFORE_STOP = 8


def pretrain(job: StageJob, pulse: Pulse | None = None) -> dict[str, Any]:
    """Train one stage to its end and return its summary; collective over all ranks.

    `pulse` is asked once a step whether to stop; a yes on one rank is enough.

    Raises:
        FloatingPointError: the loss, the gradient's norm or what a checkpoint would hold is not
            finite.
        StoppedError: on all ranks, after the step in which one of them was asked to stop was saved.
        TooManyFaultsError: too many images were unreadable.
        OSError: a checkpoint could not be written.
    """
    state = build_state(job)
    state.pulse = pulse or state.pulse
    start = state.step
    metrics_log = open_log(state)
    clock = Clock()
    if state.total_steps == 0:
        # weights taken as they are: the stage leaves a checkpoint behind all the same
        save(state)
    with closing(batches(state, clock)) as coming:
        for batch in coming:
            metrics = train_step(state, batch)
            clock.count(state.plan.batch_size)
            state.step += 1
            state.saver.poll()
            if is_due(state, job.config.logging.every_steps) or state.step == start + 1:
                stop_if_too_many_faults(state)
                if metrics_log is not None:
                    metrics_log.write(metrics | clock.lap())
            if state.is_stopping or is_due(state, job.config.checkpoint.every_steps):
                state.pulse.rest()
                save(state)
            if state.is_stopping:
                break
    if state.step < state.total_steps:
        state.saver.wait()
        if metrics_log is not None:
            metrics_log.close()
        raise StoppedError(f"{job.name}: state saved at step {state.step} of {state.total_steps}")
    loss = evaluate(state)
    state.saver.wait()
    if metrics_log is not None:
        metrics_log.close()
        if loss is not None:
            write_atomic(job.folder / "holdout.json", json.dumps(loss))
    return {"stage": job.name, "steps": state.step, "holdout": loss}


def train_step(state: TrainState, batch: Batch) -> dict[str, Any]:
    """Take one optimiser step on this rank's part of a batch; metrics are the same on all ranks.

    Raises:
        FloatingPointError: on all ranks, before the weights have changed.
    """
    engine, count = state.engine, max(1, int(batch.cluster_counts.sum()))
    micro_batches = state.micro_batches
    lr = current_learning_rate(state)
    set_learning_rate(engine.optimizer, lr)
    sums = torch.zeros(2, dtype=torch.float64)
    auxiliary = torch.zeros(2)
    norm = math.nan
    for micro in range(micro_batches):
        losses, weights, auxiliary_loss, auxiliary = forward(state, batch, micro)
        loss = (losses * weights).sum()
        # the engine averages over ranks and micro-batches; ours is a mean over the step's images
        engine.backward(loss * state.topology.num_ranks * micro_batches / count + auxiliary_loss)
        sums += torch.stack([loss.detach(), (weights > 0).sum()]).double().cpu()
        # before the optimiser has seen the gradients: a bad step must not reach the weights
        if micro == micro_batches - 1:
            asked = state.pulse(state.job.name, state.step)
            check_finite(state, sums, asked=asked)
            decay_to_mean(state.engine, state.job.config.moe, lr)
        norm = engine.step()
    stop_unless_finite(state, "gradient norm", norm)
    # unreadable images weigh 0 but stay in the divisor, so no rank has to hear of them first
    metrics = {
        "step": batch.step,
        "epoch": state.plan.epoch_of(batch.step),
        "images_seen": images_seen(state.plan, batch.step + 1),
        "loss": float(sums[0]) / count,
        "lr": lr,
        "grad_norm": norm,
    }
    state.faults += count - int(sums[1])
    return metrics | moe_metrics(state, batch, metrics["loss"], auxiliary)


def forward(
    state: TrainState, batch: Batch, micro: int
) -> tuple[Tensor, Tensor, Tensor | float, Tensor]:
    """Run one micro-batch: losses and weights (b / M,), auxiliary loss, its parts (2,)."""
    config, device, gate = state.job.config, state.engine.device, state.model.gate
    size = len(batch.weights) // state.micro_batches
    part = slice(micro * size, (micro + 1) * size)
    images, noise, weights = (
        x[part].to(device, non_blocking=True) for x in (batch.images, batch.noise, batch.weights)
    )
    if gate is None:
        losses = state.engine.forward(normalise(images), noise)
        balance = token_balance_loss(state.model)
        if balance is None:
            return losses, weights, 0.0, torch.zeros(2)
        total = config.gate.balance_weight * balance
        return losses, weights, total, torch.stack([balance, balance * 0]).detach().cpu()
    router = state.router
    exchange = ExpertExchange(
        batch.clusters[state.topology.expert_parallel_ranks(state.rank), part],
        router.table,
        router.experts,
        own_place=state.topology.place(state.rank),
        group=state.engine.expert_group,
        device=device,
    )
    table = torch.from_numpy(router.table).to(device)
    if config.gate.assign == "fixed":
        # with a gradient, of zeros: an engine wants one of every parameter
        p = F.one_hot(table, config.moe.num_experts) + 0 * gate.logits()
    else:
        p = gate.logits().softmax(dim=-1)
    clusters = batch.clusters[state.rank, part].to(device)
    scales = output_scales(p, table, clusters, config.gate.combine)
    losses = state.engine.forward(normalise(images), noise, exchange, scales)
    # the counts are the global batch's and known from the plan: no communication for these losses
    counts = batch.cluster_counts.to(device)
    balance, confidence = balance_loss(p, counts), confidence_loss(p, counts)
    total = config.gate.balance_weight * balance + config.gate.confidence_weight * confidence
    return losses, weights, total, torch.stack([balance, confidence]).detach().cpu()


def check_finite(state: TrainState, sums: Tensor, *, asked: bool = False) -> None:
    """Add up the ranks' sums in place and stop all ranks when the loss is not finite."""
    # who was asked to stop travels along: agreeing on it costs no collective of its own
    shared = torch.cat([sums, sums.new_tensor([asked])]).to(state.engine.device)
    dist.all_reduce(shared)
    sums.copy_(shared[:-1])
    state.is_stopping |= bool(shared[-1] > 0)
    stop_unless_finite(state, "loss", float(sums[0]))


def stop_unless_finite(state: TrainState, what: str, value: float) -> None:
    """Stop when a figure, which is the same on all ranks, is not finite.

    Raises:
        FloatingPointError: naming the stage, the figure and the step.
    """
    if not math.isfinite(value):
        raise FloatingPointError(f"{state.job.name}: {what} is {value} at step {state.step}")


def batches(state: TrainState, clock: Clock) -> Generator[Batch]:
    """Yield the batches that are left, with routing and placement up to date for each.

    The placement changes between intervals; the loader hears of it and reads by it. What an
    interval exchanged is written beside what its plan predicted.
    """
    stream = BatchStream(
        state.stream_spec(state.plan), start=state.step, device=state.engine.device
    )
    with closing(stream):
        yield from intervals(state, stream, clock)


def intervals(state: TrainState, stream: BatchStream, clock: Clock) -> Generator[Batch]:
    """Plan interval after interval and yield their batches; see `batches`."""
    router, gate = state.router, state.model.gate
    interval = state.job.config.parallel.replan_steps
    while state.step < state.total_steps:
        begin = state.step
        if gate is not None:
            is_planning = begin % interval == 0
            if is_planning:
                router.regroup(gate, begin)
            router.refresh(gate, begin)
            if is_planning:
                replan(state)
            if state.rank == 0:
                router.begin_interval(state.job.folder, begin)
        end = state.total_steps if gate is None else (begin // interval + 1) * interval
        stream.extend(router.placement.readers, min(end, state.total_steps))
        while (batch := timed_next(stream, clock)) is not None:
            if gate is not None:
                if state.step > begin:
                    router.refresh(gate, state.step)
                if state.rank == 0:
                    router.measure(batch.clusters.numpy())
            yield batch
        if gate is not None and state.rank == 0:
            router.write_placement(state.job.folder)


def timed_next(stream: BatchStream, clock: Clock) -> Batch | None:
    """Take the next batch and count the wait; None at the end."""
    before = time.perf_counter()
    batch = next(stream, None)
    clock.wait(time.perf_counter() - before)
    return batch


def is_due(state: TrainState, every: int) -> bool:
    """Tell whether something done every so many steps, and after the last, is due."""
    return state.step % every == 0 or state.step == state.total_steps


def images_seen(plan: Plan, steps: int) -> int:
    """Images that the first `steps` steps use, padding left out."""
    epochs, rest = divmod(steps, plan.steps_per_epoch)
    return epochs * plan.epoch_samples + rest * plan.batch_size


def current_learning_rate(state: TrainState) -> float:
    """Learning rate of the step to come."""
    return learning_rate(
        state.job.stage_config,
        state.step,
        steps_per_epoch=state.plan.steps_per_epoch,
        total_steps=state.total_steps,
    )


def stop_if_too_many_faults(state: TrainState) -> None:
    """Stop all ranks when more images were unreadable than the configuration allows.

    Raises:
        TooManyFaultsError: naming the count, the limit and the ledger.
    """
    seen = images_seen(state.plan, state.step)
    limit = state.job.config.data.max_fault_fraction
    if state.faults > max(_FAULTS_BEFORE_STOP, limit * seen):
        raise TooManyFaultsError(
            f"{state.faults} of the {seen} images read were unusable, more than "
            f"data.max_fault_fraction ({limit}) allows; see {state.job.run_root / 'faults.jsonl'}"
        )


def save(state: TrainState) -> None:
    """Begin to write a checkpoint of the step to come; collective over all ranks."""
    position = {
        "step": state.step,
        "stage": state.job.name,
        "steps_before": state.job.steps_before,
        "epoch": state.plan.epoch_of(state.step),
        "cursors": state.plan.cursors(state.step),
        "faults": state.faults,
        **state.router.save(),
    }
    state.saver.save(state.engine, state.naming, position)


def open_log(state: TrainState) -> MetricsLog | None:
    """Open the metrics of this stage on rank 0."""
    if state.rank != 0:
        return None
    tensorboard = state.job.config.logging.tensorboard
    return MetricsLog(state.job.folder, start_step=state.step, tensorboard=tensorboard)


@torch.no_grad()
def evaluate(state: TrainState) -> dict[str, Any] | None:
    """Mean loss over the held-out images, without gate noise; collective over all ranks.

    None when there are no such images, or none that can be read.
    """
    table = holdout_table(state.job)
    if table is None:
        return None
    plan = Plan(table, state.plan.batch_size, state.job.config.seed)
    if state.model.gate is not None:
        state.router.refresh(state.model.gate, state.total_steps, force=True)
    sums = torch.zeros(2, dtype=torch.float64)
    spec = replace(state.stream_spec(plan), stage=f"{state.job.name}-holdout")
    readers = state.router.placement.readers
    device, steps = state.engine.device, plan.steps_per_epoch
    for batch in stream(spec, readers, start=0, stop=steps, device=device):
        for micro in range(state.micro_batches):
            losses, weights, *_ = forward(state, batch, micro)
            sums += torch.stack([(losses * weights).sum(), weights.sum()]).double().cpu()
    check_finite(state, sums)
    if sums[1] == 0:
        return None
    return {"loss": float(sums[0] / sums[1]), "images": int(sums[1])}
