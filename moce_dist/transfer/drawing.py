"""Shared parts of predictions: options, colours, paths of drawings, decoding of images."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moce_dist.data.images import open_image
from moce_dist.run.names import one_line
from moce_dist.settings import ConfigError
from moce_dist.transfer.loading import Machine
from moce_dist.transfer.tasks import Item


class PredictOptions(NamedTuple):
    """Options of a prediction, and the machine that it runs on.

    `top` is the number of classes to list, `out` the folder for drawings (None: no drawings), and
    `min_score` the least score of a listed object (None: the default of the kind).
    """

    machine: Machine
    top: int
    out: Path | None
    min_score: float | None


def palette(num_classes: int) -> NDArray[np.uint8]:
    """Return distinct colours (C + 1, 3); the last one is black, for ignored pixels."""
    hues = np.arange(num_classes) * 255 * 0.618034 % 255
    hsv = np.stack([hues, np.full(num_classes, 190), 255 - np.arange(num_classes) % 3 * 55], axis=1)
    colours = np.asarray(Image.fromarray(hsv.astype(np.uint8)[None], "HSV").convert("RGB"))[0]
    return np.concatenate([colours, np.zeros((1, 3), np.uint8)])


def drawing_paths(images: Sequence[Item], out: Path) -> list[Path]:
    """Return the path of every image's drawing: its mask, or the image with boxes.

    Raises:
        ConfigError: two drawings have one path, or a drawing would overwrite an image.
    """
    paths = [(out / item.key).with_suffix(".png") for item in images]
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        raise ConfigError(f"{twice[0]}: would be drawn from two images; name their folder")
    originals = {Path(str(item.content)).resolve() for item in images}
    if over := [path for path in paths if path.resolve() in originals]:
        raise ConfigError(f"--out {out}: {over[0]} is one of the images; name another folder")
    return paths


def write_png(path: Path, panels: Sequence[NDArray[np.uint8]]) -> None:
    """Write images (H, W, 3) side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(panels, axis=1)).save(path)


def open_item(item: Item) -> Image.Image | str:
    """Decode an image, or return the reason why it cannot be decoded."""
    try:
        return open_image(item.read())
    except (ValueError, OSError) as error:
        return one_line(error)
