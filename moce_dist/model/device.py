"""The device of a process, and the precision of its matrix products."""

import os

import torch

from moce_dist.config import ParallelConfig
from moce_dist.settings import ConfigError


def choose_device(parallel: ParallelConfig) -> torch.device:
    """Choose this process's device, and set the precision of a GPU's matrix products.

    It is the GPU number LOCAL_RANK (0 if unset) if there is one, unless `parallel.use_gpu` is
    false. TF32 is off, so float32 products are exact float32. With `parallel.deterministic`, a GPU
    operation that is not repeatable bit for bit raises an error.

    Raises:
        ConfigError: `parallel.use_gpu` is true and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if parallel.use_gpu is True and not has_gpu:
        raise ConfigError("parallel.use_gpu (True): no GPU is visible")
    if not parallel.use_gpu or not has_gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if parallel.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return device
