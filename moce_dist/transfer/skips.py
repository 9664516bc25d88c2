"""Images that cannot be read while a fit is under way: passed over, counted and named.

In training the next image that can be read stands in (classes, masks), or the image is missing
from its batch (detection); in a test it does not count (in a detection's, nothing is found in it).
While a fit that is kept is under way, `FOLDER/skipped.jsonl` has its skips by step, so that a fit
that goes on counts those of before; in the end they are in the run's `faults.jsonl`.

Letters: n images of a rank, S side in pixels.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from moce_dist.data.loaders import load
from moce_dist.run.files import read_jsonl, record_fault, write_atomic
from moce_dist.transfer.fit import Kept
from moce_dist.transfer.loading import Draw, Loaded, Machine, Unread
from moce_dist.transfer.ranks import add_up, in_order

logger = logging.getLogger(__name__)
_FILE = "skipped.jsonl"

Skipped = dict[str, Any]
"""Key of an image, the reason, and in training the step."""


class Skips:
    """The images that a fit passed over; the first rank notes those of all."""

    def __init__(self, machine: Machine, kept: Kept | None = None) -> None:
        self.machine, self._is_first = machine, machine.rank == 0
        self._path = kept.folder / _FILE if kept and self._is_first else None
        self.lines: list[Skipped] = []
        self.test: Sequence[Unread] = ()

    def start(self, step: int) -> None:
        """Take up the skips before a step; what came later is met again."""
        known = read_jsonl(self._path) if self._path else []
        self.lines = [line for line in known if line["step"] < step]
        if len(self.lines) < len(known):
            self._write()

    def note(self, step: int, mine: Sequence[Unread | None]) -> list[Unread]:
        """Note what a step passes over, and return it; `mine` has one entry an image of this rank.

        Collective over the ranks.
        """
        # objects are sent only where there are some
        count = add_up(torch.tensor(sum(fault is not None for fault in mine)), self.machine)
        if not count:
            return []
        faults = [fault for fault in in_order(list(mine), self.machine) if fault]
        if self._is_first:
            _warn(faults)
            self.lines += [{"step": step, "key": f.key, "reason": f.reason} for f in faults]
            self._write()
        return faults

    def _write(self) -> None:
        if self._path:
            write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def close(self) -> list[Skipped]:
        """Return the skips of training and of the last test, and end their keeping on disk."""
        if self._path:
            self._path.unlink(missing_ok=True)
        if self._is_first:
            _warn(self.test)
        return self.lines + [{"key": f.key, "reason": f.reason} for f in self.test]


def record_skips(ledger: Path, skipped: Sequence[Skipped]) -> int:
    """Write a line for every skip into a run's `faults.jsonl`; return the number of images."""
    for each in skipped:
        record_fault(ledger, stage="transfer", key=each["key"], reason=each["reason"])
    return len({each["key"] for each in skipped})


def refuse_all(faults: Sequence[Unread], count: int) -> None:
    """Check that some of `count` images could be read.

    Raises:
        ValueError: none could.
    """
    if faults and len(faults) == count:
        raise ValueError(f"{faults[-1].key}: {faults[-1].reason}; nor can any other be read")


def readable(
    found: Sequence[tuple[Tensor, Tensor, list[Unread | None]]],
) -> tuple[Tensor, Tensor, list[Unread]]:
    """Join (outputs, labels, faults) of batches, without the images that could not be read.

    Raises:
        ValueError: none could.
    """
    faults = [fault for *_, each in found for fault in each]
    unread = [fault for fault in faults if fault]
    refuse_all(unread, len(faults))
    is_read = torch.tensor([fault is None for fault in faults])
    outputs, labels = (torch.cat(parts) for parts in ([f[0] for f in found], [f[1] for f in found]))
    return outputs[is_read], labels[is_read], unread


def training_batches(
    images: Dataset[Loaded], draws: Iterator[list[Draw]], machine: Machine, start: int, skips: Skips
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's part (images (n, 3, S, S), labels) of every batch from step `start` on.

    Notes the images that others stand in for. Collective over the ranks.
    """
    skips.start(start)
    loader = load(images, machine.loader_processes, batch_sampler=draws)
    for step, look in enumerate(loader, start):
        skips.note(step, look.faults())
        yield look.pixels, look.label


def _warn(faults: Sequence[Unread]) -> None:
    for fault in faults:
        logger.warning("%s: skipped: %s", fault.key, fault.reason)
