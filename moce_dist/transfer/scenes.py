"""Pictures with masks in ADE20K's folder layout, checked before anything is trained.

    DATA/images/training/NAME.jpg      DATA/annotations/training/NAME.png      0 = ignore, else
    class + 1 DATA/images/validation/NAME.jpg    DATA/annotations/validation/NAME.png
    DATA/classes.txt                   one name a line; or ADE20K's objectInfo150.txt; else 150
    numbers

Letters: H, W height and width of a picture, S side of a crop, pixels; C classes.

Source: the SceneParsing release of ADE20K (Zhou et al. 2017); random scale, crop and mirror as in
mmsegmentation's configs for ADE20K.
"""

import hashlib
import logging
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moce_dist.data.decoders import ImageError, open_stored
from moce_dist.data.images import MEAN, STD
from moce_dist.data.listing import list_images
from moce_dist.data.upright import Annotated, open_annotated
from moce_dist.run.names import as_text, read_names
from moce_dist.settings import ConfigError
from moce_dist.transfer.tasks import SCAN_LIMIT_BYTES, Item, warn_of_doubt

logger = logging.getLogger(__name__)

IGNORE = -1
_SHARES_SHOWN = 20
_NUM_CLASSES = 150
# what keeps every number as it was
_MASK_ENDINGS = frozenset(("png", "tif", "tiff", "bmp", "gif", "pgm", "pnm"))
_SCALES = (0.5, 2.0)
_MEAN = np.array(MEAN, np.float32) * 255
_STD = np.array(STD, np.float32) * 255

Labels = NDArray[np.int64]


class Scene(NamedTuple):
    """A picture and its mask."""

    key: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class Scenes:
    """A segmentation task: class names and the scenes of its two splits."""

    name: str
    classes: Sequence[str]
    train: Sequence[Scene]
    test: Sequence[Scene]
    metric: Literal["mIoU"] = "mIoU"

    def fingerprint(self) -> str:
        """Sha256 over classes, keys and file sizes."""
        digest = hashlib.sha256(repr(list(self.classes)).encode())
        for scene in [*self.train, *self.test]:
            sizes = scene.image.stat().st_size, scene.mask.stat().st_size
            digest.update(f"{scene.key}/{sizes}\n".encode())
        return digest.hexdigest()

    def subset(self, max_train: int | None, seed: int) -> "Scenes":
        """Keep at most `max_train` training scenes, drawn with `seed`, in their order."""
        if max_train is None or max_train >= len(self.train):
            return self
        kept = np.random.default_rng(seed).permutation(len(self.train))[:max_train]
        return replace(self, train=[self.train[i] for i in sorted(kept)])

    def images(self) -> list[Item]:
        """Return the training pictures without their masks."""
        return [Item(scene.key, scene.image, 0) for scene in self.train]


def _classes(data: Path) -> list[str]:
    plain, official = data / "classes.txt", data / "objectInfo150.txt"
    if plain.is_file():
        names = read_names(plain)
    elif official.is_file():
        names = [row.split("\t")[-1].strip() for row in read_names(official)[1:]]
    else:
        return [str(i + 1) for i in range(_NUM_CLASSES)]
    if len(names) < 2:
        raise ConfigError(f"--data {data}: lists {len(names)} classes, needs two or more")
    return names


def _split(data: Path, split: str) -> list[Scene]:
    pictures, masks = data / "images" / split, data / "annotations" / split
    layout = "expected DATA/{images,annotations}/{training,validation}"
    for folder in (pictures, masks):
        if not folder.is_dir():
            raise ConfigError(f"{folder}: is no folder; {layout}")
    shown, masked = _by_stem(pictures, None), _by_stem(masks, _MASK_ENDINGS)
    if not shown:
        raise ConfigError(f"{pictures}: holds no images; {layout}")
    if lacking := [stem for stem in shown if stem not in masked]:
        raise ConfigError(f"{shown[lacking[0]]}: has no mask in {masks} ({len(lacking)} such)")
    if stray := [stem for stem in masked if stem not in shown]:
        raise ConfigError(f"{masked[stray[0]]}: mask without an image ({len(stray)} such)")
    return [Scene(f"{split}/{as_text(stem)}", path, masked[stem]) for stem, path in shown.items()]


def _by_stem(folder: Path, endings: Collection[str] | None) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in list_images(folder, endings).usable():
        stem = str(path.relative_to(folder).with_suffix(""))
        if stem in found:
            raise ConfigError(f"{path}: {found[stem].name} has the same name; leave one there")
        found[stem] = path
    return found


def read_scenes(name: str, data: Path | None) -> Scenes:
    """List the scenes of a folder in ADE20K's layout.

    Raises:
        ConfigError: a folder, a mask or a picture is missing.
    """
    if data is None:
        raise ConfigError(f"--task {name}: needs --data, a folder in ADE20K's layout")
    if not data.is_dir():
        raise ConfigError(f"--data {data}: is not a folder")
    return Scenes(name, _classes(data), _split(data, "training"), _split(data, "validation"))


