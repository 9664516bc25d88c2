"""Sections of prove.py about parts of a step, each of which needs little more than torch.

A section takes the device and yields its findings, (name, value), as soon as it has them. What it
cannot import makes it skipped, any other exception failed.
"""

import copy
import importlib.machinery
import importlib.util
import io
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from benches.peaks import mean_seconds, memory_gb_s, product_tflops


def ceilings(device):
    """What products and copies reach: the roof of everything else."""
    yield "product_float32_tflops", product_tflops(device, torch.float32)
    tflops, bandwidth = product_tflops(device, torch.bfloat16), memory_gb_s(device)
    yield "product_bfloat16_tflops", tflops
    yield "memory_gb_s", bandwidth
    if device.type == "cuda":
        yield "terms", {"bf16_tflops": tflops, "memory_gb_s": bandwidth}
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        taken = mean_seconds(lambda: host.to(device, non_blocking=True), device, 5)
        yield "host_to_device_gb_s", host.numel() / taken / 1e9


def grouped(device):
    """Experts against float64, with weights of their own and with a shared base.

    Among the counts of rows are experts without any.
    """
    count = 64 if device.type == "cuda" else 4
    bound = 3e-2 if device.type == "cuda" else 1e-5
    yield "bound", bound
    for has_base in (False, True):
        for counts in ([count, count], [0, count], [count, 0], [0, 0]):
            found = compare_experts(device, counts, has_base=has_base)
            yield f"{'base' if has_base else 'own'} {counts}", found
            assert found["largest_error"] <= bound, (has_base, counts, found)


def compare_experts(device, counts, *, has_base):
    """Return the largest relative error of a gradient, and whether the products were grouped."""
    from moce_dist.model.moce import MoceMlp, is_groupable

    on_gpu = device.type == "cuda"
    width, tokens, dtype = (768, 50, torch.bfloat16) if on_gpu else (32, 5, torch.float32)
    torch.manual_seed(0)
    mlp = MoceMlp(2, width, has_base=has_base).to(device)
    exact = copy.deepcopy(mlp).double()
    rows = torch.randn(sum(counts), tokens, width, device=device, dtype=dtype)
    found, wanted = rows.clone().requires_grad_(), rows.double().requires_grad_()
    with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
        mlp.experts(found, counts, mlp.weights(found)).float().pow(2).sum().backward()
    exact.experts.one_by_one(wanted, counts, exact.weights(wanted)).pow(2).sum().backward()
    pairs = [(found.grad, wanted.grad)] + [
        (p.grad, q.grad) for p, q in zip(mlp.parameters(), exact.parameters(), strict=True)
    ]
    errors = [
        float((p.double() - q).norm() / q.norm().clamp_min(1e-12)) for p, q in pairs if p.numel()
    ]
    return {"largest_error": max(errors), "grouped": bool(is_groupable(rows, counts))}


def collectives(device):
    """The collectives of a step, with zero rows too."""
    from torch._C._distributed_c10d import HashStore

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    for rows in (0, 3):
        x = torch.arange(rows * 4.0, device=device).view(rows, 4)
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, [rows], [rows], async_op=True).wait()
        assert torch.equal(out, x)
    x = torch.ones(5, device=device, dtype=torch.bfloat16)
    dist.all_reduce(x, async_op=True).wait()
    assert x.tolist() == [1.0] * 5
    yield "backend", backend


def decode(device):
    """Crops of JPEGs decoded, resized and mirrored as with `data.decode_on: device`."""
    import nvidia.nvimgcodec
    import simplejpeg  # noqa: F401 - reads the headers

    from moce_dist.data.device import DeviceDecoder, Waiting
    from moce_dist.data.images import SampleDraws, draw_cut, open_croppable

    yield "nvimgcodec", nvidia.nvimgcodec.__version__
    side, count = (224, 256) if device.type == "cuda" else (32, 4)
    content, draws, waiting, expected = photograph(), SampleDraws(), Waiting(), []
    for number in range(count):
        image, drawn = open_croppable(content), draws.of(0, 0, str(number))
        cut = draw_cut(image, scale_min=0.2, hflip=True, draws=drawn)
        assert waiting.take(number, number, cut)
        expected.append(torch.from_numpy(cut.pixels(side).copy()).permute(2, 0, 1))
    crops, decoder = waiting.collect(), DeviceDecoder(side, device)
    found = decoder.decode(crops)
    assert all(isinstance(square, torch.Tensor) for square in found), "decoded, no errors"
    # other inverse transforms and scaled decoding on the CPU: alike, not equal
    levels = (torch.stack(found).cpu().float() - torch.stack(expected).float()).abs().mean()
    yield "mean_difference_levels", float(levels)
    assert levels < 8
    taken = mean_seconds(lambda: decoder.decode(crops), device, 5 if device.type == "cuda" else 2)
    yield "images_per_s", count / taken


