"""Classification tasks: the reader of each task name; class folders and tars.

    DATA/train/CLASS/*.jpg        DATA/test/CLASS/*.jpg   (or DATA/val)         imagefolder

    DATA/train-*.tar              DATA/test-*.tar         (or DATA/val-*.tar)   webdataset
        KEY.jpg + KEY.cls, a class number
    DATA/classes.txt              optional: class names, one per line; default: the numbers

With `transfer.evaluate: val`, figures are measured on DATA/val if an `imagefolder` has DATA/test
too; for every other task, on a fifth of the training images. Three small tasks are cut from images
that installed packages contain. `official.py` reads published sets. Images in tars are not
unpacked; they are read by byte range.

Source: torchvision.datasets.ImageFolder for the folders; WebDataset's naming rule and its `cls`
member for the tars, see `moce_dist.data.tarscan`.
"""

import hashlib
import logging
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from moce_dist.config import TransferConfig
from moce_dist.data.decoders import ImageError
from moce_dist.data.images import open_image
from moce_dist.data.listing import list_folders, list_images
from moce_dist.data.shards import read_range
from moce_dist.data.sources import TASKS as SAMPLE_TASKS
from moce_dist.data.tarscan import scan_tar
from moce_dist.run.names import and_more, as_text, read_names
from moce_dist.samples import sets
from moce_dist.settings import ConfigError
from moce_dist.transfer.classification.official import OFFICIAL, official_task
from moce_dist.transfer.tasks import FilePart, Item, Splits, Task, data_folder, scan_all, sizes_of

logger = logging.getLogger(__name__)
LOGISTIC = re.compile(r"logistic([1-9]\d*)?")
"""Logistic regression on all training images, or on N per class: `logistic10` has N = 10."""


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


def image_folder(
    name: str, data: Path | None, test_names: Sequence[str] = ("test", "val")
) -> Splits:
    """Read a folder of class folders per split; test on the first of `test_names` that exists.

    Raises:
        ConfigError: a folder is missing or empty, or the splits differ in their classes.
    """
    layout = "expected DATA/train/CLASS/IMAGE and DATA/test/CLASS/IMAGE (or DATA/val)"
    data = data_folder(name, data, layout)
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
    return Splits([as_text(name) for name in classes], train, test)


def sample_task(name: str, data: Path | None) -> Splits:
    """Build a small task from images that installed packages contain.

    Raises:
        ConfigError: `--data` was given, which this task does not use, or the package is missing.
    """
    if data is not None:
        raise ConfigError(f"--data {data}: task {name} has its own images; leave --data out")
    made = sets.task(name)
    train, test = (
        [Item(f"{split}/{i}", content, label) for i, (content, label) in enumerate(pairs)]
        for split, pairs in (("train", made.train), ("test", made.test))
    )
    return Splits(list(made.classes), train, test)


# a label with more digits is a mistake, and a list of that many classes would not fit in memory
_LABEL_DIGITS = 7
_LAYOUT = "expected DATA/train-*.tar and DATA/test-*.tar (or DATA/val-*.tar)"


def tar_task(name: str, data: Path | None) -> Splits:
    """Read the labels of all samples and the positions of their images in the tars.

    Raises:
        ConfigError: tars are missing or damaged, or a sample has no image or no valid label.
    """
    data = data_folder(name, data, _LAYOUT)
    tars = {split: sorted(data.glob(f"{split}-*.tar")) for split in ("train", "test", "val")}
    tested = tars["test"] or tars["val"]
    for split, found in (("train", tars["train"]), ("test or val", tested)):
        if not found:
            raise ConfigError(f"--data {data}: has no tars of {split}; {_LAYOUT}")
    train, test = ([i for tar in part for i in _items(tar)] for part in (tars["train"], tested))
    return Splits(_classes(data, [*train, *test]), train, test)


def _items(tar: Path) -> Iterator[Item]:
    try:
        with tar.open("rb") as file:
            scan = scan_tar(file)
    except tarfile.ReadError as error:
        raise ConfigError(f"{tar}: is not an uncompressed tar file ({error})") from None
    if scan.problems or not scan.samples:
        raise ConfigError(f"{tar}: {scan.problems[0] if scan.problems else 'holds no samples'}")
    if lost := [problem for sample in scan.samples for problem in sample.problems()]:
        raise ConfigError(f"{tar}: {lost[0].key}: {lost[0].reason}{and_more(lost)}")
    keys: set[str] = set()
    for sample in scan.samples:
        if sample.key in keys:
            raise ConfigError(f"{tar}: {sample.key}: two samples have this key")
        keys.add(sample.key)
        image = sample.image
        assert image is not None, "a sample without problems has an image"
        content = FilePart(tar, image.offset_data, image.size)
        member = sample.members.get("cls")
        if member is None:
            raise ConfigError(
                f"{tar}: sample {sample.key} has no label (a member {sample.key}.cls)"
            )
        label = read_range(str(tar), member.offset_data, member.size)
        text = label.decode("utf-8", "replace").strip()
        if not text.isascii() or not text.isdigit() or len(text) > _LABEL_DIGITS:
            raise ConfigError(f"{tar}: {sample.key}.cls = {text[:40]!r}: must be a class number")
        yield Item(f"{as_text(tar.name)}/{sample.key}", content, int(text))


