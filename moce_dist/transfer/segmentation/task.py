"""Images with masks in ADE20K's folder layout, checked before anything is trained.

    DATA/images/training/NAME.jpg      DATA/annotations/training/NAME.png
    DATA/images/validation/NAME.jpg    DATA/annotations/validation/NAME.png
    DATA/classes.txt                   one name per line; or ADE20K's objectInfo150.txt; else the
                                       classes are 150 numbers

Masks hold 0 for pixels to ignore, else class + 1.

Letters: H, W height and width of an image, pixels; C classes.

Source: the SceneParsing release of ADE20K (Zhou et al. 2017).
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from PIL import Image

from moce_dist.arrays import Int64
from moce_dist.config import Config, TransferConfig
from moce_dist.data.decoders import ImageError, open_stored
from moce_dist.data.listing import list_images
from moce_dist.data.upright import Annotated, open_annotated
from moce_dist.run.names import as_text, read_names
from moce_dist.settings import ConfigError
from moce_dist.transfer.tasks import Item, Task, data_folder, scan_all, warn_of_doubt

logger = logging.getLogger(__name__)

_LAYOUT = "expected DATA/{images,annotations}/{training,validation}"
IGNORE = -1
_SHARES_SHOWN = 20
_NUM_CLASSES = 150
# byte of a PNG and tag of a TIFF that hold the bit depth; bytes of a PGM that hold its largest grey
_PNG_BITS, _TIFF_BITS, _NETPBM_HEADER = 24, 258, 1000
# lossless formats, in which every class number is kept
_MASK_ENDINGS = frozenset(("png", "tif", "tiff", "bmp", "gif", "pgm", "pnm"))

Labels = Int64


class MaskedImage(NamedTuple):
    """An image and its mask, as files."""

    key: str
    image: Path
    mask: Path


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
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise ConfigError(f"--data {data}: lists the class {twice[0]} more than once")
    return names


def _split(data: Path, split: str) -> list[MaskedImage]:
    images, masks = data / "images" / split, data / "annotations" / split
    for folder in (images, masks):
        if not folder.is_dir():
            raise ConfigError(f"{folder}: is no folder; {_LAYOUT}")
    shown, masked = _by_stem(images, None), _by_stem(masks, _MASK_ENDINGS)
    if not shown:
        raise ConfigError(f"{images}: holds no images; {_LAYOUT}")
    if lacking := [stem for stem in shown if stem not in masked]:
        raise ConfigError(f"{shown[lacking[0]]}: has no mask in {masks} ({len(lacking)} such)")
    if stray := [stem for stem in masked if stem not in shown]:
        raise ConfigError(f"{masked[stray[0]]}: mask without an image ({len(stray)} such)")
    return [
        MaskedImage(f"{split}/{as_text(stem)}", path, masked[stem]) for stem, path in shown.items()
    ]


def _by_stem(folder: Path, endings: Collection[str] | None) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in list_images(folder, endings).usable():
        stem = str(path.relative_to(folder).with_suffix(""))
        if stem in found:
            raise ConfigError(f"{path}: {found[stem].name} has the same name; leave one there")
        found[stem] = path
    return found


def read_mask(path: Path) -> Labels:
    """Read a mask as class indices (H, W) int64; ignored pixels are `IGNORE`.

    Raises:
        ImageError: the file is not an image of one channel.
    """
    try:
        content = path.read_bytes()
        image = open_stored(content).image
    except (ImageError, OSError) as error:
        raise ImageError(f"{path}: unreadable mask: {error}") from None
    if image.mode not in ("L", "P", "I", "I;16", "I;16B"):
        raise ImageError(f"{path}: has mode {image.mode}, must have one channel of class numbers")
    numbers = np.asarray(image).astype(np.int64)
    largest, spread_to = _largest_grey(content, image), 255 if image.mode == "L" else 65535
    if largest != spread_to:
        numbers = np.rint(numbers * (largest / spread_to)).astype(np.int64)
    return numbers - 1


def _largest_grey(content: bytes, image: Image.Image) -> int:
    """Return the largest grey value of a mask's file, which Pillow scales to that of its mode."""
    if image.format == "PPM":
        return int(re.sub(rb"#[^\n]*", b" ", content[:_NETPBM_HEADER]).split()[3])
    bits = 8
    if image.format == "PNG":
        bits = content[_PNG_BITS]
    elif image.format == "TIFF":
        bits = image.tag_v2.get(_TIFF_BITS, (8,))[0]  # type: ignore[attr-defined]
    return 2**bits - 1 if image.mode == "L" else 65535


def load_masked(masked: MaskedImage, num_classes: int) -> tuple[Annotated, Labels]:
    """Read an image, upright or as stored to match its mask, and class indices (H, W).

    Raises:
        ImageError: one of them is unreadable, or the mask has another size or holds a class that
            the task does not have; names the file.
    """
    mask = read_mask(masked.mask)
    try:
        shown = open_annotated(masked.image.read_bytes(), (mask.shape[1], mask.shape[0]))
    except (ImageError, OSError) as error:
        raise ImageError(f"{masked.image}: unreadable image: {error}") from None
    for number in (mask.min() + 1, mask.max() + 1):
        if not 0 <= number <= num_classes:
            most = f"must be at most {num_classes} (classes; 0 is ignored)"
            raise ImageError(f"{masked.mask}: holds {number}, {most}")
    return shown, mask


