"""Resizing with antialias, as Pillow does it but vectorised.

Letters: H x W pixels of an image, S side of the square result.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from moce_dist.arrays import Pixels

_MAX_DROPPED = 16
# in pixels of the result
_MAX_SHIFT = 0.1


class Size(NamedTuple):
    """Width and height of an image in pixels."""

    width: int
    height: int


class _Axis(NamedTuple):
    """One axis of a resize: input pixels [start, stop), and leading result pixels to drop."""

    start: int
    stop: int
    dropped: int
    scale: float


def resize(pixels: Pixels, box: tuple[float, float, float, float], size: int) -> Pixels:
    """Resize the part `box` (left, upper, right, lower; pixels) of (H, W, 3) to (S, S, 3) uint8.

    The filter is Pillow's bicubic with antialias.
    """
    left, upper, right, lower = box
    down, across = _axis(upper, lower, size), _axis(left, right, size)
    if down is None or across is None:
        image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box=box)
        return np.asarray(image)
    crop = pixels[down.start : down.stop, across.start : across.stop]
    if crop.shape[:2] == (size, size) and down.scale == across.scale == 1:
        return crop
    import torch

    # Pillow's filter, but vectorised; interleaved RGB is torch's "channels last" format
    resized = torch.ops.aten._upsample_bicubic2d_aa(
        torch.from_numpy(np.require(crop, requirements=["C", "W"])).permute(2, 0, 1).unsqueeze(0),
        [size + down.dropped, size + across.dropped],
        False,
        1 / down.scale,
        1 / across.scale,
    )
    square: Pixels = resized[0].permute(1, 2, 0).numpy()[down.dropped :, across.dropped :]
    return square


def resize_all(pixels: Pixels, extent: tuple[float, float], size: Size, method: str) -> Pixels:
    """Resize the upper left `extent` (width, height; pixels) of (H, W, 3) to `size`.

    `method` is the name of a Pillow filter; bilinear and bicubic are vectorised.
    """
    width, height = extent
    if method not in ("bilinear", "bicubic"):
        box = (0.0, 0.0, width, height)
        image = Image.fromarray(pixels).resize(size, Image.Resampling[method.upper()], box=box)
        return np.asarray(image)
    import torch

    resizing = getattr(torch.ops.aten, f"_upsample_{method}2d_aa")
    planes = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)
    resized = resizing(
        planes.unsqueeze(0),
        [size.height, size.width],
        False,
        size.height / height,
        size.width / width,
    )
    whole: Pixels = resized[0].permute(1, 2, 0).numpy()
    return whole


def _axis(low: float, high: float, size: int) -> _Axis | None:
    # torch's resize starts at a whole input pixel. If a crop starts between two, the resize starts
    # a few result pixels earlier, nearly at a whole input pixel, and drops these from the result
    scale = (high - low) / size
    if low == int(low):
        return _Axis(int(low), math.ceil(high), 0, scale)
    dropped = np.arange(min(_MAX_DROPPED, int(low / scale)) + 1)
    starts = low - dropped * scale
    shifts = np.abs(starts - starts.round()) / scale
    best = int(shifts.argmin())
    if shifts[best] > _MAX_SHIFT:
        return None
    return _Axis(round(starts[best]), math.ceil(high), best, scale)
