"""Sections of prove.py that train: the step, a resumed run, the loop. See prove_parts.py."""

import collections
import contextlib
import gc
import io
import itertools
import math
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from benches.peaks import mean_seconds
from benches.settings import load_bench_config
from benches.step import compute_terms
from benches.synthetic import synthetic_batches, synthetic_state
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from moce_dist.config import load_config
from moce_dist.cost.budget import budget
from moce_dist.data.shards import write_index
from moce_dist.data.writer import ShardWriter
from moce_dist.parallel.engine import init_distributed
from moce_dist.run.directory import StoppedError
from moce_dist.run.files import read_jsonl
from moce_dist.train.checkpoint import complete_checkpoints, damage, stored
from moce_dist.train.job import StageJob
from moce_dist.train.loop import pretrain, settle, train_step
from moce_dist.train.pulse import Pulse

TINY = (
    "model.width=32", "model.num_heads=2", "model.depth=2", "moe.layers=[1]", "moe.num_experts=2",
    "model.decoder_width=16", "model.decoder_num_heads=2", "model.decoder_depth=1",
    "data.image_size=32", "model.patch_size=8", "cluster.num_clusters=4", "gate.groups=shared",
)  # fmt: skip
BASE = ("model.size=base", "moe.num_experts=8", "cluster.num_clusters=64", "gate.groups=shared")
# its checkpoints are small enough to write many
SMALL = ("model.size=small", "model.decoder_depth=2", "moe.num_experts=2", *BASE[2:])
SYNTHETIC = ("moce.epochs=20", "moce.warmup_epochs=0", "gate.noise=0", "data.loader_processes=0")
STEPS, STOP_AFTER = 4, 2


def step(device):
    """Images a second of dense and MoCE steps, kernels, memory, and where the host waits."""
    on_gpu, failed = device.type == "cuda", []
    terms = compute_terms(make_config(device, "dense", 128 if on_gpu else 8), device)
    yield "passes", terms
    if on_gpu:
        yield "terms", terms
    for compiled in (False, True) if on_gpu else (False,):
        for images in (128, 256, 512) if on_gpu else (8,):
            for kind in ("dense", "cluster"):
                name = f"{kind}_{images}{'_compiled' if compiled else ''}"
                if compiled and shutil.which("cc") is None:
                    yield name, {"skipped": "no C compiler"}
                    continue
                try:
                    found = measure_variant(device, kind, images, compiled)
                except Exception as error:  # noqa: BLE001 - the other variants' figures stay
                    failed.append(name)
                    found = {"error": repr(error)}
                yield name, found
                if name == "cluster_128" and "host_s" in found:
                    yield "terms", {"host_ms": 1000 * found["host_s"]}
                free(device)
    assert not failed, f"failed: {', '.join(failed)}"


def make_config(device, kind, images, *overrides):
    """Return the configuration of steps on synthetic batches."""
    shape = BASE if device.type == "cuda" else TINY
    sizes = [f"mae.batch_size={images}", f"moce.batch_size={images}", f"moe.kind={kind}"]
    return load_bench_config(None, [*shape, *SYNTHETIC, *sizes, *overrides])


def measure_variant(device, kind, images, compiled):
    """Build one variant's state and measure it."""
    config = make_config(device, kind, images, f"parallel.compile={str(compiled).lower()}")
    init_distributed(device)
    with contextlib.ExitStack() as stack:
        state = synthetic_state(config, device)
        stack.callback(state.engine.destroy)
        return measure_step(state, images, device)


