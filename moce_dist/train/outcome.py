"""The figures that a step leaves on the device, and when the host reads them.

If the host waited for the figures of the step just launched, the device would be idle while the
next step is launched. So the copy to the host is queued behind the step and read one step late,
when it has arrived. Only a step that is logged or saved is read at once.

    host     launch 4   launch 5   read 4   launch 6   read 5
    device              4 4 4 4 4 4 5 5 5 5 5 5 6 6 6 ...
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moce_dist.data.stream import Batch


class Figures(NamedTuple):
    """The figures of a step; the same on all ranks."""

    loss: float
    """Sum over the images of the step."""
    images: float
    """Images that could be read."""
    asked: float
    """Ranks that were asked to stop."""
    writing: float
    """Ranks that were writing a checkpoint when the step was launched, see `Outcome.turn`."""
    norm: float
    """Norm of the gradient before clipping."""
    balance: float
    confidence: float


@dataclass
class Outcome:
    """A launched step: what the host knows of it, and its figures on their way to the host."""

    batch: Batch
    """Without its images and noise."""
    lr: float
    turn: int
    """The turn of the saver that `Figures.writing` is about."""
    figures: Tensor
    """(7,) float64, see `Figures`."""
    _arrival: Any = None

    def __post_init__(self) -> None:
        """Begin to copy the figures to the host."""
        self.batch = self.batch._replace(images=torch.empty(0), noise=torch.empty(0))
        if self.figures.is_cuda:
            host = torch.empty(self.figures.shape, dtype=self.figures.dtype, pin_memory=True)
            self.figures = host.copy_(self.figures, non_blocking=True)
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record()

    @property
    def planned(self) -> int:
        """Images of the step, unreadable ones included; 1 at least."""
        return max(1, int(self.batch.cluster_counts.sum()))

    def read(self) -> Figures:
        """Return the figures; waits for the step if it still runs."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return Figures(*self.figures.tolist())
