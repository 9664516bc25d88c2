"""Which way up a stored image is: the one reader of its orientation, for pixels and for boxes.

stored, tag 6   C A    turned: flip the rows, then swap    A B
                D B                                        C D
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_ORIENTATION = 0x0112


class Turn(NamedTuple):
    """What makes a stored image upright: flip its rows, flip its columns, then swap both."""

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
        """Find a box of the upright image in the stored one of `width` x `height` pixels."""
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


def turn_of(image: Image.Image) -> Turn:
    """Read the orientation of an opened image; unreadable or odd means upright as stored.

    Pillow looks for it in EXIF, in TIFF's own tags and in XMP.
    """
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - metadata of any shape never decide whether pixels count
        return AS_STORED
    return _TURNS.get(value, AS_STORED) if type(value) is int else AS_STORED
