"""The downstream tasks: labelled images under one name, checked before anything is trained.

A task is two lists of items (an image's bytes or where they lie, and its label). Three small tasks
are cut from images that installed packages carry; `imagefolder` reads any data set laid out as

    DATA/train/CLASS/*.jpg        DATA/test/CLASS/*.jpg   (or DATA/val)

With `transfer.evaluate: val` DATA/val is what figures are of where DATA/test is there too; of any
other task a fifth of the training images.

Published sets are read by `official.py`, tars by `tars.py`; which name is read by whom stands in
`catalog.py`. `ade20k` (pictures with masks) is read by `scenes.py`, `coco` (with boxes) by
`instances.py`.

Source: torchvision.datasets.ImageFolder for the layout.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from moce_dist.data import samples
from moce_dist.data.decoders import ImageError
from moce_dist.data.images import open_image
from moce_dist.data.listing import list_folders, list_images
from moce_dist.data.packing import share
from moce_dist.data.shards import read_range
from moce_dist.run.names import as_text
from moce_dist.settings import ConfigError

logger = logging.getLogger(__name__)
SCAN_LIMIT_BYTES = 10 * 10**9
_VALIDATION = 0.2

Metric = Literal["accuracy", "mean_class_accuracy", "mAP"]


class Range(NamedTuple):
    """Bytes of a file: the picture of a sample in a tar."""

    file: Path
    start: int
    size: int


class Item(NamedTuple):
    """A labelled image: its bytes, or the file or part of a file that holds them.

    The label is a class, or with several labels an image one number a class: 1 there, 0 not there,
    -1 not counted.
    """

    key: str
    content: bytes | Path | Range
    label: int | tuple[int, ...]

    def read(self) -> bytes:
        """Return the compressed image."""
        if isinstance(self.content, Range):
            return read_range(str(self.content.file), self.content.start, self.content.size)
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()

    def size(self) -> int:
        """Return the size of the compressed image, bytes."""
        if isinstance(self.content, Range):
            return self.content.size
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Task:
    """A classification task: class names, the items of its two splits, and its metric.

    With the metric `mAP` an image has several labels.
    """

    name: str
    classes: Sequence[str]
    train: Sequence[Item]
    test: Sequence[Item]
    metric: Metric = "accuracy"

    @property
    def is_multi_label(self) -> bool:
        """Tell whether an image has several labels."""
        return self.metric == "mAP"

    def fingerprint(self) -> str:
        """Sha256 over keys, sizes and labels of all items, and the bytes of those in memory."""
        digest = hashlib.sha256(repr(list(self.classes)).encode())
        for item in [*self.train, *self.test]:
            digest.update(f"{item.key}/{item.size()}/{item.label}\n".encode())
            if isinstance(item.content, bytes):
                digest.update(item.content)
        return digest.hexdigest()

    def images(self) -> list[Item]:
        """Return the training images."""
        return list(self.train)

    def subset(self, max_train: int | None, seed: int) -> "Task":
        """Keep at most `max_train` training items, drawn with `seed`, in their order."""
        if max_train is None or max_train >= len(self.train):
            return self
        kept = np.random.default_rng(seed).permutation(len(self.train))[:max_train]
        return replace(self, train=[self.train[i] for i in sorted(kept)])


def _split_items(split: Path, classes: Sequence[str]) -> list[Item]:
    found: dict[str, list[Path]] = {name: [] for name in classes}
    beside = 0
    for path in list_images(split).usable():
        inner = path.relative_to(split)
        if len(inner.parts) > 1:
            found[inner.parts[0]].append(path)
        else:
            beside += 1
    if beside:
        logger.warning("%s: left out: %d images in no class folder", split, beside)
    if empty := [name for name in classes if not found[name]]:
        raise ConfigError(f"{split / empty[0]}: holds no images ({len(empty)} such class folders)")
    return [
        Item(f"{split.name}/{as_text(path.relative_to(split))}", path, label)
        for label, name in enumerate(classes)
        for path in found[name]
    ]


def image_folder(name: str, data: Path | None, test_names: Sequence[str] = ("test", "val")) -> Task:
    """Read a folder of class folders per split; the first of `test_names` that is there tests.

    Raises:
        ConfigError: a folder is missing or empty, or the splits differ in their classes.
    """
    layout = "expected DATA/train/CLASS/IMAGE and DATA/test/CLASS/IMAGE (or DATA/val)"
    if data is None:
        raise ConfigError(f"--task {name}: needs --data; {layout}")
    if not data.is_dir():
        raise ConfigError(f"--data {data}: is not a folder; {layout}")
    test_name = next((t for t in test_names if (data / t).is_dir()), None)
    wanted = " or ".join(test_names)
    for split, found in (("train", (data / "train").is_dir()), (wanted, test_name)):
        if not found:
            raise ConfigError(f"--data {data}: has no folder {split}; {layout}")
    assert test_name is not None
    classes, others = list_folders(data / "train"), list_folders(data / test_name)
    if len(classes) < 2:
        raise ConfigError(f"{data / 'train'}: has {len(classes)} class folders, needs two or more")
    if classes != others:
        odd = [as_text(name) for name in sorted(set(classes) ^ set(others))]
        raise ConfigError(f"--data {data}: train and {test_name} differ in the classes {odd[:5]}")
    train, test = (_split_items(data / split, classes) for split in ("train", test_name))
    return Task(name, [as_text(name) for name in classes], train, test)


def has_three_splits(data: Path | None) -> bool:
    """Tell whether a folder of class folders has images of its own for validation."""
    return data is not None and all((data / name).is_dir() for name in ("val", "test"))


def sample_task(name: str, data: Path | None) -> Task:
    """Cut a small task from images that installed packages carry.

    Raises:
        ConfigError: `--data` was given, which this task does not read, or the package is missing.
    """
    if data is not None:
        raise ConfigError(f"--data {data}: task {name} has its own images; leave --data out")
    made = samples.task(name)
    train, test = (
        [Item(f"{split}/{i}", content, label) for i, (content, label) in enumerate(pairs)]
        for split, pairs in (("train", made.train), ("test", made.test))
    )
    return Task(name, list(made.classes), train, test)


class _Keyed(Protocol):
    @property
    def key(self) -> str:
        """Name of an image in its task."""
        ...


class _Splits(Protocol):
    @property
    def train(self) -> Sequence[_Keyed]:
        """Images that are learnt from."""
        ...


AnyTask = TypeVar("AnyTask", bound=_Splits)


def validation_split(task: AnyTask) -> AnyTask:
    """Measure a task on a fifth of its training images, by their keys, and train on the others.

    Raises:
        ConfigError: there are too few.
    """
    held = [item for item in task.train if share(item.key) < _VALIDATION]
    kept = [item for item in task.train if share(item.key) >= _VALIDATION]
    if not held or not kept:
        raise ConfigError(f"{len(task.train)} training images are too few to validate on a fifth")
    return replace(task, train=kept, test=held)  # type: ignore[type-var]


SEGMENTATION_TASKS = ("ade20k",)
DETECTION_TASKS = ("coco",)


def unreadable(items: Sequence[Item], *, threads: int) -> Iterator[tuple[Item, str]]:
    """Decode every image once and yield those that cannot be read, each with the reason."""
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        for item, reason in zip(items, pool.map(_why_unreadable, items), strict=True):
            if reason:
                yield item, reason


def _why_unreadable(item: Item) -> str:
    try:
        open_image(item.read())
    except (ImageError, OSError) as error:
        return str(error)
    return ""


def warn_of_doubt(keys: Sequence[str]) -> None:
    """Name the annotated images that are turned by their EXIF, their size telling nothing."""
    if keys:
        logger.warning(
            "%d annotated images are turned by EXIF, the first is %s: their sizes do not tell "
            "whether annotations are for the turned image, as is assumed, or for the stored one",
            *(len(keys), keys[0]),
        )


def check_images(task: Task, *, threads: int) -> None:
    """Scan a task of files below `SCAN_LIMIT_BYTES`; larger ones are checked as they are read.

    Raises:
        ConfigError: naming the first unreadable image and how many there are.
    """
    items = [i for i in [*task.train, *task.test] if not isinstance(i.content, bytes)]
    if sum(item.size() for item in items) > SCAN_LIMIT_BYTES:
        return
    bad = list(unreadable(items, threads=threads))
    if bad:
        item, reason = bad[0]
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        where = item.content if isinstance(item.content, Path) else item.key
        raise ConfigError(f"{where}: unreadable image: {reason}{more}")
