"""The training loop of all stages; it knows nothing of Ray.

    build, resume; for each step: next batch, routing table, train_step, log, save; held-out loss

Lines run in this order, except that a step's figures are read one step late (outcome.py) unless the
step is logged or saved. A loss or gradient that is not finite stops all ranks together. From that
step on the weights do not change, even if another step is launched before the figures are read. The
caller may ask the training to stop: the ranks agree on it in the collective that sums the losses,
save and leave. In the same way they agree that all of them have written a checkpoint.

Letters: R ranks, b images of a rank, B images of a step, M micro-batches, L MoE layers, E experts.
"""

import json
import logging
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moce_dist.cost.sizes import num_visible
from moce_dist.data.batches import BatchStream, stream
from moce_dist.data.images import normalise
from moce_dist.data.plan import ORDER, Plan
from moce_dist.data.stream import Batch
from moce_dist.model.gate import balance_loss, confidence_loss, output_scales
from moce_dist.parallel.exchange import ExpertExchange
from moce_dist.parallel.token import token_balance_loss
from moce_dist.run.directory import StoppedError
from moce_dist.run.files import write_atomic
from moce_dist.settings import flatten
from moce_dist.train.expert_metrics import moe_metrics
from moce_dist.train.job import StageJob, TooManyFaultsError
from moce_dist.train.metrics import Clock, MetricsLog
from moce_dist.train.migrate import replan
from moce_dist.train.optim import (
    decay_to_mean,
    learning_rate,
    set_learning_rate,
    stop_unless_finite,
)
from moce_dist.train.outcome import Outcome
from moce_dist.train.pulse import Pulse
from moce_dist.train.setup import TrainState, build_state, holdout_table
from moce_dist.train.trackers import StepProfile, open_trackers

log = logging.getLogger(__name__)
_FAULTS_BEFORE_STOP = 8


def pretrain(job: StageJob, pulse: Pulse | None = None) -> dict[str, Any]:
    """Train one stage to its end and return its summary; collective over all ranks.

    `pulse` is asked once per step whether to stop; a yes on one rank is enough.

    Raises:
        FloatingPointError: the loss, the gradient norm or the state to be saved is not finite.
        StoppedError: on all ranks, when one of them was asked to stop; the state is saved.
        TooManyFaultsError: too many images were unreadable.
        OSError: a checkpoint could not be written.
    """
    state = build_state(job)
    state.pulse = pulse or state.pulse
    try:
        summary = _train(state)
    except StoppedError:
        state.engine.destroy()
        raise
    # this process may train the next stage; DeepSpeed's hooks would keep this one's tensors
    state.engine.destroy()
    return summary


def _train(state: TrainState) -> dict[str, Any]:
    job, start = state.job, state.step
    metrics_log, clock = open_log(state), Clock()
    steps = job.config.logging.profile_steps if state.rank == 0 else None
    profile = StepProfile(job.folder, steps)
    profile.at(state.step)
    if state.total_steps == 0:
        # a stage that takes weights as they are writes a checkpoint all the same
        save(state)
    with closing(batches(state, clock)) as coming:
        state.pulse.resume()
        for batch in coming:
            outcome = train_step(state, batch)
            state.step += 1
            before = images_seen(state.plan, state.step - 1)
            clock.count(images_seen(state.plan, state.step) - before)
            is_logged = is_due(state, job.config.logging.every_steps) or state.step == start + 1
            is_saved = is_due(state, job.config.checkpoint.every_steps)
            settle(state, outcome, at_once=is_logged or is_saved)
            if is_logged:
                stop_if_too_many_faults(state)
                if metrics_log is not None:
                    state.router.measure(batch.clusters.numpy())
                    saved = {"checkpoint_s": state.saver.seconds}
                    metrics_log.write(step_metrics(state, outcome) | clock.lap() | saved)
            if state.is_stopping or is_saved:
                state.pulse.rest()
                with clock.saving():
                    save(state)
                state.pulse.resume()
            if state.is_stopping:
                break
            profile.at(state.step)
    profile.close()
    is_finished = state.step == state.total_steps
    loss = evaluate(state) if is_finished else None
    state.pulse.rest()
    state.saver.wait()
    if metrics_log is not None:
        metrics_log.close()
    if not is_finished:
        raise StoppedError(f"{job.name}: state saved at step {state.step} of {state.total_steps}")
    if metrics_log is not None and loss is not None:
        loss["steps"] = job.steps_before + state.step
        write_atomic(job.folder / "holdout.json", json.dumps(loss))
    return {"stage": job.name, "steps": state.step, "holdout": loss}


