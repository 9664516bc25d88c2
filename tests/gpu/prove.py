"""Prove and measure the training step on one bare machine, in at most ten minutes.

python tests/gpu/prove.py --out proof.json [--wheels FOLDER] [--only step,grouped]

Needs torch, timm and torchvision; DeepSpeed, pydantic, PyYAML, SciPy and what these need may lie as
wheels in FOLDER (`pip wheel --no-deps ...`). No Ray, FAISS or simplejpeg. Every section prints one
JSON line as soon as it is done; what cannot be had here is named in `skipped`. Without a GPU
everything runs on the CPU at a tiny size, so that the script is known to work.
"""

import argparse
import collections
import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = [
    "model.width=32", "model.num_heads=2", "model.depth=2", "moe.layers=[1]", "moe.num_experts=2",
    "model.decoder_width=16", "model.decoder_num_heads=2", "model.decoder_depth=1",
    "data.image_size=32", "model.patch_size=8", "cluster.num_clusters=4",
]  # fmt: skip
BASE = ["model.size=base", "moe.num_experts=8", "cluster.num_clusters=64", "gate.groups=shared"]
ALWAYS = ["moce.epochs=20", "moce.warmup_epochs=0", "gate.noise=0", "data.loader_processes=0"]


def main():
    """Run the sections in order, each under its own cap of time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    prepare(arguments.wheels)
    # read once, at the first product on the device; section `repeatable` needs it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    on_gpu = torch.cuda.is_available()
    # DeepSpeed says on standard output what it finds, unless it is told
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    proof = {"torch": torch.__version__, "device": device_name(), "sections": {}}
    begin = time.monotonic()
    for name, (section, cap_s) in SECTIONS.items():
        if arguments.only and name not in arguments.only.split(","):
            continue
        result = run_section(section, on_gpu, min(cap_s, 600 - (time.monotonic() - begin)))
        proof["sections"][name] = result
        print(json.dumps({name: result}), flush=True)
        arguments.out.write_text(json.dumps(proof, indent=1))
    return 0 if all("error" not in s for s in proof["sections"].values()) else 1


def prepare(wheels):
    """Install what the machine lacks from a folder of wheels, and put the project on the path."""
    if wheels is not None and any(wheels.glob("*.whl")):
        target = tempfile.mkdtemp(prefix="prove-")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([*command, "--target", target, *map(str, wheels.glob("*.whl"))], check=True)
        sys.path.append(target)
    sys.path[:0] = [str(ROOT), str(ROOT / "jobs")]


def run_section(section, on_gpu, cap_s):
    """Run one section; what it raises is its result."""
    begin = time.monotonic()
    if cap_s <= 0:
        return {"skipped": "no time left"}
    try:
        result = section(on_gpu, begin + cap_s)
    except ImportError as error:
        result = {"skipped": str(error)}
    except Exception as error:  # noqa: BLE001 - a section that fails must not take the others along
        result = {"error": repr(error), "at": traceback.format_exc().strip().splitlines()[-3:]}
    return {**result, "seconds": round(time.monotonic() - begin, 1)}


def device_name():
    """Name the GPU, or the CPU."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def seconds(function, on_gpu, repeats):
    """Median seconds of a call, the device waited for."""
    import torch

    times = []
    for turn in range(repeats + 2):
        begin = time.perf_counter()
        function()
        if on_gpu:
            torch.cuda.synchronize()
        if turn >= 2:
            times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def ceilings(on_gpu, _):
    """What products and copies reach: the roof of everything below."""
    import torch

    device, side = ("cuda", 8192) if on_gpu else ("cpu", 512)
    result = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(side, side, device=device, dtype=dtype)
        taken = seconds(lambda a=a: a @ a, on_gpu, 5)
        result[f"product_{dtype}_tflops".replace("torch.", "")] = 2 * side**3 / taken / 1e12
    source = torch.empty(2**28 if on_gpu else 2**22, dtype=torch.uint8)
    if on_gpu:
        pinned = source.pin_memory()
        taken = seconds(lambda: pinned.to(device, non_blocking=True), on_gpu, 5)
        result["host_to_device_gb_s"] = source.numel() / taken / 1e9
    there = source.to(device)
    taken = seconds(there.clone, on_gpu, 5)
    result["device_copy_gb_s"] = 2 * source.numel() / taken / 1e9
    return result


