"""Images that cannot be read during a fit: they are skipped, counted and recorded.

In training, the next readable image replaces the unreadable one. In a test it does not count (in
detection, nothing is found in it). While a fit that is kept is running, `FOLDER/skipped.jsonl`
lists its skips by step, so that a resumed fit counts earlier ones too. At the end the run's
`faults.jsonl` lists them.

Letters: n images of a rank, S side in pixels.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from moce_dist.run.files import read_jsonl, record_fault, write_jsonl
from moce_dist.transfer.fit import Kept
from moce_dist.transfer.loading import Draw, Loaded, Machine, Unread
from moce_dist.transfer.ranks import add_up, gathered

logger = logging.getLogger(__name__)
_FILE = "skipped.jsonl"

Skipped = dict[str, Any]
"""Key of an image, the reason, and in training the step."""


class Skips:
    """The images that a fit skipped; rank 0 records those of all ranks."""

    def __init__(self, machine: Machine, kept: Kept | None = None) -> None:
        self.machine, self._is_first = machine, machine.rank == 0
        self._path = kept.folder / _FILE if kept and self._is_first else None
        self.lines: list[Skipped] = []
        self.test: Sequence[Unread] = ()

    def start(self, step: int) -> None:
        """Restore the skips before a step; later ones will be found again."""
        known = read_jsonl(self._path) if self._path else []
        self.lines = [line for line in known if line["step"] < step]
        if len(self.lines) < len(known):
            self._write()

    def note(self, step: int, mine: Sequence[Unread | None]) -> None:
        """Record the skips of a step; `mine` has one entry per image of this rank. Collective."""
        # objects are gathered only if there are any
        if not add_up(torch.tensor(sum(fault is not None for fault in mine)), self.machine):
            return
        every = gathered([fault for fault in mine if fault], self.machine)
        if self._is_first:
            faults = sorted(fault for each in every for fault in each)
            _warn(faults)
            self.lines += [{"step": step, "key": f.key, "reason": f.reason} for f in faults]
            self._write()

    def _write(self) -> None:
        if self._path:
            write_jsonl(self._path, self.lines)

    def close(self) -> list[Skipped]:
        """Return the skips of training and of the last test, and delete their file."""
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
    images: Dataset[Loaded],
    draws: Iterator[list[Draw]],
    machine: Machine,
    start: int,
    skips: Skips,
    **options: Any,
) -> Iterator[tuple[Tensor, Any]]:
    """Yield this rank's part (images (n, 3, S, S), labels) of every batch from step `start` on.

    Records the images that others replace. `options` are a DataLoader's. Collective over the ranks.
    """
    skips.start(start)
    loader = machine.load(images, batch_sampler=draws, **options)
    for step, look in enumerate(loader, start):
        skips.note(step, look.faults())
        yield look.pixels, look.label


def _warn(faults: Sequence[Unread]) -> None:
    for fault in faults:
        logger.warning("%s: skipped: %s", fault.key, fault.reason)
