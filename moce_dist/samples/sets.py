"""The `sample:NAME` sets: real images for the quickstart, the tests and small experiments.

`pretrain` is the pre-training mix of six domains. `digits`, `silhouettes` and `climate` are
downstream classification tasks, `climate-ade20k` is a segmentation task in ADE20K's folder layout.
`detection.py` builds the detection tasks.

No training or test image of a task is in the mix. Digits and silhouettes are split by the hash of
their pixels, so equal images are in the same part. The earth is split by place: of the blocks of
300 x 300 pixels that contain land, 24 are for training and 12 for testing the climate tasks. No
map of the earth contributes tiles of these blocks to the mix.

    one block of the Blue Marble     300 px    5 x 5 tiles of 64 px, every 59 px
    the same block, shaded relief    600 px   10 x 10 tiles of 64 px, every 60 px

Tiles of one image and slices of one volume are real images, but they are not independent.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moce_dist.arrays import Int64, Pixels
from moce_dist.data.sources import SEGMENTATION, TASKS
from moce_dist.data.writer import all_or_nothing
from moce_dist.run.artefacts import is_complete, mark_complete, read_marker
from moce_dist.samples import carriers
from moce_dist.settings import ConfigError

SetPart = Literal["train", "test", "pretrain"]
_TILE = 64
# lower bounds on the standard deviation of the grey values, of an image and of 4 x 4 cells
_MIN_DEVIATION = 4.0
_MIN_TEXTURE = 0.75
_BLOCK = 300
_GRID = (carriers.EARTH_SHAPE[0] // _BLOCK, carriers.EARTH_SHAPE[1] // _BLOCK)
_BLOCKS = {"test": 12, "train": 24}
# chosen by tile counts alone, so that every climate group has tiles in both parts
_BLOCK_SALT = 1726
_EARTH_IMAGES = {
    "satellite": ("bmng", 1),
    "elevation": ("etopo1", 1),
    "relief": ("shadedrelief", 2),
}
DOMAINS = ("digits", "silhouettes", *_EARTH_IMAGES, "brain")
_TASK_FILES = (
    *("*.png", "train/*/*", "val/*/*", "test/*/*", "images/*/*", "annotations/*/*", "classes.txt"),
    *("annotations/*.json", "train2017/*", "val2017/*"),
)
_PER_CLASS = {"digits": {"test": 50, "train": 100}, "silhouettes": {"test": 70, "train": 130}}


class LabelledImage(NamedTuple):
    """An encoded image and its class."""

    content: bytes
    label: int


@dataclass(frozen=True)
class SampleTask:
    """A downstream classification task; no image of it is in the pre-training mix."""

    train: list[LabelledImage]
    test: list[LabelledImage]
    classes: list[str]


class _Tile(NamedTuple):
    row: int
    column: int
    side: int

    def of(self, image: NDArray[Any], scale: int = 1) -> NDArray[Any]:
        """Cut this tile out of an image in which one unit of the tile is `scale` pixels."""
        return image[
            self.row * scale : (self.row + self.side) * scale,
            self.column * scale : (self.column + self.side) * scale,
        ]


def encode(pixels: Pixels, kind: str = "PNG") -> bytes:
    """Encode pixels (H, W) or (H, W, 3) as PNG or as JPEG of quality 95."""
    buffer = io.BytesIO()
    # PNG level 3 takes half the time of the default 6 and 4 % more bytes
    Image.fromarray(pixels).save(buffer, kind, quality=95, compress_level=3)
    return buffer.getvalue()


def is_informative(pixels: Pixels) -> bool:
    """Tell whether pixels (H, W) or (H, W, 3) show more than one shade or a smooth gradient."""
    gray = pixels.mean(axis=2) if pixels.ndim == 3 else pixels.astype(float)
    cells = gray.reshape(gray.shape[0] // 4, 4, gray.shape[1] // 4, 4)
    texture = cells.std(axis=(1, 3)).mean()
    return bool(gray.std() >= _MIN_DEVIATION and texture >= _MIN_TEXTURE)


def _labelled(name: str) -> carriers.Labelled:
    return carriers.digits() if name == "digits" else carriers.silhouettes()


def _part_rows(name: str, part: SetPart) -> Iterator[int]:
    # the rows of each class are ordered by the hash of their pixels, then split into parts
    images, labels, classes = _labelled(name)
    sizes = _PER_CLASS[name]
    stop = {"test": sizes["test"], "train": sum(sizes.values()), "pretrain": None}[part]
    start = {"test": 0, "train": sizes["test"], "pretrain": sum(sizes.values())}[part]
    for label in range(len(classes)):
        rows = np.flatnonzero(labels == label).tolist()
        rows.sort(key=lambda row: hashlib.sha256(images[row].tobytes()).digest())
        yield from sorted(rows[start:stop])


def blocks(part: SetPart) -> list[tuple[int, int]]:
    """Return the blocks (row, column) of the earth that belong to a part, sorted."""
    land = carriers.land_share(*_GRID)
    every = [(int(row), int(column)) for row, column in np.ndindex(*_GRID)]
    candidates = sorted(
        (block for block in every if land[block] >= 0.05),
        key=lambda block: hashlib.sha256(f"{_BLOCK_SALT}:{block[0]}:{block[1]}".encode()).digest(),
    )
    test, train = _BLOCKS["test"], _BLOCKS["train"]
    held = {"test": candidates[:test], "train": candidates[test : test + train]}
    if part in held:
        return sorted(held[part])
    return [block for block in every if block not in candidates[: test + train]]


def _tiles(block: tuple[int, int], side: int, per_side: int, *, scale: int = 1) -> Iterator[_Tile]:
    """Yield tiles spread evenly over a block of a map `scale` times as fine as the Blue Marble."""
    extent = _BLOCK * scale
    steps = np.linspace(0, extent - side, per_side).round().astype(int).tolist()
    for row in steps:
        for column in steps:
            yield _Tile(block[0] * extent + row, block[1] * extent + column, side)


def brain_slices() -> Iterator[Pixels]:
    """Yield slices of three volumes of a brain along three axes, (64, 64)."""
    for volume in ("t1", "gm", "wm"):
        voxels = carriers.brain(volume)
        for axis in range(3):
            for plane in np.moveaxis(voxels, axis, 0):
                # a slice at the edge of the brain shows a few specks on black
                if (plane > 20).mean() > 0.1:
                    yield _thumbnail(np.rot90(plane))


def _thumbnail(plane: Pixels) -> Pixels:
    square = np.zeros((max(plane.shape),) * 2, np.uint8)
    top, left = ((square.shape[0] - size) // 2 for size in plane.shape)
    square[top : top + plane.shape[0], left : left + plane.shape[1]] = plane
    return np.asarray(Image.fromarray(square).resize((_TILE, _TILE), Image.Resampling.BOX))


def domain_images(name: str) -> Iterator[Pixels]:
    """Yield the pre-training images of a domain, pixels (H, W) or (H, W, 3)."""
    if name in _EARTH_IMAGES:
        source, scale = _EARTH_IMAGES[name]
        image = carriers.earth(source)
        for block in blocks("pretrain"):
            for tile in _tiles(block, _TILE, 5 * scale, scale=scale):
                yield tile.of(image)
    elif name == "brain":
        yield from brain_slices()
    else:
        images = _labelled(name).images
        yield from (images[row] for row in _part_rows(name, "pretrain"))


def pretrain() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the pre-training mix as (key, members), e.g. `relief/000123` with `png` and `json`.

    Images are 28 or 64 pixels wide; near-constant and repeated images are left out.

    Raises:
        ConfigError: a package that contains the images is missing.
    """
    carriers.check_installed()
    seen: set[bytes] = set()
    for domain in DOMAINS:
        number = 0
        for pixels in domain_images(domain):
            digest = hashlib.sha256(pixels.tobytes()).digest()
            if digest in seen or not is_informative(pixels):
                continue
            seen.add(digest)
            yield (
                f"{domain}/{number:06d}",
                {"png": encode(pixels), "json": json.dumps({"domain": domain}).encode()},
            )
            number += 1


