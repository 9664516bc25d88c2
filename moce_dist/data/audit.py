"""Checks of every image of ingested data before it is used for training.

`verify` reads and decodes everything, so that the faults of a training run are known beforehand.
`find_copies` searches the pre-training images for images of a downstream set, because such leaks
invalidate every later result:

    exact   the same bytes
    near    an image that was resized, encoded again or mirrored

Two images are near if at most 10 of their 128 signs differ and their thumbnails correlate by at
least 0.95. The signs are those of differences between neighbouring pixels on grids of 9 x 8
(horizontal) and 8 x 9 (vertical).

Every shard is a task, so workers share the reading. A task returns its findings, not the data.

Source: signs of differences as in the difference hash of N. Krawetz, "Kind of like that", 2013.
"""

import contextlib
import hashlib
import logging
import os
import tarfile
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moce_dist.arrays import Float32
from moce_dist.config import DataConfig
from moce_dist.data.cache import SampleRange
from moce_dist.data.decoders import ImageError, image_endings
from moce_dist.data.images import decode_image
from moce_dist.data.listing import ending, list_images
from moce_dist.data.progress import track
from moce_dist.data.ranges import Content, RangeReader
from moce_dist.data.shards import Fault, Shard, ShardIndex, read_whole
from moce_dist.data.tarscan import is_hidden_member, open_tar, split_name
from moce_dist.run.names import as_text
from moce_dist.run.tasks import MapTasks, map_here
from moce_dist.settings import ConfigError

logger = logging.getLogger(__name__)
_BLOCK = 512
_GRID = 8
_THUMBNAIL = 16
_MIN_CORRELATION = 0.95
_MAX_DISTANCE = 10
_Task = tuple[str, Shard]
_Known = frozenset[tuple[str, str | None]]


class Copy(NamedTuple):
    """A pre-training image that is in a downstream set too."""

    shard: str
    key: str
    file: str
    kind: str
    """`exact` or `near`."""
    distance: int
    """Number of the 128 signs that differ."""


def verify(
    index: ShardIndex,
    data: DataConfig,
    map_tasks: MapTasks = map_here,
    known: Collection[tuple[str, str | None]] = (),
) -> Iterator[Fault]:
    """Read and decode every sample; yield the faults shard by shard, in order.

    `known` has the (shard URL, key) of faults found by ingest, whose samples the index lacks.
    """
    tasks = _tasks(index)
    found = map_tasks(verify_shard, (data, frozenset(known)), tasks)
    for faults in track(found, "shards verified", total=len(tasks)):
        yield from faults


def verify_shard(shared: tuple[DataConfig, _Known], task: _Task) -> list[Fault]:
    """Compare a tar with its index entry and decode all its images."""
    (data, known), (url, shard) = shared, task

    def compare(file: Any) -> tuple[str, list[Fault]]:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, list(unaccounted(file, url, shard))

    try:
        digest, faults = read_whole(url, compare, data.read_deadline_s)
    except FileNotFoundError:
        return [Fault(url, None, "no such shard")]
    except OSError as error:
        return [Fault(url, None, str(error))]
    faults = [f for f in faults if not _names_of(f.key) & {key for at, key in known if at == url}]
    if digest != shard.sha256:
        faults.insert(0, Fault(url, None, "is not what was indexed (sha256 differs)"))
    problems = ((key, _problem(content)) for key, content in _images(url, shard, data))
    return [*faults, *(Fault(url, key, why) for key, why in problems if why)]


def _names_of(member: str | None) -> set[str | None]:
    # a fault is named by the key of its sample, or by the key and the rest of the member's name
    if member is None:
        return {None}
    stem, _, last = member.rpartition(".")
    return {member, f"{stem}.{last.lower()}", (split_name(member) or (member,))[0]}


def unaccounted(file: IO[bytes], url: str, shard: Shard) -> Iterator[Fault]:
    """Yield what a tar contains that its index entry lacks: images, and bytes of no member.

    The check is independent of `scan_tar`: it relies neither on ends of archives nor on keys.
    """
    end = 0
    file.seek(0)
    try:
        with open_tar(file, ignore_zeros=True) as tar:
            while (member := tar.next()) is not None:
                name = as_text(member.name)
                is_image = ending(name) in image_endings() and not is_hidden_member(name)
                row = bisect_right(shard.starts, member.offset) - 1
                is_indexed = row >= 0 and member.offset < shard.ends[row]
                if is_image and not member.isdir() and not is_indexed:
                    yield Fault(url, name, "is an image that the index has not")
                if junk := _junk(file, end, member.offset):
                    yield Fault(url, None, junk)
                end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        yield Fault(url, None, f"is damaged ({error})")
        return
    size = file.seek(0, os.SEEK_END)
    if junk := "is cut off" if end > size else _junk(file, end, size):
        yield Fault(url, None, junk)