def free(device):
    """Give back the memory of states that nobody needs any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_step(state, images, device):
    """Time steps as the loop takes them, and count what one of them launches and waits for."""
    on_gpu = device.type == "cuda"
    # training uploads a batch while the step before it computes
    batches = [
        batch._replace(
            images=batch.images.to(device),
            noise=batch.noise.to(device),
            weights=batch.weights.to(device),
        )
        for batch in synthetic_batches(state, 3)
    ]

    def take():
        if state.model.gate is not None:
            state.router.refresh(state.model.gate, state.step)
        outcome = train_step(state, batches[state.step % len(batches)])
        state.step += 1
        # reads the figures of the step before
        settle(state, outcome, at_once=False)

    # compiles, and creates the moments
    take()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    taken = mean_seconds(take, device, 20 if on_gpu else 2)
    predicted = budget(state.job.config).memory().value
    figures = {"images_per_s": images / taken, "step_s": taken, "predicted_memory_gib": predicted}
    if on_gpu:
        peak = torch.cuda.max_memory_allocated() / 2**30
        figures |= {"peak_memory_gib": peak, "peak_over_predicted": peak / predicted}
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiled:
        take()
        if on_gpu:
            torch.cuda.synchronize()
    counts = profiled.key_averages()
    figures["aten_operators"] = sum(e.count for e in counts if e.key.startswith("aten::"))
    if on_gpu:
        busy_s, kernels, copies = on_device(profiled)
        figures |= {"kernels": kernels, "copies": copies, "busy_share": busy_s / taken}
        figures["host_s"] = max(0.0, taken - busy_s)
        with waits() as lines:
            take()
        figures["waits"] = dict(lines)
    return figures


def on_device(profiled):
    """Return the seconds in which the GPU was busy, and its kernels and copies."""
    events = [
        e
        for e in profiled.events()
        if e.device_type.name == "CUDA" and not getattr(e, "is_user_annotation", False)
    ]
    is_copy = [e.name.startswith(("Memcpy", "Memset")) for e in events]
    total, reached = 0.0, float("-inf")
    for begin, end in sorted((e.time_range.start, e.time_range.end) for e in events):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total / 1e6, is_copy.count(False), is_copy.count(True)


@contextlib.contextmanager
def waits():
    """Count the lines at which the host waits for the device."""
    lines = collections.Counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield lines
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines.update(
        f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)
    )


def repeatable(device):
    """A run that is saved after two steps and resumed, against one that is not: equal bits."""
    for deterministic in (False, True):
        flag = f"parallel.deterministic={str(deterministic).lower()}"
        with tempfile.TemporaryDirectory() as folder:
            whole, halves = Path(folder) / "whole", Path(folder) / "halves"
            for run in (whole, halves):
                write_run(run, device, images=STEPS * batch_size(device))
            train(whole, device, flag)
            with contextlib.suppress(StoppedError):
                train(halves, device, flag, pulse=stop_after(STOP_AFTER))
            assert newest(halves).name == f"step_{STOP_AFTER:08d}", "it was stopped"
            train(halves, device, flag)
            expected, found = dict(stored(newest(whole))), dict(stored(newest(halves)))
        torch.use_deterministic_algorithms(False)
        free(device)
        assert expected.keys() == found.keys()
        differing = [name for name, t in expected.items() if not torch.equal(t, found[name])]
        result = {"tensors": len(expected), "differing": len(differing)}
        yield "deterministic" if deterministic else "default", result
        assert not differing or (device.type == "cuda" and not deterministic), differing[:3]


def loop(device):
    """The real loop over tars: loaders, upload on its own stream, late figures, saves beside it."""
    on_gpu, every = device.type == "cuda", STEPS
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        write_run(run, device, images=2 * every * batch_size(device))
        flags = [f"checkpoint.every_steps={every}", f"logging.every_steps={every}"]
        flags += [f"data.loader_processes={8 if on_gpu else 1}", "data.keep=memory"]
        with waits() if on_gpu else contextlib.nullcontext() as lines:
            train(run, device, *flags, epochs=3)
        metrics = read_jsonl(run / "moce" / "metrics.jsonl")
        saved = complete_checkpoints(run / "moce" / "checkpoints")
        assert damage(saved[0]) is None
        yield "checkpoints", [checkpoint.name for checkpoint in saved]
        assert newest(run).name == f"step_{6 * every:08d}"
    names = ("step", "loss", "images_per_s", "seconds", "data_wait_s", "save_s", "checkpoint_s")
    yield "metrics", [{name: line.get(name) for name in names} for line in metrics]
    assert all(math.isfinite(line["loss"]) for line in metrics)
    if on_gpu:
        yield "waits", dict(lines)


def batch_size(device):
    """Images of a step of the runs on tars."""
    return 64 if device.type == "cuda" else 8


def train(run, device, *overrides, epochs=1, pulse=None):
    """Run stage moce to its end, or until the pulse says stop."""
    shape, size = SMALL if device.type == "cuda" else TINY, batch_size(device)
    sizes = [f"mae.batch_size={size}", f"moce.batch_size={size}", f"moce.epochs={epochs}"]
    usual = ["moce.warmup_epochs=0", "logging.every_steps=1", "logging.tensorboard=false"]
    usual += ["data.loader_processes=0", "parallel.replan_steps=10"]
    config = load_config(None, [*shape, *sizes, *usual, *overrides])
    pretrain(StageJob(config, run, "moce", str(run / "shards")), pulse)


def stop_after(steps):
    """Make a pulse that asks a training to stop after some steps."""
    asked = itertools.count(1)
    return Pulse(lambda: next(asked) == steps)


def newest(run):
    """Return the newest checkpoint of stage moce."""
    return complete_checkpoints(run / "moce" / "checkpoints")[0]


def write_run(run, device, *, images):
    """Write tars of small PNGs, one per cluster, and centroids: what stage moce starts from."""
    width, clusters = (384, 64) if device.type == "cuda" else (32, 4)
    draws, shards = np.random.default_rng(0), []
    for cluster in range(clusters):
        writer = ShardWriter(run / "shards", f"cluster-{cluster:05d}-000000.tar", cluster=cluster)
        for number in range(images // clusters):
            file = io.BytesIO()
            low = Image.fromarray(draws.integers(0, 256, (8, 8, 3), np.uint8))
            low.resize((64, 64), Image.Resampling.BICUBIC).save(file, "PNG")
            writer.add(f"{cluster}/{number}", {"png": file.getvalue()})
        shards.append(writer.close())
    write_index(run / "shards", shards)
    (run / "clusters").mkdir()
    centroids = draws.standard_normal((clusters, width)).astype(np.float32)
    np.save(run / "clusters" / "centroids.npy", centroids)
