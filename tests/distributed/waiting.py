"""Counts the places at which the host would wait for a device, on a machine without one.

On a CPU all tensors are there at once, so what is counted is every call that reads a tensor's
value, brings it to the host or copies into it, by the line of the package that makes it. A tensor
that was made on the host can be read without waiting, and a copy between two tensors of a device
waits for nothing; the lists of the tests name the lines that do only that.
"""

import linecache
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import moce_dist
from moce_dist.parallel.deepspeed_import import deepspeed

NAMES = (
    "item", "tolist", "cpu", "numpy", "copy_", "nonzero", "argwhere", "masked_select", "bincount",
    "unique", "unique_consecutive", "equal", "allclose", "is_nonzero", "__float__", "__int__",
    "__bool__", "__index__", "__array__", "__contains__",
)  # fmt: skip
READS = {
    getattr(owner, name) for owner in (Tensor, torch) for name in NAMES if hasattr(owner, name)
}
PACKAGES = tuple(f"{Path(module.__file__).parent}/" for module in (moce_dist, deepspeed))


class Waits(TorchFunctionMode):
    """Counts reads by `FOLDER/FILE FUNCTION: LINE` of the innermost frame of the packages."""

    def __init__(self):
        super().__init__()
        self.places = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in READS or may_wait(function, args, kwargs or {}):
            self.places[_place()] += 1
        return function(*args, **(kwargs or {}))


def may_wait(function, args, kwargs):
    """Tell whether a call goes to the host, takes values from there, or looks for true entries."""
    if function is Tensor.to:
        return any(map(_is_host, (*args[1:], *kwargs.values())))
    if function in (torch.tensor, torch.as_tensor):
        return kwargs.get("device") is not None
    if function in (Tensor.__getitem__, Tensor.__setitem__):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index)
    return False


def _is_host(target):
    target = target.device if isinstance(target, Tensor) else target
    target = target.type if isinstance(target, torch.device) else target
    return isinstance(target, str) and target.startswith("cpu")


def _place():
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(PACKAGES):
            function = frame.f_code.co_qualname.split(".<locals>")[0]
            line = linecache.getline(path, frame.f_lineno).strip()
            return f"{Path(path).parent.name}/{Path(path).name} {function}: {line}"
        frame = frame.f_back
    return "elsewhere"


def read(values):
    """Look at a value, as a careless line would."""
    values.mean().item()


def copy_to_host(values):
    """Copy a value to the host, as a careless line would."""
    torch.empty(()).copy_(values.mean())