def _classes(data: Path, items: list[Item]) -> list[str]:
    most, listed = max((i.label, i.key) for i in items), data / "classes.txt"
    assert isinstance(most[0], int)
    has_list = listed.is_file()
    names = read_names(listed) if has_list else [str(i) for i in range(most[0] + 1)]
    if most[0] >= len(names):
        raise ConfigError(f"{most[1]}.cls = {most[0]}: {listed} lists {len(names)} classes")
    if len(names) < 2:
        raise ConfigError(f"--data {data}: has {len(names)} classes, needs two or more")
    return names


TASKS: dict[str, Callable[[str, Path | None], Splits]] = {
    **dict.fromkeys(SAMPLE_TASKS, sample_task),
    "imagefolder": image_folder,
    "webdataset": tar_task,
    **dict.fromkeys(OFFICIAL, official_task),
}


def _look(item: Item) -> None:
    where = item.content if isinstance(item.content, Path) else item.key
    try:
        open_image(item.read())
    except (ImageError, OSError) as error:
        raise ImageError(f"{where}: unreadable image: {error}") from None


@dataclass(frozen=True)
class Classification(Task):
    """Labelled images; with the metric `mAP` an image has several labels."""

    kind: ClassVar[str] = "classify"
    names: ClassVar[Sequence[str]] = tuple(TASKS)
    protocols: ClassVar[Sequence[str]] = ("finetune", "linear", "knn")
    images_per_worker: ClassVar[int] = 2  # Mixup pairs images
    can_validate: ClassVar[bool] = True

    metric: str = "accuracy"

    @property
    def is_multi_label(self) -> bool:
        """Tell whether an image has several labels."""
        return self.metric == "mAP"

    @classmethod
    def read(cls, name: str, data: Path | None) -> Self:
        """List a task's images with the reader of its name; see the readers in `TASKS`."""
        metric = OFFICIAL[name].metric if name in OFFICIAL else "accuracy"
        return cls(name, *TASKS[name](name, data), metric)

    @classmethod
    def open(cls, name: str, data: Path | None, evaluate: str = "test") -> Self:
        """List a task's images; `val` tests on DATA/val of an `imagefolder` with three splits."""
        has_three = data is not None and all((data / split).is_dir() for split in ("val", "test"))
        if evaluate == "val" and name == "imagefolder" and has_three:
            return cls(name, *image_folder(name, data, ("val",)))
        return super().open(name, data, evaluate)

    @classmethod
    def more_protocols(cls, name: str) -> str:
        """Name the logistic protocols where they are accepted."""
        return ", logistic, logisticN (N labels a class)" if cls.takes("logistic", name) else ""

    @classmethod
    def takes(cls, protocol: str, name: str) -> bool:
        """Tell whether a protocol is known; the logistic ones need one label per image."""
        if LOGISTIC.fullmatch(protocol) is not None:
            return name not in OFFICIAL or OFFICIAL[name].metric != "mAP"
        return protocol in cls.protocols

    @classmethod
    def needs_data(cls, name: str) -> bool:
        """Tell whether the user has to supply a task's images (`--data`)."""
        return name not in SAMPLE_TASKS

    @classmethod
    def budget(cls, transfer: TransferConfig, protocol: str) -> dict[str, Any]:
        """Select the fields of `transfer` that the result of a protocol depends on."""
        own = {"knn": ["knn_k"], "linear": ["linear_epochs"], "finetune": ["finetune"]}
        fields = transfer.flat()
        return {name: fields[name] for name in ["max_train", *own.get(protocol, [])]}

    @classmethod
    def plan(cls, transfer: TransferConfig) -> str:
        """Describe the cost of the protocols in one line, for `--dry-run`."""
        return (
            f"finetune {transfer.finetune.epochs} epochs of batches of "
            f"{transfer.finetune.batch_size}, linear {transfer.linear_epochs} epochs, "
            f"knn {transfer.knn_k} neighbours"
        )

    @classmethod
    def batch_size(cls, transfer: TransferConfig) -> int:
        """Return the number of images of a fine-tuning step, over all ranks."""
        return transfer.finetune.batch_size

    def fingerprint(self) -> str:
        """Return a sha256 of all keys, sizes, labels and class names, and of images in memory."""
        digest = hashlib.sha256(repr(list(self.classes)).encode())
        items = [*self.train, *self.test]
        for item, size in zip(items, sizes_of(items), strict=True):
            digest.update(f"{item.key}/{size}/{item.label}\n".encode())
            if isinstance(item.content, bytes):
                digest.update(item.content)
        return digest.hexdigest()

    def images(self) -> list[Item]:
        """Return the training images."""
        return list(self.train)

    def part_of(self, transfer: TransferConfig, protocol: str, seed: int) -> Self:
        """Keep the training images that a protocol may use; fine-tuning has its own limit."""
        part = super().part_of(transfer, protocol, seed)
        is_capped = protocol == "finetune"
        return part.subset(transfer.finetune.max_train, seed) if is_capped else part

    def scan(self, *, threads: int) -> list[str]:
        """Decode all images that are stored in files; see `Task.scan`."""
        items = [i for i in [*self.train, *self.test] if not isinstance(i.content, bytes)]
        scan_all(items, Item.size, _look, threads)
        return []
