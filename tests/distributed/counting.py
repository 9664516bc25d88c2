"""Counts the operators that a piece of code runs: on a GPU each of them is a kernel or more."""

from torch.utils._python_dispatch import TorchDispatchMode

WITHOUT_A_KERNEL = ("detach", "_unsafe_view", "aten.empty", "aten.new_empty", "profiler.")


class Operators(TorchDispatchMode):
    """Counts what computes or copies; views, memory that is only taken, and marks are left out."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.count += not (function.is_view or any(part in name for part in WITHOUT_A_KERNEL))
        return function(*args, **(kwargs or {}))
