"""Progress of long loops as plain log lines: done, rate, time left."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
_EVERY_S = 10.0


def track(
    items: Iterable[T],
    what: str,
    *,
    total: int | None = None,
    size: Callable[[T], int] = lambda _: 1,
) -> Iterator[T]:
    """Yield the items; log every ten seconds the number done, the rate and the time left.

    `what` begins with the unit. If items differ in size, `size` returns the units of `total` that
    an item counts for.
    """
    start = said = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += size(item)
        now = time.monotonic()
        if now - said >= _EVERY_S:
            said = now
            rate, unit = done / (now - start), what.partition(" ")[0]
            text = f"{done} {what}" if total is None else f"{done} of {total} {what}"
            if not done and total is not None:
                logger.info("%s, after %.0f s", text, now - start)
                continue
            left = "" if total is None else f", {(total - done) / rate:.0f} s left"
            logger.info("%s, %.1f %s/s%s", text, rate, unit, left)
