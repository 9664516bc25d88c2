"""What the processes of a pool run: each function is called on every rank with equal arguments."""

import contextlib
import functools
import gc
import itertools
import logging
import operator
import os
import resource
import shutil
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import counting
import numpy as np
import torch
import torch.distributed as dist
import waiting
from pulses import RecordedPulse

from moce_dist import pipeline
from moce_dist.config import load_config
from moce_dist.data import loaders
from moce_dist.data.batches import stream
from moce_dist.model import moce
from moce_dist.model.gate import Gate, NoiseSchedule, logits, routing_table
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.model.moce import is_stacked
from moce_dist.parallel import engine, reduction
from moce_dist.parallel.engine import init_distributed
from moce_dist.parallel.placement import Placement
from moce_dist.run.directory import Run, StoppedError
from moce_dist.settings import ConfigError
from moce_dist.train import loop, migrate, outcome, routing, saver, setup
from moce_dist.train.checkpoint import Naming
from moce_dist.train.job import MoreSteps, StageJob
from moce_dist.train.pulse import Pulse
from moce_dist.train.tables import TableMaker

patched = patch.multiple
TINY = (
    "model.size=tiny", "model.width=32", "model.num_heads=2", "model.depth=4",
    "data.image_size=32", "model.patch_size=8", "model.decoder_depth=1",
    "model.decoder_width=16", "model.decoder_num_heads=2", "moe.num_experts=4",
    "cluster.num_clusters=8", "parallel.num_groups=2", "moce.batch_size=16", "moce.epochs=2",
    "moce.warmup_epochs=0", "mae.batch_size=16", "logging.every_steps=1",
    "logging.tensorboard=false", "data.loader_processes=0", "parallel.precision=fp32",
    "parallel.replan_steps=5", "checkpoint.every_steps=4", "checkpoint.keep=100",
    "data.max_fault_fraction=1",
)  # fmt: skip


def tiny_config(overrides=()):
    return load_config(None, [*TINY, *overrides])


def make_job(run, overrides, stage="moce"):
    """Make the job of a stage, or of the steps beside the stages that a dictionary describes."""
    where = tiny_config(overrides), Path(run)
    if isinstance(stage, dict):
        return MoreSteps(*where, "control", str(Path(run) / "shards"), **stage)
    return StageJob(*where, stage, str(Path(run) / "shards"))


