"""Pictures with boxes, and masks where all objects have them, in COCO's folder layout.

    DATA/annotations/instances_train2017.json      DATA/train2017/NAME.jpg
    DATA/annotations/instances_val2017.json        DATA/val2017/NAME.jpg

Another ending than 2017 (`instances_train.json`, `train/`) is read as well. Everything is checked
before anything is trained.

Letters: H, W height and width of a picture, pixels; C classes.

Source: the 2017 release of COCO (Lin et al. 2014, arXiv 1405.0312).
"""

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from moce_dist.data.decoders import ImageError
from moce_dist.data.upright import Annotated, open_annotated
from moce_dist.run.artefacts import file_sha256
from moce_dist.run.names import as_text
from moce_dist.settings import ConfigError
from moce_dist.transfer.coco_json import Annotation, AnnotationFile, read_annotations
from moce_dist.transfer.tasks import SCAN_LIMIT_BYTES, Item, warn_of_doubt

logger = logging.getLogger(__name__)
_YEAR = "2017"
_LAYOUT = "expected DATA/annotations/instances_{train,val}2017.json and DATA/{train,val}2017"


class Picture(NamedTuple):
    """A picture and its objects; `id` is COCO's."""

    key: str
    image: Path
    id: int
    width: int
    height: int
    annotations: Sequence[Annotation]

    def learnable(self) -> list[Annotation]:
        """Return the objects that a detector learns from: no crowds, no boxes of no area."""
        return [a for a in self.annotations if not a.is_crowd and min(a.box[2:]) > 0]


@dataclass(frozen=True)
class Instances:
    """A detection task: class names, their category ids (C,), and the pictures of its two splits.

    `has_masks` tells whether every object has an outline; otherwise only boxes are learnt.
    """

    name: str
    classes: Sequence[str]
    category_ids: Sequence[int]
    train: Sequence[Picture]
    test: Sequence[Picture]
    has_masks: bool
    annotations_sha256: tuple[str, ...]
    metric: Literal["box AP"] = "box AP"

    def fingerprint(self) -> str:
        """Sha256 over the annotation files, and keys and sizes of the pictures' files."""
        digest = hashlib.sha256(repr(self.annotations_sha256).encode())
        for picture in [*self.train, *self.test]:
            digest.update(f"{picture.key}/{picture.image.stat().st_size}\n".encode())
        return digest.hexdigest()

    def subset(self, max_train: int | None, seed: int) -> "Instances":
        """Keep at most `max_train` training pictures, drawn with `seed`, in their order."""
        if max_train is None or max_train >= len(self.train):
            return self
        kept = np.random.default_rng(seed).permutation(len(self.train))[:max_train]
        return replace(self, train=[self.train[i] for i in sorted(kept)])

    def images(self) -> list[Item]:
        """Return the training pictures without their objects."""
        return [Item(picture.key, picture.image, 0) for picture in self.train]


def read_instances(name: str, data: Path | None) -> Instances:
    """List the pictures and objects of a folder in COCO's layout.

    Training pictures with nothing to learn from are left out.

    Raises:
        ConfigError: a file or folder is missing, an annotation is wrong, or the splits differ in
            their classes.
    """
    if data is None:
        raise ConfigError(f"--task {name}: needs --data; {_LAYOUT}")
    if not data.is_dir():
        raise ConfigError(f"--data {data}: is not a folder; {_LAYOUT}")
    files = [_find(data, split) for split in ("train", "val")]
    folders = [_pictures_of(data, path) for path in files]
    read = [read_annotations(path) for path in files]
    _check_classes(files, read)
    train, test = (_pictures(*pair) for pair in zip(folders, read, strict=True))
    for path, split in zip(files, (train, test), strict=True):
        if not any(picture.learnable() for picture in split):
            raise ConfigError(f"{path}: has no box that is neither a crowd's nor empty")
    train = [picture for picture in train if picture.learnable()]
    ids, classes = zip(*read[0].categories, strict=True)
    shas = tuple(file_sha256(path) for path in files)
    return Instances(name, classes, ids, train, test, _have_masks(data, [*train, *test]), shas)


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


def _pictures_of(data: Path, annotations: Path) -> Path:
    folder = data / annotations.stem.removeprefix("instances_")
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is no folder; it holds the pictures of {annotations.name}")
    return folder


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


def _pictures(folder: Path, read: AnnotationFile) -> list[Picture]:
    found = [
        Picture(
            as_text(f"{folder.name}/{i.file_name}"),
            folder / i.file_name,
            i.id,
            i.width,
            i.height,
            a,
        )
        for i in read.images
        for a in [i.annotations]
    ]
    missing = [picture.image for picture in found if not picture.image.is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ConfigError(f"{missing[0]}: is missing, the annotations list it{more}")
    return found


def _have_masks(data: Path, pictures: Sequence[Picture]) -> bool:
    objects = [a for picture in pictures for a in picture.learnable()]
    lacking = sum(a.segmentation is None for a in objects)
    if 0 < lacking < len(objects):
        logger.warning(
            "%s: %d of %d objects have no outline; only boxes are learnt",
            *(data, lacking, len(objects)),
        )
    return lacking == 0


def load_picture(picture: Picture) -> Image.Image:
    """Decode a picture, RGB: upright, or as stored where its annotations are for that.

    Raises:
        ImageError: it cannot be read, or is not of the size that the annotations are for.
    """
    return _load(picture).image


def _load(picture: Picture) -> Annotated:
    try:
        content = picture.image.read_bytes()
    except OSError as error:
        raise ImageError(str(error)) from None
    return open_annotated(content, (picture.width, picture.height))


def check_instances(instances: Instances, *, threads: int) -> None:
    """Decode all pictures of a task below `SCAN_LIMIT_BYTES`; larger ones are checked as met.

    Raises:
        ConfigError: naming the first picture that is unreadable or of another size than annotated,
            and how many there are.
    """
    every = [*instances.train, *instances.test]
    if sum(picture.image.stat().st_size for picture in every) > SCAN_LIMIT_BYTES:
        return
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        found = list(pool.map(_fault, every))
    if bad := [fault for fault, _ in found if fault]:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise ConfigError(bad[0] + more)
    warn_of_doubt([p.key for p, (_, doubt) in zip(every, found, strict=True) if doubt])


def _fault(picture: Picture) -> tuple[str, bool]:
    try:
        return "", _load(picture).is_in_doubt
    except ImageError as error:
        return f"{picture.image}: unreadable image: {error}", False
