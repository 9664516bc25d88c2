"""The device of a process, and the precision of its matrix products."""

import os
from pathlib import Path

import torch

from moce_dist.config import ParallelConfig
from moce_dist.settings import ConfigError

DRIVER = Path("/dev/nvidiactl")
"""Exists where a driver of NVIDIA is loaded."""


def choose_device(parallel: ParallelConfig) -> torch.device:
    """Choose the GPU number LOCAL_RANK (0 if unset), or the CPU if there is none to use.

    TF32 is off, so float32 products are exact float32 on a GPU too.

    Raises:
        ConfigError: there is a GPU that torch cannot use.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if not parallel.use_gpu or not torch.cuda.is_available():
        _check_driver(parallel)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def check_gpu(parallel: ParallelConfig) -> None:
    """Refuse to train on a CPU where GPUs were asked for.

    Raises:
        ConfigError: `parallel.use_gpu` is true and there is none, or there is one that torch cannot
            use.
    """
    _check_driver(parallel)
    if parallel.use_gpu is True and not torch.cuda.is_available():
        raise ConfigError("parallel.use_gpu (True): no GPU is visible")


def _check_driver(parallel: ParallelConfig) -> None:
    # a process that may see no GPU has an empty list
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if not parallel.use_gpu or is_hidden or not DRIVER.exists() or torch.cuda.is_available():
        return
    raise ConfigError(
        f"parallel.use_gpu ({parallel.use_gpu}): this machine has a GPU that torch does not see; "
        f"is its driver new enough for CUDA {torch.version.cuda}? false computes on the CPU"
    )


def training_device(parallel: ParallelConfig, *, warn_only: bool = False) -> torch.device:
    """Choose the device of a rank that trains.

    With `parallel.deterministic`, a GPU operation that is not repeatable bit for bit raises an
    error, or with `warn_only` a warning.

    Raises:
        ConfigError: see `check_gpu`.
    """
    check_gpu(parallel)
    device = choose_device(parallel)
    if parallel.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
    return device