def _describe(classes: Sequence[str], counts: Labels) -> list[str]:
    names = ["ignored", *classes]
    shares = [
        f"{number} ({names[number]}) {count / counts.sum():.1%}"
        for number, count in enumerate(counts.tolist())
        if count
    ]
    notes = [f"masks hold {', '.join(shares[:_SHARES_SHOWN])}"]
    if absent := [number for number in range(1, len(counts)) if not counts[number]]:
        last = f"class {absent[-1]} ({names[absent[-1]]}) is in no mask"
        notes.append(
            f"{last} ({len(absent)} such classes of {len(classes)}): masks count classes "
            "from 1, and 0 is ignored; to masks that count from 0 add 1"
        )
        if len(absent) >= len(classes) - 1:
            raise ConfigError(f"{'; '.join(notes)}: with a class or none there is nothing to learn")
        logger.warning(notes[-1])
    return notes


@dataclass(frozen=True)
class Segmentation(Task):
    """Images with masks, in ADE20K's layout."""

    kind: ClassVar[str] = "segment"
    names: ClassVar[Sequence[str]] = ("ade20k",)

    metric: str = "mIoU"

    @classmethod
    def read(cls, name: str, data: Path | None) -> Self:
        """List the images of a folder in ADE20K's layout.

        Raises:
            ConfigError: a folder, a mask or an image is missing.
        """
        data = data_folder(name, data, _LAYOUT)
        return cls(name, _classes(data), _split(data, "training"), _split(data, "validation"))

    @classmethod
    def check(cls, config: Config) -> None:
        """Check the size of crop and batch."""
        recipe, patch_size = config.transfer.segmentation, config.model.patch_size
        if recipe.crop % (2 * patch_size):
            raise ConfigError(
                f"transfer.segmentation.crop ({recipe.crop}) must be a multiple of twice "
                f"model.patch_size ({patch_size})"
            )
        if recipe.batch_size < 2:
            raise ConfigError(
                f"transfer.segmentation.batch_size ({recipe.batch_size}) must be 2 or more (batch "
                "normalisation)"
            )
        # batch normalisation is over one micro-batch of all ranks; fewer ranks make more of them
        parallel = config.parallel
        most = -(-parallel.num_workers * parallel.micro_batches // parallel.fewest_workers)
        if recipe.batch_size < 2 * most:
            raise ConfigError(
                f"transfer.segmentation.batch_size ({recipe.batch_size}): must be {2 * most} or "
                "more, 2 crops in a micro-batch of all ranks (batch normalisation), with "
                f"{parallel.fewest_workers} ranks of parallel.num_workers ({parallel.num_workers}) "
                f"and parallel.micro_batches ({parallel.micro_batches})"
            )

    @classmethod
    def budget(cls, transfer: TransferConfig, protocol: str) -> dict[str, Any]:
        """Select the fields of segmentation, under their names of version 0.1."""
        # rows of earlier versions had a faster encoder, whose last block learnt like the head, and
        # crops of any share of a class
        ratio = transfer.segmentation.cat_max_ratio
        return {**transfer.budget("segment_"), "last_block": "decayed", "cat_max_ratio": ratio}

    @classmethod
    def plan(cls, transfer: TransferConfig) -> str:
        """Say what a fit costs."""
        recipe = transfer.segmentation
        return f"{recipe.steps} steps of {recipe.batch_size} crops of {recipe.crop} pixels"

    @classmethod
    def batch_size(cls, transfer: TransferConfig) -> int:
        """Return the crops of a step."""
        return transfer.segmentation.batch_size

    def fingerprint(self) -> str:
        """Return a sha256 over classes, keys, sizes of images, and masks."""
        digest = hashlib.sha256(repr(list(self.classes)).encode())
        for masked in [*self.train, *self.test]:
            digest.update(f"{masked.key}/{masked.image.stat().st_size}\n".encode())
            # a corrected mask may have the size of the wrong one
            digest.update(hashlib.sha256(masked.mask.read_bytes()).digest())
        return digest.hexdigest()

    def images(self) -> list[Item]:
        """Return the training images without their masks."""
        return [Item(masked.key, masked.image) for masked in self.train]

    def scan(self, *, threads: int) -> list[str]:
        """Decode all images and masks and compare them.

        Returns notes: how often every number of a mask occurs, and which class is in no mask.

        Raises:
            ConfigError: a file cannot be used, or the masks hold fewer than two classes.
        """
        num_classes = len(self.classes)

        def look(masked: MaskedImage) -> tuple[bool, Labels]:
            shown, mask = load_masked(masked, num_classes)
            counts = np.bincount(mask.ravel() - IGNORE, minlength=num_classes + 1)
            return shown.is_in_doubt, counts

        every = [*self.train, *self.test]
        found = scan_all(every, lambda masked: masked.image.stat().st_size, look, threads)
        if not found:
            return []
        pairs = zip(every, found, strict=True)
        warn_of_doubt([masked.key for masked, (is_in_doubt, _) in pairs if is_in_doubt])
        return _describe(self.classes, np.sum([counts for _, counts in found], axis=0))