def grouped(on_gpu, _):
    """Experts against float64, with experts without rows and without any."""
    import torch

    from moce_dist.model.moce import Experts, is_groupable

    device, width, tokens, count = ("cuda", 768, 50, 64) if on_gpu else ("cpu", 32, 5, 4)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    bound, figures = (3e-2, {}) if on_gpu else (1e-5, {})
    for counts in ([count, count], [0, count], [count, 0], [0, 0]):
        torch.manual_seed(0)
        experts = Experts(2, width, 4 * width).to(device)
        exact = Experts(2, width, 4 * width).to(device).double()
        exact.load_state_dict(experts.state_dict())
        rows = torch.randn(sum(counts), tokens, width, device=device, dtype=dtype)
        found, wanted = rows.clone().requires_grad_(), rows.double().requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            experts(found, counts, experts.cast(found)).float().pow(2).sum().backward()
        exact.one_by_one(wanted, counts, exact.cast(wanted)).pow(2).sum().backward()
        pairs = [(found.grad, wanted.grad)] + [
            (p.grad, q.grad) for p, q in zip(experts.parameters(), exact.parameters(), strict=True)
        ]
        errors = [
            float((p.double() - q).norm() / q.norm().clamp_min(1e-12))
            for p, q in pairs
            if p.numel()
        ]
        assert max(errors) <= bound, (counts, errors)
        figures[str(counts)] = {
            "largest_error": max(errors),
            "grouped": bool(is_groupable(rows, counts)),
        }
    return {"bound": bound, "counts": figures}


def collectives(on_gpu, _):
    """The collectives of a step, with zero rows too."""
    import torch
    import torch.distributed as dist

    from moce_dist.parallel.engine import init_distributed

    device = torch.device("cuda" if on_gpu else "cpu")
    init_distributed(device)
    for rows in (0, 3):
        x = torch.arange(rows * 4.0, device=device).view(rows, 4)
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, [rows], [rows], async_op=True).wait()
        assert torch.equal(out, x)
    x = torch.ones(5, device=device, dtype=torch.bfloat16)
    dist.all_reduce(x, async_op=True).wait()
    assert x.tolist() == [1.0] * 5
    return {"backend": dist.get_backend(), "world_size": dist.get_world_size()}


def make_state(on_gpu, kind, images, *overrides):
    """Build a training state on synthetic data."""
    import torch
    from benches.settings import load_bench_config
    from benches.synthetic import synthetic_state

    shape = BASE if on_gpu else SMALL
    sizes = [f"mae.batch_size={images}", f"moce.batch_size={images}", f"moe.kind={kind}"]
    config = load_bench_config(None, [*shape, *ALWAYS, *sizes, *overrides])
    return synthetic_state(config, torch.device("cuda" if on_gpu else "cpu"))


def step(on_gpu, deadline):
    """Images a second of dense and MoCE steps, kernels and places where the host waits."""
    result = {}
    can_compile = shutil.which("cc") is not None
    for images in (128, 256, 512) if on_gpu else (8,):
        for kind in ("dense", "cluster"):
            for compiled in (False, True) if on_gpu else (False,):
                name = f"{kind}_{images}{'_compiled' if compiled else ''}"
                if time.monotonic() > deadline:
                    return {**result, "skipped": f"from {name} on: no time left"}
                if compiled and not can_compile:
                    result[name] = {"skipped": "no C compiler"}
                    continue
                try:
                    result[name] = measure_variant(on_gpu, kind, images, compiled)
                except ImportError:
                    raise
                except Exception as error:  # noqa: BLE001 - the other variants' figures stay
                    result[name] = {"error": repr(error)}
                free(on_gpu)
    if failed := [name for name, found in result.items() if "error" in found]:
        result["error"] = f"failed: {', '.join(failed)}"
    return result


def measure_variant(on_gpu, kind, images, compiled):
    """Build one variant's state and measure it."""
    with contextlib.ExitStack() as stack:
        state = make_state(on_gpu, kind, images, f"parallel.compile={str(compiled).lower()}")
        stack.callback(state.engine.destroy)
        return measure_step(state, images, on_gpu)


