"""The interface of a kind of task: its images, and what the rest of `transfer` needs from it.

A kind is a subclass of `Task` in its own folder, a module there that fits and predicts, and a line
in `kinds.py`. This module checks requests, so it must not import anything heavy.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np

from moce_dist.config import Config, TransferConfig
from moce_dist.data.decoders import ImageError
from moce_dist.data.packing import share
from moce_dist.data.shards import read_range
from moce_dist.run.names import and_more
from moce_dist.settings import ConfigError

logger = logging.getLogger(__name__)
SCAN_LIMIT_BYTES = 10 * 10**9
_VALIDATION = 0.2
_STAT_THREADS, _STATS_AT_ONCE = 16, 256

T = TypeVar("T")


class FilePart(NamedTuple):
    """A range of a file's bytes: an image in a tar."""

    file: Path
    start: int
    size: int


class Item(NamedTuple):
    """A labelled image: its bytes, or the file or part of a file that holds them.

    The label is a class. If images have several labels it is one number per class: 1 present, 0
    absent, -1 not counted. Where labels do not matter it is 0.
    """

    key: str
    content: bytes | Path | FilePart
    label: int | tuple[int, ...] = 0

    def read(self) -> bytes:
        """Return the compressed image."""
        if isinstance(self.content, FilePart):
            return read_range(str(self.content.file), self.content.start, self.content.size)
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()

    def size(self) -> int:
        """Return the size of the compressed image, bytes."""
        if isinstance(self.content, FilePart):
            return self.content.size
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def sizes_of(items: Sequence[Item]) -> Iterator[int]:
    """Yield the size of every compressed image, bytes.

    Threads look them up, because a network's file system answers after a millisecond.
    """
    parts = [items[i : i + _STATS_AT_ONCE] for i in range(0, len(items), _STATS_AT_ONCE)]
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        for sizes in pool.map(lambda part: [item.size() for item in part], parts):
            yield from sizes


class Splits(NamedTuple):
    """Class names and the labelled images of the two splits."""

    classes: Sequence[str]
    train: Sequence[Item]
    test: Sequence[Item]