def scrambled(num_layers, num_experts, num_clusters, num_groups, seed=5):
    """A bad placement: experts anywhere, clusters read in random parts by every group."""
    draws = np.random.default_rng(seed)
    homes = np.repeat(np.arange(num_groups), num_experts // num_groups)
    expert_group = np.stack([draws.permutation(homes) for _ in range(num_layers)])
    return Placement(expert_group, draws.dirichlet(np.ones(num_groups), num_clusters))


def build(run, overrides, placement="planned"):
    """Build a fresh state; with `scrambled`, under the bad placement."""
    job = make_job(run, overrides)
    state = setup.build_state(job)
    if placement == "scrambled":
        shape = (len(job.config.moe_layers), job.config.moe.num_experts, 8)
        state.router.placement = scrambled(*shape, state.topology.num_groups)
        state.naming = Naming(
            job.config.moe_layers, state.router.experts, state.topology.place(state.rank)
        )
        read = {f"weight/{n}": t for n, t in setup.first_weights(job).items()}.get
        state.engine.load_state(setup.part_reader(read, state.naming), step=0)
    return state


def by_global_name(state, pairs):
    """{global name: numpy array} of this rank's tensors."""
    result = {}
    for name, tensor in pairs:
        names = state.naming.global_names(name)
        parts = tensor if is_stacked(name) else [tensor]
        result |= {n: p.detach().cpu().numpy().copy() for n, p in zip(names, parts, strict=True)}
    return result


def gradients(engine):
    """Yield (name, averaged gradient) of every parameter, between `backward` and `step`."""
    from deepspeed.utils import safe_get_full_grad

    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            is_whole = engine.spec.parallel.zero_stage == 0
            gradient = parameter.grad if is_whole else safe_get_full_grad(parameter)
            assert gradient is not None, name
            yield name, gradient


def take_steps(run, overrides, placement="planned", steps=1, first=0, bucket=None):
    """Run real training steps; gradients of the first, weights after the last, and the metrics.

    `first` is the step whose batch is used first, `bucket` the size of ZeRO's buckets, elements.
    """
    init_distributed(torch.device("cpu"))
    with patched(engine, BUCKET=bucket or engine.BUCKET):
        state = build(run, overrides, placement)
    captured = {}
    original = state.engine.step

    def step():
        boundary = state.engine._engine.is_gradient_accumulation_boundary()
        if boundary and not captured:
            captured.update(by_global_name(state, gradients(state.engine)))
        return original()

    state.engine.step = step
    readers = state.router.placement.readers
    metrics = []
    spec = state.stream_spec(state.plan)
    for batch in stream(spec, readers, start=first, stop=first + steps):
        if state.step:
            state.router.refresh(state.model.gate, state.step)
        metrics.append(loop.step_metrics(state, loop.train_step(state, batch)))
        state.step += 1
    weights = by_global_name(state, ((n, t) for n, k, t in state.engine.state() if k == "weight"))
    result = {
        "gradients": captured,
        "weights": weights,
        "metrics": metrics,
        "table": state.router.table,
    }
    state.engine.destroy()
    return result


def stage_with_doubts(run, overrides, doubts):
    """Carry out stage mae as a command does, each time with a rank whose checkpoint is damaged.

    Returns how often this rank trained each time.
    """
    config = tiny_config([*overrides, f"data.source=index:{Path(run) / 'shards'}"])
    carried_out, counts = pipeline.Pipeline(Run(Path(run)), config), []
    original = pipeline.has_last_checkpoint
    for doubt in doubts:
        trained = []

        def train(job, trained=trained):
            trained.append(job)
            loop.pretrain(job)

        def sees(folder, doubt=doubt):
            return int(os.environ["RANK"]) != doubt and original(folder)

        with patched(pipeline, has_last_checkpoint=sees):
            carried_out.mae(train)
        counts.append(len(trained))
    return counts


def models_left(run, overrides, times):
    """Train a stage from its start several times; count the models alive after each time."""
    counts = []
    for _ in range(times):
        shutil.rmtree(Path(run) / "moce", ignore_errors=True)
        loop.pretrain(make_job(run, overrides))
        gc.collect()
        alive = (isinstance(each, MaskedAutoencoder) for each in gc.get_objects())
        counts.append(sum(alive))
    return counts


def reductions(run, overrides, bucket_bytes):
    """Take a step with buckets of a size; how its gradients were summed, and the gradients."""
    init_distributed(torch.device("cpu"))
    state = build(run, overrides)
    state.engine.reducer.detach()
    order = list(reduction.in_backward_order(state.engine.module, state.engine.replica_group))
    dtype = torch.bfloat16 if "parallel.reduce_dtype=bf16" in overrides else None
    reducer = reduction.GradientReducer(order, dtype=dtype, bucket_bytes=bucket_bytes)
    state.engine.reducer = reducer
    sums, waited_for, original, finish = [], [], dist.all_reduce, reducer.finish
    num_bytes = []

    def counted(tensor, *arguments, **named):
        (sums if named.get("async_op") else waited_for).append(tensor.numel())
        num_bytes.append(tensor.nbytes if named.get("async_op") else 0)
        return original(tensor, *arguments, **named)

    begun, begun_before = [], []
    first_block = next(p for n, p in state.engine.module.named_parameters() if "blocks.0." in n)
    first_block.register_post_accumulate_grad_hook(lambda _: begun_before.append(len(sums)))

    def finish_counted():
        begun.append(len(sums))
        finish()

    dist.all_reduce, reducer.finish = counted, finish_counted
    captured, step = {}, state.engine.step

    def step_captured():
        captured.update(by_global_name(state, gradients(state.engine)))
        return step()

    state.engine.step = step_captured
    try:
        readers = state.router.placement.readers
        batch = next(stream(state.stream_spec(state.plan), readers, start=0, stop=1))
        loop.train_step(state, batch)
    finally:
        dist.all_reduce = original
    state.engine.destroy()
    return {
        "sums": sums,
        "waited_for": len(waited_for),
        "begun_in_backward": begun,
        "begun_before_first_block": begun_before,
        "buckets": reducer.num_buckets,
        "bytes": sum(num_bytes),
        "gradients": captured,
    }


def exchange_collectives(run, overrides, placement):
    """Count all_to_all calls in one step, and what the step says was exchanged."""
    init_distributed(torch.device("cpu"))
    state = build(run, overrides, placement)
    calls, original = [], dist.all_to_all_single
    elements, num_bytes = [], []

    def counted(*arguments, **named):
        # DeepSpeed names the arguments
        out = arguments[0] if arguments else named["output"]
        calls.append(out.shape[0])
        elements.append(out.numel())
        num_bytes.append(out.nbytes)
        return original(*arguments, **named)

    readers = state.router.placement.readers
    batch = next(stream(state.stream_spec(state.plan), readers, start=0, stop=1))
    with patched(dist, all_to_all_single=counted):
        metrics = loop.step_metrics(state, loop.train_step(state, batch))
    state.engine.destroy()
    return {
        "calls": len(calls),
        "elements": sum(elements),
        "bytes": sum(num_bytes),
        "metrics": metrics,
        "keys": batch.keys,
    }


def train_to_end(run, overrides, stage="moce"):
    """Run the stage with the real loop; what this rank learnt from: {step: {key: its noise}}."""
    init_distributed(torch.device("cpu"))
    original, seen = loop.train_step, {}

    def step(state, batch):
        pairs = zip(batch.keys, batch.noise.numpy(), strict=True)
        seen[batch.step] = {key: noise.tobytes() for key, noise in pairs if key}
        return original(state, batch)

    with patched(loop, train_step=step):
        loop.pretrain(make_job(run, overrides, stage))
    return seen


def train_part(run, overrides, stop, stage="moce", order=None):
    """Run the stage and abandon it at step `stop`, as a kill would, with no save in flight.

    With `order` its checkpoints say that their order of images is that one.
    """
    init_distributed(torch.device("cpu"))
    original, own = loop.train_step, loop.ORDER
    loop.ORDER = order or own

    def step(state, batch):
        if batch.step == stop:
            state.saver.wait()
            raise InterruptedError
        return original(state, batch)

    loop.train_step = step
    try:
        loop.pretrain(make_job(run, overrides, stage))
    except InterruptedError:
        return stop
    finally:
        loop.train_step, loop.ORDER = original, own
    raise AssertionError("the stage ended before it was stopped")


def train_recorded(run, overrides):
    """Run the stage, its own images held out; what the pulse was told, and where it was saved."""
    init_distributed(torch.device("cpu"))
    pulse, save = RecordedPulse(), loop.save

    def recorded(state):
        pulse.told.append("save")
        save(state)

    with patched(loop, save=recorded, holdout_table=lambda job: job.plan().table):
        loop.pretrain(make_job(run, overrides), pulse)
    return pulse.told


def train_until_asked(run, overrides, asked_rank, questions):
    """Run the stage; one rank alone says stop at its nth question. Return what every rank says."""
    init_distributed(torch.device("cpu"))
    asked = []

    def should_stop():
        asked.append(None)
        return dist.get_rank() == asked_rank and len(asked) == questions

    try:
        loop.pretrain(make_job(run, overrides), Pulse(should_stop))
    except StoppedError as stopped:
        return str(stopped)
    raise AssertionError("nobody stopped")


def fit(function, **arguments):
    """Call a function of fits.py, whose imports take seconds."""
    import fits

    return getattr(fits, function)(**arguments)


def stream_keys(run, overrides, start, stop):
    """Keys and noise of every step that this rank reads."""
    init_distributed(torch.device("cpu"))
    state = build(run, overrides)
    readers = state.router.placement.readers
    batches = stream(state.stream_spec(state.plan), readers, start=start, stop=stop)
    result = [(b.step, [k for k in b.keys if k], b.noise.sum(dim=1).tolist()) for b in batches]
    state.engine.destroy()
    return result


def saved_state(run, overrides):
    """Load the newest checkpoint and return every tensor of this rank by (kind, global name)."""
    init_distributed(torch.device("cpu"))
    state = setup.build_state(make_job(run, overrides))
    result = {}
    for name, kind, tensor in state.engine.state():
        named = by_global_name(state, [(name, tensor)])
        result |= {(kind, n): value for n, value in named.items()}
    step = state.step
    state.engine.destroy()
    return {"step": step, "tensors": result, "table": state.router.table}


def save_again(run, overrides, out):
    """Load the newest checkpoint and save it in another folder, from this number of ranks."""
    init_distributed(torch.device("cpu"))
    state = setup.build_state(make_job(run, overrides))
    if dist.get_rank() == 0:
        shutil.rmtree(out, ignore_errors=True)
    state.saver = saver.Saver(Path(out), state.topology, keep=1)
    loop.save(state)
    state.saver.wait()
    state.engine.destroy()


def save_while_training(run, overrides, out):
    """Save one step twice: waiting for it, and written only after two further steps."""
    init_distributed(torch.device("cpu"))
    state, may_write, lines = build(run, overrides), threading.Event(), []
    write, handler = saver.write_tensors, logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    saver.log.addHandler(handler)
    saver.log.setLevel(logging.INFO)

    def write_late(path, tensors):
        may_write.wait()
        return write(path, tensors)

    def release():
        saver.write_tensors = write
        may_write.set()

    for batch in stream(
        state.stream_spec(state.plan), state.router.placement.readers, start=0, stop=4
    ):
        if state.step == 2:
            state.saver = saver.Saver(Path(out) / "waited", state.topology, keep=2)
            loop.save(state)
            state.saver.wait()
            saver.write_tensors = write_late
            state.saver = saver.Saver(Path(out) / "late", state.topology, keep=2)
            loop.save(state)
        outcome = loop.train_step(state, batch)
        state.step += 1
        loop.settle(state, outcome, at_once=False)
    published = sorted(p.name for p in (Path(out) / "late").glob("step_*"))
    # the next save finds this one still in flight
    timer = threading.Timer(0.5, release)
    timer.start()
    loop.save(state)
    state.saver.wait()
    timer.join()
    saver.log.removeHandler(handler)
    state.engine.destroy()
    return {"published_before_release": published, "log": lines}


def train_until_disk_hangs(run, overrides, at_step):
    """Run the stage on a disk that takes the data of one checkpoint and never says it is done."""
    init_distributed(torch.device("cpu"))
    fsync, path_of = os.fsync, "/proc/self/fd/{}".format

    def hang(descriptor):
        if f".step_{at_step:08d}." in os.readlink(path_of(descriptor)):
            threading.Event().wait()
        fsync(descriptor)

    os.fsync = hang
    loop.pretrain(make_job(run, overrides))


def train_with_small_files(run, overrides, rank):
    """Run the stage; one rank may not write files over 64 KiB. Return the error of this rank."""
    init_distributed(torch.device("cpu"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        loop.pretrain(make_job(run, overrides))
    except OSError as error:
        return str(error), error.errno
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return None


def copies(state):
    """Copy this rank's tensors as they are now."""
    return {(name, kind): tensor.clone() for name, kind, tensor in state.engine.state()}


def train_with_bad_gradient(run, overrides, rank, parameter, at_step):
    """Run the stage; in one step one rank's gradient of one parameter is infinite.

    Returns the error of this rank, whether its weights and moments are those before the step, what
    is published, and the last step that was launched.
    """
    init_distributed(torch.device("cpu"))
    step, seen = loop.train_step, {}

    def watched(state, batch):
        seen["last"] = batch.step
        if batch.step != at_step:
            return step(state, batch)
        seen.update(state=state, before=copies(state))
        state.saver.wait()
        weight = state.model.get_parameter(parameter)
        if dist.get_rank() != rank:
            return step(state, batch)
        hook = weight.register_hook(lambda gradient: gradient * np.inf)
        try:
            return step(state, batch)
        finally:
            # so that the next step is finite, if one is launched before this one's figures are read
            hook.remove()

    loop.train_step = watched
    try:
        loop.pretrain(make_job(run, overrides))
    except FloatingPointError as error:
        after = copies(seen["state"])
        is_same = all(tensor.equal(after[key]) for key, tensor in seen["before"].items())
        published = sorted(os.listdir(Path(run) / "moce" / "checkpoints"))
        return str(error), is_same, published, seen["last"]
    finally:
        loop.train_step = step
    raise AssertionError("nobody stopped")


def train_with_bad_loss(run, overrides, rank, at_step, writing_step):
    """Run the stage; in one step the losses of one rank are NaN, while a checkpoint is written.

    Returns the error of this rank, whether its weights and moments are those before the step, and
    what is in the folder of checkpoints when all data of that one is on disk.
    """
    init_distributed(torch.device("cpu"))
    step, forward, write = loop.train_step, loop.forward, saver.write_tensors
    seen, is_over = {}, threading.Event()

    def watched(state, batch):
        if batch.step == at_step:
            seen.update(state=state, before=copies(state))
        return step(state, batch)

    def spoilt(state, batch, micro):
        losses, *rest = forward(state, batch, micro)
        is_bad = batch.step == at_step and dist.get_rank() == rank
        return losses * np.nan if is_bad else losses, *rest

    def write_late(path, tensors):
        digests = write(path, tensors)
        if f".step_{writing_step:08d}." in path.parent.name:
            is_over.wait()
        return digests

    loop.train_step, loop.forward, saver.write_tensors = watched, spoilt, write_late
    try:
        loop.pretrain(make_job(run, overrides))
    except FloatingPointError as error:
        after = copies(seen["state"])
        is_same = all(tensor.equal(after[key]) for key, tensor in seen["before"].items())
        is_over.set()
        seen["state"].saver._save.task.join()
        dist.barrier()
        return str(error), is_same, sorted(os.listdir(Path(run) / "moce" / "checkpoints"))
    finally:
        is_over.set()
        loop.train_step, loop.forward, saver.write_tensors = step, forward, write
    raise AssertionError("nobody stopped")


def train_to_ruin(run, overrides, rank):
    """Run the stage; after the last step one rank's experts are beyond what can be summed."""
    init_distributed(torch.device("cpu"))
    save = loop.save

    def ruin(state):
        if state.step == state.total_steps and dist.get_rank() == rank:
            for name, _, tensor in state.engine.state():
                if is_stacked(name):
                    tensor.fill_(1e37)
        save(state)

    with patched(loop, save=ruin, evaluate=lambda state: None):
        try:
            loop.pretrain(make_job(run, overrides))
        except FloatingPointError as error:
            return str(error)
    raise AssertionError("nobody stopped")


def _shuffled(placement, step):
    # experts anywhere, as many in every group as before; readers as planned
    draws = np.random.default_rng(step)
    return Placement(draws.permuted(placement.expert_group, axis=1), placement.shares)


def train_replanning(run, overrides, moves, stop=None):
    """Run the real loop; at every re-plan all experts are dealt anew, or (`moves` False) stay put.

    Returns the keys that this rank read in every step, and its tensors by (kind, global name)
    before and after every move.
    """
    init_distributed(torch.device("cpu"))
    plan, move, step = routing.Router._plan, migrate.move_experts, loop.train_step
    keys, snapshots = [], []

    def forced_plan(router, gate, at):
        placement = plan(router, gate, at)
        return _shuffled(placement, at) if moves and at else placement

    def snapshot(state):
        tensors = {}
        for name, kind, tensor in state.engine.state():
            named = by_global_name(state, [(name, tensor)])
            tensors |= {(kind, n): value for n, value in named.items()}
        return tensors

    def watched_move(state, before):
        first = snapshot(state)
        move(state, before)
        moved = (state.router.experts.place != before.place).any()
        snapshots.append((state.step, bool(moved), first, snapshot(state)))

    def watched_step(state, batch):
        if batch.step == stop:
            state.saver.wait()
            raise InterruptedError
        keys.append((batch.step, [key for key in batch.keys if key]))
        return step(state, batch)

    routing.Router._plan, migrate.move_experts = forced_plan, watched_move
    loop.train_step, cost = watched_step, routing.Router.move_cost
    if not moves:
        routing.Router.move_cost = lambda router, at: np.inf
    try:
        with contextlib.suppress(InterruptedError):
            loop.pretrain(make_job(run, overrides))
    finally:
        routing.Router._plan, migrate.move_experts = plan, move
        loop.train_step, routing.Router.move_cost = step, cost
    return {"keys": keys, "snapshots": snapshots}


def start_of(run, overrides, start):
    """Begin a stage from the weights of another run's checkpoint; what it begins with."""
    init_distributed(torch.device("cpu"))
    state = setup.build_state(replace(make_job(run, overrides), start=start))
    weights = by_global_name(state, ((n, t) for n, k, t in state.engine.state() if k == "weight"))
    kinds = {kind for _, kind, _ in state.engine.state()}
    result = {
        "weights": weights,
        "kinds": kinds,
        "table": state.router.table,
        "logits": state.model.gate.logits().detach().numpy(),
        "counts": state.plan.table.cluster_sizes.tolist(),
    }
    state.engine.destroy()
    return result


def continue_to_end(run, overrides, start):
    """Run the stage with the real loop from another run's checkpoint."""
    init_distributed(torch.device("cpu"))
    return loop.pretrain(replace(make_job(run, overrides), start=start))


def loader_starts(run, overrides):
    """Run the stage with the real loop; count the loaders and re-plans, note the keys of steps."""
    init_distributed(torch.device("cpu"))
    loader, replan, step = loaders.DataLoader, loop.replan, loop.train_step
    starts, replans, keys = [], [], []

    def started(*arguments, **named):
        starts.append(loader)
        return loader(*arguments, **named)

    def replanned(state):
        replans.append(state.step)
        replan(state)

    def watched(state, batch):
        keys.append([key for key in batch.keys if key])
        return step(state, batch)

    watch = patched(loop, replan=replanned, train_step=watched)
    with patched(loaders, DataLoader=started), watch:
        loop.pretrain(make_job(run, overrides))
    return {"starts": len(starts), "replans": replans, "keys": keys}


def weights_given(run, inits):
    """Take the first weights of stage mae, every rank from its own file.

    Returns a sum of each tensor by name, or what was said instead.
    """
    init_distributed(torch.device("cpu"))
    job = make_job(run, [f"model.init={inits[dist.get_rank()]}"], "mae")
    try:
        return {name: tensor.sum().item() for name, tensor in setup.first_weights(job).items()}
    except ConfigError as error:
        return str(error)


def refusal(run, overrides):
    """Start the stage; what it says instead."""
    init_distributed(torch.device("cpu"))
    try:
        loop.pretrain(make_job(run, overrides))
    except ConfigError as error:
        return str(error)
    raise AssertionError("it went on")


def reads_between_logged_steps(run, overrides, planted=None, held=None):
    """Run the real loop; by place, the most reads of tensors' values from one step to the next.

    Steps that end with a save are left out. `planted` names a function of waiting.py that is
    applied to a tensor inside train_step. `held` are two steps: saves are not written before the
    first, and not published before the second. Returns also the steps that find a save in flight.
    """
    init_distributed(torch.device("cpu"))
    step, rate = loop.train_step, loop.current_learning_rate
    write, publish = saver.write_tensors, saver.publish
    counts, busy, mode = [], [], waiting.Waits()
    releases = dict(zip(held or (0, 0), (threading.Event(), threading.Event()), strict=True))

    def held_back(function, event):
        def call(*arguments, **named):
            event.wait()
            return function(*arguments, **named)

        return call

    def watched(state, batch):
        if batch.step in releases:
            releases[batch.step].set()
            if held:
                state.saver._save.task.join()
        counts.append(mode.places.copy())
        if state.saver.look()[1]:
            busy.append(batch.step)
        return step(state, batch)

    def careless_rate(state):
        getattr(waiting, planted)(state.model.cls_token)
        return rate(state)

    loop.train_step = watched
    if planted:
        loop.current_learning_rate = careless_rate
    if held:
        may_write, may_publish = (releases[at] for at in held)
        saver.write_tensors = held_back(write, may_write)
        saver.publish = held_back(publish, may_publish)
    try:
        with mode:
            loop.pretrain(make_job(run, overrides))
    finally:
        loop.train_step, loop.current_learning_rate = step, rate
        saver.write_tensors, saver.publish = write, publish
        for event in releases.values():
            event.set()
    every = tiny_config(overrides).checkpoint.every_steps
    # the first steps make optimiser state, the last is logged
    between = [
        later - earlier
        for number, (earlier, later) in enumerate(itertools.pairwise(counts[:-1]))
        if number >= 3 and (number + 1) % every
    ]
    assert len(between) > 10
    return dict(functools.reduce(operator.or_, between)), busy


def launches_and_reads(run, overrides):
    """Run the real loop; what it does in its order: ("launch" or "read", step)."""
    init_distributed(torch.device("cpu"))
    step, read, done = loop.train_step, outcome.Outcome.read, []

    def launched(state, batch):
        done.append(("launch", batch.step))
        return step(state, batch)

    def seen(figures):
        done.append(("read", figures.batch.step))
        return read(figures)

    with patched(loop, train_step=launched), patched(outcome.Outcome, read=seen):
        loop.pretrain(make_job(run, overrides))
    return done


COLLECTIVES = (
    "all", "_all", "barrier", "broadcast", "gather", "monitored", "recv", "reduce", "_reduce",
    "scatter", "send",
)  # fmt: skip


def collectives_of_steps(run, overrides, planted=False):
    """Run the real loop; count the collectives from each step to the next, whoever calls them.

    Returns the counts by name of the training's thread for every step, the number of those of other
    threads, and the buckets of gradients. With `planted` a barrier precedes every step.
    """
    init_distributed(torch.device("cpu"))
    step, own, calls, marks, seen = loop.train_step, threading.get_ident(), [], [], {}
    methods = vars(dist.ProcessGroup).items()
    originals = {name: method for name, method in methods if name.startswith(COLLECTIVES)}

    def counted(name, original):
        def call(*arguments, **named):
            calls.append((name, threading.get_ident() == own))
            return original(*arguments, **named)

        return call

    def watched(state, batch):
        seen.update(buckets=state.engine.reducer.num_buckets)
        marks.append(len(calls))
        if planted:
            dist.barrier()
        return step(state, batch)

    watch = {name: counted(name, original) for name, original in originals.items()}
    with patched(dist.ProcessGroup, **watch), patched(loop, train_step=watched):
        loop.pretrain(make_job(run, overrides))
    # the first step is logged, and the last
    steps = [calls[start:stop] for start, stop in itertools.pairwise(marks[1:-1])]
    aside = sum(not is_own for of_step in steps for _, is_own in of_step)
    counts = [Counter(name for name, is_own in of_step if is_own) for of_step in steps]
    return {"steps": counts, "aside": aside, **seen}


def process_groups(run, overrides):
    """Build a state and save it; the timeouts of all process groups (s), and NCCL's order."""
    state = build(run, overrides)
    loop.save(state)
    state.saver.wait()
    state.engine.destroy()
    cpu = torch.device("cpu")
    timeouts = [
        group._get_backend(cpu).options._timeout.total_seconds()
        for group in dist.distributed_c10d._world.pg_map
    ]
    return {"timeouts": timeouts, "order": os.environ["NCCL_LAUNCH_ORDER_IMPLICIT"]}


def take_compiled_steps(run, overrides, placement="planned"):
    """Run `take_steps` and count the graphs that this process has compiled so far."""
    result = take_steps(run, overrides, placement)
    return result | {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


def take_grouped_steps(run, overrides, placement="planned"):
    """Run `take_steps` with grouped products, as on a GPU; count those whose ends were given."""
    product, given = moce.Experts.grouped, []

    def grouped(experts, rows, counts, weights, ends=None):
        given.append(ends is not None)
        return product(experts, rows, counts, weights, ends)

    everywhere = patched(moce, is_groupable=lambda rows, counts: min(counts) > 0)
    with everywhere, patched(moce.Experts, grouped=grouped):
        result = take_steps(run, overrides, placement)
    assert all(given)
    return result | {"grouped": len(given)}


def operators(run, overrides, placement="planned", planted=False):
    """Count the operators that compute in a step after the first ones, forward to update.

    With `planted` somebody looks at every parameter's norm besides.
    """
    init_distributed(torch.device("cpu"))
    state, counter = build(run, overrides, placement), counting.Operators()
    readers = state.router.placement.readers
    for batch in stream(state.stream_spec(state.plan), readers, start=0, stop=3):
        with counter if batch.step == 2 else contextlib.nullcontext():
            loop.train_step(state, batch)
            for parameter in state.model.parameters() if planted else ():
                parameter.detach().norm()
        state.step += 1
    state.engine.destroy()
    return counter.count


def tables_and_weights(run, overrides):
    """Run the real loop; of every step the gate's weights before it, and the table that it used."""
    init_distributed(torch.device("cpu"))
    step, seen = loop.train_step, []

    def watched(state, batch):
        gate = state.model.gate
        kept = gate.weight.detach().clone(), gate.cluster_group.clone(), state.router.table.copy()
        seen.append((*kept, gate.cluster_embedding.clone()))
        return step(state, batch)

    with patched(loop, train_step=watched):
        loop.pretrain(make_job(run, overrides))
    return [
        [value if isinstance(value, np.ndarray) else value.numpy() for value in e] for e in seen
    ]


def large_tables(steps, planted=False, failing=None):
    """Large tables of a gate that trains, (steps, L, K), and the reference's.

    With `planted`, the gate of all ranks but the first is another one. With `failing`, a rank
    cannot make its share; return what ranks say.
    """
    init_distributed(torch.device("cpu"))
    config = tiny_config(["model.depth=6", "moe.layers=[0,1,2,3,4]", "moe.num_experts=64"])
    gate = Gate(5, 64, torch.randn(1000, 24, generator=torch.Generator().manual_seed(1)))
    noise, drawn = NoiseSchedule(3, 1.0, 2 * steps), torch.Generator().manual_seed(2)
    maker, found, expected = TableMaker(config, noise, 1000, 1), [], []
    if failing == dist.get_rank():
        maker.begin(gate, None)  # no step
    elif failing is not None:
        maker.begin(gate, 0)
    if failing is not None:
        try:
            return maker.take()
        except Exception as error:  # noqa: BLE001 - whatever it is
            return str(error)
    maker.begin(gate, 999)  # never taken
    for step in range(steps):
        scores = logits(gate.weight.detach(), gate.cluster_embedding)
        drawn_noise = noise.sample(step, scores.shape)
        expected.append(routing_table(scores, config.gate, noise=drawn_noise))
        if planted and dist.get_rank() > 0:
            gate.weight.data.neg_()
        maker.begin(gate, step)
        # what the optimiser does to the weights meanwhile does not touch the table
        gate.weight.data += torch.randn(gate.weight.shape, generator=drawn)
        found.append(maker.take())
    return np.stack(found), np.stack(expected)
