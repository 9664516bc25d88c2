"""What predictions of all kinds share: wishes, colours, places of drawings, opened images."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moce_dist.data.images import open_image
from moce_dist.settings import ConfigError
from moce_dist.transfer.loading import Machine
from moce_dist.transfer.tasks import Item


class Wishes(NamedTuple):
    """How images are to be predicted, and on what.

    `top` classes are named; `out` is where drawings go (None: there are none); objects have at
    least `min_score` (None: the kind's own least).
    """

    machine: Machine
    top: int = 5
    out: Path | None = None
    min_score: float | None = None


def palette(num_classes: int) -> NDArray[np.uint8]:
    """Return distinct colours (C + 1, 3), the last one, black, for ignored pixels."""
    hues = np.arange(num_classes) * 255 * 0.618034 % 255
    hsv = np.stack([hues, np.full(num_classes, 190), 255 - np.arange(num_classes) % 3 * 55], axis=1)
    colours = np.asarray(Image.fromarray(hsv.astype(np.uint8)[None], "HSV").convert("RGB"))[0]
    return np.concatenate([colours, np.zeros((1, 3), np.uint8)])


def drawing_paths(images: Sequence[Item], out: Path) -> list[Path]:
    """Say where the drawing of every image goes: its mask, or itself with boxes.

    Raises:
        ConfigError: two would go to one place, or one to that of an image.
    """
    paths = [(out / item.key).with_suffix(".png") for item in images]
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        raise ConfigError(f"{twice[0]}: would be drawn from two images; name their folder")
    originals = {Path(str(item.content)).resolve() for item in images}
    if over := [path for path in paths if path.resolve() in originals]:
        raise ConfigError(f"--out {out}: {over[0]} is one of the images; name another folder")
    return paths


def open_item(item: Item) -> Image.Image | str:
    """Decode an image, or say why that cannot be done."""
    try:
        return open_image(item.read())
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())
