"""One compressed image to one training or evaluation sample.

Every random draw of an image comes from a generator keyed by (seed, epoch, sample key), so a sample
does not depend on the rank, the process or the order in which it is read.

Letters: S side of the square sample in pixels. Samples are (3, S, S) float32, normalised by
ImageNet's mean and standard deviation.

Source: RandomResizedCrop as in torchvision.transforms.v2 (ten tries, then the centre); the MAE
recipe (scale 0.2 to 1, bicubic, mirror) from He et al. 2022, appendix A.1.
"""

import hashlib
import io
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 178_956_970
_ASPECT = (math.log(3 / 4), math.log(4 / 3))
_MEAN = np.array(MEAN, np.float32).reshape(3, 1, 1) * 255
_STD = np.array(STD, np.float32).reshape(3, 1, 1) * 255

Pixels = NDArray[np.uint8]
Sample = NDArray[np.float32]


class ImageError(ValueError):
    """The bytes are no usable image; the message says why."""


class Box(NamedTuple):
    """A crop: left, upper, right, lower, pixels."""

    left: int
    upper: int
    right: int
    lower: int


def sample_generator(seed: int, epoch: int, key: str) -> np.random.Generator:
    """Make the generator of one image in one epoch; equal arguments give equal draws anywhere."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow clips 16-bit greys to 8 bits when it converts; keep the upper byte instead
        image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image.convert("RGB")


def open_image(content: bytes) -> Image.Image:
    """Decode to an upright RGB picture: transparency on black, of an animation the first frame.

    Raises:
        ImageError: empty, of unknown format, truncated, damaged, or larger than `MAX_PIXELS`.
    """
    if not content:
        raise ImageError("image is empty")
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"image has {image.width} x {image.height} pixels")
            image.load()
            return _to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(str(error)) from None


def decode_image(content: bytes) -> Pixels:
    """Decode to (H, W, 3) uint8 RGB.

    Raises:
        ImageError: see `open_image`.
    """
    return np.asarray(open_image(content))


def _normalise(image: Image.Image, *, mirror: bool = False) -> Sample:
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)
    if mirror:
        pixels = pixels[:, :, ::-1]
    return (pixels - _MEAN) / _STD


def random_box(width: int, height: int, scale_min: float, draws: np.random.Generator) -> Box:
    """Draw RandomResizedCrop's rectangle for a picture of `width` x `height` pixels."""
    for _ in range(10):
        area = width * height * draws.uniform(scale_min, 1.0)
        ratio = math.exp(draws.uniform(*_ASPECT))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(draws.integers(width - w + 1)), int(draws.integers(height - h + 1))
            return Box(left, upper, left + w, upper + h)
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    left, upper = (width - w) // 2, (height - h) // 2
    return Box(left, upper, left + w, upper + h)


def train_image(
    content: bytes, *, size: int, scale_min: float, hflip: bool, draws: np.random.Generator
) -> Sample:
    """Make a training sample (3, S, S): random crop, bicubic resize with antialias, mirror.

    Raises:
        ImageError: see `open_image`.
    """
    image = open_image(content)
    box = random_box(image.width, image.height, scale_min, draws)
    mirror = hflip and draws.random() < 0.5
    crop = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return _normalise(crop, mirror=mirror)


def eval_image(content: bytes, size: int) -> Sample:
    """Make an evaluation sample (3, S, S): the largest centred square, resized to `size`.

    Raises:
        ImageError: see `open_image`.
    """
    image = open_image(content)
    side = min(image.size)
    left, upper = (image.width - side) // 2, (image.height - side) // 2
    box = (left, upper, left + side, upper + side)
    return _normalise(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
