"""Training samples of detection: an image at a random scale, cropped or padded to a square.

    image 640 x 480, S = 1024, factor 1.5     scaled to 1536 x 1152, a window of 1024 x 1024
    the same, factor 0.3                        scaled to 307 x 230, padded below and to the right

Objects are transformed with the image. Boxes are clipped to the window; those less than a pixel
wide or high are left out. With outlines, boxes are recomputed around the visible part of each.

Letters: W, H width and height of an image, S side of the square, pixels; n objects.

Source: large-scale jitter of Ghiasi et al. 2021, arXiv 2012.07177, section 3, with the scales that
ViTDet takes (Li et al. 2022, arXiv 2203.16527, appendix A.2).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as run_lengths
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as geometry
from torchvision.tv_tensors import BoundingBoxes

from moce_dist.arrays import Float32, Int64
from moce_dist.data.images import MEAN_COLOUR, to_planes
from moce_dist.transfer.detection.coco_json import BoxedImage

Masks = NDArray[np.uint8]
_Shown = TypeVar("_Shown", Image.Image, BoundingBoxes)


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
    """How an image is placed in a square of side S: scaled, cropped, mirrored, padded."""

    scaled: tuple[int, int]
    """Width and height after scaling."""
    left: int
    upper: int
    is_mirrored: bool
    size: int

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of the window, at most S; the rest of the square is padding."""
        width, height = self.scaled
        return min(height, self.size), min(width, self.size)

    def crop(
        self, shown: _Shown, interpolation: InterpolationMode = InterpolationMode.BILINEAR
    ) -> _Shown:
        """Scale an image or boxes in it, and crop them to the window."""
        width, height = self.scaled
        scaled = geometry.resize(shown, [height, width], interpolation=interpolation)
        cropped: _Shown = geometry.crop(scaled, self.upper, self.left, *self.window)
        return cropped

    def fill(self, cropped: _Shown, colour: Sequence[int] = (0,)) -> _Shown:
        """Mirror a window or boxes in it, and pad them to the square, below and to the right."""
        mirrored = geometry.horizontal_flip(cropped) if self.is_mirrored else cropped
        height, width = self.window
        filled: _Shown = geometry.pad(
            mirrored, [0, 0, self.size - width, self.size - height], list(colour)
        )
        return filled


def draw_placing(
    boxed: BoxedImage, size: int, scales: tuple[float, float], draws: np.random.Generator
) -> Placing:
    """Draw scale (the longer side is S times a factor from `scales`), window and mirror."""
    factor = size * draws.uniform(*scales) / max(boxed.width, boxed.height)
    width, height = (max(1, round(s * factor)) for s in (boxed.width, boxed.height))
    left, upper = (int(draws.integers(max(1, s - size + 1))) for s in (width, height))
    return Placing((width, height), left, upper, bool(draws.random() < 0.5), size)


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
    square = placing.fill(placing.crop(image), MEAN_COLOUR)
    objects = boxed.learnable()
    masks = None
    if has_masks:
        masks = np.stack([place_mask(a.segmentation, placing, boxed) for a in objects])
        boxes = np.array([Image.fromarray(m).getbbox() or (0, 0, 0, 0) for m in masks], np.float64)
    else:
        sizes = torch.tensor([a.box for a in objects], dtype=torch.float64)
        annotated = BoundingBoxes(sizes, format="XYWH", canvas_size=(boxed.height, boxed.width))
        corners = geometry.convert_bounding_box_format(annotated, new_format="XYXY")
        boxes = placing.fill(placing.crop(corners)).numpy()
    kept = (boxes[:, 2:] - boxes[:, :2]).min(axis=1) >= 1
    categories = np.array([a.category for a in objects], np.int64)
    return PlacedSample(
        to_planes(np.asarray(square)),
        boxes[kept].astype(np.float32),
        categories[kept],
        masks[kept] if masks is not None else None,
    )


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
        whole = Image.fromarray(decode_mask(segmentation, boxed.height, boxed.width))
        mask = placing.crop(whole, InterpolationMode.NEAREST)
    else:
        # scaled as polygons, an outline stays smooth where a scaled mask has steps
        factors = np.array(placing.scaled) / (boxed.width, boxed.height)
        polygons = [np.asarray(p, np.float64).reshape(-1, 2) * factors for p in segmentation]
        moved = [(p - (placing.left, placing.upper)).ravel().tolist() for p in polygons]
        mask = Image.fromarray(decode_mask(moved, *placing.window))
    return np.asarray(placing.fill(mask))
