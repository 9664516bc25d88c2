"""Samples of remote shards, kept on a node's disk after their first use.

    CACHE/3f/3f1c...    one sample and its checksum; named by shard content, offset and size

Every sample is used once an epoch, so the least recently used one is the worst to drop. Which ones
are kept therefore follows from their name alone, as many of a data set as fit, and none is ever
replaced: all processes of a node share a folder without knowing of each other, and it stays as
large as it may be.
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


class Wanted(NamedTuple):
    """Where the bytes of one sample stand."""

    url: str
    offset: int
    size: int


@dataclass
class SampleCache:
    """The kept samples of some shards: `versions` has the sha256 of those at their URLs.

    `share` of all samples is kept.
    """

    folder: Path
    versions: Mapping[str, str]
    share: float
    _is_writable: bool = True

    def get(self, wanted: Wanted) -> memoryview | None:
        """Return the bytes of a sample, or None where it is not kept or was damaged."""
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

    def has(self, wanted: Wanted) -> bool:
        """Tell whether a sample is kept, without reading it."""
        path = self._path(wanted)
        return path is not None and path.exists()

    def keep(self, wanted: Wanted, sample: memoryview) -> None:
        """Keep a sample, if it is one of those that fit; a folder that takes no more is left."""
        path = self._path(wanted)
        if path is None or not self._is_writable:
            return
        # processes that write the same sample at once write the same bytes: one name serves all,
        # and what a killed one left is written over by the next
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(sample)
                file.write(_checksum(sample))
            with suppress(FileNotFoundError):  # another one has renamed it
                temporary.replace(path)
        except OSError as error:
            self._is_writable = False
            temporary.unlink(missing_ok=True)
            log.warning("data.cache (%s): takes no more samples: %s", self.folder, error.strerror)

    def _path(self, wanted: Wanted) -> Path | None:
        version = self.versions.get(wanted.url)
        if not version:
            return None
        address = f"{version}/{wanted.offset}/{wanted.size}".encode()
        digest = hashlib.blake2b(address, digest_size=16).digest()
        if int.from_bytes(digest[:8], "big") >= self.share * 2**64:
            return None
        # the first bytes decide what is kept, so folders are told apart by the last one
        return self.folder / digest[-1:].hex() / digest.hex()


def _checksum(sample: memoryview) -> bytes:
    return zlib.crc32(sample).to_bytes(_CHECKSUM_BYTES, "big")