def task(name: str) -> SampleTask:
    """Build a downstream classification task: `digits`, `silhouettes` or `climate`.

    The class in `climate` is the most frequent Koeppen group of a 64-pixel tile of the Blue Marble.
    Training and test tiles lie in different blocks; tiles overlap within a block. Lakes are too few
    to be a class.

    Raises:
        ConfigError: there is no such task, or a package is missing.
    """
    if name not in TASKS:
        raise ConfigError(f"sample task {name!r}: must be one of {', '.join(TASKS)}")
    if name == "climate":
        image, groups = carriers.earth("bmng"), carriers.climate()
        return SampleTask(
            list(_climate_tiles(image, groups, "train")),
            list(_climate_tiles(image, groups, "test")),
            list(carriers.CLIMATE_GROUPS[:-1]),
        )
    images, labels, classes = _labelled(name)
    train, test = (
        [LabelledImage(encode(images[row]), int(labels[row])) for row in _part_rows(name, part)]
        for part in ("train", "test")
    )
    return SampleTask(train, test, classes)


def _climate_tiles(image: Pixels, groups: Pixels, part: SetPart) -> Iterator[LabelledImage]:
    for block in blocks(part):
        for tile in _tiles(block, _TILE, 9):
            counts = np.bincount(tile.of(groups).ravel(), minlength=len(carriers.CLIMATE_GROUPS))
            label, pixels = int(counts.argmax()), tile.of(image)
            is_class = label < len(carriers.CLIMATE_GROUPS) - 1
            if is_class and _has_land(counts) and is_informative(pixels):
                yield LabelledImage(encode(pixels), label)


