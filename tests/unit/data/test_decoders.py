"""One door around all decoders, and metadata that never decide whether pixels count."""

import io
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageFile, PngImagePlugin

from moce_dist.data import decoders
from moce_dist.data.decoders import ImageError, image_endings
from moce_dist.data.images import Box, centre_sample, open_croppable, open_image
from moce_dist.features.decoding import Framing, framed_image

pytestmark = pytest.mark.filterwarnings("ignore")
ORIENTATION = (0x0112, 3, 1, struct.pack("<H", 6))
_RATIO = struct.pack("<LL", 300, 1)
ODD_TAGS = {
    "maker as a ratio": (0x010F, 5, 1, _RATIO),
    "two resolutions": (0x011A, 5, 2, _RATIO * 2),
    "maker as two numbers": (0x010F, 3, 2, struct.pack("<HH", 1, 2)),
    "ratio of zeros": (0x011A, 5, 1, bytes(8)),
    "text for a number": (0x0128, 2, 4, b"abc\0"),
    "negative": (0x0100, 9, 1, struct.pack("<l", -5)),
    "value outside of the file": (0x010F, 2, 9999, struct.pack("<L", 2**31)),
    "unknown type": (0x010F, 99, 1, b"abcd"),
}


def tiff_block(*entries):
    """One little-endian directory of (tag, type, count, value)."""
    head, tail = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)), b""
    offset = 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in sorted(entries):
        field = value.ljust(4, b"\0")
        if len(value) > 4:
            field, tail = struct.pack("<L", offset + len(tail)), tail + value
        head += struct.pack("<HHL", tag, kind, count) + field
    return head + bytes(4) + tail


def saved(kind, some_image, **options):
    file = io.BytesIO()
    some_image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def some_image():
    """Wide, and with every corner of its own colour."""
    pixels = np.zeros((40, 56, 3), np.uint8)
    pixels[:20, :28], pixels[:20, 28:], pixels[20:, :28] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    return Image.fromarray(pixels)


def chunk(kind, body):
    return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body))


def with_exif(kind, some_image, tiff):
    """Write an image with an EXIF block of any bytes."""
    if kind == "WEBP":
        return saved(kind, some_image, lossless=True, exif=b"Exif\0\0" + tiff)
    content = saved(kind, some_image, **({"quality": 95} if kind == "JPEG" else {}))
    if kind == "PNG":
        return content[:33] + chunk(b"eXIf", tiff) + content[33:]
    body = b"Exif\0\0" + tiff
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + content[2:]


def corner(pixels):
    """The colours of the corners, read clockwise from the upper left, as letters."""
    letters = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (0, 0, 0): "k"}
    found = [pixels[y, x] for y, x in ((2, 2), (2, -3), (-3, -3), (-3, 2))]
    return "".join(letters[tuple(int(v > 125) for v in pixel)] for pixel in found)


def looks(content):
    """How training, evaluation, features of timm's framing and `predict` see an image."""
    image = open_image(content)
    some_image = open_croppable(content)
    assert (some_image.width, some_image.height) == image.size
    whole = some_image.crop(Box(0, 0, *image.size), 32)
    square, framed = (
        sample.transpose(1, 2, 0)
        for sample in (
            centre_sample(open_croppable(content), 32),
            framed_image(content, 32, Framing(1.0, "squash")),
        )
    )
    return {corner(np.asarray(image)), corner(whole), corner(square), corner(framed)}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("odd", ODD_TAGS)
def test_a_tag_of_an_odd_type_costs_neither_the_image_nor_its_orientation(some_image, kind, odd):
    content = with_exif(kind, some_image, tiff_block(ODD_TAGS[odd], ORIENTATION))
    assert open_image(content).size == (40, 56)
    # stored r g / b k, turned by 90 degrees
    assert looks(content) == {"brgk"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "value",
    [
        (0x0112, 3, 1, struct.pack("<H", 9)),
        (0x0112, 3, 1, bytes(2)),
        (0x0112, 2, 2, b"6\0"),
        (0x0112, 3, 2, struct.pack("<HH", 6, 6)),
        (0x0112, 5, 1, struct.pack("<LL", 6, 1)),
        (0x0112, 12, 1, struct.pack("<d", float("nan"))),
    ],
    ids=["9", "0", "text", "two", "ratio", "nan"],
)
def test_an_odd_orientation_is_upright_or_what_all_see_alike(some_image, kind, value):
    (seen,) = looks(with_exif(kind, some_image, tiff_block(value)))
    assert seen in ("rgkb", "brgk")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("tiff", [b"", b"II*\0", b"no block at all", b"II*\0\xff\xff\xff\x7f"])
