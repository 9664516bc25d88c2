"""Cut-outs and wallpapers from Debian packages, as arrays.

They are read where the packages install them, in the folders of `XDG_DATA_DIRS`
(/usr/local/share, /usr/share). Without root, use `dpkg -x PACKAGE.deb DIR` and add DIR/usr/share to
that variable. Licences are mixed, so images are built where they are used.

Axes: H rows, W columns; pixels are uint8 in [0, 255].

Source: tuxpaint-stamps-default 2022.06.04 (cut-outs by subject; without drawings),
lomiri-wallpapers-16.04 and mate-backgrounds (photographs).
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL.Image import Resampling

from moce_dist.arrays import Pixels
from moce_dist.data.decoders import open_stored
from moce_dist.settings import ConfigError

STAMP_SUBJECTS = ("animals", "food", "household", "plants", "vehicles")
_PACKAGES = ("tuxpaint-stamps-default", "lomiri-wallpapers-16.04", "mate-backgrounds")
_STAMPS = "tuxpaint/stamps"
_STAMP_SIDE = 96
_OPAQUE = (0.15, 0.92)
# distinct colours (32 levels per channel) divided by opaque pixels: a drawing has few colours
_MIN_COLOURS = 0.08
_WALLPAPER_SIDE = 1024
_LOMIRI = (
    "Bridge_by_Sander_Klootwijk",
    "Dragonfly_by_Bolly",
    "Picture_0B_by_freespace",
    "Picture_1A_by_freespace",
    "Wine_by_Jakkub_Mede",
    "aitzgorri_by_Aitzol_Berasategi",
    "free_by_Peter_Nerlich",
    "friends_by_Aitzol_Berasategi",
    "greentock_by_Peter_Nerlich",
    "life_by_Aitzol_Berasategi",
    "picosdeeuropa_by_Aitzol_Berasategi",
    "seeding_by_Clements_Engelhardt",
    "sunset_by_Aitzol_Berasategi",
    "umang_by_Abhishek_Mudgal",
)
_MATE = (
    "Aqua",
    "Dune",
    "FreshFlower",
    "Garden",
    "GreenMeadow",
    "LadyBird",
    "RainDrops",
    "Storm",
    "TwoWings",
    "Wood",
    "YellowFlower",
)


class Stamp(NamedTuple):
    """A cut-out: its file, subject, and pixels (H, W, 4), whose last channel is opacity."""

    name: str
    label: int
    pixels: Pixels


class Wallpaper(NamedTuple):
    """A photograph: its file and pixels (H, W, 3); all have the same `label`."""

    name: str
    pixels: Pixels
    label: int = 0


def _locate(path: str) -> Path:
    folders = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    for folder in folders.split(":"):
        if (found := Path(folder) / path).exists():
            return found
    raise ConfigError(
        f"{path}: in no folder of XDG_DATA_DIRS ({folders}); apt-get install {' '.join(_PACKAGES)}"
    )


def check_installed() -> None:
    """Check that every package that is read is installed.

    Raises:
        ConfigError: one of them is missing; the message contains the apt-get command.
    """
    _locate(_STAMPS)
    for path in wallpaper_paths():
        _locate(path)


def stamps() -> list[Stamp]:
    """Read the photographed cut-outs of `STAMP_SUBJECTS`, at most 96 pixels wide and high.

    Raises:
        ConfigError: the package is missing.
    """
    root = _locate(_STAMPS)
    found = []
    for label, name in enumerate(STAMP_SUBJECTS):
        for path in sorted((root / name).rglob("*.png")):
            if "cartoon" in path.parts:
                continue
            image = open_stored(path.read_bytes()).image
            image.thumbnail((4 * _STAMP_SIDE, 4 * _STAMP_SIDE))
            image = image.convert("RGBA")
            box = image.getchannel("A").point(lambda alpha: 255 * (alpha >= 128)).getbbox()
            image = image.crop(box)
            image.thumbnail((_STAMP_SIDE, _STAMP_SIDE))
            if _is_photograph(pixels := np.asarray(image)):
                found.append(Stamp(str(path.relative_to(root)), label, pixels))
    return found


def _is_photograph(pixels: Pixels) -> bool:
    opaque = pixels[..., 3] >= 128
    if not _OPAQUE[0] <= opaque.mean() <= _OPAQUE[1]:
        return False
    colours = np.unique(pixels[opaque][:, :3] // 8, axis=0)
    return bool(len(colours) >= _MIN_COLOURS * opaque.sum())


def wallpaper_paths() -> Iterator[str]:
    """Yield the paths of the wallpapers, relative to a folder of `XDG_DATA_DIRS`."""
    yield from (f"backgrounds/{name}.jpg" for name in _LOMIRI)
    yield from (f"backgrounds/mate/nature/{name}.jpg" for name in _MATE)


def wallpapers() -> list[Wallpaper]:
    """Read the wallpapers, reduced to a shorter side of at most 1024 pixels.

    Raises:
        ConfigError: a package is missing.
    """
    found = []
    for path in wallpaper_paths():
        # a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is large enough
        content = _locate(path).read_bytes()
        image = open_stored(content, draft=(_WALLPAPER_SIDE, _WALLPAPER_SIDE)).image.convert("RGB")
        factor = min(1.0, _WALLPAPER_SIDE / min(image.size))
        width, height = (round(side * factor) for side in image.size)
        found.append(Wallpaper(path, np.asarray(image.resize((width, height), Resampling.BOX))))
    return found
