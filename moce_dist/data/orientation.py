"""Which way up a stored picture is: what its EXIF tag says, for pixels and for boxes.

stored, tag 6   C A    turned: flip the rows, then swap    A B
                D B                                        C D
"""

import io
import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_EXIF = b"Exif\0\0"
_EXIF_WITHIN = 2**16
_ORIENTATION = 0x0112

DAMAGE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
"""What Pillow raises of damaged files."""


class Turn(NamedTuple):
    """What makes a stored picture upright: flip its rows, flip its columns, then swap both."""

    flip_rows: bool
    flip_columns: bool
    swap: bool

    def apply(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Make stored pixels (H, W, 3), or a square part of them, upright; a view."""
        turned = pixels[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]
        return turned.swapaxes(0, 1) if self.swap else turned

    def stored(
        self, box: tuple[int, int, int, int], width: int, height: int
    ) -> tuple[int, int, int, int]:
        """Find a box of the upright picture in the stored one of `width` x `height` pixels."""
        left, upper, right, lower = box
        if self.swap:
            left, upper, right, lower = upper, left, lower, right
        if self.flip_columns:
            left, right = width - right, width - left
        if self.flip_rows:
            upper, lower = height - lower, height - upper
        return left, upper, right, lower


AS_STORED = Turn(flip_rows=False, flip_columns=False, swap=False)
_TURNS = {
    2: Turn(flip_rows=False, flip_columns=True, swap=False),
    3: Turn(flip_rows=True, flip_columns=True, swap=False),
    4: Turn(flip_rows=True, flip_columns=False, swap=False),
    5: Turn(flip_rows=False, flip_columns=False, swap=True),
    6: Turn(flip_rows=True, flip_columns=False, swap=True),
    7: Turn(flip_rows=True, flip_columns=True, swap=True),
    8: Turn(flip_rows=False, flip_columns=True, swap=True),
}


def read_turn(content: bytes | memoryview) -> Turn:
    """Read a picture's EXIF tag; without a readable one the picture is upright as stored."""
    if _EXIF not in bytes(content[:_EXIF_WITHIN]):
        return AS_STORED
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _TURNS.get(int(image.getexif().get(_ORIENTATION, 1)), AS_STORED)
    except (*DAMAGE, TypeError):
        # the picture itself may be whole
        return AS_STORED
