"""Decoding to upright RGB of 8 bits a colour, whatever is stored.

transparency          lies on black
animations            the first frame
16 bits of grey       the upper byte
32 bits of grey       stretched: what their values mean no file says, so the smallest is black
and the largest white; what is not finite is no image
annotated images      upright, unless only the stored image has the size of its annotations
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from moce_dist.data.decoders import Encoded, ImageError, door, open_stored
from moce_dist.data.orientation import AS_STORED, Turn

# 16 bits that Pillow keeps in 32
_DEEP_16 = ("PNG", "PPM")
_SAMPLE_FORMAT, _UNSIGNED = 339, 1


def _stretched(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.format == "TIFF" and image.mode == "I" and _sample_format(image) == _UNSIGNED:
        values = values.view(np.uint32)
    levels = values.astype(np.float64)
    if not np.isfinite(levels).all():
        raise ImageError("image holds values that are not finite")
    levels -= levels.min()
    if levels.any():
        levels *= 255 / levels.max()
    return Image.fromarray(np.rint(levels).astype(np.uint8))


def _sample_format(image: Image.Image) -> object:
    found = getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, _UNSIGNED)
    return found[0] if isinstance(found, tuple) and found else found


def _to_rgb(image: Image.Image) -> Image.Image:
    # Pillow clips deep greys to 8 bits when it converts
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _DEEP_16):
        image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = _stretched(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image.convert("RGB")


def open_rgb(content: Encoded) -> tuple[Image.Image, Turn]:
    """Decode to RGB as stored, and say what makes it upright.

    Raises:
        ImageError: see `open_stored`; or values are not finite.
    """
    stored = open_stored(content)
    with door():
        return _to_rgb(stored.image), stored.turn


def turned(image: Image.Image, turn: Turn) -> Image.Image:
    """Turn an image as a whole."""
    return image if turn == AS_STORED else Image.fromarray(turn.apply(np.asarray(image)))


class Annotated(NamedTuple):
    """An image, RGB, in which its annotations are where they say."""

    image: Image.Image
    is_in_doubt: bool
    """Its size does not tell whether they are for the upright image; it is taken for that."""


def open_annotated(content: Encoded, size: tuple[int, int]) -> Annotated:
    """Decode upright, or as stored where annotations of `size`, (width, height), are for that.

    Raises:
        ImageError: see `open_rgb`; or it is of neither size.
    """
    image, turn = open_rgb(content)
    upright = turned(image, turn)
    if upright.size == size:
        return Annotated(upright, turn != AS_STORED and image.size == size)
    if image.size == size:
        return Annotated(image, False)
    has, wants = (f"{width} x {height}" for width, height in (upright.size, size))
    raise ImageError(f"it has {has} pixels, its annotations are for {wants}")
