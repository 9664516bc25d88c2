"""Read a shard's images in batches for an encoder, decoded on threads while it works.

    reader      |b0 b1|        |b2|         |b3|         reads, and hands images to the decoders
    decoders    |b0 b0 b1 b1 ...   b2 b2 ...   b3 b3     one image each, into its slot of the batch
    encoder              |b0|      |b1|        |b2|      the caller, who takes the batches

The decoders work one batch ahead of the one that the caller waits for. So at most three batches,
and the stored bytes of three, are in memory. Every image has its slot, so a batch does not depend
on which thread decodes what. With `num_threads` 1 there are no extra threads: the caller's thread
reads and decodes a batch when it takes it.

For a timm model the whole image is resized as in timm's evaluation. Then its centre is cut out, and
padded where the resized image is smaller.

    center   the shorter side becomes T = floor(S / crop_pct), the aspect ratio stays
    squash   both sides become T
    border   the longer side becomes T, the aspect ratio stays

    640 x 480, S 224, crop_pct 0.875: T 256, resized to 341 x 256, cut at (58, 16)

A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves at least twice the pixels of the
resized image in each direction. Otherwise the pixels equal timm's to one or two gray levels.

Letters: B images of a batch, S side in pixels, T side before the cut.

Source: timm.data.transforms_factory.transforms_imagenet_eval, and torchvision's Resize and
CenterCrop, which it uses.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from moce_dist.arrays import Pixels
from moce_dist.data.cache import SampleRange
from moce_dist.data.decoders import Encoded, ImageError
from moce_dist.data.images import centre_sample, open_croppable, open_image, to_planes
from moce_dist.data.ranges import RangeReader, TruncatedError
from moce_dist.data.resize import Size
from moce_dist.data.shards import Shard, class_label
from moce_dist.run.names import clean_label

_BATCHES_AHEAD = 1
_BLOCK, _MOST_BESIDE = 512, 2**16
"""Bytes of a tar header, to which members are padded as well; the most bytes of a sample besides
its image that are read to look for a class.
"""
MODES = ("center", "squash", "border")
METHODS = tuple(method.name.lower() for method in Image.Resampling)
"""Interpolation methods for resizing."""
_SPARE = 2
"""Least ratio, per direction, of a JPEG's reduced decoded size to the size it is resized to."""
BLACK = (0, 0, 0)
_MAX_ASPECT = 8
"""Largest side of the resized image over S up to which the whole image is resized."""


class Framing(NamedTuple):
    """How an image is resized and cut; `fill` is the RGB colour of the padding."""

    crop_pct: float
    mode: str = "center"
    method: str = "bicubic"
    fill: tuple[int, ...] = BLACK

    def resized(self, image: Size, side: int) -> Size:
        """Return the size of the whole image before an S x S square is cut out of it."""
        target = math.floor(side / self.crop_pct)
        if self.mode == "squash":
            return Size(target, target)
        if self.mode == "border":
            ratio = max(image) / target
            width, height = (max(1, round(length / ratio)) for length in image)
            return Size(width, height)
        width, height = (int(target * length / min(image)) for length in image)
        return Size(width, height)


def framed_image(content: Encoded, side: int, framing: Framing | None) -> Pixels:
    """Make an evaluation sample (3, S, S) uint8, as timm does, or without framing `centre_sample`.

    Raises:
        ImageError: see `open_image`.
    """
    if framing is None:
        return centre_sample(open_croppable(content), side)
    image = open_croppable(content)
    size = framing.resized(Size(image.width, image.height), side)
    if max(size) > _MAX_ASPECT * side:
        pixels = _middle(content, size, side, framing.method)
    else:
        pixels = image.resized(size, framing.method, _SPARE)
    return to_planes(_square(pixels, side, framing.fill))


def _middle(content: Encoded, size: Size, side: int, method: str) -> Pixels:
    """Resize only the kept middle of a very long image, at most (S, S, 3)."""
    image = open_image(content)
    across, down = image.width / size.width, image.height / size.height
    left, upper = (max(0, round((length - side) / 2)) for length in size)
    width, height = (min(length, side) for length in size)
    box = (left * across, upper * down, (left + width) * across, (upper + height) * down)
    return np.asarray(image.resize((width, height), Image.Resampling[method.upper()], box=box))


