"""DeepSpeed: all of it that the package uses; no other file imports it.

Its autotuner, which is unused here, imports mlflow where that is installed, and with it pandas:
1.5 s in every process. So mlflow is hidden for the time of the import, as if it were missing.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    before = modules.get(name)
    modules[name] = None  # the import statement then raises ImportError
    try:
        yield
    finally:
        if before is None:
            del modules[name]
        else:
            modules[name] = before


with _hidden("mlflow"):
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from deepspeed.utils import groups as deepspeed_groups
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

__all__ = [
    "CPU_Accelerator",
    "CUDA_Accelerator",
    "MoE",
    "deepspeed",
    "deepspeed_groups",
    "get_accelerator",
    "safe_get_full_fp32_param",
    "safe_get_full_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_optimizer_state",
    "set_accelerator",
    "split_params_into_different_moe_groups_for_optimizer",
]