def _has_land(counts: Int64) -> bool:
    # at least a fifth of the tile is not sea
    return bool(counts[0] <= 0.8 * counts.sum())


def write_task(name: str, out: Path) -> None:
    """Write a classification task as folders, `out/train/CLASS/000000.png` and `out/test/...`.

    Raises:
        ConfigError: there is no such task, or a package is missing.
    """

    def files() -> Iterator[tuple[str, bytes]]:
        built = task(name)
        for part, items in (("train", built.train), ("test", built.test)):
            for number, item in enumerate(items):
                yield f"{part}/{built.classes[item.label]}/{number:06d}.png", item.content

    write_files(out, name, files())


def write_climate_segmentation(out: Path) -> None:
    """Write climate groups of Blue Marble tiles (96 x 96) in ADE20K's folder layout.

    `images/{training,validation}/NAME.jpg`, `annotations/{training,validation}/NAME.png` with class
    index + 1 (0 = ignore), and `classes.txt`, one class per line. Training tiles overlap by about
    half, validation tiles do not overlap. The two parts lie in different blocks.

    Raises:
        ConfigError: a package is missing.
    """

    def files() -> Iterator[tuple[str, bytes]]:
        image, groups = carriers.earth("bmng"), carriers.climate()
        yield "classes.txt", "".join(f"{name}\n" for name in carriers.CLIMATE_GROUPS).encode()
        parts: tuple[tuple[SetPart, str, int], ...]
        parts = (("train", "training", 5), ("test", "validation", 3))
        for part, folder, per_side in parts:
            for block in blocks(part):
                for number, tile in enumerate(_tiles(block, 96, per_side)):
                    labels = tile.of(groups)
                    counts = np.bincount(labels.ravel(), minlength=len(carriers.CLIMATE_GROUPS))
                    if _has_land(counts):
                        name = f"block_{block[0]:02d}_{block[1]:02d}_tile_{number:02d}"
                        yield f"images/{folder}/{name}.jpg", encode(tile.of(image), "JPEG")
                        yield f"annotations/{folder}/{name}.png", encode(labels + np.uint8(1))

    write_files(out, SEGMENTATION, files())


def write_files(out: Path, name: str, files: Iterable[tuple[str, bytes]]) -> None:
    """Write all files of a set, given as (path inside `out`, content), or none of them.

    If the set is already complete in `out`, return at once.

    Raises:
        ConfigError: `out` contains other files or another data set.
    """
    inputs = {"source": f"sample:{name}"}
    if is_complete(out, inputs):
        return
    if (marker := read_marker(out)) is not None and marker["inputs"] != inputs:
        raise ConfigError(
            f"{out}: holds other data ({marker['inputs']}); choose another folder, or --fresh"
        )
    with all_or_nothing(out, _TASK_FILES):
        written = []
        for relative, content in files:
            path = out / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            written.append(path)
        mark_complete(out, inputs, written)
