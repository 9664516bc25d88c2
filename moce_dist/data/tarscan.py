"""Where the samples of a tar stand: one sequential pass over its headers, hashing as it goes.

A sample is a run of members that share a key, as WebDataset groups them. Python's tarfile ends
quietly at a damaged header, so the scan looks at what it ended on: a tar is whole when that is a
block of zeros, the archive's end mark.

Source: WebDataset's naming rule, webdataset/webdataset tariterators.py (base_plus_ext and
group_by_keys).
"""

import hashlib
import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple

_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"^__[^/]*__$")
_READ_BYTES = 2**20


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's path into (key, extension), e.g. `a.b/c.seg.png` -> (`a.b/c`, `seg.png`).

    None for what WebDataset passes over: names without an extension, hidden files, `__meta__`.
    """
    match = _NAME.match(name)
    if match is None or _META.match(name):
        return None
    return match.group(1), match.group(2).lower()


class TarSample(NamedTuple):
    """The members of one sample by extension; positions are bytes in the tar."""

    key: str
    members: dict[str, tarfile.TarInfo]

    @property
    def start(self) -> int:
        """Where the header of the first member begins."""
        return next(iter(self.members.values())).offset

    @property
    def end(self) -> int:
        """Where the padding of the last member ends."""
        last = next(reversed(self.members.values()))
        return last.offset_data + (last.size + 511) // 512 * 512


class TarScan(NamedTuple):
    """What a tar holds: whole samples, and what is wrong with the rest (None when nothing is)."""

    samples: list[TarSample]
    problem: str | None
    bytes: int
    sha256: str


class _HashingReader:
    """A file that is read forward only, so that one pass serves the headers and the sha256."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._position = 0
        self._digest = hashlib.sha256()
        self.last = b""

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        self.last = self._file.read(size)
        self._digest.update(self.last)
        self._position += len(self.last)
        return self.last

    def seek(self, position: int) -> int:
        assert position >= self._position, "tar headers are read in order"
        while self._position < position and self.read(min(_READ_BYTES, position - self._position)):
            pass
        return self._position

    def drain(self) -> tuple[int, str]:
        """Read to the end; return the size and the sha256 of the whole."""
        while self.read(_READ_BYTES):
            pass
        return self._position, self._digest.hexdigest()


def scan_tar(file: IO[bytes]) -> TarScan:
    """Scan an uncompressed tar from its start.

    Raises:
        tarfile.ReadError: it is no tar at all.
    """
    reader = _HashingReader(file)
    members: list[tarfile.TarInfo] = []
    problem = _read_headers(reader, members)
    size, sha256 = reader.drain()
    samples = list(_group(members))
    if samples and (samples[-1].end > size or (problem and _lacks_members(samples))):
        samples.pop()
    return TarScan(samples, problem, size, sha256)


def _read_headers(reader: _HashingReader, members: list[tarfile.TarInfo]) -> str | None:
    with tarfile.open(fileobj=reader, mode="r:") as tar:  # type: ignore[call-overload]
        try:
            members.extend(member for member in tar if member.isfile())
        except tarfile.ReadError as error:
            return f"cut off or damaged after {len(members)} members ({error})"
        if len(reader.last) < 512:
            return f"cut off after {len(members)} members (no end mark)"
        if any(reader.last):
            return f"damaged header after {len(members)} members, at byte {tar.offset}"
    return None


def _lacks_members(samples: list[TarSample]) -> bool:
    # between two members a cut leaves no trace but what the other samples have
    return samples[-1].members.keys() < samples[0].members.keys()


def _group(members: Iterable[tarfile.TarInfo]) -> Iterator[TarSample]:
    sample: TarSample | None = None
    for member in members:
        name = split_name(member.name)
        if name is None:
            continue
        key, extension = name
        # the same extension again is the same key again: a second sample, not a second member
        if sample is None or key != sample.key or extension in sample.members:
            if sample is not None:
                yield sample
            sample = TarSample(key, {})
        sample.members[extension] = member
    if sample is not None:
        yield sample
