"""How a stage hands out tasks: one by one in this process, or to workers.

The workers are those of `launch/tasks.py` or `launch/actors.py`. The code that hands out tasks need
not know which, because results come back in the order of the items.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

Shared = TypeVar("Shared")
T = TypeVar("T")
Result = TypeVar("Result")


class MapTasks(Protocol):
    """Apply a module-level function to a shared value and each item, in the items' order."""

    def __call__(
        self, function: Callable[[Shared, T], Result], shared: Shared, items: Sequence[T], /
    ) -> Iterable[Result]:
        """Return `[function(shared, item) for item in items]`."""
        ...


def map_here(
    function: Callable[[Shared, T], Result], shared: Shared, items: Sequence[T], /
) -> Iterable[Result]:
    """Apply the function in this process, one item after the other."""
    return (function(shared, item) for item in items)


class Workers(NamedTuple):
    """The workers of a stage: how they get tasks, and the device of each, cpu or cuda."""

    map_tasks: MapTasks = map_here
    device: str = "cpu"


HERE = Workers()
"""This process, without a GPU."""
