"""Read the images of the small study from packages: every set is a stream of small squares.

A set is a domain of the pre-training data and, if its images have classes, also a task. Every
image carries its group: images of one group are relatives (frames of one unit, styles of one
emoji, tiles of one place) and stay together in every split.

Axes: H rows, W columns; squares are (32, 32) or (32, 32, 3), uint8.
"""

import gzip
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from moce_dist.arrays import Pixels
from moce_dist.samples import carriers, desktop, detection, sets

SIDE = 32
Split = Literal["train", "val", "test"]
Open = Callable[[str], Path]
"""Returns the folder of a package by its name."""

_FASHION = (
    *("t_shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "boot"),
)
_WHITE, _GREY = (255, 255, 255), (128, 128, 128)
_NO_TERRAIN = {"masks", "symbols", "off-map", "fog", "void", "light", "misc", "map-specific"}
# code points of an emoji that only say who does it
_WHO = {"200d", "2640", "2642", "fe0f", "1f468", "1f469", "1f9d1", "27a1"}
_TILE, _TILES_PER_SIDE, _TILES_PER_TEXTURE = 64, 9, 8
_VAL_BLOCKS = 10
_CROPS, _MIN_CROP = 120, 64
_MAGIC = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP", re.DOTALL)


class SmallImage(NamedTuple):
    """A square, its group, its class if it has one, and its split if that is given."""

    pixels: Pixels
    group: str
    label: str | None = None
    split: Split | None = None


def _middle(image: Image.Image) -> Pixels:
    side = min(image.size)
    left, upper = ((length - side) // 2 for length in image.size)
    square = image.convert("RGB").crop((left, upper, left + side, upper + side))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BOX))


def _on(colour: tuple[int, int, int], image: Image.Image) -> Pixels | None:
    # the visible part of a cut-out, as a square on a plain background
    image = image.convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha >= 32)).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2), image)
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BOX))


def _framed(pixels: Pixels) -> Pixels:
    # 28 pixels become 32 by repeating the border
    margin = (SIDE - pixels.shape[0]) // 2
    return np.pad(pixels, margin, mode="edge")


def _word(name: str) -> str:
    # bears_02.png and bears-red.png are relatives
    return next(iter(re.findall("[a-z]+", name.lower())), name)


def fashion(package: Open) -> Iterator[SmallImage]:
    """70,000 photographs of clothes; the official test images are for testing."""
    root = package("dataset-fashion-mnist") / "usr/share/datasets/fashion-mnist"
    for part in ("train", "t10k"):
        images, labels = (
            np.frombuffer(gzip.decompress((root / f"{part}-{name}.gz").read_bytes()), np.uint8)
            for name in ("images-idx3-ubyte", "labels-idx1-ubyte")
        )
        for number, label in enumerate(labels[8:]):
            square = _framed(images[16 + 784 * number :][:784].reshape(28, 28))
            name = _FASHION[label]
            yield SmallImage(square, f"{part}/{number}", name, "test" if part == "t10k" else None)


def _labelled(found: carriers.Labelled) -> Iterator[SmallImage]:
    for number, (pixels, label) in enumerate(zip(found.images, found.labels, strict=True)):
        yield SmallImage(_framed(pixels), str(number), found.classes[label])


def digits(_: Open) -> Iterator[SmallImage]:
    """5,000 handwritten digits."""
    return _labelled(carriers.digits())


def silhouettes(_: Open) -> Iterator[SmallImage]:
    """9,716 outlines of animals."""
    return _labelled(carriers.silhouettes())


def emoji(package: Open) -> Iterator[SmallImage]:
    """Emoji in three styles, by category; who does a thing, and the style, make no new group."""
    root = package("emoji-datasource-google") / "package"
    fluent = {
        path.stem.replace("-fe0f", ""): path
        for path in (package("@lobehub/fluent-emoji-3d") / "package/assets").glob("*.webp")
    }
    twitter = package("emoji-datasource-twitter") / "package/img/twitter/64"
    for entry in json.loads((root / "emoji.json").read_text()):
        name = entry["image"].removesuffix(".png")
        parts = [part for part in name.split("-") if part not in _WHO]
        places = [root / "img/google/64" / entry["image"], twitter / entry["image"]]
        places += [fluent[key]] if (key := name.replace("-fe0f", "")) in fluent else []
        for path in places:
            if path.is_file() and (square := _on(_WHITE, Image.open(path))) is not None:
                yield SmallImage(square, "-".join(parts) or name, entry["category"].split(" ")[0])


