"""One annotation file in COCO's form, `instances_*.json`, read and checked as a whole.

    {"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}],
     "annotations": [{"image_id", "category_id", "bbox": [x, y, width, height],
                      "segmentation": polygons or run lengths, "area", "iscrowd"}]}

`segmentation`, `area` and `iscrowd` may be absent. Boxes are in pixels from the upper left corner.
Wrong entries are errors, except for boxes without area, of which COCO itself has a few. They count
in the evaluation, as in the official evaluator, but are not used for training.

Source: Lin et al. 2014, arXiv 1405.0312; the data format of cocodataset.org.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moce_dist.data.decoders import ImageError
from moce_dist.data.upright import Annotated, open_annotated
from moce_dist.run.names import and_more, as_text
from moce_dist.settings import ConfigError

logger = logging.getLogger(__name__)
# ids become 64-bit integers
_IDS = 2**63

Entry = dict[str, Any]
_LARGEST = 2.0**53


class Annotation(NamedTuple):
    """One object of an image, as the file has it."""

    category: int
    """Id of its category."""
    box: tuple[float, float, float, float]
    """Left, upper, width, height, pixels."""
    area: float
    """Area of the mask, pixels; of the box if the file gives none."""
    is_crowd: bool
    """Many objects in one outline: not learnt, and never counted against a prediction."""
    segmentation: Any
    """Polygons as arrays (x, y, x, y, ...), run lengths as a dict, or None."""


class BoxedImage(NamedTuple):
    """An image file and its objects; `id` is the image id of COCO."""

    key: str
    image: Path
    id: int
    width: int
    height: int
    annotations: Sequence[Annotation]

    def learnable(self) -> list[Annotation]:
        """Return the objects that a detector learns from: no crowds, no boxes of no area."""
        return [a for a in self.annotations if not a.is_crowd and min(a.box[2:]) > 0]

    def load(self) -> Annotated:
        """Decode the image to RGB: upright, or as stored if its annotations refer to that.

        Raises:
            ImageError: it cannot be read, or does not have the annotated size.
        """
        try:
            content = self.image.read_bytes()
        except OSError as error:
            raise ImageError(str(error)) from None
        return open_annotated(content, (self.width, self.height))


class AnnotationFile(NamedTuple):
    """What a file holds; categories are (id, name) in the order of their ids."""

    categories: Sequence[tuple[int, str]]
    images: Sequence[BoxedImage]


def read_annotations(path: Path, folder: Path) -> AnnotationFile:
    """Read and check a file about the images in `folder`; whether they are there is not checked.

    Raises:
        ConfigError: naming the file, the entry and what is wrong with it.
    """
    tree = _parse(path)
    categories = _by_id(path, tree, "categories", ("name",))
    images = _by_id(path, tree, "images", ("file_name", "width", "height"))
    if problems := list(_annotation_problems(tree["annotations"], images, categories)):
        raise ConfigError(f"{path}: {problems[0]}{and_more(problems)}")
    found: dict[int, list[Annotation]] = {key: [] for key in images}
    for entry in tree["annotations"]:
        x, y, width, height = entry["bbox"]
        found[entry["image_id"]].append(
            Annotation(
                entry["category_id"],
                (x, y, width, height),
                float(entry.get("area", width * height)),
                bool(entry.get("iscrowd", 0)),
                _outline(entry.get("segmentation")),
            )
        )
    empty = [a for each in found.values() for a in each if min(a.box[2:]) <= 0]
    if empty:
        logger.warning(
            "%s: %d boxes have no area, the first is %s; nothing learns from them",
            *(path, len(empty), list(empty[0].box)),
        )
    return AnnotationFile(
        [(key, as_text(categories[key]["name"])) for key in sorted(categories)],
        [
            BoxedImage(
                as_text(f"{folder.name}/{image['file_name']}"),
                folder / image["file_name"],
                *(key, image["width"], image["height"], found[key]),
            )
            for key, image in sorted(images.items())
        ],
    )


def _parse(path: Path) -> dict[str, list[Entry]]:
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path}: is no JSON: {error}") from None
    for name in ("images", "annotations", "categories"):
        entries = tree.get(name) if isinstance(tree, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise ConfigError(f"{path}: has no list {name}; expected COCO's instances_*.json")
        if not entries:
            raise ConfigError(f"{path}: its list {name} is empty")
    return dict(tree)


def _by_id(path: Path, tree: dict[str, list[Entry]], name: str, keys: Sequence[str]) -> Any:
    found: dict[int, Entry] = {}
    for number, entry in enumerate(tree[name]):
        lacking = [key for key in ("id", *keys) if key not in entry]
        if lacking:
            raise ConfigError(f"{path}: {name}[{number}] has no {lacking[0]}")
        is_number = type(entry["id"]) is int and abs(entry["id"]) < _IDS
        if not is_number or entry["id"] in found:
            raise ConfigError(f"{path}: {name}[{number}].id ({entry['id']}) must be a number once")
        for text in ("name", "file_name"):
            if text in keys and (type(entry[text]) is not str or not entry[text]):
                raise ConfigError(f"{path}: {name}[{number}].{text} {entry[text]!r:.50} is no text")
        for side in ("width", "height"):
            if side in keys and (type(entry[side]) is not int or entry[side] < 1):
                raise ConfigError(f"{path}: image {entry['id']}: {side} {entry[side]} is no size")
        found[entry["id"]] = entry
    return found


def _annotation_problems(
    entries: Sequence[Entry], images: dict[int, Entry], categories: dict[int, Entry]
) -> Iterator[str]:
    for number, entry in enumerate(entries):
        image_id, category_id = entry.get("image_id"), entry.get("category_id")
        image = images.get(image_id) if type(image_id) is int else None
        if image is None:
            problem = f"image_id {image_id} is no image's"
        elif type(category_id) is not int or category_id not in categories:
            problem = f"category_id {category_id} is no category's"
        else:
            problem = _box_problem(entry.get("bbox"), image) or _segmentation_problem(
                entry.get("segmentation"), image
            )
            area, is_crowd = entry.get("area", 0), entry.get("iscrowd", 0)
            if not problem and not (_is_number(area) and area >= 0):
                problem = f"area {area!r:.50} must be a number of pixels"
            elif not problem and is_crowd not in (0, 1):
                problem = f"iscrowd {is_crowd!r:.50} must be 0 or 1"
        if problem:
            yield f"annotation {entry.get('id', f'number {number}')}: {problem}"


def _is_number(value: Any) -> bool:
    # booleans are no numbers here, and NaN fails the comparison
    return type(value) in (int, float) and abs(value) <= _LARGEST


def _box_problem(box: Any, image: Entry) -> str:
    is_box = isinstance(box, list) and len(box) == 4
    if not is_box or not all(_is_number(v) for v in box):
        return f"bbox {box} must be four numbers x, y, width, height"
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return ""
    if x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0:
        return f"bbox {box} lies outside {_size(image)}"
    if not (
        _is_near([x, x + width], image["width"]) and _is_near([y, y + height], image["height"])
    ):
        return f"bbox {box} reaches far outside of {_size(image)}"
    return ""


def _segmentation_problem(segmentation: Any, image: Entry) -> str:
    if not segmentation:
        return ""
    if isinstance(segmentation, dict):
        return _run_lengths_problem(segmentation, [image["height"], image["width"]])
    try:
        arrays = [np.asarray(polygon) for polygon in segmentation]
    except (TypeError, ValueError):
        arrays = []
    is_good = [
        a.dtype.kind in "iuf" and a.ndim == 1 and len(a) >= 6 and not len(a) % 2 for a in arrays
    ]
    if not arrays or not all(is_good) or not all(np.isfinite(a).all() for a in arrays):
        return "segmentation must be polygons [x, y, x, y, ...] of three points or more"
    if not all(
        _is_near(a[::2], image["width"]) and _is_near(a[1::2], image["height"]) for a in arrays
    ):
        # pycocotools takes memory for every pixel of an edge when it fills them, or crashes
        return f"segmentation reaches far outside of {_size(image)}"
    return ""


def _is_near(positions: Any, side: int) -> bool:
    """Tell whether positions lie inside an image, or outside by at most its side."""
    return bool(np.min(positions) >= -side and np.max(positions) <= 2 * side)


def _size(image: Entry) -> str:
    return f"its image of {image['width']} x {image['height']} pixels"


def _run_lengths_problem(runs: Entry, size: Sequence[int]) -> str:
    if runs.get("size") != size:
        return f"run lengths of size {runs.get('size')}, its image has {size}"
    counts = runs.get("counts")
    if isinstance(counts, str):
        counts = unpack_counts(counts)
    is_good = isinstance(counts, list) and all(type(c) is int and c >= 0 for c in counts)
    # pycocotools does not check this when it decodes them, and leaves the rest undefined
    if not counts or not is_good or sum(counts) != math.prod(size):
        return "its run lengths do not add up to the image"
    return ""


def unpack_counts(packed: str) -> list[int]:
    """Decode run lengths from COCO's packed form; [] if it ends within a number.

    A character holds five bits of a number, lowest first, and a flag that more follow. From the
    fourth number on, each is stored as its difference to the number two before it.
    """
    found: list[int] = []
    value = shift = 0
    for letter in packed:
        bits = ord(letter) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            # the highest bit is the sign
            value -= (bits & 16) << (shift - 4)
            found.append(value + (found[-2] if len(found) > 2 else 0))
            value = shift = 0
    return found if shift == 0 else []


def _outline(segmentation: Any) -> Any:
    # as Python lists, the polygons of COCO would take gigabytes in every loader process
    if isinstance(segmentation, list) and segmentation:
        return [np.array(polygon, np.float64) for polygon in segmentation]
    return segmentation or None
