"""Decoding of all formats to upright RGB with 8 bits per channel.

transparency         composited on black
animation            first frame only
12, 16 bit grey      the upper 8 bits
signed, 32 bit grey  stretched, as no file defines the range: the smallest value becomes black, the
                     largest white; an image with values that are not finite is refused
white is zero        inverted, in TIFF's greys of all depths
annotated images     upright, unless only the stored image has the size of its annotations
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from moce_dist.data.decoders import Encoded, ImageError, door, open_stored
from moce_dist.data.metadata import AS_STORED, Turn

# formats whose 16 bit greys Pillow holds in 32 bits
_DEEP_16 = ("PNG", "PPM")
# TIFF tags, and their values
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, 1, 2


def _stretched(values: NDArray[Any]) -> Image.Image:
    levels = values.astype(np.float64)
    if not np.isfinite(levels).all():
        raise ImageError("image holds values that are not finite")
    levels -= levels.min()
    if levels.any():
        levels *= 255 / levels.max()
    return Image.fromarray(np.rint(levels).astype(np.uint8))


def _tag(image: Image.Image, tag: int, default: int) -> int:
    found = getattr(image, "tag_v2", {}).get(tag, default)
    return found[0] if isinstance(found, tuple) and found else found


def _deep_grey(image: Image.Image) -> Image.Image:
    """Convert a grey image that is not unsigned 8 bit to that; return others unchanged."""
    values, is_tiff = np.asarray(image), image.format == "TIFF"
    sample_format = _tag(image, _SAMPLE_FORMAT, _UNSIGNED) if is_tiff else _UNSIGNED
    # Pillow clips deep greys to 8 bits when it converts
    if image.mode.startswith("I;16") and image.format == "FITS":
        grey = _stretched(values.view(np.int16))
    elif image.mode.startswith("I;16") or (image.mode == "I" and image.format in _DEEP_16):
        bits = _tag(image, _BITS, 16) if is_tiff else 16
        levels = values.astype(np.uint32)
        # a level that PNG declares transparent, on black
        levels[levels == image.info.get("transparency", -1)] = 0
        grey = Image.fromarray((levels >> (bits - 8)).astype(np.uint8))
    elif image.mode == "L" and sample_format == _SIGNED:
        return _stretched(values.view(np.int8))
    elif image.mode in ("I", "F"):
        is_unsigned = is_tiff and image.mode == "I" and sample_format == _UNSIGNED
        grey = _stretched(values.view(np.uint32) if is_unsigned else values)
    else:
        return image
    is_inverted = is_tiff and _tag(image, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO
    return ImageChops.invert(grey) if is_inverted else grey


def _to_rgb(image: Image.Image) -> Image.Image:
    image = _deep_grey(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image.convert("RGB")


def open_rgb(content: Encoded) -> tuple[Image.Image, Turn]:
    """Decode to RGB as stored, and return the turn that makes it upright.

    Raises:
        ImageError: see `open_stored`; or the image has values that are not finite.
    """
    stored = open_stored(content)
    with door():
        return _to_rgb(stored.image), stored.turn


def turned(image: Image.Image, turn: Turn) -> Image.Image:
    """Apply a turn to a whole image."""
    return image if turn == AS_STORED else Image.fromarray(turn.apply(np.asarray(image)))


class Annotated(NamedTuple):
    """An RGB image in the orientation that its annotations refer to."""

    image: Image.Image
    is_in_doubt: bool
    """The size fits both the stored and the upright image; the upright one was chosen."""


def open_annotated(content: Encoded, size: tuple[int, int]) -> Annotated:
    """Decode upright, or as stored if only that has the annotations' `size`, (width, height).

    Raises:
        ImageError: see `open_rgb`; or neither has that size.
    """
    image, turn = open_rgb(content)
    upright = turned(image, turn)
    if upright.size == size:
        return Annotated(upright, turn != AS_STORED and image.size == size)
    if image.size == size:
        return Annotated(image, False)
    has, wants = (f"{width} x {height}" for width, height in (upright.size, size))
    raise ImageError(f"it has {has} pixels, its annotations are for {wants}")