@dataclass(frozen=True)
class Task(ABC):
    """A downstream task: class names, the images of its two splits, and its metric.

    Images have a `key`; their other fields depend on the kind.
    """

    kind: ClassVar[str]
    """Name of the kind in fitted models."""
    names: ClassVar[Sequence[str]]
    """Names that `--task` accepts for this kind."""
    protocols: ClassVar[Sequence[str]] = ("finetune",)
    """Protocols that are used by default."""
    images_per_worker: ClassVar[int] = 1
    """Fewest images of a step that a worker needs to fit."""
    can_validate: ClassVar[bool] = False
    """Whether experts can be chosen by `validate`, which needs images with class labels."""
    has_scores: ClassVar[bool] = False
    """Whether `predict` finds objects with scores."""
    onnx_output: ClassVar[str] = "logits"
    """Name of the output of an ONNX file; "": the kind cannot be exported."""

    name: str
    classes: Sequence[str]
    train: Sequence[Any]
    test: Sequence[Any]
    metric: str

    @classmethod
    @abstractmethod
    def read(cls, name: str, data: Path | None) -> Self:
        """List a task's images and check its files.

        Raises:
            ConfigError: a file or folder is missing or wrong.
        """

    @classmethod
    def open(cls, name: str, data: Path | None, evaluate: str = "test") -> Self:
        """List a task's images; `evaluate: val` tests on a fifth of the training images instead.

        Raises:
            ConfigError: a file or folder is missing or wrong, or there are too few images.
        """
        task = cls.read(name, data)
        if evaluate == "test":
            return task
        held = [image for image in task.train if share(image.key) < _VALIDATION]
        kept = [image for image in task.train if share(image.key) >= _VALIDATION]
        if not held or not kept:
            raise ConfigError(
                f"{len(task.train)} training images are too few to validate on a fifth"
            )
        return replace(task, train=kept, test=held)

    @classmethod
    def more_protocols(cls, name: str) -> str:
        """Return the other protocols that are accepted, as text for an error message."""
        return ""

    @classmethod
    def takes(cls, protocol: str, name: str) -> bool:
        """Tell whether the task of this name can be fitted by a protocol."""
        return protocol in cls.protocols

    @classmethod
    def needs_data(cls, name: str) -> bool:
        """Tell whether the user has to supply a task's images (`--data`)."""
        return True

    @classmethod  # noqa: B027 - a kind may have nothing to check
    def check(cls, config: Config) -> None:
        """Check the fields of the configuration that a fit of this kind depends on.

        Raises:
            ConfigError: naming the field, the value and the rule.
        """

    @classmethod
    @abstractmethod
    def budget(cls, transfer: TransferConfig, protocol: str) -> dict[str, Any]:
        """Select the fields of `transfer` that the result of a protocol depends on."""

    @classmethod
    @abstractmethod
    def plan(cls, transfer: TransferConfig) -> str:
        """Describe the cost of a fit in one line, for `--dry-run`."""

    @classmethod
    @abstractmethod
    def batch_size(cls, transfer: TransferConfig) -> int:
        """Return the number of images of a training step, over all ranks."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a sha256 of all that a result depends on: keys, labels, sizes of files."""

    @abstractmethod
    def images(self) -> list[Item]:
        """Return the training images as items, whose labels are not to be used."""

    def subset(self, max_train: int | None, seed: int) -> Self:
        """Keep at most `max_train` training images, drawn with `seed`, in their original order."""
        if max_train is None or max_train >= len(self.train):
            return self
        kept = np.random.default_rng(seed).permutation(len(self.train))[:max_train]
        return replace(self, train=[self.train[i] for i in sorted(kept)])

    def part_of(self, transfer: TransferConfig, protocol: str, seed: int) -> Self:
        """Keep the training images that a protocol may use."""
        return self.subset(transfer.max_train, seed)

    @abstractmethod
    def scan(self, *, threads: int) -> list[str]:
        """Check all files of a task of at most `SCAN_LIMIT_BYTES`; return notes on their content.

        Files of a larger task are checked when they are used.

        Raises:
            ConfigError: naming the first damaged file, and how many there are.
        """


def data_folder(name: str, data: Path | None, layout: str) -> Path:
    """Return the folder of a task's images; `layout` says in an error what it should hold.

    Raises:
        ConfigError: `--data` is missing, or names no folder.
    """
    if data is None:
        raise ConfigError(f"--task {name}: needs --data; {layout}")
    if not data.is_dir():
        raise ConfigError(f"--data {data}: is not a folder; {layout}")
    return data


def scan_all(
    images: Sequence[T], size: Callable[[T], int], look: Callable[[T], Any], threads: int
) -> list[Any]:
    """Return `look` of every image, or [] if their total size exceeds `SCAN_LIMIT_BYTES`.

    Raises:
        ConfigError: the text of the first ImageError that `look` raises, and how many there are.
    """
    total = 0
    for image in images:
        # of a large data set only the first images are looked up
        if (total := total + size(image)) > SCAN_LIMIT_BYTES:
            return []

    def attempt(image: T) -> Any:
        try:
            return look(image)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        found = list(pool.map(attempt, images))
    if bad := [error for error in found if isinstance(error, ImageError)]:
        raise ConfigError(f"{bad[0]}{and_more(bad)}")
    return found


def warn_of_doubt(keys: Sequence[str]) -> None:
    """Warn of annotated images that EXIF turns and whose size does not tell what was annotated."""
    if keys:
        logger.warning(
            "%d annotated images are turned by EXIF, the first is %s: their sizes do not tell "
            "whether annotations are for the turned image, as is assumed, or for the stored one",
            *(len(keys), keys[0]),
        )
