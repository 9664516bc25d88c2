"""Metadata of image files: its removal, and the orientation.

Damaged metadata does not make an image unusable. If a decoder fails on a text, a profile or a tag
of an unexpected type, the image is read again without its metadata. What is removed:

    JPEG    segments APP1 to APP15 and COM, except APP14 (how colours are stored)
    PNG     all chunks except those that a decoder needs and tRNS (transparency)
    WebP    the chunks EXIF, XMP and ICCP
    TIFF    all tags of the directory except the orientation and how pixels are stored

The EXIF block is kept separately, for the orientation. Orientation is read only here, for pixels
and for boxes:

    stored, tag 6   B D    upright: flip the rows, then swap    A B
                    A C                                         C D

Source: ITU-T T.81 annex B, PNG 3rd edition section 11, RFC 9649, TIFF 6.0 section 2.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_EXIF = b"Exif\0\0"
_APP1, _APP14, _APP15, _COM = 0xE1, 0xEE, 0xEF, 0xFE
_NO_LENGTH = (0x01, *range(0xD0, 0xD8))
_SCAN, _END = 0xDA, 0xD9
_PNG_KEPT = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS")
_WEBP_DROPPED = (b"EXIF", b"XMP ", b"ICCP")
# tags of how pixels are stored, and the orientation
_TIFF_KEPT = frozenset(
    (
        *(256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322),
        *(323, 324, 325, 332, 338, 339, 347, 512, 513, 514, 519, 520, 521, 529, 530, 531, 532),
    )
)


class Bare(NamedTuple):
    """An image file without metadata, and its EXIF block, empty if it has none."""

    content: bytes
    exif: bytes


class _Segment(NamedTuple):
    marker: int
    start: int
    body: int
    end: int


def _segments(content: bytes | memoryview) -> Iterator[_Segment]:
    """Yield the segments of a JPEG before its pixels; stop early where the file is damaged."""
    position = 2
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker in (_SCAN, _END):
            return
        if marker == 0xFF:
            position += 1
        elif marker in _NO_LENGTH:
            position += 2
        else:
            end = position + 2 + int.from_bytes(content[position + 2 : position + 4])
            yield _Segment(marker, position, position + 4, end)
            position = end


def may_be_turned(content: bytes | memoryview) -> bool:
    """Tell whether a JPEG has a segment that can hold an orientation: EXIF or XMP."""
    return any(segment.marker == _APP1 for segment in _segments(content))


def without_metadata(content: bytes | memoryview) -> Bare | None:
    """Remove the metadata of an image file; None if it has another format or is damaged."""
    content = bytes(content)
    try:
        if content.startswith(JPEG):
            return _bare_jpeg(content)
        if content.startswith(_PNG):
            return _bare_png(content)
        if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
            return _bare_webp(content)
        if content[:4] in (b"II*\0", b"MM\0*"):
            return _bare_tiff(content)
    except (struct.error, IndexError):
        return None
    return None


def _bare_jpeg(content: bytes) -> Bare:
    kept, exif, last = [content[:2]], b"", 2
    for segment in _segments(content):
        body, last = content[segment.body : segment.end], segment.end
        is_app = _APP1 <= segment.marker <= _APP15 and segment.marker != _APP14
        if not is_app and segment.marker != _COM:
            kept.append(content[segment.start : segment.end])
        elif segment.marker == _APP1 and body.startswith(_EXIF):
            exif = exif or body
    return Bare(b"".join([*kept, content[last:]]), exif)


def _bare_png(content: bytes) -> Bare:
    kept, exif, position = [_PNG], b"", len(_PNG)
    while position < len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        if kind in _PNG_KEPT:
            kept.append(content[position:end])
        elif kind == b"eXIf":
            exif = _EXIF + content[position + 8 : end - 4]
        position = end
    return Bare(b"".join(kept), exif)


def _bare_webp(content: bytes) -> Bare:
    kept, exif, position = [b"WEBP"], b"", 12
    while position < len(content):
        kind, length = struct.unpack_from("<4sI", content, position)
        end = position + 8 + length + length % 2
        if kind == b"EXIF":
            body = content[position + 8 : position + 8 + length]
            exif = body if body.startswith(_EXIF) else _EXIF + body
        if kind == b"VP8X":
            # clear the flags of the removed chunks: ICC 32, EXIF 8, XMP 4
            flags = bytes([content[position + 8] & ~(32 | 8 | 4)])
            kept.append(content[position : position + 8] + flags + content[position + 9 : end])
        elif kind not in _WEBP_DROPPED:
            kept.append(content[position:end])
        position = end
    body = b"".join(kept)
    return Bare(b"RIFF" + struct.pack("<I", len(body)) + body, exif)


def _bare_tiff(content: bytes) -> Bare:
    order = "<" if content[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, start)
    entries = [content[start + 2 + 12 * i : start + 14 + 12 * i] for i in range(count)]
    kept = [e for e in entries if struct.unpack(f"{order}H", e[:2])[0] in _TIFF_KEPT]
    # the directory is shortened in place, so that all offsets remain valid
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return Bare(content[:start] + directory + content[start + len(directory) :], b"")


_ORIENTATION = 0x0112


class Turn(NamedTuple):
    """How to make a stored image upright: flip its rows, flip its columns, then swap both axes."""

    flip_rows: bool
    flip_columns: bool
    swap: bool

    def apply(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return an upright view of stored pixels (H, W, 3), or of a part of them."""
        turned = pixels[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]
        return turned.swapaxes(0, 1) if self.swap else turned

    def stored(
        self, box: tuple[int, int, int, int], width: int, height: int
    ) -> tuple[int, int, int, int]:
        """Map a box of the upright image to the stored image of `width` x `height` pixels."""
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
    """Read the orientation of an opened image; without a valid one, it is upright as stored.

    Pillow looks for it in EXIF, in TIFF's own tags and in XMP.
    """
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - damaged metadata must not make an image unusable
        return AS_STORED
    return _TURNS.get(value, AS_STORED) if type(value) is int else AS_STORED
