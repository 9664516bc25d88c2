"""One compressed image to one training or evaluation sample.

Every random draw of an image comes from a generator keyed by (seed, epoch, sample key), so a sample
does not depend on the rank, the process or the order in which it is read.

Decoding costs more than everything else, so a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where
the crop still holds more pixels than the sample (simplejpeg, libjpeg-turbo's scaled inverse DCT).
All other formats, and any JPEG that it refuses, go through Pillow: what Pillow reads is read.

    2000 x 1500 JPEG, crop 1500 x 1200, sample 224 x 224
      decoded at 1/4: 500 x 375, crop 375 x 300, resized by bicubic with antialias

Letters: S side of the square sample in pixels. Samples are (3, S, S) float32, normalised by
ImageNet's mean and standard deviation.

Source: RandomResizedCrop as in torchvision.transforms.v2 (ten tries, then the centre); the MAE
recipe (scale 0.2 to 1, bicubic, mirror) from He et al. 2022, appendix A.1.
"""

import hashlib
import io
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from moce_dist.data.resize import Pixels, resize

if TYPE_CHECKING:
    from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 178_956_970
MAX_BYTES = 256 * 2**20
_ASPECT = (math.log(3 / 4), math.log(4 / 3))
_JPEG, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_EXIF = b"Exif\0\0"
_EXIF_WITHIN = 2**16
_ORIENTATION = 0x0112
# libjpeg-turbo has vectorised inverse DCTs for these only
_REDUCTIONS = (8, 4, 2)
# what makes a stored picture upright: flip its rows, flip its columns, then swap both
_UPRIGHT = {
    2: (False, True, False),
    3: (True, True, False),
    4: (True, False, False),
    5: (False, False, True),
    6: (True, False, True),
    7: (True, True, True),
    8: (False, True, True),
}
_AS_STORED = (False, False, False)

Encoded = bytes | memoryview
Sample = NDArray[np.float32]


DAMAGE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
"""What Pillow raises of damaged files."""


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


def open_image(content: Encoded) -> Image.Image:
    """Decode to an upright RGB picture: transparency on black, of an animation the first frame.

    Raises:
        ImageError: empty, of unknown format, truncated, damaged, of more than `MAX_PIXELS` or
            `MAX_BYTES`.
    """
    _check_bytes(content)
    try:
        with Image.open(io.BytesIO(content)) as image:
            _check_pixels(*image.size)
            image.load()
            return _to_rgb(image)
    except DAMAGE as error:
        raise ImageError(str(error)) from None


def _check_bytes(content: Encoded) -> None:
    if not content:
        raise ImageError("image is empty")
    if len(content) > MAX_BYTES:
        raise ImageError(f"image has {len(content)} bytes, more than {MAX_BYTES}")


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"image has {width} x {height} pixels, more than {MAX_PIXELS}")


class Picture(Protocol):
    """A picture whose upright size is known; how much of it is decoded depends on the crop."""

    @property
    def width(self) -> int:
        """Pixels of a row."""

    @property
    def height(self) -> int:
        """Pixels of a column."""

    def crop(self, box: Box, size: int) -> Pixels:
        """Resize a crop to (S, S, 3) uint8 RGB, bicubic with antialias."""


