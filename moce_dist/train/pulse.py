"""Heartbeat of a training: the loop and step that a rank is in, and for how long.

A loop asks its pulse once per step whether to stop. While it does something else between two steps
(a save, a measurement), it rests: that time counts as no step. It resumes before the next step, so
that a first step or a step after a save that hangs is noticed. `launch/status.py` judges the
heartbeats of the ranks.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

_STEPS = 64


@dataclass(frozen=True)
class Beat:
    """What a rank reports: the loop and step that it is in, and for how long.

    `age_s` is None while no step is under way; `median_s` is the median of the last steps, 0 before
    the first has ended.
    """

    loop: str = ""
    step: int = -1
    age_s: float | None = None
    median_s: float = 0.0


class Pulse:
    """Asked once per step whether to stop; after a yes on one rank all ranks save and leave."""

    def __init__(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        self._should_stop = should_stop
        self._loop, self._step = "", -1
        self._since: float | None = None
        self._steps = deque[float](maxlen=_STEPS)

    def __call__(self, loop: str, step: int) -> bool:
        """Note that a loop is in a step; tell whether to stop after it."""
        now = time.monotonic()
        if self._since is not None:
            self._steps.append(now - self._since)
        self._loop, self._step, self._since = loop, step, now
        return self._should_stop()

    def rest(self) -> None:
        """Note that the time until the next step belongs to no step."""
        self._since = None

    def resume(self) -> None:
        """Note that a step begins, the first one or the next after a rest."""
        self._since = time.monotonic()

    def beat(self) -> Beat:
        """Return the current state; called from another thread."""
        since, steps = self._since, [*self._steps]
        return Beat(
            self._loop,
            self._step,
            None if since is None else time.monotonic() - since,
            statistics.median(steps) if steps else 0.0,
        )
