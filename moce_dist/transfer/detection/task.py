"""Images with boxes, and masks where all objects have them, in COCO's folder layout.

    DATA/annotations/instances_train2017.json      DATA/train2017/NAME.jpg
    DATA/annotations/instances_val2017.json        DATA/val2017/NAME.jpg

Endings other than 2017 (`instances_train.json`, `train/`) are read as well. Everything is checked
before anything is trained.

Letters: H, W height and width of an image, pixels; C classes.

Source: the 2017 release of COCO (Lin et al. 2014, arXiv 1405.0312).
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from moce_dist.config import Config, TransferConfig
from moce_dist.data.decoders import ImageError
from moce_dist.run.artefacts import file_sha256
from moce_dist.run.names import and_more
from moce_dist.settings import ConfigError
from moce_dist.transfer.detection.coco_json import AnnotationFile, BoxedImage, read_annotations
from moce_dist.transfer.tasks import Item, Task, data_folder, scan_all, warn_of_doubt

logger = logging.getLogger(__name__)
_YEAR = "2017"
_LAYOUT = "expected DATA/annotations/instances_{train,val}2017.json and DATA/{train,val}2017"


def _find(data: Path, split: str) -> Path:
    usual = data / "annotations" / f"instances_{split}{_YEAR}.json"
    if usual.is_file():
        return usual
    found = sorted(usual.parent.glob(f"instances_{split}*.json"))
    if not found:
        raise ConfigError(f"{usual}: is missing; {_LAYOUT}")
    if len(found) > 1:
        raise ConfigError(f"{found[0]}: one of {len(found)} files for {split}; leave one there")
    return found[0]


def _check_classes(files: Sequence[Path], read: Sequence[AnnotationFile]) -> None:
    train, val = (list(each.categories) for each in read)
    if len(train) != len(val):
        raise ConfigError(
            f"{files[1]}: lists {len(val)} categories, {files[0].name} lists {len(train)}"
        )
    for ours, theirs in zip(train, val, strict=True):
        if ours != theirs:
            raise ConfigError(
                f"{files[1]}: category {theirs[0]} ({theirs[1]}) is {ours[0]} ({ours[1]}) in "
                f"{files[0].name}"
            )


def _look(boxed: BoxedImage) -> bool:
    try:
        return boxed.load().is_in_doubt
    except ImageError as error:
        raise ImageError(f"{boxed.image}: unreadable image: {error}") from None


@dataclass(frozen=True)
class Detection(Task):
    """Images with boxes, in COCO's layout; `category_ids` (C,) are COCO's ids of the classes.

    `has_masks` tells whether every object has an outline; otherwise only boxes are learnt.
    """

    kind: ClassVar[str] = "detect"
    names: ClassVar[Sequence[str]] = ("coco",)
    has_scores: ClassVar[bool] = True
    onnx_output: ClassVar[str] = ""

    metric: str = "box AP"
    category_ids: Sequence[int] = ()
    has_masks: bool = False
    annotations_sha256: tuple[str, ...] = ()

    @classmethod
    def read(cls, name: str, data: Path | None) -> Self:
        """List the images and objects of a folder in COCO's layout.

        Training images without learnable objects are left out.

        Raises:
            ConfigError: a file or folder is missing, an annotation is wrong, or the splits differ
                in their classes.
        """
        data = data_folder(name, data, _LAYOUT)
        files = [_find(data, split) for split in ("train", "val")]
        folders = [data / path.stem.removeprefix("instances_") for path in files]
        for folder, path in zip(folders, files, strict=True):
            if not folder.is_dir():
                raise ConfigError(f"{folder}: is no folder; it holds the images of {path.name}")
        found = [read_annotations(*pair) for pair in zip(files, folders, strict=True)]
        _check_classes(files, found)
        train, test = (list(each.images) for each in found)
        if missing := [b.image for b in (*train, *test) if not b.image.is_file()]:
            more = and_more(missing)
            raise ConfigError(f"{missing[0]}: is missing, the annotations list it{more}")
        for path, split in zip(files, (train, test), strict=True):
            if not any(boxed.learnable() for boxed in split):
                raise ConfigError(f"{path}: has no box that is neither a crowd's nor empty")
        train = [boxed for boxed in train if boxed.learnable()]
        objects = [a for boxed in (*train, *test) for a in boxed.learnable()]
        if 0 < (lacking := sum(a.segmentation is None for a in objects)) < len(objects):
            logger.warning(
                "%s: %d of %d objects have no outline; only boxes are learnt",
                *(data, lacking, len(objects)),
            )
        ids, classes = zip(*found[0].categories, strict=True)
        return cls(
            *(name, classes, train, test),
            category_ids=ids,
            has_masks=lacking == 0,
            annotations_sha256=tuple(file_sha256(path) for path in files),
        )

    @classmethod
    def check(cls, config: Config) -> None:
        """Check the size of square and patches."""
        size, patch_size = config.transfer.detection.size, config.model.patch_size
        if patch_size & (patch_size - 1):
            raise ConfigError(
                f"model.patch_size ({patch_size}) must be a power of two for detection, whose "
                "pyramid doubles and halves it"
            )
        # the pyramid's coarsest stride
        coarsest = max(32, 2 * patch_size)
        if size % coarsest:
            raise ConfigError(f"transfer.detection.size ({size}) must be a multiple of {coarsest}")

    @classmethod
    def budget(cls, transfer: TransferConfig, protocol: str) -> dict[str, Any]:
        """Select the fields of detection, under their names of version 0.1."""
        # rows of earlier versions had a faster encoder: its last block learnt like the head
        return {**transfer.budget("detect_"), "last_block": "decayed"}

    @classmethod
    def plan(cls, transfer: TransferConfig) -> str:
        """Say what a fit costs."""
        recipe = transfer.detection
        return (
            f"{recipe.steps} steps of {recipe.batch_size} squares of {recipe.size} pixels, windows "
            f"of {recipe.window} patches"
        )

    @classmethod
    def batch_size(cls, transfer: TransferConfig) -> int:
        """Return the number of squares per step."""
        return transfer.detection.batch_size

    def fingerprint(self) -> str:
        """Return a sha256 over the annotation files, and keys and sizes of the image files."""
        digest = hashlib.sha256(repr(self.annotations_sha256).encode())
        for boxed in [*self.train, *self.test]:
            digest.update(f"{boxed.key}/{boxed.image.stat().st_size}\n".encode())
        return digest.hexdigest()

    def images(self) -> list[Item]:
        """Return the training images without their objects."""
        return [Item(boxed.key, boxed.image) for boxed in self.train]

    def scan(self, *, threads: int) -> list[str]:
        """Decode all images and compare their sizes with the annotated ones."""
        every = [*self.train, *self.test]
        found = scan_all(every, lambda boxed: boxed.image.stat().st_size, _look, threads)
        warn_of_doubt([boxed.key for boxed, doubt in zip(every, found, strict=False) if doubt])
        return []