def free(on_gpu):
    """Give back the memory of states that nobody needs any more, and forget its peak."""
    import torch

    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure_step(state, images, on_gpu):
    """Time steps of a state, and count what one of them launches and waits for."""
    import torch
    from benches.synthetic import synthetic_batches
    from torch.profiler import ProfilerActivity, profile

    from moce_dist.train.loop import train_step

    # training uploads a batch while the step before it computes
    device = state.engine.device
    batches = [
        batch._replace(
            images=batch.images.to(device),
            noise=batch.noise.to(device),
            weights=batch.weights.to(device),
        )
        for batch in synthetic_batches(state, 3)
    ]

    def take():
        train_step(state, batches[state.step % len(batches)])
        state.step += 1

    taken = seconds(take, on_gpu, 10 if on_gpu else 2)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiled:
        take()
    events = profiled.key_averages()
    operators = sum(e.count for e in events if e.key.startswith("aten::"))
    figures = {"images_per_s": images / taken, "step_s": taken, "aten_operators": operators}
    if on_gpu:
        on_device = [
            e
            for e in profiled.events()
            if e.device_type.name == "CUDA" and not getattr(e, "is_user_annotation", False)
        ]
        is_copy = [e.name.startswith(("Memcpy", "Memset")) for e in on_device]
        figures["kernels"], figures["copies"] = is_copy.count(False), is_copy.count(True)
        spans = sorted((e.time_range.start, e.time_range.end) for e in on_device)
        figures["busy_share"] = covered(spans) / 1e6 / taken
        figures["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        figures["waits"] = waits(take)
    return figures


def covered(spans):
    """Length of the union of sorted spans (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in spans:
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def waits(take):
    """Lines of the package at which the host waits for the device in one step."""
    import torch

    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        take()
    torch.cuda.set_sync_debug_mode("default")
    lines = collections.Counter(
        f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)
    )
    return dict(lines)


def repeatable(on_gpu, _):
    """Two runs of the same steps: equal bits, with and without the deterministic flag."""
    import torch
    from benches.synthetic import synthetic_batches

    from moce_dist.train.loop import train_step

    result, steps = {}, 4
    for deterministic in (False, True):
        found = []
        for _ in range(2):
            torch.manual_seed(0)
            flag = f"parallel.deterministic={str(deterministic).lower()}"
            state = make_state(on_gpu, "cluster", 64 if on_gpu else 8, flag)
            from moce_dist.model.device import training_device

            training_device(state.job.config.parallel)
            for batch in synthetic_batches(state, steps):
                train_step(state, batch)
                state.step += 1
            found.append({n: t.detach().cpu().clone() for n, t in state.model.named_parameters()})
            state.engine.destroy()
            del state
            free(on_gpu)
        differing = [n for n, t in found[0].items() if not torch.equal(t, found[1][n])]
        result["deterministic" if deterministic else "default"] = {
            "tensors": len(found[0]),
            "differing": len(differing),
        }
        torch.use_deterministic_algorithms(False)
    if not on_gpu:
        assert result["default"]["differing"] == 0, result
    assert result["deterministic"]["differing"] == 0, result
    return result


def decode(on_gpu, _):
    """Decoding on the device, where its wheel is installed."""
    if not on_gpu:
        return {"skipped": "needs a GPU"}
    try:
        from nvidia import nvimgcodec
    except ImportError as error:
        return {"skipped": str(error)}
    import io

    import numpy as np
    from PIL import Image

    draws = np.random.default_rng(0)
    low = draws.integers(0, 256, (24, 32, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(low).resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    decoder, contents = nvimgcodec.Decoder(), [buffer.getvalue()] * 256
    taken = seconds(lambda: decoder.decode(contents), on_gpu, 5)
    return {"images_per_s": len(contents) / taken}


def clustering(on_gpu, _):
    """Balanced k-means of ImageNet's size on the device, where FAISS is installed."""
    try:
        import faiss  # noqa: F401
    except ImportError as error:
        return {"skipped": str(error)}
    import numpy as np

    from moce_dist.cluster.assign import run_clustering
    from moce_dist.config import ClusterConfig
    from moce_dist.run.tasks import HERE

    rows, width, clusters = (1_281_167, 768, 256) if on_gpu else (4000, 16, 8)
    draws = np.random.default_rng(0)
    centres = draws.standard_normal((4 * clusters, width), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        features = Path(folder) / "features"
        features.mkdir()
        for number, part in enumerate(np.array_split(np.arange(rows), 8)):
            noise = draws.standard_normal((len(part), width), np.float32)
            block = centres[draws.integers(0, len(centres), len(part))] + noise
            np.save(features / f"{number}.npy", block.astype(np.float16))
        begin = time.monotonic()
        summary = run_clustering(
            features,
            Path(folder) / "out",
            ClusterConfig(num_clusters=clusters),
            seed=0,
            subtract_mean=True,
            workers=HERE._replace(device="cuda") if on_gpu else HERE,
        )
        taken = time.monotonic() - begin
    assert summary["size_max"] - summary["size_min"] <= 1
    return {"rows": rows, "clustering_s": taken, "iterations": summary["iterations"]}


SECTIONS = {
    "ceilings": (ceilings, 30),
    "grouped": (grouped, 30),
    "collectives": (collectives, 60),
    "step": (step, 300),
    "repeatable": (repeatable, 90),
    "decode": (decode, 30),
    "clustering": (clustering, 120),
}

if __name__ == "__main__":
    sys.exit(main())