@dataclass(frozen=True)
class Jpeg:
    """A JPEG that is decoded, scaled, when its crop is known."""

    content: Encoded
    stored_width: int
    stored_height: int
    upright: tuple[bool, bool, bool]

    @property
    def is_plain(self) -> bool:
        """Whether any decoder gives the same picture: stored upright and with its end mark."""
        return self.upright == _AS_STORED and bytes(self.content[-2:]) == _JPEG_END

    @property
    def width(self) -> int:
        """Pixels of a row of the upright picture."""
        return self.stored_height if self.upright[2] else self.stored_width

    @property
    def height(self) -> int:
        """Pixels of a column of the upright picture."""
        return self.stored_width if self.upright[2] else self.stored_height

    def crop(self, box: Box, size: int) -> Pixels:
        """See `Picture`.

        Raises:
            ImageError: see `open_image`.
        """
        side = min(box.right - box.left, box.lower - box.upper)
        reduction = next((r for r in _REDUCTIONS if side >= r * size), 1)
        try:
            pixels = simplejpeg.decode_jpeg(
                self.content,
                "RGB",
                fastdct=True,
                fastupsample=True,
                min_height=-(-self.stored_height // reduction),
                min_width=-(-self.stored_width // reduction),
                min_factor=reduction,
            )
        except ValueError:
            # warnings count as errors there; Pillow knows which of them are harmless
            return _Pillow(open_image(self.content)).crop(box, size)
        flip_rows, flip_columns, swap = self.upright
        left, upper, right, lower = (edge / reduction for edge in self._stored(box))
        square = resize(pixels, (left, upper, right, lower), size)
        square = square[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
        return square.swapaxes(0, 1) if swap else square

    def _stored(self, box: Box) -> Box:
        flip_rows, flip_columns, swap = self.upright
        left, upper, right, lower = box
        if swap:
            left, upper, right, lower = upper, left, lower, right
        if flip_columns:
            left, right = self.stored_width - right, self.stored_width - left
        if flip_rows:
            upper, lower = self.stored_height - lower, self.stored_height - upper
        return Box(left, upper, right, lower)


@dataclass(frozen=True)
class _Pillow:
    image: Image.Image

    @property
    def width(self) -> int:
        return self.image.width

    @property
    def height(self) -> int:
        return self.image.height

    def crop(self, box: Box, size: int) -> Pixels:
        return resize(np.asarray(self.image), box, size)


def open_picture(content: Encoded) -> Picture:
    """Read what is needed to choose a crop.

    Raises:
        ImageError: see `open_image`; damage behind a JPEG's header shows when it is cropped.
    """
    _check_bytes(content)
    if content[:3] == _JPEG:
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(content)
        except ValueError:
            return _Pillow(open_image(content))
        if space not in ("CMYK", "YCCK"):
            _check_pixels(width, height)
            return Jpeg(content, width, height, _UPRIGHT.get(_orientation(content), _AS_STORED))
    return _Pillow(open_image(content))


def _orientation(content: Encoded) -> int:
    if _EXIF not in bytes(content[:_EXIF_WITHIN]):
        return 1
    try:
        with Image.open(io.BytesIO(content)) as image:
            return int(image.getexif().get(_ORIENTATION, 1))
    except (*DAMAGE, TypeError):
        # the picture itself may be whole
        return 1


def decode_image(content: Encoded) -> Pixels:
    """Decode to (H, W, 3) uint8 RGB.

    Raises:
        ImageError: see `open_image`.
    """
    return np.asarray(open_image(content))


def normalise(images: "Tensor") -> "Tensor":
    """Bring (..., 3, S, S) uint8 to float32 by ImageNet's mean and deviation, where it lies."""
    import torch

    levels = torch.tensor([MEAN, STD], device=images.device) * 255
    mean, std = levels.view(2, 3, 1, 1)
    return images.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).div_(std)


def _sample(pixels: Pixels) -> Sample:
    import torch

    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return normalise(torch.from_numpy(planes)).numpy()


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


class Cut(NamedTuple):
    """What a training sample takes of a picture."""

    picture: Picture
    box: Box
    is_mirrored: bool

    def pixels(self, size: int) -> Pixels:
        """Make the sample's pixels, (S, S, 3): crop, bicubic resize, mirror.

        Raises:
            ImageError: see `open_image`.
        """
        return self.picture.crop(self.box, size)[:, :: -1 if self.is_mirrored else 1]


def train_cut(
    content: Encoded, *, scale_min: float, hflip: bool, draws: np.random.Generator
) -> Cut:
    """Draw the random crop of a training sample.

    Raises:
        ImageError: see `open_picture`.
    """
    picture = open_picture(content)
    box = random_box(picture.width, picture.height, scale_min, draws)
    return Cut(picture, box, bool(hflip and draws.random() < 0.5))


def train_image(
    content: Encoded, *, size: int, scale_min: float, hflip: bool, draws: np.random.Generator
) -> Sample:
    """Make a training sample (3, S, S): the pixels of `train_cut`, normalised.

    Raises:
        ImageError: see `open_image`.
    """
    return _sample(train_cut(content, scale_min=scale_min, hflip=hflip, draws=draws).pixels(size))


def eval_image(content: Encoded, size: int) -> Sample:
    """Make an evaluation sample (3, S, S): the largest centred square, resized to `size`.

    Raises:
        ImageError: see `open_image`.
    """
    picture = open_picture(content)
    side = min(picture.width, picture.height)
    left, upper = (picture.width - side) // 2, (picture.height - side) // 2
    return _sample(picture.crop(Box(left, upper, left + side, upper + side), size))
