"""The boundary around all decoders: an exception of a decoder is a fault of one image only.

Pillow, simplejpeg and nvImageCodec raise exceptions of many types for damaged or unusual files. All
calls of them go through `door`, which turns every exception into an `ImageError`, so that one file
never stops the work on the others. Nothing larger than `MAX_PIXELS` or `MAX_BYTES` is decoded.

Image formats are those that the installed Pillow can really open: all formats of its registry with
a file extension, except those that only pass the file to another program.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image, ImageFile, UnidentifiedImageError, features

from moce_dist.arrays import Pixels
from moce_dist.data.metadata import AS_STORED, JPEG, Turn, may_be_turned, turn_of, without_metadata
from moce_dist.run.names import one_line

MAX_PIXELS = 178_956_970
MAX_BYTES = 256 * 2**20
_REASON_LETTERS = 300
# an EPS file is a program, which Ghostscript would run; of MPEG Pillow reads only the header
_NOT_OPENED = ("EPS", "MPEG")
_NEEDS = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}
_SPEAK_FOR_THEMSELVES = (OSError, ValueError, SyntaxError, struct.error)

Encoded = bytes | memoryview


class ImageError(ValueError):
    """The bytes are no usable image; the message says why, but does not name the image."""


class Stored(NamedTuple):
    """A decoded image as it is stored, and the turn that makes it upright."""

    image: Image.Image
    turn: Turn


class JpegHeader(NamedTuple):
    """Size of a JPEG as stored, in pixels, and its colour space."""

    width: int
    height: int
    space: str


@contextmanager
def door() -> Iterator[None]:
    """Turn every exception of a decoder into an `ImageError`.

    Raises:
        ImageError: with the reason in one line.
    """
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # noqa: BLE001 - decoders raise anything
        raise ImageError(_reason(error)) from None


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "is no image of a known format"
    text = one_line(error)[:_REASON_LETTERS]
    if text and isinstance(error, _SPEAK_FOR_THEMSELVES):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@lru_cache(maxsize=1)
def image_formats() -> tuple[str, ...]:
    """Return the formats that the installed Pillow can really open."""
    Image.init()
    named = set(Image.registered_extensions().values())
    return tuple(
        name
        for name in Image.ID
        if name in named and name not in _NOT_OPENED
        if name not in _NEEDS or features.check(_NEEDS[name])
        if not isinstance(factory := Image.OPEN[name][0], type)
        or not issubclass(factory, ImageFile.StubImageFile)
    )


@lru_cache(maxsize=1)
def image_endings() -> frozenset[str]:
    """Return the file extensions of images, lower case, without the dot."""
    # Pillow opens MPO, several JPEGs in one file, as a JPEG
    formats = {*image_formats(), "MPO"}
    found = Image.registered_extensions().items()
    return frozenset(ending[1:] for ending, name in found if name in formats)


def check_bytes(content: Encoded) -> None:
    """Refuse content that is empty or longer than `MAX_BYTES`.

    Raises:
        ImageError: it is refused.
    """
    if not content:
        raise ImageError("image is empty")
    if len(content) > MAX_BYTES:
        raise ImageError(f"image has {len(content)} bytes, more than {MAX_BYTES}")


def check_pixels(width: int, height: int) -> None:
    """Refuse an image that has no pixels or more than `MAX_PIXELS`.

    Raises:
        ImageError: it is refused.
    """
    if width < 1 or height < 1:
        raise ImageError(f"image has {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise ImageError(f"image has {width} x {height} pixels, more than {MAX_PIXELS}")


def open_stored(content: Encoded, draft: tuple[int, int] | None = None) -> Stored:
    """Decode the first frame as stored; ignore metadata that cannot be read.

    With `draft` (width, height), a JPEG may be decoded at a reduced size that is not smaller.

    Raises:
        ImageError: empty, of unknown format, truncated, damaged, of more than `MAX_PIXELS` or
            `MAX_BYTES`.
    """
    check_bytes(content)
    try:
        return _load(content, draft)
    except ImageError as error:
        with suppress(ImageError):
            if (bare := without_metadata(content)) is not None:
                again = _load(bare.content, draft)
                return again._replace(turn=_turn_of_exif(bare.exif)) if bare.exif else again
        raise error


def _load(content: Encoded, draft: tuple[int, int] | None) -> Stored:
    with door(), Image.open(io.BytesIO(content), formats=image_formats()) as image:
        check_pixels(*image.size)
        if draft is not None:
            image.draft("RGB", draft)
        image.load()
        # some formats know their true size only after loading
        check_pixels(*image.size)
        return Stored(image, turn_of(image))


def _turn_of_exif(exif: bytes) -> Turn:
    image = Image.new("L", (1, 1))
    image.info["exif"] = exif
    return turn_of(image)


def check_header(file: IO[bytes] | Path) -> str:
    """Read the header only, and return a file extension of the format, such as png.

    Raises:
        ImageError: the header cannot be read, or the image is too large.
    """
    with door(), Image.open(file, formats=image_formats()) as image:
        check_pixels(*image.size)
        name = str(image.format)
    if (ending := name.lower()) in image_endings():
        return ending
    return next(e[1:] for e, found in Image.registered_extensions().items() if found == name)


def read_turn(content: Encoded) -> Turn:
    """Read a JPEG's orientation without decoding it; without a valid one, it is upright."""
    if not may_be_turned(content):
        return AS_STORED
    with suppress(ImageError), door(), Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
        return turn_of(image)
    bare = without_metadata(content)
    return _turn_of_exif(bare.exif) if bare else AS_STORED


def jpeg_header(content: Encoded) -> JpegHeader | None:
    """Read the header of a JPEG; None if it is no JPEG, or one that libjpeg-turbo refuses."""
    if content[:3] != JPEG:
        return None
    import simplejpeg  # imported here, as benches on synthetic images run without it

    with suppress(ImageError), door():
        height, width, space, _ = simplejpeg.decode_jpeg_header(content)
        return JpegHeader(width, height, space)
    return None


def jpeg_pixels(
    content: Encoded, width: int, height: int, factor: int, *, is_fast: bool
) -> Pixels | None:
    """Decode a JPEG as stored, at 1 / `factor` of its size, to (height, width, 3).

    None if libjpeg-turbo warns or fails; Pillow knows which warnings are harmless.
    """
    import simplejpeg

    with suppress(ImageError), door():
        pixels: Pixels = simplejpeg.decode_jpeg(
            content,
            "RGB",
            fastdct=is_fast,
            fastupsample=is_fast,
            min_height=height,
            min_width=width,
            min_factor=factor,
        )
        return pixels
    return None
