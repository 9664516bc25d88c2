"""From one compressed image to one training or evaluation sample.

Every random draw of an image comes from a generator keyed by (seed, epoch, sample key), so a sample
does not depend on the rank, the process or the order in which it is read.

Decoding is the most expensive step, so a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the crop
then still has at least as many pixels as the sample (simplejpeg, libjpeg-turbo's scaled inverse
DCT). Pillow decodes all other formats, and JPEGs that libjpeg-turbo refuses.

    2000 x 1500 JPEG, crop 1500 x 1200, sample 224 x 224
      decoded at 1/4: 500 x 375, crop 375 x 300, bicubic resize with antialias

Letters: S side of the square sample in pixels. Samples are (3, S, S) float32, normalised by
ImageNet's mean and standard deviation.

Source: RandomResizedCrop as in torchvision.transforms.v2 (ten tries, then the centre); the MAE
recipe (scale 0.2 to 1, bicubic, mirror) from He et al. 2022, appendix A.1.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from moce_dist.arrays import Pixels
from moce_dist.data.decoders import (
    Encoded,
    ImageError,  # noqa: F401 - the functions here raise it
    check_bytes,
    check_pixels,
    jpeg_header,
    jpeg_pixels,
    read_turn,
)
from moce_dist.data.metadata import AS_STORED, Turn
from moce_dist.data.resize import Size, resize, resize_all
from moce_dist.data.upright import open_rgb, turned
from moce_dist.run.names import as_text

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
MEAN_COLOUR = [round(255 * level) for level in MEAN]
LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))
_JPEG_END = b"\xff\xd9"
# libjpeg-turbo has vectorised inverse DCTs only for these
_REDUCTIONS = (8, 4, 2)


class Box(NamedTuple):
    """A crop: left, upper, right and lower edge in pixels."""

    left: int
    upper: int
    right: int
    lower: int


class SampleDraws:
    """One generator that is reset for every image, which is faster than making a new one."""

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=0)
        self._start = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def of(self, seed: int, epoch: int, key: str) -> np.random.Generator:
        """Return the generator of one image in one epoch; it is valid until the next call."""
        digest = hashlib.blake2b(as_text(f"{seed}/{epoch}/{key}").encode(), digest_size=16).digest()
        self._start["state"]["key"] = np.frombuffer(digest, "<u8")
        self._bits.state = self._start
        return self._generator


def sample_generator(seed: int, epoch: int, key: str) -> np.random.Generator:
    """Make the generator of one image in one epoch; equal arguments give equal draws anywhere."""
    return SampleDraws().of(seed, epoch, key)


def open_image(content: Encoded) -> Image.Image:
    """Decode to an upright RGB image, see `moce_dist.data.upright`.

    Raises:
        ImageError: see `open_rgb`.
    """
    return turned(*open_rgb(content))


def decode_image(content: Encoded) -> Pixels:
    """Decode to (H, W, 3) uint8 RGB.

    Raises:
        ImageError: see `open_image`.
    """
    return np.asarray(open_image(content))


@dataclass(frozen=True)
class Jpeg:
    """A JPEG that is decoded, at a reduced scale, when its crop is known."""

    content: Encoded
    stored_width: int
    stored_height: int
    turn: Turn

    @property
    def is_plain(self) -> bool:
        """Whether all decoders give the same image: it is stored upright and has its end mark."""
        return self.turn == AS_STORED and bytes(self.content[-2:]) == _JPEG_END

    @property
    def width(self) -> int:
        """Width of the upright image in pixels."""
        return self.stored_height if self.turn.swap else self.stored_width

    @property
    def height(self) -> int:
        """Height of the upright image in pixels."""
        return self.stored_width if self.turn.swap else self.stored_height

    def crop(self, box: Box, size: int) -> Pixels:
        """Resize a crop to (S, S, 3) uint8 RGB, bicubic with antialias.

        Raises:
            ImageError: see `open_image`.
        """
        side = min(box.right - box.left, box.lower - box.upper)
        reduction = next((r for r in _REDUCTIONS if side >= r * size), 1)
        pixels = self._decode(reduction, is_fast=True)
        if pixels is None:
            # libjpeg-turbo's warnings count as errors; Pillow knows which of them are harmless
            return Decoded(decode_image(self.content)).crop(box, size)
        stored = self.turn.stored(box, self.stored_width, self.stored_height)
        left, upper, right, lower = (edge / reduction for edge in stored)
        return self.turn.apply(resize(pixels, (left, upper, right, lower), size))

    def resized(self, size: Size, method: str, spare: int) -> Pixels:
        """Resize the whole image to (height, width, 3), decoding it at a reduced scale.

        The decoded image has at least `spare` times the pixels of the result in each direction,
        unless the stored image has fewer.

        Raises:
            ImageError: see `open_image`.
        """
        fits = (
            r
            for r in _REDUCTIONS
            if self.width >= r * spare * size.width and self.height >= r * spare * size.height
        )
        reduction = next(fits, 1)
        pixels = self._decode(reduction, is_fast=False)
        if pixels is None:
            return Decoded(decode_image(self.content)).resized(size, method, spare)
        # size of the stored image, scaled: the last decoded row or column may count in part only
        extent = self.stored_width / reduction, self.stored_height / reduction
        stored = Size(*size[::-1]) if self.turn.swap else size
        return self.turn.apply(resize_all(pixels, extent, stored, method))

    def _decode(self, reduction: int, *, is_fast: bool) -> Pixels | None:
        width, height = (-(-side // reduction) for side in (self.stored_width, self.stored_height))
        return jpeg_pixels(self.content, width, height, reduction, is_fast=is_fast)


@dataclass(frozen=True)
class Decoded:
    """An image that was decoded in full: pixels (H, W, 3)."""

    pixels: Pixels

    @property
    def width(self) -> int:
        """See `Jpeg`."""
        return self.pixels.shape[1]

    @property
    def height(self) -> int:
        """See `Jpeg`."""
        return self.pixels.shape[0]

    def crop(self, box: Box, size: int) -> Pixels:
        """See `Jpeg`."""
        return resize(self.pixels, box, size)

    def resized(self, size: Size, method: str, _spare: int) -> Pixels:
        """Resize the whole image to (height, width, 3); see `Jpeg`."""
        return resize_all(self.pixels, (self.width, self.height), size, method)


Croppable = Jpeg | Decoded
"""An image of known upright size, decoded as far as a crop needs it."""


def open_croppable(content: Encoded) -> Croppable:
    """Open an image so that a crop can be chosen; decode it now unless it is a usual JPEG.

    Raises:
        ImageError: see `open_image`; damage behind a JPEG's header is found only by `crop`.
    """
    check_bytes(content)
    header = jpeg_header(content)
    if header is None or header.space in ("CMYK", "YCCK"):
        return Decoded(decode_image(content))
    check_pixels(header.width, header.height)
    return Jpeg(content, header.width, header.height, read_turn(content))


@cache
def _levels(
    device: "torch.device", mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple["Tensor", ...]:
    import torch

    return (torch.tensor([mean, std], device=device) * 255).view(2, 3, 1, 1).unbind()


def normalise(
    images: "Tensor", mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
) -> "Tensor":
    """Normalise (..., 3, S, S) uint8 to float32 by mean and deviation of [0, 1], on its device."""
    import torch

    mean_level, std_level = _levels(images.device, mean, std)
    levels = images.to(torch.float32, memory_format=torch.contiguous_format)
    return levels.sub_(mean_level).div_(std_level)


def to_planes(pixels: Pixels) -> Pixels:
    """Rearrange pixels (H, W, 3) as a model takes them: (3, H, W)."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def random_box(width: int, height: int, scale_min: float, draws: np.random.Generator) -> Box:
    """Draw RandomResizedCrop's rectangle for an image of `width` x `height` pixels."""
    for _ in range(10):
        # the same values as `draws.uniform`, in a third of the time
        area = width * height * (scale_min + (1.0 - scale_min) * draws.random())
        ratio = math.exp(LOG_ASPECT[0] + (LOG_ASPECT[1] - LOG_ASPECT[0]) * draws.random())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(draws.integers(width - w + 1)), int(draws.integers(height - h + 1))
            return Box(left, upper, left + w, upper + h)
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    left, upper = (width - w) // 2, (height - h) // 2
    return Box(left, upper, left + w, upper + h)


class Cut(NamedTuple):
    """The random crop of an image for a training sample."""

    image: Croppable
    box: Box
    is_mirrored: bool

    def pixels(self, size: int) -> Pixels:
        """Make the sample's pixels, (S, S, 3): crop, bicubic resize, mirror.

        Raises:
            ImageError: see `open_image`.
        """
        return self.image.crop(self.box, size)[:, :: -1 if self.is_mirrored else 1]


def draw_cut(image: Croppable, *, scale_min: float, hflip: bool, draws: np.random.Generator) -> Cut:
    """Draw the random crop of an opened image."""
    box = random_box(image.width, image.height, scale_min, draws)
    return Cut(image, box, bool(hflip and draws.random() < 0.5))


def centre_sample(image: Croppable, size: int) -> Pixels:
    """Make an evaluation sample (3, S, S) uint8: the largest centred square, resized to `size`.

    Raises:
        ImageError: see `open_image`.
    """
    side = min(image.width, image.height)
    left, upper = (image.width - side) // 2, (image.height - side) // 2
    return to_planes(image.crop(Box(left, upper, left + side, upper + side), size))