def photograph():
    """Make a JPEG of 500 x 375 pixels."""
    import numpy as np
    from PIL import Image

    low = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(low).resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def clustering(device):
    """Clustering of ImageNet's size: the parts that are torch's alone, then the whole of it."""
    needs = ("faiss", "numba", "pyarrow", "sklearn", "threadpoolctl")
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    for name in {"faiss", "numba"} & set(missing):
        # only imported by the modules of the parts that come first, not called on a GPU
        sys.modules[name] = importlib.util.module_from_spec(
            importlib.machinery.ModuleSpec(name, None)
        )
        sys.modules[name].njit = lambda **_: lambda function: function
    on_gpu = device.type == "cuda"
    blocks, rows, width, clusters = (20, 65_536, 768, 256) if on_gpu else (2, 300, 16, 8)
    yield "sums", sum_blocks(device, blocks, rows, width, clusters)
    yield "distances", measure_blocks(device, blocks, rows, width, clusters)
    if missing:
        raise ImportError(f"the whole needs {', '.join(missing)}")
    yield "whole", cluster_all(device, 1_281_167 if on_gpu else 4000, width, clusters)


def sum_blocks(device, blocks, rows, width, clusters):
    """Add `blocks` blocks of rows (rows, D + 1) to the sums of their clusters, in float64."""
    from moce_dist.cluster.sweeps import add_sorted_rows

    augmented = torch.randn(rows, width + 1, device=device)
    labels = torch.randint(0, clusters, (rows,), device=device)
    exact = torch.zeros(clusters, width + 1, dtype=torch.float64)
    exact.index_add_(0, labels.cpu(), augmented.cpu().double())
    found, again = (torch.zeros_like(exact, device=device) for _ in range(2))
    add_sorted_rows(found, augmented, labels)
    add_sorted_rows(again, augmented, labels)
    assert torch.equal(found, again), "the same bits every time"
    torch.testing.assert_close(found.cpu(), exact)
    taken = mean_seconds(lambda: add_sorted_rows(found, augmented, labels), device, blocks)
    return {"rows": blocks * rows, "seconds": blocks * taken}


def measure_blocks(device, blocks, rows, width, clusters):
    """Measure the distances of `blocks` blocks of rows to 4 candidates each."""
    from moce_dist.cluster.nearest import candidate_distances

    points = torch.randn(rows, width, device=device)
    centroids = torch.randn(clusters, width, device=device)
    ids = torch.randint(0, clusters, (rows, 4), device=device)
    found = candidate_distances(points, centroids, ids)
    some = slice(0, 1000)
    exact = (points[some, None].double() - centroids[ids[some]].double()).square().sum(dim=2)
    torch.testing.assert_close(found[some].double(), exact, rtol=1e-4, atol=1e-4)
    taken = mean_seconds(lambda: candidate_distances(points, centroids, ids), device, blocks)
    return {"rows": blocks * rows, "seconds": blocks * taken}


def cluster_all(device, rows, width, clusters):
    """Run balanced k-means over files of features drawn around more directions than clusters."""
    import numpy as np

    from moce_dist.cluster.assign import run_clustering
    from moce_dist.config import ClusterConfig
    from moce_dist.run.tasks import HERE

    torch.manual_seed(0)
    centres = torch.randn(4 * clusters, width, device=device)
    with tempfile.TemporaryDirectory() as folder:
        features = Path(folder) / "features"
        features.mkdir()
        for number, part in enumerate(np.array_split(np.arange(rows), 8)):
            block = torch.randn(len(part), width, device=device)
            block += centres[torch.randint(0, len(centres), (len(part),), device=device)]
            np.save(features / f"{number}.npy", block.half().cpu().numpy())
        begin = time.monotonic()
        summary = run_clustering(
            features,
            Path(folder) / "out",
            ClusterConfig(num_clusters=clusters),
            seed=0,
            subtract_mean=True,
            workers=HERE._replace(device=device.type),
        )
        taken = time.monotonic() - begin
    assert summary["size_max"] - summary["size_min"] <= 1
    return {"rows": rows, "seconds": taken, "iterations": summary["iterations"]}
