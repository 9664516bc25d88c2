"""Samples of remote shards, kept on a node's disk after their first use.

    CACHE/1c/3f...1c    one sample and its checksum; the name is a hash of shard content, offset
                        and size, and the folder is its last byte

Every sample is used once per epoch, so the least recently used sample is the worst to drop. Instead
the name alone decides whether a sample is kept, such that as many samples of a data set are kept as
fit. No sample is ever replaced. So the processes of a node share a folder without communication,
and what it holds of a data set stays within the limit. Every data set fills its own share: the tars
that stage mae reads, those by cluster, and those of other runs.
"""

import hashlib
import logging
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)
_CHECKSUM_BYTES = 4


class SampleRange(NamedTuple):
    """The position of the bytes of one sample."""

    url: str
    offset: int
    size: int


@dataclass
class SampleCache:
    """A cache for the share `share` of the samples of some shards.

    `versions` maps the URL of a shard to its sha256.
    """

    folder: Path
    versions: Mapping[str, str]
    share: float
    _is_writable: bool = True

    def get(self, wanted: SampleRange) -> memoryview | None:
        """Return the bytes of a sample, or None if it is not cached or damaged."""
        path = self._path(wanted)
        if path is None:
            return None
        try:
            content = memoryview(path.read_bytes())
        except OSError:
            return None
        sample, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
        is_whole = len(sample) == wanted.size and bytes(checksum) == _checksum(sample)
        return sample if is_whole else None

    def has(self, wanted: SampleRange) -> bool:
        """Tell whether a sample is cached, without reading it."""
        path = self._path(wanted)
        with suppress(OSError):  # a folder that may not be searched
            return path is not None and path.exists()
        return False

    def keep(self, wanted: SampleRange, sample: memoryview) -> None:
        """Cache a sample if it is one of those to keep; after a failed write, cache no more."""
        path = self._path(wanted)
        if path is None or not self._is_writable:
            return
        # processes that write a sample at the same time write equal bytes, so they can share one
        # temporary name; the next writer overwrites what a killed process left
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(sample)
                file.write(_checksum(sample))
            with suppress(FileNotFoundError):  # another process has renamed it
                temporary.replace(path)
        except OSError as error:
            self._is_writable = False
            with suppress(OSError):
                temporary.unlink()
            log.warning("data.cache (%s): takes no more samples: %s", self.folder, error.strerror)

    def _path(self, wanted: SampleRange) -> Path | None:
        version = self.versions.get(wanted.url)
        if not version:
            return None
        address = f"{version}/{wanted.offset}/{wanted.size}".encode()
        digest = hashlib.blake2b(address, digest_size=16).digest()
        if int.from_bytes(digest[:8], "big") >= self.share * 2**64:
            return None
        # the first bytes decide what is kept, so the folder is named by the last byte
        return self.folder / digest[-1:].hex() / digest.hex()


def _checksum(sample: memoryview) -> bytes:
    return zlib.crc32(sample).to_bytes(_CHECKSUM_BYTES, "big")
