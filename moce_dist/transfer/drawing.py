"""Pictures of detections: what was found beside what is there.

Letters: H, W height and width of a picture, pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as run_lengths

from moce_dist.transfer.instances import Instances, Picture
from moce_dist.transfer.jitter import decode_mask
from moce_dist.transfer.precision import Detections
from moce_dist.transfer.segment import palette

SHOWN_SCORE = 0.5
"""Least score of a detection that is worth showing."""
_OPACITY = 0.4
_MIN_SIDE = 400


class Drawn(NamedTuple):
    """One object of a picture: corners, what is written beside it, colour, and mask (H, W)."""

    box: tuple[float, float, float, float]
    text: str
    colour: tuple[int, int, int]
    mask: NDArray[np.uint8] | None


def draw_preview(
    path: Path, image: Image.Image, picture: Picture, found: Detections, instances: Instances
) -> None:
    """Write a picture with its sure detections, beside it with its true objects."""
    sure = _found(found.above(SHOWN_SCORE), instances.classes)
    _write(path, [_draw(image, objects) for objects in (sure, _true(picture, instances))])


def draw_found(path: Path, image: Image.Image, found: Detections, classes: Sequence[str]) -> None:
    """Write a picture with its detections."""
    _write(path, [_draw(image, _found(found, classes))])


def _write(path: Path, panels: Sequence[NDArray[np.uint8]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(panels, axis=1)).save(path)


def _colour(label: int, num_classes: int) -> tuple[int, int, int]:
    red, green, blue = palette(num_classes)[label].tolist()
    return red, green, blue


def _found(found: Detections, classes: Sequence[str]) -> list[Drawn]:
    drawn = []
    for i, (score, label) in enumerate(zip(found.scores, found.labels, strict=True)):
        left, upper, right, lower = found.boxes[i].tolist()
        text = f"{classes[label]} {score:.2f}"
        mask = None if found.masks is None else run_lengths.decode(found.masks[i])
        colour = _colour(int(label), len(classes))
        drawn.append(Drawn((left, upper, right, lower), text, colour, mask))
    return drawn


def _true(picture: Picture, instances: Instances) -> list[Drawn]:
    drawn = []
    for a in picture.learnable():
        x, y, width, height = a.box
        label = list(instances.category_ids).index(a.category)
        mask: Any = None
        if instances.has_masks:
            mask = decode_mask(a.segmentation, picture.height, picture.width)
        colour = _colour(label, len(instances.classes))
        drawn.append(Drawn((x, y, x + width, y + height), instances.classes[label], colour, mask))
    return drawn


def _draw(image: Image.Image, objects: list[Drawn]) -> NDArray[np.uint8]:
    pixels = np.array(image, np.float32)
    for each in objects:
        if each.mask is not None:
            inside = each.mask == 1
            pixels[inside] += _OPACITY * (np.array(each.colour, np.float32) - pixels[inside])
    # a small picture is enlarged, so that what is written stays readable
    factor = max(1, -(-_MIN_SIDE // max(image.size)))
    size = image.width * factor, image.height * factor
    canvas = Image.fromarray(pixels.round().astype(np.uint8)).resize(size)
    draw = ImageDraw.Draw(canvas)
    for each in objects:
        left, upper, right, lower = (edge * factor for edge in each.box)
        draw.rectangle((left, upper, right, lower), outline=each.colour, width=2)
        draw.text(
            (left + 3, max(0, upper)),
            each.text,
            fill=(255, 255, 255),
            stroke_width=1,
            stroke_fill=(0, 0, 0),
        )
    return np.asarray(canvas)
