"""Samples that stay in memory after their first use (`data.keep: memory`).

The memory belongs to a rank. It is mapped before the rank's loader processes fork, so they all
share it, as do processes that fork later. JPEGs and large images are kept encoded, other images
decoded. Samples that do not fit are read again at every use. Nothing is ever removed, so a kept
sample stays.

    places (n, 3) int64    first byte + 1 (0: not kept), rows (0: encoded), columns or bytes
    memory                 pixels or bytes of the samples, one after the other
"""

import mmap
import multiprocessing
from collections.abc import Callable

import numpy as np

from moce_dist.arrays import Int64
from moce_dist.config import DataConfig
from moce_dist.data.decoders import Encoded
from moce_dist.data.images import Croppable, Decoded, open_croppable
from moce_dist.data.loaders import in_shared_memory

_MAX_DECODED_BYTES = 3 * 128 * 128


class KeptSamples:
    """Samples by id, shared with the processes that fork from this one."""

    def __init__(self, num_samples: int, num_bytes: int) -> None:
        """Map the memory; pages are allocated only when they are written."""
        self._memory = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
        self._places = np.frombuffer(mmap.mmap(-1, max(1, num_samples) * 24), np.int64)
        self._places = self._places.reshape(-1, 3)
        self._end = np.frombuffer(mmap.mmap(-1, 8), np.int64)
        with in_shared_memory():
            self._lock = multiprocessing.Lock()

    def has(self, ids: Int64) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Tell which of the samples (m,) are kept, (m,)."""
        return self._places[ids, 0] > 0

    def get(self, sample_id: int) -> Croppable | None:
        """Return a sample's image, None if it is not kept.

        Raises:
            ImageError: see `open_croppable`.
        """
        start, rows, columns = self._places[sample_id].tolist()
        if not start:
            return None
        content = self._memory[start - 1 :][: 3 * rows * columns if rows else columns]
        if rows:
            return Decoded(content.reshape(rows, columns, 3))
        return open_croppable(content.data)

    def keep(self, sample_id: int, image: Croppable, content: Encoded) -> None:
        """Keep an image that was read from `content`, if it fits."""
        kept, rows, columns = np.frombuffer(content, np.uint8), 0, len(content)
        if isinstance(image, Decoded) and image.pixels.nbytes <= _MAX_DECODED_BYTES:
            kept, rows, columns = image.pixels, image.height, image.width
        with self._lock:
            start = int(self._end[0])
            if start + kept.nbytes > len(self._memory) or self._places[sample_id, 0]:
                return
            self._end[0] = start + kept.nbytes
        self._memory[start : start + kept.nbytes] = kept.ravel()
        # the lock orders the writes: a process that sees the place also sees the data
        with self._lock:
            self._places[sample_id, 1:] = rows, columns
        with self._lock:
            self._places[sample_id, 0] = start + 1


def open_kept(data: DataConfig, num_samples: int) -> KeptSamples | None:
    """Map memory for the samples of a table; None unless `data.keep` is `memory`."""
    return KeptSamples(num_samples, data.keep_bytes) if data.keep == "memory" else None


class KeptImages:
    """Images by key, in this process alone; transfers use every image many times."""

    def __init__(self, num_bytes: int) -> None:
        """Keep at most `num_bytes`; 0 keeps nothing."""
        self._left = num_bytes
        self._images: dict[str, Croppable] = {}

    def open(self, key: str, read: Callable[[], Encoded]) -> Croppable:
        """Return an image; call `read` unless it is kept.

        Raises:
            ImageError: see `open_croppable`.
            OSError: the image cannot be read.
        """
        if (found := self._images.get(key)) is not None:
            return found
        content = read()
        image, size = open_croppable(content), len(content)
        if isinstance(image, Decoded):
            size = image.pixels.nbytes
            if size > _MAX_DECODED_BYTES:
                return image
        if size <= self._left:
            self._left -= size
            self._images[key] = image
        return image