def _junk(file: IO[bytes], start: int, end: int) -> str:
    while start < end:
        file.seek(start)
        block, header = file.read(_BLOCK), None
        # zeros and junk are no header
        with contextlib.suppress(tarfile.HeaderError):
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if header is not None and header.type == tarfile.XGLTYPE and header.size >= 0:
            # a global pax header, which belongs to no single member
            start += _BLOCK + -(-header.size // _BLOCK) * _BLOCK
        elif block.strip(b"\0"):
            return f"bytes that are part of no member, at byte {start}"
        else:
            start += _BLOCK
    return ""


def _problem(content: Content) -> str | None:
    if isinstance(content, OSError):
        return str(content)
    try:
        decode_image(content)
    except ImageError as error:
        return str(error)
    return None


def _tasks(index: ShardIndex) -> list[_Task]:
    return [(index.url(shard), shard) for shard in index.shards]


def _images(url: str, shard: Shard, data: DataConfig) -> Iterator[tuple[str, Content]]:
    wanted = [SampleRange(url, *place) for place in zip(shard.offsets, shard.sizes, strict=True)]
    with closing(RangeReader(data.read_timeout_s, data.read_deadline_s)) as reader:
        yield from zip(shard.keys, reader.read_in_turn(wanted), strict=True)


@dataclass(frozen=True)
class ImageHashes:
    """Hashes and thumbnails of n images, for comparison."""

    names: list[str]
    digests: dict[bytes, int]
    """Row of an image by the sha256 of its bytes."""
    signs: NDArray[np.uint64]
    """(2 n, 2) signs of differences, 64 bits a word; rows n and up are of the mirror images."""
    thumbnails: Float32
    """(2 n, 256) centred thumbnails of length 1, in the same order."""


def find_copies(
    indices: Sequence[ShardIndex], folder: Path, data: DataConfig, map_tasks: MapTasks = map_here
) -> Iterator[Copy]:
    """Yield the images of some indices that are in a folder of images too.

    The number of files that cannot be compared is logged.

    Raises:
        ConfigError: the folder is missing or has no readable images.
        RuntimeError: too many images of the indices cannot be read, so copies may be among them.
    """
    listing = list_images(folder)
    if not listing.files:
        raise ConfigError(f"{folder}: no image of it can be read")
    hashes = hash_images([file.path for file in listing.files])
    if unread := len(listing.unusable) + len(listing.files) - len(hashes.names):
        logger.warning("%s: %d of its images cannot be read or decoded", folder, unread)
    tasks = [task for index in indices for task in _tasks(index)]
    total, lost = sum(shard.num_samples for _, shard in tasks), 0
    found = map_tasks(find_in_shard, (hashes, data), tasks)
    for copies, unreadable in track(found, "shards compared", total=len(tasks)):
        yield from copies
        lost += unreadable
    if lost:
        problem = f"{lost} of {total} images of the data cannot be read, and were not compared"
        if lost > data.max_fault_fraction * total:
            raise RuntimeError(f"{problem}; over data.max_fault_fraction")
        logger.warning("%s", problem)


def hash_images(paths: Sequence[Path]) -> ImageHashes:
    """Compute the `ImageHashes` of image files; images that cannot be decoded are skipped.

    Raises:
        ConfigError: none of them can be decoded.
    """
    names: list[str] = []
    digests: dict[bytes, int] = {}
    images: list[Float32] = []
    for path in track(paths, "images", total=len(paths)):
        try:
            content = path.read_bytes()
            images.append(_small(content))
        except (ImageError, OSError):
            continue
        digests[hashlib.sha256(content).digest()] = len(names)
        names.append(str(path))
    if not images:
        raise ConfigError(f"{paths[0].parent}: no image of it can be read")
    both = [*images, *(image[:, ::-1] for image in images)]
    signs = np.stack([_signs(image) for image in both])
    return ImageHashes(names, digests, signs, np.stack([thumbnail(image) for image in both]))


def find_in_shard(shared: tuple[ImageHashes, DataConfig], task: _Task) -> tuple[list[Copy], int]:
    """Compare the images of a shard with the folder's; also count those that cannot be read."""
    (hashes, data), (url, shard) = shared, task
    found, unreadable = [], 0
    for key, content in _images(url, shard, data):
        if isinstance(content, OSError):
            unreadable += 1
            continue
        match = find_match(hashes, content)
        if match is not None:
            row, kind, distance = match
            found.append(Copy(shard.path, key, hashes.names[row], kind, distance))
    return found, unreadable


def find_match(hashes: ImageHashes, content: bytes | memoryview) -> tuple[int, str, int] | None:
    """Find the original of an image: its row, `exact` or `near`, and how many signs differ.

    None if there is none, or the image cannot be decoded.
    """
    row = hashes.digests.get(hashlib.sha256(content).digest())
    return (row, "exact", 0) if row is not None else _near(hashes, content)


def _near(hashes: ImageHashes, content: bytes | memoryview) -> tuple[int, str, int] | None:
    try:
        image = _small(content)
    except ImageError:
        return None
    distances = np.bitwise_count(hashes.signs ^ _signs(image)).sum(axis=1)
    rows = np.flatnonzero(distances <= _MAX_DISTANCE)
    alike = hashes.thumbnails[rows] @ thumbnail(image)
    if not len(rows) or alike.max() < _MIN_CORRELATION:
        return None
    best = rows[alike.argmax()]
    return int(best) % len(hashes.names), "near", int(distances[best])


def _small(content: bytes | memoryview) -> Float32:
    # grey, and small enough that encoding, size and sharpness make no difference
    side = 4 * _THUMBNAIL
    image = Image.fromarray(decode_image(content)).convert("L")
    return np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32)


def _resized(image: Float32, width: int, height: int) -> Float32:
    small = Image.fromarray(image).resize((width, height), Image.Resampling.BOX)
    return np.asarray(small, np.float32)


def _signs(image: Float32) -> NDArray[np.uint64]:
    across = np.diff(_resized(image, _GRID + 1, _GRID), axis=1) > 0
    down = np.diff(_resized(image, _GRID, _GRID + 1), axis=0) > 0
    return np.packbits(np.concatenate([across.ravel(), down.ravel()])).view(np.uint64)


def thumbnail(image: Float32) -> Float32:
    """Shrink an image to a vector of length 1 and mean 0; zeros for an image of one colour."""
    pixels = _resized(image, _THUMBNAIL, _THUMBNAIL).ravel()
    centred = pixels - pixels.mean()
    length = float(np.linalg.norm(centred))
    return centred / length if length > 1e-3 else np.zeros_like(centred)