def clip_art(package: Open) -> Iterator[SmallImage]:
    """Drawings by subject; those of one folder that begin with the same word are relatives."""
    root = package("openclipart-png") / "usr/share/openclipart/png"
    for path in sorted(path for path in root.rglob("*.png") if not path.is_symlink()):
        try:
            image = Image.open(path)
        except Image.DecompressionBombError:
            continue
        if max(image.size) <= 3000 and (square := _on(_WHITE, image)) is not None:
            place = path.relative_to(root)
            label = place.parts[0] if place.parts[0] not in ("unsorted", "special") else None
            yield SmallImage(square, f"{place.parent}/{_word(place.stem)}", label)


def _wesnoth(package: Open) -> Path:
    return package("wesnoth-1.16-data") / "usr/share/games/wesnoth/1.16/data/core/images"


def _game(root: Path) -> Iterator[SmallImage]:
    for path in sorted(root.rglob("*.png")):
        folder, *rest = path.relative_to(root).parts
        image = Image.open(path)
        if rest and min(image.size) >= SIDE and (square := _on(_GREY, image)) is not None:
            yield SmallImage(square, f"{folder}/{_word(rest[0])}", folder)


def sprites(package: Open) -> Iterator[SmallImage]:
    """Frames of a game's units, by race; frames of one unit are relatives."""
    return _game(_wesnoth(package) / "units")


def terrain(package: Open) -> Iterator[SmallImage]:
    """Fields of a game's ground, by kind; variants of one ground are relatives."""
    for image in _game(_wesnoth(package) / "terrain"):
        if image.label not in _NO_TERRAIN:
            yield image


def textures(package: Open) -> Iterator[SmallImage]:
    """Up to 8 tiles of every texture of a game, by folder; names that begin alike are relatives."""
    root = package("openarena-081-textures") / "usr/share/games/openarena/baseoa"
    with zipfile.ZipFile(root / "pak4-textures.pk3") as archive:
        for name in sorted(archive.namelist()):
            if Path(name).suffix.lower() not in (".jpg", ".png", ".tga"):
                continue
            image = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
            folder, stem = Path(name).parts[-2], Path(name).stem
            for tile in _spread_tiles(image, name):
                yield SmallImage(_middle(tile), f"{folder}/{_word(stem)}", folder)


def _draws(name: str) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))


