"""The learning rate of a fit, and the stop when its figures are not finite.

Source: facebookresearch/mae util/lr_sched.py @efb2a80; for detection ViTDet, Li et al. 2022, arXiv
2203.16527, appendix A.2.
"""

import math

import torch

_MIN_LR = 1e-6
# 163889 and 177546 of 184375 steps, in ViTDet
_MILESTONES = (8 / 9, 26 / 27)


def learning_rate(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """Return the rate of a step counted from 0: linear to `peak`, then half a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return _MIN_LR + (peak - _MIN_LR) * 0.5 * (1 + math.cos(math.pi * share))


def stepped_rate(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """Return the rate of a step counted from 0: linear to `peak`, a tenth twice near the end."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return float(peak * 0.1 ** sum(step >= share * steps for share in _MILESTONES))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group to `lr` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def stop_unless_finite(value: float, what: str, fit: str, step: int) -> None:
    """Stop a fit when a figure, which is the same on all ranks, is not finite.

    Raises:
        FloatingPointError: naming the fit, the figure and the step.
    """
    if not math.isfinite(value):
        raise FloatingPointError(f"{fit}: {what} is {value} in step {step}")
