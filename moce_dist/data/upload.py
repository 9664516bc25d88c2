"""Batches on their way to a GPU, beside what it computes.

The copies run on a stream of their own: while a step is computed, the next batch arrives. They
start from page-locked memory, so the host does not wait for them either.
"""

from typing import Any

import torch
from torch import Tensor


class Upload:
    """Brings tensors to a device; to a CPU they are there already."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Begin to copy; what is launched from now on waits for the copies, the host does not."""
        if self._stream is None:
            return tensors
        with torch.cuda.stream(self._stream):
            there = tuple(tensor.to(self._device, non_blocking=True) for tensor in tensors)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in there:
            # their memory is the other stream's: it must not be given away while they are in use
            tensor.record_stream(current)
        return there
