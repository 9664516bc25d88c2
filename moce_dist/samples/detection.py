"""The detection sets of `sample:NAME`, in COCO's folder layout.

`trees-coco`: tiles of aerial photographs with boxes of trees, without masks. Training and test
tiles come from different photographs.

`composited-coco`: cut-outs pasted on wallpapers, all of one class, with boxes and masks. No cut-out
or wallpaper of a training image is in a test image. Results on this set must be called composited.

    annotations/instances_{train,val}2017.json       {train,val}2017/NAME.jpg

Axes: H rows, W columns, n objects; pixels are uint8 in [0, 255]. Boxes are left, upper, right,
lower in pixels.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as run_lengths

from moce_dist.arrays import Int64, Pixels
from moce_dist.data.sources import COMPOSITED, TREES
from moce_dist.samples import carriers, desktop
from moce_dist.samples.desktop import Stamp
from moce_dist.samples.sets import encode, write_files

Split = Literal["train2017", "val2017"]
Mask = NDArray[np.bool_]
Boxes = Int64

_SIDE = 128
TREE_SPLITS: dict[Split, tuple[tuple[str, int], ...]] = {
    # photograph and stride of its tiles in pixels: training tiles overlap
    "train2017": ((carriers.TREE_PHOTOGRAPHS[0], 96), (carriers.TREE_PHOTOGRAPHS[3], 68)),
    "val2017": ((carriers.TREE_PHOTOGRAPHS[1], 128), (carriers.TREE_PHOTOGRAPHS[2], 128)),
}
# a tree of which a tile shows less than this share is ignored, in training and in the metric
_MIN_SHOWN = 0.4
NUM_SCENES: dict[Split, int] = {"train2017": 480, "val2017": 120}
_MAX_STAMPS = 4
_STAMP_SIDES = (28, 72)
_MIN_CROP = 256
_MAX_COVERED = 0.5
_TRIES = 10
_SALT = 7
_TEST_SHARE = 4


class Scene(NamedTuple):
    """An image and its objects: boxes (n, 4), whether to ignore each, masks (H, W) or None.

    Ignored objects have COCO's `iscrowd`.
    """

    pixels: Pixels
    boxes: Boxes
    ignored: Sequence[bool]
    masks: Sequence[Mask] | None


def write_trees(out: Path) -> None:
    """Write the tiles of trees.

    Raises:
        ConfigError: a package is missing.
    """

    def files() -> Iterator[tuple[str, bytes]]:
        yield from _coco_files({split: list(_tree_tiles(split)) for split in TREE_SPLITS}, "tree")

    write_files(out, TREES, files())


def _tree_tiles(split: Split) -> Iterator[Scene]:
    for name, step in TREE_SPLITS[split]:
        photograph = carriers.trees(name)
        height, width = photograph.pixels.shape[:2]
        for upper in range(0, height - _SIDE + 1, step):
            for left in range(0, width - _SIDE + 1, step):
                tile = photograph.pixels[upper : upper + _SIDE, left : left + _SIDE]
                boxes = photograph.boxes - np.array([left, upper, left, upper])
                if (scene := tile_scene(tile, boxes)) is not None:
                    yield scene


def tile_scene(tile: Pixels, boxes: Boxes) -> Scene | None:
    """Clip boxes (n, 4) to a tile (S, S, 3), S = 128, and drop those outside.

    Boxes of which the tile shows too little are ignored. None if there are no others.
    """
    shown = boxes.clip(0, _SIDE)
    visible, whole = (np.prod((b[:, 2:] - b[:, :2]).clip(0), axis=1) for b in (shown, boxes))
    is_there = visible > 0
    ignored = (visible < _MIN_SHOWN * whole)[is_there]
    return None if ignored.all() else Scene(tile, shown[is_there], ignored.tolist(), None)


def write_composited(out: Path) -> None:
    """Write the composited scenes.

    Raises:
        ConfigError: a package is missing.
    """

    def files() -> Iterator[tuple[str, bytes]]:
        stamps, wallpapers = desktop.stamps(), desktop.wallpapers()
        splits = {}
        for index, (split, count) in enumerate(NUM_SCENES.items()):
            own = part(stamps, split), part(wallpapers, split)
            draws = (np.random.default_rng([_SALT, index, number]) for number in range(count))
            splits[split] = [_compose(*own, each) for each in draws]
        yield from _coco_files(splits, "cut-out")

    write_files(out, COMPOSITED, files())


def part(items: Sequence[Any], split: Split) -> list[Any]:
    """Keep the cut-outs or wallpapers of a split.

    The hash of their names selects a quarter of every subject for the test split.
    """
    kept = []
    for label in sorted({item.label for item in items}):
        some = sorted(
            (item for item in items if item.label == label),
            key=lambda item: hashlib.sha256(item.name.encode()).digest(),
        )
        cut = len(some) // _TEST_SHARE
        kept += some[:cut] if split == "val2017" else some[cut:]
    return kept


def _compose(
    stamps: Sequence[Stamp], wallpapers: Sequence[desktop.Wallpaper], draws: np.random.Generator
) -> Scene:
    pixels = wallpapers[int(draws.integers(len(wallpapers)))].pixels
    height, width = pixels.shape[:2]
    side = int(draws.integers(_MIN_CROP, min(height, width) + 1))
    upper, left = int(draws.integers(height - side + 1)), int(draws.integers(width - side + 1))
    crop = Image.fromarray(pixels[upper : upper + side, left : left + side])
    canvas = crop.resize((_SIDE, _SIDE), Image.Resampling.BOX)
    masks: list[Mask] = []
    for _ in range(int(draws.integers(1, _MAX_STAMPS + 1))):
        subject = int(draws.integers(len(desktop.STAMP_SUBJECTS)))
        own = [stamp for stamp in stamps if stamp.label == subject]
        image = Image.fromarray(own[int(draws.integers(len(own)))].pixels, "RGBA")
        factor = draws.uniform(*_STAMP_SIDES) / max(image.size)
        width, height = (max(1, round(side * factor)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        if draws.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        place = _free_place(image, masks, draws)
        if place is None:
            continue
        left, upper, mask = place
        canvas.paste(image, (left, upper), image)
        masks = [*(other & ~mask for other in masks), mask]
    boxes = np.array([Image.fromarray(mask).getbbox() for mask in masks])
    return Scene(np.asarray(canvas), boxes, [False] * len(boxes), masks)


def _free_place(
    image: Image.Image, masks: Sequence[Mask], draws: np.random.Generator
) -> tuple[int, int, Mask] | None:
    # a position where at least half of every cut-out below stays visible
    own = np.asarray(image)[..., 3] >= 128
    for _ in range(_TRIES):
        left, upper = (int(draws.integers(_SIDE - side + 1)) for side in image.size)
        mask = np.zeros((_SIDE, _SIDE), bool)
        mask[upper : upper + image.height, left : left + image.width] = own
        if all((other & mask).sum() <= _MAX_COVERED * other.sum() for other in masks):
            return left, upper, mask
    return None


def _coco_files(splits: dict[Split, list[Scene]], name: str) -> Iterator[tuple[str, bytes]]:
    for split, scenes in splits.items():
        for number, scene in enumerate(scenes):
            yield f"{split}/{number:012d}.jpg", encode(scene.pixels, "JPEG")
        images = [
            {
                "id": number,
                "file_name": f"{number:012d}.jpg",
                "width": scene.pixels.shape[1],
                "height": scene.pixels.shape[0],
            }
            for number, scene in enumerate(scenes)
        ]
        annotations: list[dict[str, Any]] = []
        for number, scene in enumerate(scenes):
            for i, (left, upper, right, lower) in enumerate(scene.boxes.tolist()):
                width, height = right - left, lower - upper
                entry = {
                    "image_id": number,
                    "category_id": 1,
                    "bbox": [left, upper, width, height],
                    "area": width * height,
                    "iscrowd": int(scene.ignored[i]),
                }
                if scene.masks is not None:
                    mask = scene.masks[i]
                    runs = run_lengths.encode(np.asfortranarray(mask, np.uint8))
                    counts = runs["counts"].decode()
                    entry["segmentation"] = {"size": list(runs["size"]), "counts": counts}
                    entry["area"] = int(mask.sum())
                annotations.append(entry)
        tree = {
            "images": images,
            "annotations": [{"id": i, **entry} for i, entry in enumerate(annotations, start=1)],
            "categories": [{"id": 1, "name": name}],
        }
        yield f"annotations/instances_{split}.json", json.dumps(tree).encode()