def train_step(state: TrainState, batch: Batch) -> Outcome:
    """Launch one optimiser step on this rank's part of a batch; collective over all ranks.

    If the loss or the gradient is not finite, neither this step nor any later one updates anything.

    Raises:
        FloatingPointError: at ZeRO-1 and 2, on all ranks, before the optimiser has changed weights.
    """
    engine, count = state.engine, max(1, int(batch.cluster_counts.sum()))
    micro_batches, is_whole = state.micro_batches, state.engine.spec.parallel.zero_stage == 0
    lr = current_learning_rate(state)
    set_learning_rate(engine.optimizer, lr)
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
    for micro in range(micro_batches):
        losses, weights, auxiliary_loss, auxiliary = forward(state, batch, micro)
        loss = (losses * weights).sum()
        # the engine averages over ranks and micro-batches; the loss is a mean over all images
        engine.backward(loss * (state.topology.num_ranks * micro_batches / count) + auxiliary_loss)
        sums[:2].add_(torch.stack([loss.detach(), (weights > 0).sum()]))
        if micro < micro_batches - 1:
            engine.step()
    # requests to stop and unwritten checkpoints are summed with the losses: no further collective
    turn, is_writing = state.saver.look()
    sums[2].fill_(float(state.pulse(state.job.name, state.step)))
    sums[3].fill_(float(is_writing))
    sums = engine.agree(sums)
    if not is_whole:
        # check before the optimiser sees the gradients; ZeRO waits for the device anyway
        stop_unless_finite(state.job.name, "loss", float(sums[0]), batch.step)
    decay_to_mean(engine, state.job.config.moe, lr)
    norm = engine.step()
    if not is_whole:
        stop_unless_finite(state.job.name, "gradient norm", float(norm), batch.step)
    return Outcome(batch, lr, turn, torch.cat([sums, norm.view(1), auxiliary]))


def settle(state: TrainState, outcome: Outcome, *, at_once: bool) -> None:
    """Read the previous step; read the newest one too if `at_once`, or if all ranks are to stop.

    Raises:
        FloatingPointError: on all ranks, for a step that is not finite; it changed no weights.
        FloatingPointError, OSError: on all ranks, if the save in flight failed.
    """
    if state.pending is not None:
        take_note(state, state.pending)
    state.pending = outcome
    if at_once or state.is_stopping:
        take_note(state, outcome)
        state.pending = None


def take_note(state: TrainState, outcome: Outcome) -> None:
    """Read a step's figures and act on them; see `settle`."""
    figures = outcome.read()
    stop_unless_finite(state.job.name, "loss", figures.loss, outcome.batch.step)
    stop_unless_finite(state.job.name, "gradient norm", figures.norm, outcome.batch.step)
    # unreadable images weigh 0 but stay in the divisor, so ranks need not count them beforehand
    state.faults += outcome.planned - int(figures.images)
    state.is_stopping |= figures.asked > 0
    state.saver.poll(outcome.turn, figures.writing)


def step_metrics(state: TrainState, outcome: Outcome) -> dict[str, Any]:
    """Return the metrics of the newest step; they are the same on all ranks."""
    figures, step = outcome.read(), outcome.batch.step
    loss = figures.loss / outcome.planned
    metrics = {
        "step": step,
        "epoch": state.plan.epoch_of(step),
        "images_seen": images_seen(state.plan, step + 1),
        "loss": loss,
        "lr": outcome.lr,
        "grad_norm": figures.norm,
    }
    auxiliary = figures.balance, figures.confidence
    return metrics | moe_metrics(state, outcome.batch, loss, auxiliary)