def read_mask(path: Path) -> Labels:
    """Read a mask as class indices (H, W) int64; ignored pixels are `IGNORE`.

    Raises:
        ImageError: the file is no image of one channel.
    """
    try:
        image = open_stored(path.read_bytes()).image
    except (ImageError, OSError) as error:
        raise ImageError(f"{path}: unreadable mask: {error}") from None
    if image.mode in ("L", "P", "I", "I;16", "I;16B"):
        return np.asarray(image).astype(np.int64) - 1
    raise ImageError(f"{path}: has mode {image.mode}, must have one channel of class numbers")


def load_scene(scene: Scene, num_classes: int) -> tuple[Image.Image, Labels]:
    """Read picture and class indices (H, W).

    Raises:
        ImageError: one of them is unreadable, or the mask has another size or holds a class that
            the task does not have; names the file.
    """
    shown, mask = _load(scene, num_classes)
    return shown.image, mask


def _load(scene: Scene, num_classes: int) -> tuple[Annotated, Labels]:
    mask = read_mask(scene.mask)
    try:
        shown = open_annotated(scene.image.read_bytes(), (mask.shape[1], mask.shape[0]))
    except (ImageError, OSError) as error:
        raise ImageError(f"{scene.image}: unreadable image: {error}") from None
    if mask.max() >= num_classes:
        most = f"must be at most {num_classes} (classes; 0 is ignored)"
        raise ImageError(f"{scene.mask}: holds {mask.max() + 1}, {most}")
    return shown, mask


def check_scenes(scenes: Scenes, *, threads: int) -> list[str]:
    """Decode all images and masks of a task below `SCAN_LIMIT_BYTES` and compare them.

    Returns notes: how often every number of a mask occurs, and which class is in no mask.

    Raises:
        ConfigError: naming the first scene that `load_scene` refuses, and how many there are.
    """
    every, num_classes = [*scenes.train, *scenes.test], len(scenes.classes)
    if sum(scene.image.stat().st_size for scene in every) > SCAN_LIMIT_BYTES:
        return []
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        found = list(pool.map(lambda scene: _look(scene, num_classes), every))
    if bad := [look.fault for look in found if look.fault]:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise ConfigError(bad[0] + more)
    warn_of_doubt([s.key for s, look in zip(every, found, strict=True) if look.is_in_doubt])
    return _describe(scenes, np.sum([look.counts for look in found], axis=0))


class _Look(NamedTuple):
    fault: str
    is_in_doubt: bool
    counts: Labels
    """(C + 1,) pixels of a mask by the number that stands in it."""


def _look(scene: Scene, num_classes: int) -> _Look:
    try:
        shown, mask = _load(scene, num_classes)
    except ImageError as error:
        return _Look(str(error), False, np.zeros(num_classes + 1, np.int64))
    counts = np.bincount(mask.ravel() - IGNORE, minlength=num_classes + 1)
    return _Look("", shown.is_in_doubt, counts)


def _describe(scenes: Scenes, counts: Labels) -> list[str]:
    names = ["ignored", *scenes.classes]
    shares = [
        f"{number} ({names[number]}) {count / counts.sum():.1%}"
        for number, count in enumerate(counts.tolist())
        if count
    ]
    notes = [f"masks hold {', '.join(shares[:_SHARES_SHOWN])}"]
    if absent := [number for number in range(1, len(counts)) if not counts[number]]:
        last = f"class {absent[-1]} ({names[absent[-1]]}) is in no mask"
        notes.append(
            f"{last} ({len(absent)} such classes of {len(scenes.classes)}): masks count classes "
            "from 1, and 0 is ignored; to masks that count from 0 add 1"
        )
        logger.warning(notes[-1])
    return notes


def scaled(picture: Image.Image, short_side: int) -> Image.Image:
    """Resize a picture bilinearly so that its shorter side has `short_side` pixels."""
    factor = short_side / min(picture.size)
    size = [max(short_side, round(side * factor)) for side in picture.size]
    return picture.resize((size[0], size[1]), Image.Resampling.BILINEAR)


def to_pixels(picture: Image.Image) -> NDArray[np.float32]:
    """Normalise a picture by ImageNet's statistics, (3, H, W)."""
    return ((np.asarray(picture, np.float32) - _MEAN) / _STD).transpose(2, 0, 1)


def training_crop(
    picture: Image.Image, mask: Labels, size: int, draws: np.random.Generator
) -> tuple[NDArray[np.float32], Labels]:
    """Make a training sample: random scale (0.5 to 2 of shorter side = S), crop, mirror.

    Returns pixels (3, S, S) and class indices (S, S); what lies outside the picture is ignored.
    """
    factor = draws.uniform(*_SCALES)
    picture = scaled(picture, max(1, round(size * factor)))
    labels = Image.fromarray(mask.astype(np.int32))
    mask = np.asarray(labels.resize(picture.size, Image.Resampling.NEAREST), np.int64)
    pixels = to_pixels(picture)
    top, left = (int(draws.integers(max(1, side - size + 1))) for side in mask.shape)
    window: tuple[Any, ...] = (slice(top, top + size), slice(left, left + size))
    pixels, mask = pixels[:, *window], mask[window]
    if draws.random() < 0.5:
        pixels, mask = pixels[:, :, ::-1], mask[:, ::-1]
    below, beside = size - mask.shape[0], size - mask.shape[1]
    padding = ((0, below), (0, beside))
    return np.pad(pixels, ((0, 0), *padding)), np.pad(mask, padding, constant_values=IGNORE)
