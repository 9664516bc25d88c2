"""Progress of long loops as plain log lines: done, rate, time left."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


def track(
    items: Iterable[Item], what: str, *, total: int | None = None, every_s: float = 10
) -> Iterator[Item]:
    """Yield the items; log every `every_s` seconds how many are done and how long is left."""
    start = said = time.monotonic()
    for number, item in enumerate(items):
        now = time.monotonic()
        if now - said >= every_s:
            said = now
            logger.info("%s", _line(number, now - start, what, total))
        yield item


def _line(done: int, seconds: float, what: str, total: int | None) -> str:
    rate = done / seconds
    if total is None:
        return f"{done} {what}, {rate:.1f}/s"
    if done == 0:
        return f"0 of {total} {what}, after {seconds:.0f} s"
    return f"{done} of {total} {what}, {rate:.1f}/s, {(total - done) / rate:.0f} s left"