def forward(
    state: TrainState, batch: Batch, micro: int
) -> tuple[Tensor, Tensor, Tensor | float, Tensor]:
    """Run one micro-batch; return losses and weights (b / M,), auxiliary loss, its parts (2,)."""
    config, device, gate = state.job.config, state.engine.device, state.model.gate
    size = len(batch.weights) // state.micro_batches
    part = slice(micro * size, (micro + 1) * size)
    images, noise, weights = (
        x[part].to(device, non_blocking=True) for x in (batch.images, batch.noise, batch.weights)
    )
    if gate is None:
        losses = state.engine.forward(normalise(images), noise)
        balance = token_balance_loss(state.model) if config.moe.kind == "token" else None
        if balance is None:
            return losses, weights, 0.0, torch.zeros(2, device=device)
        total = config.gate.balance_weight * balance
        return losses, weights, total, torch.stack([balance, balance * 0]).detach()
    router = state.router
    exchange = ExpertExchange(
        batch.clusters[state.topology.expert_parallel_ranks(state.rank), part],
        router.table,
        router.experts,
        tokens=num_visible(config),
        group=state.engine.expert_group,
        device=device,
        along=[
            router.table,
            batch.clusters[state.rank, part].numpy(),
            batch.cluster_counts.numpy(),
        ],
    )
    table, clusters, counts = exchange.along
    if config.gate.assign == "fixed":
        # adds a zero gradient, because the engine needs a gradient for every parameter
        log_p = 0 * gate.logits()
        p = F.one_hot(table, config.moe.num_experts) + log_p
    else:
        log_p = gate.logits().log_softmax(dim=-1)
        p = log_p.exp()
    scales = output_scales(log_p, table, clusters, config.gate.combine)
    losses = state.engine.forward(normalise(images), noise, exchange, scales)
    # the plan gives the counts of the global batch, so these losses need no communication
    counts = counts.to(p.dtype)
    balance, confidence = balance_loss(p, counts), confidence_loss(p, counts)
    total = config.gate.balance_weight * balance + config.gate.confidence_weight * confidence
    return losses, weights, total, torch.stack([balance, confidence]).detach()


def batches(state: TrainState, clock: Clock) -> Generator[Batch]:
    """Yield the remaining batches, with routing and placement up to date for each.

    The placement changes between intervals, and the loader then reads by the new one. The exchange
    of an interval, counted on its logged steps, is written next to what its plan predicted.
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
        if gate is not None and router.is_planning(begin):
            router.regroup(gate, begin)
            router.decide(gate, begin)
            replan(state)
        end = state.total_steps if gate is None else (begin // interval + 1) * interval
        stream.extend(router.placement.readers, min(end, state.total_steps))
        if gate is not None and state.rank == 0:
            # while the loaders begin to read
            router.begin_interval(gate, state.job.folder, begin)
        while (batch := timed_next(stream, clock)) is not None:
            if gate is not None:
                router.refresh(gate, state.step)
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
    """Tell whether an action is due that runs every `every` steps and after the last one."""
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
    # some are bearable in a short run; only a fraction of 0 forbids them
    if state.faults > max(_FAULTS_BEFORE_STOP if limit else 0, limit * seen):
        raise TooManyFaultsError(
            f"{state.faults} of the {seen} images read were unusable, more than "
            f"data.max_fault_fraction ({limit}) allows; see {state.job.run_root / 'faults.jsonl'}"
        )


def save(state: TrainState) -> None:
    """Begin to write a checkpoint that resumes at `state.step`; collective over all ranks."""
    position = {
        "step": state.step,
        "stage": state.job.name,
        "steps_before": state.job.steps_before,
        "epoch": state.plan.epoch_of(state.step),
        "order": ORDER,
        "cursors": state.plan.cursors(state.step),
        "faults": state.faults,
        **state.router.save(),
    }
    state.saver.save(state.engine, state.naming, position)


def open_log(state: TrainState) -> MetricsLog | None:
    """Open the metrics of this stage on rank 0."""
    if state.rank != 0:
        return None
    config, folder = state.job.config, state.job.folder
    settings = flatten(config.model_dump(mode="json"))
    trackers = open_trackers(config.logging, folder, start_step=state.step, settings=settings)
    return MetricsLog(folder, start_step=state.step, trackers=trackers)


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
        state.router.decide(state.model.gate, state.total_steps)
    device, steps = state.engine.device, plan.steps_per_epoch
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    spec = replace(state.stream_spec(plan), stage=f"{state.job.name}-holdout")
    readers = state.router.placement.readers
    for batch in stream(spec, readers, start=0, stop=steps, device=device):
        state.pulse(state.job.name, state.step + batch.step)
        for micro in range(state.micro_batches):
            losses, weights, *_ = forward(state, batch, micro)
            sums += torch.stack([(losses * weights).sum(), weights.sum()])
    dist.all_reduce(sums)
    total, images = sums.tolist()
    stop_unless_finite(state.job.name, "loss", total, state.step)
    if images == 0:
        return None
    return {"loss": total / images, "images": int(images)}