def _square(pixels: Pixels, side: int, fill: tuple[int, ...]) -> Pixels:
    """Cut the middle out of pixels (H, W, 3), and pad it to (S, S, 3) where they are smaller."""
    height, width = pixels.shape[:2]
    upper, left = (max(0, round((length - side) / 2)) for length in (height, width))
    middle = pixels[upper : upper + side, left : left + side]
    if middle.shape[:2] == (side, side):
        return middle
    above, before = ((side - length) // 2 for length in middle.shape[:2])
    square = np.empty((side, side, 3), np.uint8)
    square[:] = fill
    square[above : above + len(middle), before : before + middle.shape[1]] = middle
    return square


class ImageBatch(NamedTuple):
    """The next images, (B, 3, S, S) uint8; a last batch is padded with zeros after `num_images`.

    `faults` maps the shard's rows of unreadable images, which are zeros here, to the reasons.
    `labels` are the classes that the shard gives for the images, None where it gives none.
    """

    images: Pixels
    num_images: int
    faults: dict[int, str]
    labels: list[str | None]


_Outcome = Callable[[], str | None]
"""Waits for an image; returns the reason why it cannot be used, or None."""
_Submit = Callable[[Callable[[], str | None]], _Outcome]


class _Begun(NamedTuple):
    """A batch that is being decoded: first row, images, labels, and the outcome of each image."""

    first: int
    images: Pixels
    labels: list[str | None]
    outcomes: list[_Outcome]

    def finish(self) -> ImageBatch:
        reasons = [outcome() for outcome in self.outcomes]
        faults = {self.first + i: reason for i, reason in enumerate(reasons) if reason is not None}
        return ImageBatch(self.images, len(reasons), faults, self.labels)


@dataclass(frozen=True)
class ShardImages:
    """The images of the shard at `url`, as an encoder takes them.

    `framing` is how they are cut; None: the full centre square, bicubic. `num_threads` threads
    decode them; the result does not depend on their number.
    """

    shard: Shard
    url: str
    image_size: int
    framing: Framing | None
    batch_size: int
    num_threads: int = 1
    open_reader: Callable[[], RangeReader] = RangeReader
    """Says how long remote shards are waited for."""

    def batches(self) -> Iterator[ImageBatch]:
        """Yield all images in order; an empty shard yields one empty batch, to learn the width D.

        Raises:
            OSError: the shard is gone, or its storage did not answer in time.
        """
        starts = range(0, max(len(self.shard.keys), 1), self.batch_size)
        with closing(self.open_reader()) as ranges:
            if self.num_threads == 1:
                yield from (self._begin(ranges, first, _at_once).finish() for first in starts)
            else:
                yield from self._ahead(ranges, starts)

    def _ahead(self, ranges: RangeReader, starts: range) -> Iterator[ImageBatch]:
        reader, decoders = ThreadPoolExecutor(1), ThreadPoolExecutor(self.num_threads)

        def submit(decode: Callable[[], str | None]) -> _Outcome:
            return decoders.submit(decode).result

        waiting: deque[Future[_Begun]] = deque()
        try:
            for first in starts:
                waiting.append(reader.submit(self._begin, ranges, first, submit))
                if len(waiting) > _BATCHES_AHEAD:
                    yield waiting.popleft().result().finish()
            yield from (begun.result().finish() for begun in waiting)
        finally:
            # shut down the reader first, as it hands images to the decoders
            for pool in (reader, decoders):
                pool.shutdown(cancel_futures=True)

    def _begin(self, ranges: RangeReader, first: int, submit: _Submit) -> _Begun:
        side = self.image_size
        images = np.zeros((self.batch_size, 3, side, side), np.uint8)
        rows = range(first, min(first + self.batch_size, len(self.shard.keys)))
        labels: list[str | None] = []
        outcomes: list[_Outcome] = []
        places = [self._place(row) for row in rows]
        contents = ranges.read([SampleRange(self.url, start, size) for start, size, _ in places])
        for slot, row, (start, _, is_whole), content in zip(
            images, rows, places, contents, strict=False
        ):
            label = None
            if isinstance(content, TruncatedError):
                outcomes.append(partial(str, content))
            elif isinstance(content, OSError):
                # errors of remote shards do not name them
                raise content if content.filename else type(content)(f"{self.url}: {content}")
            else:
                encoded = bytes(content)
                if is_whole:
                    label = clean_label(class_label(encoded))
                    before = self.shard.offsets[row] - start
                    encoded = encoded[before : before + self.shard.sizes[row]]
                outcomes.append(submit(self._decoding(encoded, slot)))
            labels.append(label)
        return _Begun(first, images, labels, outcomes)

    def _place(self, row: int) -> tuple[int, int, bool]:
        # offset and size of what to read, and whether that is the whole sample, not the image alone
        start, end, offset, size = (
            column[row]
            for column in (self.shard.starts, self.shard.ends, self.shard.offsets, self.shard.sizes)
        )
        # a sample of one image has no class, and large other members are not read to look for one
        is_alone = offset - start <= _BLOCK and end - offset - size < _BLOCK
        if is_alone or end - start - size > _MOST_BESIDE:
            return offset, size, False
        return start, end - start, True

    def _decoding(self, content: bytes, slot: Pixels) -> Callable[[], str | None]:
        def decode() -> str | None:
            try:
                slot[:] = framed_image(content, self.image_size, self.framing)
            except ImageError as error:
                return str(error)
            return None

        return decode


def _at_once(decode: Callable[[], str | None]) -> _Outcome:
    reason = decode()
    return lambda: reason
