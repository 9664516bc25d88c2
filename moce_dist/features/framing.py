"""How an image becomes the square that a model of timm's sees in evaluation.

The whole image is resized, then its middle is cut out; where it is smaller, it is padded.

    center   the shorter side becomes T = floor(S / crop_pct), the aspect stays
    squash   both sides become T
    border   the longer side becomes T, the aspect stays

    640 x 480, S 224, crop_pct 0.875: T 256, resized to 341 x 256, cut at (58, 16)

A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves twice the pixels, in each
direction, of the resized one. Else pixels are timm's to one or two gray levels.

Letters: S side of the square in pixels, T side that it is cut from.

Source: timm.data.transforms_factory.transforms_imagenet_eval, and torchvision's Resize and
CenterCrop that it is made of.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from moce_dist.data.decoders import Encoded
from moce_dist.data.images import Sample, eval_image, open_croppable, open_image, to_sample
from moce_dist.data.resize import Pixels, Size

MODES = ("center", "squash", "border")
METHODS = tuple(method.name.lower() for method in Image.Resampling)
"""Ways of interpolation that an image can be resized by."""
_SPARE = 2
"""Pixels of a JPEG decoded at a part of its size over those that it is resized to."""
BLACK = (0, 0, 0)
_MAX_ASPECT = 8
"""Aspect up to which all of an image is resized, though only its middle is kept."""


class Framing(NamedTuple):
    """What is made of an image; `fill` is the colour that pads it, RGB."""

    crop_pct: float
    mode: str = "center"
    method: str = "bicubic"
    fill: tuple[int, ...] = BLACK

    def resized(self, image: Size, side: int) -> Size:
        """Size of the whole image before an S x S square is cut out of it."""
        target = math.floor(side / self.crop_pct)
        if self.mode == "squash":
            return Size(target, target)
        if self.mode == "border":
            ratio = max(image) / target
            width, height = (max(1, round(length / ratio)) for length in image)
            return Size(width, height)
        width, height = (int(target * length / min(image)) for length in image)
        return Size(width, height)


def framed_image(content: Encoded, side: int, framing: Framing | None) -> Sample:
    """Make an evaluation sample (3, S, S) as a model of timm's sees it; None: see `eval_image`.

    Raises:
        ImageError: see `open_image`.
    """
    if framing is None:
        return eval_image(content, side)
    image = open_croppable(content)
    size = framing.resized(Size(image.width, image.height), side)
    if max(size) > _MAX_ASPECT * side:
        pixels = _middle(content, size, side, framing.method)
    else:
        pixels = image.resized(size, framing.method, _SPARE)
    return to_sample(_square(pixels, side, framing.fill))


def _middle(content: Encoded, size: Size, side: int, method: str) -> Pixels:
    """Resize only what is kept of a very long image, at most (S, S, 3)."""
    image = open_image(content)
    across, down = image.width / size.width, image.height / size.height
    left, upper = (max(0, round((length - side) / 2)) for length in size)
    width, height = (min(length, side) for length in size)
    box = (left * across, upper * down, (left + width) * across, (upper + height) * down)
    return np.asarray(image.resize((width, height), Image.Resampling[method.upper()], box=box))


def _square(pixels: Pixels, side: int, fill: tuple[int, ...]) -> Pixels:
    """Cut out the middle of (H, W, 3), and pad what is missing of (S, S, 3)."""
    height, width = pixels.shape[:2]
    upper, left = (max(0, round((length - side) / 2)) for length in (height, width))
    middle = pixels[upper : upper + side, left : left + side]
    if middle.shape[:2] == (side, side):
        return middle
    above, before = ((side - length) // 2 for length in middle.shape[:2])
    square = np.empty((side, side, 3), np.uint8)
    square[:] = fill
    square[above : above + len(middle), before : before + middle.shape[1]] = middle
    return square