def _spread_tiles(image: Pixels, name: str) -> Iterator[Image.Image]:
    rows, columns = (length // _TILE for length in image.shape[:2])
    for place in _draws(name).permutation(rows * columns)[:_TILES_PER_TEXTURE].tolist():
        upper, left = (_TILE * step for step in divmod(place, columns))
        yield Image.fromarray(image[upper : upper + _TILE, left : left + _TILE])


def wallpapers(package: Open) -> Iterator[SmallImage]:
    """Crops of photographs and drawings of desktops; none of a wallpaper of detection's test."""
    held = {item.name for item in detection.part(desktop.wallpapers(), "val2017")}
    names = ("mate-backgrounds", "lomiri-wallpapers-16.04", "plasma-workspace-wallpapers")
    paths = [path for name in names for path in (package(name) / "usr/share").rglob("*.*")]
    for path in sorted(path for path in paths if path.suffix in (".jpg", ".png")):
        if path.stem == "screenshot":
            continue
        file = Image.open(path)
        file.draft("RGB", (1024, 1024))
        image = file.convert("RGB")
        theme = path.parts[path.parts.index("contents") - 1] if "contents" in path.parts else ""
        is_held = any(str(path).endswith(name) for name in held)
        draws = _draws(theme or path.stem)
        for _ in range(_CROPS):
            side = int(np.exp(draws.uniform(np.log(_MIN_CROP), np.log(min(image.size)))))
            left, upper = (int(draws.integers(length - side + 1)) for length in image.size)
            crop = image.crop((left, upper, left + side, upper + side))
            group = theme or _word(path.stem)
            yield SmallImage(_middle(crop), group, None, "test" if is_held else None)


def _block_splits() -> dict[tuple[int, int], Split]:
    # blocks of the climate tasks; some of those for training are for validation here
    train = sorted(
        sets.blocks("train"), key=lambda block: hashlib.sha256(str(block).encode()).digest()
    )
    splits: dict[tuple[int, int], Split] = dict.fromkeys(sets.blocks("test"), "test")
    splits |= dict.fromkeys(train[:_VAL_BLOCKS], "val")
    return splits | dict.fromkeys(train[_VAL_BLOCKS:], "train")


def _earth(name: str, scale: int) -> Iterator[tuple[Pixels, tuple[slice, slice], str, Split]]:
    image, splits = carriers.earth(name), _block_splits()
    rows, columns = (size // 300 for size in carriers.EARTH_SHAPE)
    spread = np.linspace(0, 300 * scale - _TILE, scale * _TILES_PER_SIDE)
    steps = spread.round().astype(int).tolist()
    for block in np.ndindex(rows, columns):
        for upper in steps:
            for left in steps:
                top, start = block[0] * 300 * scale + upper, block[1] * 300 * scale + left
                place = (slice(top, top + _TILE), slice(start, start + _TILE))
                group = f"{block[0]}/{block[1]}"
                yield image[place], place, group, splits.get(block, "train")


def satellite(_: Open) -> Iterator[SmallImage]:
    """Tiles of the Blue Marble with land, by climate; those of a block of 300 px are relatives."""
    groups, names = carriers.climate(), carriers.CLIMATE_GROUPS
    task_blocks = {f"{row}/{column}" for row, column in _block_splits()}
    for tile, place, block, split in _earth("bmng", 1):
        counts = np.bincount(groups[place].ravel(), minlength=len(names))
        if counts[0] > 0.8 * counts.sum():
            continue
        # lakes are too few to be a class
        is_class = block in task_blocks and counts.argmax() < len(names) - 1
        label = names[counts.argmax()] if is_class else None
        yield SmallImage(_middle(Image.fromarray(tile)), block, label, split)


def relief(_: Open) -> Iterator[SmallImage]:
    """Tiles of a shaded relief of the earth, without the places of the climate tasks' tests."""
    for tile, _place, block, split in _earth("shadedrelief", 2):
        yield SmallImage(_middle(Image.fromarray(tile)), block, None, split)


def elevation(_: Open) -> Iterator[SmallImage]:
    """Tiles of a map of heights and depths, without the same places."""
    for tile, _place, block, split in _earth("etopo1", 1):
        yield SmallImage(_middle(Image.fromarray(tile)), block, None, split)


def brain(_: Open) -> Iterator[SmallImage]:
    """Slices of a scan of a brain and of maps of its tissues."""
    for number, plane in enumerate(sets.brain_slices()):
        small = Image.fromarray(plane).resize((SIDE, SIDE), Image.Resampling.BOX)
        yield SmallImage(np.asarray(small), str(number))


def stamps(package: Open) -> Iterator[SmallImage]:
    """Cut-outs by subject; those of detection's test are for testing here too."""
    root = package("tuxpaint-stamps-default") / "usr/share/tuxpaint/stamps"
    held = {item.name for item in detection.part(desktop.stamps(), "val2017")}
    for path in sorted(root.rglob("*.png")):
        place = path.relative_to(root)
        image = Image.open(path)
        image.thumbnail((256, 256))
        if (square := _on(_WHITE, image)) is not None:
            split: Split | None = "test" if str(place) in held else None
            group = f"{place.parent}/{_word(place.stem)}"
            yield SmallImage(square, group, place.parts[0], split)


def games(package: Open) -> Iterator[SmallImage]:
    """Images inside the resource files of learning games."""
    root = package("gcompris-qt-data") / "usr/share"
    for path in sorted(root.rglob("*.rcc")):
        content = path.read_bytes()
        for match in _MAGIC.finditer(content):
            try:
                image = Image.open(io.BytesIO(content[match.start() :]))
                if min(image.size) < SIDE:
                    continue
                square = _on(_WHITE, image) if image.mode in ("P", "LA", "RGBA") else _middle(image)
            except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
                continue
            if square is not None:
                yield SmallImage(square, f"{path.stem}/{match.start()}")
