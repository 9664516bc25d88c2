"""A small image of every format that Pillow opens here, written by Pillow or by hand."""

import io
import struct

import numpy as np
from PIL import Image

from moce_dist.data.decoders import image_formats

SIDE = 12


def _pixels(bands: int) -> np.ndarray:
    noise = np.random.default_rng(bands).integers(0, 256, (SIDE, SIDE, bands), np.uint8)
    return noise[..., 0] if bands == 1 else noise


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _written() -> dict[str, list[bytes]]:
    rgb, grey = Image.fromarray(_pixels(3)), Image.fromarray(_pixels(1))
    rgba, palette = Image.fromarray(_pixels(4)), rgb.quantize(16)
    deep = Image.fromarray(_pixels(1).astype(np.uint16) * 257)
    exact = Image.fromarray(_pixels(1).astype(np.float32))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    return {
        "AVIF": [_saved(rgb, "AVIF"), _saved(rgba, "AVIF", exif=exif)],
        "BLP": [_saved(palette, "BLP")],
        "BMP": [_saved(image, "BMP") for image in (rgb, palette, grey.convert("1"))],
        "DDS": [_saved(rgb, "DDS"), _saved(rgba, "DDS", pixel_format="DXT5")],
        "DIB": [_saved(rgb, "DIB")],
        "GIF": [
            _saved(palette, "GIF"),
            _saved(palette, "GIF", save_all=True, append_images=[palette]),
        ],
        "ICO": [
            _saved(rgba, "ICO", sizes=[(SIDE, SIDE)]),
            _saved(rgba, "ICO", bitmap_format="bmp"),
        ],
        "IM": [_saved(rgb, "IM"), _saved(palette, "IM"), _saved(exact, "IM")],
        "JPEG": [
            _saved(rgb, "JPEG", exif=exif),
            _saved(grey, "JPEG", comment=b"note"),
            _saved(rgb, "JPEG", progressive=True, icc_profile=bytes(200)),
            _saved(rgb.convert("CMYK"), "JPEG"),
            _saved(rgb, "MPO", save_all=True, append_images=[rgb]),
        ],
        "JPEG2000": [_saved(rgb, "JPEG2000"), _saved(rgba, "JPEG2000", no_jp2=True)],
        "MSP": [_saved(grey.convert("1"), "MSP")],
        "PCX": [_saved(rgb, "PCX"), _saved(palette, "PCX")],
        "PNG": [
            _saved(rgb, "PNG", exif=exif),
            _saved(palette, "PNG", transparency=3),
            _saved(deep, "PNG"),
            _saved(rgba, "PNG", save_all=True, append_images=[rgba]),
        ],
        "PPM": [_saved(image, "PPM") for image in (rgb, deep, grey.convert("1"), exact)],
        "QOI": [_saved(rgb, "QOI"), _saved(rgba, "QOI")],
        "SGI": [_saved(rgb, "SGI"), _saved(grey, "SGI", bpc=2)],
        "TGA": [_saved(rgb, "TGA"), _saved(palette, "TGA", compression="tga_rle")],
        "TIFF": [
            *(_saved(image, "TIFF", exif=exif) for image in (rgb, palette, deep, exact)),
            *(_saved(rgb, "TIFF", compression=c) for c in ("tiff_lzw", "jpeg", "packbits")),
        ],
        "WEBP": [_saved(rgb, "WEBP", exif=exif), _saved(rgba, "WEBP", lossless=True)],
        "XBM": [_saved(grey.convert("1"), "XBM")],
    }


def _by_hand() -> dict[str, list[bytes]]:
    grey, rgb = _pixels(1).tobytes(), _pixels(3).tobytes()
    dib = _saved(Image.fromarray(_pixels(3)), "DIB")
    icon = struct.pack("<HHH4BHHII", 0, 2, 1, SIDE, SIDE, 0, 0, 0, 0, len(dib), 22)
    cursor = icon + dib[:8] + struct.pack("<i", 2 * SIDE) + dib[12:]
    pcx = _saved(Image.fromarray(_pixels(3)), "PCX")
    card = ["SIMPLE = T", "BITPIX = 8", "NAXIS = 2", "NAXIS1 = 12", "NAXIS2 = 12", "END"]
    lines = [f"{k:8}= {v:>20}" for k, _, v in (c.partition(" = ") for c in card[:-1])]
    fits = "".join(line.ljust(80) for line in [*lines, card[-1]]).encode().ljust(2880) + grey
    frame = struct.pack("<IHH8xIH", 16 + 6 + len(grey), 0xF1FA, 1, 6 + len(grey), 16) + grey
    fli = struct.pack("<IHHHHHHI", 128 + len(frame), 0xAF12, 1, SIDE, SIDE, 8, 0, 10).ljust(
        128, b"\0"
    )
    field = b"".join(
        struct.pack(">BBBH", 0x1C, 3, number, len(body)) + body
        for number, body in ((60, b"\1\0"), (20, bytes([SIDE])), (30, bytes([SIDE])), (120, b"\1"))
    )
    psd = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, SIDE, SIDE, 8, 3) + bytes(12) + bytes(2) + rgb
    icon = _saved(Image.fromarray(_pixels(4)).resize((16, 16)), "PNG")
    icns = b"icp4" + struct.pack(">I", 8 + len(icon)) + icon
    xpm = '/* XPM */\nstatic char *x[] = {\n"12 12 2 1",\n"a c #ff0000",\n"b c None",\n'
    return {
        "CUR": [cursor],
        "DCX": [struct.pack("<III", 0x3ADE68B1, 12, 0) + pcx],
        "FITS": [fits],
        "FLI": [fli + frame],
        "FTEX": [b"FTEX" + struct.pack("<7iI", 0, SIDE, SIDE, 1, 1, 1, 32, len(rgb)) + rgb],
        "GBR": [struct.pack(">5I", 22, 1, SIDE, SIDE, 1) + b"a\0" + grey],
        "ICNS": [b"icns" + struct.pack(">I", 8 + len(icns)) + icns],
        "IPTC": [field + struct.pack(">BBBH", 0x1C, 8, 10, len(grey)) + grey],
        "PCD": [bytes(2048) + b"PCD_" + bytes(2000)],
        "PIXAR": [
            (
                b"\x80\xe8\0\0".ljust(416, b"\0") + struct.pack("<HHHHHH", SIDE, SIDE, 0, 0, 14, 2)
            ).ljust(1024, b"\0")
            + rgb
        ],
        "PSD": [psd],
        "SUN": [struct.pack(">8I", 0x59A66A95, SIDE, SIDE, 8, len(grey), 1, 0, 0) + grey],
        "XPM": [(xpm + ",\n".join(f'"{"ab" * 6}"' for _ in range(SIDE)) + "\n};\n").encode()],
    }


def seeds() -> dict[str, list[bytes]]:
    """Return small files by format, of all that are opened here."""
    made = {**_written(), **_by_hand()}
    return {name: made[name] for name in image_formats()}
