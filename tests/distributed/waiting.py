"""Counts the places at which the host would wait for a device, on a machine without one.

On a CPU all tensors are there at once, so what is counted is every call that reads a tensor's
value or brings it to the host, by the function of the package that makes it. Reading a tensor that
was made on the host waits for nothing; the lists of the tests say which functions do that.
"""

import sys
from collections import Counter
from pathlib import Path

import deepspeed
from torch import Tensor
from torch.overrides import TorchFunctionMode

import moce_dist

READS = {
    getattr(Tensor, name)
    for name in (
        "item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__",
        "nonzero", "__array__", "__contains__",
    )
}  # fmt: skip
PACKAGES = tuple(f"{Path(module.__file__).parent}/" for module in (moce_dist, deepspeed))


class Waits(TorchFunctionMode):
    """Counts reads by FILE:FUNCTION of the innermost frame of the package, or of DeepSpeed."""

    def __init__(self):
        super().__init__()
        self.places = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in READS or self._goes_to_host(function, args, kwargs or {}):
            self.places[_place()] += 1
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _goes_to_host(function, args, kwargs):
        if function is Tensor.to:
            return "cpu" in [v for v in (*args[1:], *kwargs.values()) if isinstance(v, str)]
        return False


def _place():
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(PACKAGES):
            return f"{Path(path).parent.name}/{Path(path).name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def look(output):
    """Look at a value, as a careless line of a model would."""
    output.mean().item()
