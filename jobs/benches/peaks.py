"""The largest rates of a device: matrix products and copies. Needs torch alone.

These are the roof under which a step's figures stand, and terms of its budget.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

_WARMUP = 2


def mean_seconds(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the mean time of a call over `repeats` calls that are waited for only at the end.

    So the host may launch one call while the device computes the one before, as in training.
    """
    for _ in range(_WARMUP):
        function()
    finish(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    finish(device)
    return (time.perf_counter() - begin) / repeats


def finish(device: torch.device) -> None:
    """Wait until the device has done its work; a CPU has none left."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the rate of a large square matrix product, TFLOP/s."""
    # many CPUs have no fast products of bfloat16
    side = 8192 if device.type == "cuda" else 128
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / mean_seconds(lambda: a @ a, device, 10) / 1e12


def memory_gb_s(device: torch.device) -> float:
    """Measure the bandwidth of the device's memory by a copy, GB/s read and written together."""
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / mean_seconds(lambda: target.copy_(source), device, 10) / 1e9
