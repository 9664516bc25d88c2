"""Rows that a process keeps on its GPU from one sweep to the next.

Rows are kept as they lie in the files. Sweeps go over all blocks in the same order, so what does
not fit is read again every time, and what is there stays: to put the least recently used out would
put out all.

Letters: n rows, D width.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

_KEPT_FREE = 0.3
"""Share of the device's memory that stays free for what is computed."""

Key = tuple[str, int, int, int]
"""File, first row, row after the last, time of the file's last change."""


class Residents:
    """Blocks of rows, (n, D) each, on one device."""

    def __init__(self) -> None:
        self._rows: dict[Key, Tensor] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, key: Key, read: Callable[[], Tensor]) -> Tensor:
        """Return rows that are here, or `read` them and keep them while there is room."""
        if (kept := self._rows.get(key)) is not None:
            return kept
        rows = read()
        free, total = torch.cuda.mem_get_info(rows.device)
        # what the allocator holds and nobody uses is free as well
        unused = torch.cuda.memory_reserved(rows.device) - torch.cuda.memory_allocated(rows.device)
        if free + unused > _KEPT_FREE * total:
            self._rows[key] = rows
        return rows


@lru_cache(maxsize=1)
def residents() -> Residents:
    """Return what this process keeps."""
    return Residents()
