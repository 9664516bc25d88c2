"""The device of a process, and the precision of its matrix products."""

import logging
import os
from pathlib import Path

import torch

from moce_dist.config import ParallelConfig
from moce_dist.settings import ConfigError

logger = logging.getLogger(__name__)
DEVICES = Path("/dev")
"""Has a file `nvidia0` for the first GPU, and so on; readable by a process that may use it."""


def choose_device(parallel: ParallelConfig) -> torch.device:
    """Choose the GPU number LOCAL_RANK (0 if unset), or the CPU if there is none to use.

    TF32 is off, so float32 products are exact float32 on a GPU too.

    Raises:
        ConfigError: there are fewer GPUs than processes on this host.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if not parallel.use_gpu or not torch.cuda.is_available():
        if parallel.use_gpu and (reason := unusable_gpu()):
            logger.warning("computing on the CPU: %s", reason)
        return torch.device("cpu")
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= max(1, count):
        raise ConfigError(
            f"parallel.num_workers ({parallel.num_workers}): a host with {count} GPUs has process "
            f"number {number}; start fewer, or set parallel.use_gpu=false"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def check_gpu(parallel: ParallelConfig) -> None:
    """Refuse to train on a CPU where GPUs were asked for.

    Raises:
        ConfigError: `parallel.use_gpu` is true and there is none.
    """
    if parallel.use_gpu is True and not torch.cuda.is_available():
        reason = unusable_gpu() or "no GPU is visible"
        raise ConfigError(f"parallel.use_gpu (True): {reason}")


def unusable_gpu() -> str | None:
    """Say why torch does not see a GPU that this process may use; None if there is no such GPU."""
    if torch.cuda.is_available() or "CUDA_VISIBLE_DEVICES" in os.environ:
        return None
    if not any(os.access(path, os.R_OK | os.W_OK) for path in DEVICES.glob("nvidia[0-9]*")):
        return None
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
    return f"torch, built for {built}, sees no GPU, but there is one; is its driver too old?"


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
