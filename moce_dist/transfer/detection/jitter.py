"""Training samples of detection: an image at a random scale, cropped or padded to a square.

    image 640 x 480, S = 1024, factor 1.5     scaled to 1536 x 1152, a window of 1024 x 1024
    the same, factor 0.3                        scaled to 307 x 230, padded below and to the right

Objects are transformed with the image. Boxes are clipped to the window; those less than a pixel
wide or high are left out. With outlines, boxes are recomputed around the visible part of each.

Letters: W, H width and height of an image, S side of the square, pixels; n objects.

Source: large-scale jitter of Ghiasi et al. 2021, arXiv 2012.07177, section 3, with the scales that
ViTDet takes (Li et al. 2022, arXiv 2203.16527, appendix A.2).
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as run_lengths

from moce_dist.arrays import Float32, Float64, Int64
from moce_dist.data.images import MEAN
from moce_dist.transfer.detection.task import BoxedImage

_PADDING = np.round(np.array(MEAN) * 255).astype(np.uint8)

Masks = NDArray[np.uint8]


class PlacedSample(NamedTuple):
    """A training square; `categories` are COCO's ids, `masks` is None for box-only tasks."""

    pixels: NDArray[np.uint8]
    """(3, S, S) in [0, 255]."""
    boxes: Float32
    """(n, 4): left, upper, right, lower, pixels."""
    categories: Int64
    """(n,)."""
    masks: Masks | None
    """(n, S, S), 0 or 1."""


class Placing(NamedTuple):
    """How an image is placed in a square of side S: scaled, cropped to a window, mirrored."""

    scaled: tuple[int, int]
    """Width and height after scaling."""
    left: int
    upper: int
    width: int
    """Width of the window, at most S; the rest of the square is padding."""
    height: int
    is_mirrored: bool
    size: int

    def points(self, points: Float64, boxed: BoxedImage) -> Float64:
        """Map points (..., 2), which are (x, y) of the image, to the square."""
        factors = np.array(self.scaled) / (boxed.width, boxed.height)
        moved: Float64 = points * factors - (self.left, self.upper)
        if self.is_mirrored:
            moved[..., 0] = self.width - moved[..., 0]
        return moved


def draw_placing(
    boxed: BoxedImage, size: int, scales: tuple[float, float], draws: np.random.Generator
) -> Placing:
    """Draw scale (the longer side is S times a factor from `scales`), window and mirror."""
    factor = size * draws.uniform(*scales) / max(boxed.width, boxed.height)
    width, height = (max(1, round(s * factor)) for s in (boxed.width, boxed.height))
    left, upper = (int(draws.integers(max(1, s - size + 1))) for s in (width, height))
    is_mirrored = bool(draws.random() < 0.5)
    window = min(width, size), min(height, size)
    return Placing((width, height), left, upper, *window, is_mirrored, size)


def training_square(
    boxed: BoxedImage,
    size: int,
    scales: tuple[float, float],
    *,
    has_masks: bool,
    draws: np.random.Generator,
) -> PlacedSample:
    """Make a training sample of an image.

    Raises:
        ImageError: the image cannot be read, or has another size than annotated.
    """
    image = boxed.load().image
    placing = draw_placing(boxed, size, scales, draws)
    pixels = _square(image, placing)
    objects = boxed.learnable()
    masks = None
    if has_masks:
        masks = np.stack([place_mask(a.segmentation, placing, boxed) for a in objects])
        boxes = np.array([Image.fromarray(m).getbbox() or (0, 0, 0, 0) for m in masks], np.float64)
    else:
        sizes = np.array([a.box for a in objects], np.float64)
        corners = np.stack([sizes[:, :2], sizes[:, :2] + sizes[:, 2:]], axis=1)
        corners = placing.points(corners, boxed)
        # mirroring swaps left and right
        corners.sort(axis=1)
        boxes = corners.clip(0, (placing.width, placing.height)).reshape(-1, 4)
    kept = (boxes[:, 2:] - boxes[:, :2]).min(axis=1) >= 1
    categories = np.array([a.category for a in objects], np.int64)
    return PlacedSample(
        pixels,
        boxes[kept].astype(np.float32),
        categories[kept],
        masks[kept] if masks is not None else None,
    )


def _square(image: Image.Image, placing: Placing) -> NDArray[np.uint8]:
    left, upper = placing.left, placing.upper
    window = (left, upper, left + placing.width, upper + placing.height)
    scaled = image.resize(placing.scaled, Image.Resampling.BILINEAR).crop(window)
    pixels = np.asarray(scaled)[:, :: -1 if placing.is_mirrored else 1]
    square = np.empty((placing.size, placing.size, 3), np.uint8)
    square[:] = _PADDING
    square[: placing.height, : placing.width] = pixels
    return np.ascontiguousarray(square.transpose(2, 0, 1))


def to_runs(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Convert polygons or run lengths, packed or not, to packed run lengths of a mask (H, W)."""
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str | bytes):
        return segmentation
    runs = run_lengths.frPyObjects(segmentation, height, width)
    return dict(run_lengths.merge(runs) if isinstance(runs, list) else runs)


def decode_mask(segmentation: Any, height: int, width: int) -> Masks:
    """Fill polygons, or decode run lengths, as a mask (H, W) of 0 and 1."""
    mask: Masks = run_lengths.decode(to_runs(segmentation, height, width))
    return mask


def place_mask(segmentation: Any, placing: Placing, boxed: BoxedImage) -> Masks:
    """Convert an outline to a mask (S, S) of the square."""
    if isinstance(segmentation, dict):
        whole = decode_mask(segmentation, boxed.height, boxed.width)
        scaled = np.asarray(Image.fromarray(whole).resize(placing.scaled, Image.Resampling.NEAREST))
        left, upper = placing.left, placing.upper
        window = scaled[upper : upper + placing.height, left : left + placing.width]
        mask = np.zeros((placing.size, placing.size), np.uint8)
        mask[: placing.height, : placing.width] = window[:, :: -1 if placing.is_mirrored else 1]
        return mask
    moved = [
        placing.points(np.asarray(polygon, np.float64).reshape(-1, 2), boxed).ravel().tolist()
        for polygon in segmentation
    ]
    mask = decode_mask(moved, placing.size, placing.size)
    mask[placing.height :] = 0
    mask[:, placing.width :] = 0
    return mask
