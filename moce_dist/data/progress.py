"""Progress of long loops as plain log lines: done, rate, time left."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


def track(
    items: Iterable[Item],
    what: str,
    *,
    total: int | None = None,
    every_s: float = 10,
    size: Callable[[Item], int] = lambda _: 1,
) -> Iterator[Item]:
    """Yield the items; log every `every_s` seconds how many are done and how long is left.

    `what` begins with the unit. Where items differ in size, `size` says how many units of `total`
    each of them is.
    """
    start = said = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += size(item)
        now = time.monotonic()
        if now - said >= every_s:
            said = now
            logger.info("%s", _line(done, now - start, what, total))


def _line(done: int, seconds: float, what: str, total: int | None) -> str:
    rate, unit = done / seconds, what.partition(" ")[0]
    if total is None:
        return f"{done} {what}, {rate:.1f} {unit}/s"
    if done == 0:
        return f"0 of {total} {what}, after {seconds:.0f} s"
    return f"{done} of {total} {what}, {rate:.1f} {unit}/s, {(total - done) / rate:.0f} s left"
