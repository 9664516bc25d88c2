"""Signs of life of a training: how far every rank is, and who stands still.

A loop asks its pulse once a step whether to stop. A worker sends what its pulse knows to the desk
(launch.py) every second; the driver looks at all of them:

    rank 0   step 41, for 310 s      waits for rank 1 in a collective
    rank 1   step 40, for 312 s      is behind: it stands still, and is killed
    rank 2   nothing for 305 s       its process is stopped: it stands still, too

Time between two steps in which something else is done (a save, a measurement) is no step: there the
loop rests, and only silence counts.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_STEPS = 64
_MEDIANS = 10


def never() -> bool:
    """Never ask a training to stop."""
    return False


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself: loop and step that it is in, and for how long.

    `age_s` is None while no step is under way; `median_s` is the median of the last steps.
    """

    loop: str = ""
    step: int = -1
    age_s: float | None = None
    median_s: float = 0.0


class Pulse:
    """Asked once a step whether to stop; a yes on one rank is enough for all to save and leave."""

    def __init__(self, should_stop: Callable[[], bool] = never) -> None:
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
        """Note that what follows, until the next step, may take its time."""
        self._since = None

    def beat(self) -> Beat:
        """Return what there is to say now; called on another thread."""
        since, steps = self._since, [*self._steps]
        return Beat(
            self._loop,
            self._step,
            None if since is None else time.monotonic() - since,
            statistics.median(steps) if steps else 0.0,
        )


@dataclass(frozen=True)
class Sign:
    """A rank's last beat, when it came (seconds of this host's clock), and where the rank is."""

    node: str
    address: str
    process: int
    at: float
    beat: Beat = Beat()


def standing_still(signs: Mapping[int, Sign], timeout_s: float, now: float) -> dict[int, str]:
    """Find the ranks that stand still, each with a line that says so.

    None does before `timeout_s`, nor before ten times the median step.
    """
    limit = max([timeout_s, *(_MEDIANS * sign.beat.median_s for sign in signs.values())])
    silent = {rank: now - sign.at for rank, sign in signs.items() if now - sign.at > limit}
    if silent:
        return {r: _say(r, signs[r], f"no sign of life for {s:.0f} s") for r, s in silent.items()}
    ages = {
        rank: sign.beat.age_s + now - sign.at
        for rank, sign in signs.items()
        if sign.beat.age_s is not None
    }
    # a rank that rests may be at what the others wait for
    if len(ages) < len(signs) or max(ages.values(), default=0.0) <= limit:
        return {}
    last = min(sign.beat.step for sign in signs.values())
    return {
        rank: _say(rank, sign, f"in step {last} of {sign.beat.loop} for {ages[rank]:.0f} s")
        for rank, sign in signs.items()
        if sign.beat.step == last
    }


def _say(rank: int, sign: Sign, what: str) -> str:
    return f"rank {rank} on node {sign.address} (process {sign.process}) stands still: {what}"