def test_a_damaged_block_is_upright(some_image, kind, tiff):
    assert looks(with_exif(kind, some_image, tiff)) == {"rgkb"}


def test_an_orientation_far_behind_the_start_of_a_jpeg_counts(some_image):
    content = with_exif("JPEG", some_image, tiff_block(ORIENTATION))
    note = b"\xff\xfe" + struct.pack(">H", 65535) + bytes(65533)
    assert looks(content[:2] + 2 * note + content[2:]) == {"brgk"}


def test_an_orientation_in_xmp_counts(some_image):
    note = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
    content = saved("JPEG", some_image, quality=95)
    segment = b"\xff\xe1" + struct.pack(">H", len(note) + 2) + note
    assert looks(content[:2] + segment + content[2:]) == {"brgk"}


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tag_of_tiff_with_an_odd_type_costs_neither(some_image, compression):
    exif = Image.Exif()
    exif[0x0112], exif[0x0128], exif[0x011A] = 6, 3, 72.0
    content = bytearray(saved("TIFF", some_image, exif=exif, compression=compression))
    start = struct.unpack_from("<I", content, 4)[0] + 2
    for number in range(struct.unpack_from("<H", content, start - 2)[0]):
        place = start + 12 * number
        if struct.unpack_from("<H", content, place)[0] == 0x011A:
            content[place + 2 : place + 12] = struct.pack("<HI4s", 2, 4, b"abc\0")
    if compression is None:
        with pytest.raises(Exception, match=r"."), Image.open(io.BytesIO(content)) as odd:
            odd.load()  # Pillow alone gives it up
    assert looks(bytes(content)) == {"brgk"}


def test_a_text_that_is_too_long_for_pillow_does_not_count(some_image):
    notes = PngImagePlugin.PngInfo()
    notes.add_text("note", "x" * 2 * PngImagePlugin.MAX_TEXT_CHUNK, zip=True)
    content = saved("PNG", some_image, pnginfo=notes)
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(content))
    assert looks(content) == {"rgkb"}
    turned = content[:33] + chunk(b"eXIf", tiff_block(ORIENTATION)) + content[33:]
    assert looks(turned) == {"brgk"}


@pytest.mark.parametrize(
    "error", [KeyError("tag"), AttributeError("x"), RuntimeError(), MemoryError()]
)
def test_whatever_pillow_raises_is_an_image_error(monkeypatch, some_image, error):
    def load(self):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(ImageError, match=type(error).__name__):
        open_image(saved("PNG", some_image))


def test_whatever_the_jpeg_decoder_raises_goes_to_pillow(monkeypatch, some_image):
    def broken(*args, **options):
        raise OverflowError("odd")

    content = saved("JPEG", some_image, quality=95)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", broken)
    assert looks(content) == {"rgkb"}
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", broken)
    assert looks(content) == {"rgkb"}


def test_limits_hold_where_a_header_says_less_than_what_is_decoded(monkeypatch):
    inner = saved("PNG", Image.new("RGB", (64, 64)))
    icon = struct.pack("<HHH4BHHII", 0, 1, 1, 8, 8, 0, 0, 1, 32, len(inner), 22) + inner
    monkeypatch.setattr(decoders, "MAX_PIXELS", 100)
    with pytest.raises(ImageError, match="pixels, more than 100"):
        open_image(icon)


def test_a_program_is_no_image():
    """Pillow would hand PostScript to Ghostscript."""
    with pytest.raises(ImageError, match="no image of a known format"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    assert not {"eps", "ps", "pdf", "mpg", "hdf", "wmf"} & image_endings()
    assert {"jfif", "avif", "jp2", "pgm", "webp", "tif", "bmp", "mpo", "jpe"} <= image_endings()


def test_there_is_one_door():
    """Nothing else of the package opens images, turns them, or knows what decoders raise."""
    root = Path(decoders.__file__).parents[1]
    words = r"Image\.open|simplejpeg\.|exif_transpose|getexif|DAMAGE|IMAGE_EXTENSIONS"
    found = subprocess.run(
        ["grep", "-rlE", words, "--include=*.py", root], capture_output=True, text=True, check=True
    )
    names = {str(Path(line).relative_to(root)) for line in found.stdout.splitlines()}
    assert names == {"data/decoders.py", "data/metadata.py"}


@pytest.mark.parametrize(
    "format_", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "PPM"]
)
def test_header_names_an_extension_of_its_format(format_):
    file = io.BytesIO()
    Image.new("RGB", (24, 16), (90, 30, 200)).save(file, format_)
    file.seek(0)
    ending = decoders.check_header(file)
    assert ending in image_endings()
    assert Image.registered_extensions()[f".{ending}"] == format_
