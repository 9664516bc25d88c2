"""The positions of the samples in a tar: one sequential pass that reads headers and hashes.

A sample is a run of members that share a key, as WebDataset groups them. No image is lost silently:

    a.tar, then b.tar      concatenated archives are all read, as by `tar -i`
    a damaged header       is reported; the scan continues at the next valid one, as in `tar -x`
    times in GNU headers   are not taken for POSIX's name prefix, which has the same position
    links, sparse files    have their bytes elsewhere or in parts; each is reported
    IMG_2020.01.000.jpg    has the key IMG_2020, like its neighbours; each is reported
    ._IMG.jpg, __MACOSX    are hidden, and skipped

Source: WebDataset's naming rule, webdataset/webdataset tariterators.py (base_plus_ext and
group_by_keys); POSIX pax and GNU tar's formats as Python's tarfile reads them.
"""

import hashlib
import io
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from moce_dist.data.decoders import image_endings
from moce_dist.data.listing import ending, is_hidden
from moce_dist.run.names import as_text

_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_META = re.compile(r"^__[^/]*__$")
# preferred, so that a file of another kind, such as KEY.im, is not taken for the sample's image
_USUAL = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"))
# text between dots that belongs to a name, not to an extension: a number, or text with a space
_PART_OF_A_NAME = re.compile(r"\d+|.*[\s()].*")
_READ_BYTES, _BLOCK = 2**20, 512
TAR_END = bytes(2 * _BLOCK)
"""The end mark of a tar."""
CUT_OFF = "cut off"
"""Begin of the problem of a tar without an end mark."""
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
_GNU_MAGIC, _CHECKSUM = b"ustar  \0", re.compile(rb"[ \0]*[0-7]+[ \0]*")
_ODD = {tarfile.LNKTYPE: "is a hard link to", tarfile.SYMTYPE: "is a symbolic link to"}


def is_hidden_member(name: str) -> bool:
    """Tell whether a member, or a folder that it lies in, is hidden."""
    return any(is_hidden(part) for part in name.split("/") if part not in (".", "..", ""))


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's path into (key, extension), e.g. `a.b/c.seg.png` -> (`a.b/c`, `seg.png`).

    None for skipped members: names without an extension, hidden files, `__meta__`.
    """
    match = _NAME.match(name)
    if match is None or _META.match(name) or is_hidden_member(name):
        return None
    return as_text(match.group(1)), as_text(match.group(2)).lower()


class StorageError(OSError):
    """A file cannot be read; the cause is an error of the library that reads it."""


class Problem(NamedTuple):
    """An image that is lost: its name and the reason."""

    key: str
    reason: str


@dataclass
class TarSample:
    """The members of one sample by extension; positions are bytes in the tar."""

    key: str
    start: int
    """First byte of the first member's header."""
    end: int
    """End of the last member's padding."""
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)
    """Members whose bytes do not follow their header, with the reason."""

    def has(self, extension: str) -> bool:
        """Tell whether the sample has a member with this extension."""
        return extension in self.members or extension in self.odd

    @property
    def image(self) -> tarfile.TarInfo | None:
        """The image member, of several one in a usual format; None if it cannot be used."""
        found = [extension for extension in self.members if extension in image_endings()]
        usual = [extension for extension in found if extension in _USUAL]
        image = self.members[(usual or found)[0]] if found and not self.odd else None
        return image if image is not None and image.size else None

    def problems(self) -> list[Problem]:
        """Return all images that are lost; if `image` is None, at least one."""
        if self.odd:
            lost = [e for e in self.odd if _is_image(e)] or list(self.odd)[:1]
            keys = [self.key] if len(lost) == 1 else [f"{self.key}.{e}" for e in lost]
            reasons = [f"member {e} {self.odd[e]}" for e in lost]
            return [Problem(*pair) for pair in zip(keys, reasons, strict=True)]
        if not any(extension in image_endings() for extension in self.members):
            lost = [e for e in self.members if _is_image(e)]
            if len(lost) < 2:
                return [Problem(self.key, "sample has no image member")]
        elif self.image is None:
            return [Problem(self.key, "image is empty")]
        else:
            lost = [
                e
                for e in self.members
                if _is_image(e) and any(map(_PART_OF_A_NAME.fullmatch, e.split(".")[:-1]))
            ]
        rule = "a key ends at the first dot"
        return [Problem(f"{self.key}.{e}", f"is no image of its own: {rule}") for e in lost]


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in image_endings()


class TarScan(NamedTuple):
    """The whole samples of a tar, and its problems, one line per damaged place."""

    samples: list[TarSample]
    problems: list[str]
    bytes: int
    sha256: str
    left_out: Counter[str]
    """Number of skipped members by kind."""


class _Member(NamedTuple):
    info: tarfile.TarInfo
    end: int


class _Header(tarfile.TarInfo):
    """A header as GNU and POSIX tar read it; Python takes GNU's times for a part of the name."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if buf[257:265] == _GNU_MAGIC and buf[345:346] != b"\0":
            header.name = buf[:100].split(b"\0", 1)[0].decode(encoding, errors)
        return header


def open_tar(file: Any, **options: Any) -> tarfile.TarFile:
    """Open an uncompressed tar; bytes of names that are not UTF-8 become surrogate escapes.

    Raises:
        tarfile.ReadError: it is not a tar.
    """
    return tarfile.open(
        fileobj=file,
        mode="r:",
        encoding="utf-8",
        errors="surrogateescape",
        tarinfo=_Header,
        **options,
    )


def read_files(sample: bytes | memoryview) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every regular file among the members of one sample.

    Plain members are read by their headers alone, without opening a tar for every sample.

    Raises:
        tarfile.TarError: the bytes are no members of a tar.
    """
    begin = 0
    while begin < len(sample):
        data = begin + _BLOCK
        header = None
        with suppress(tarfile.HeaderError):  # the end, or what only a tar can tell
            header = _Header.frombuf(bytes(sample[begin:data]), "utf-8", "surrogateescape")
        if header is not None and header.size < 0:
            raise tarfile.ReadError("a header says a negative size")
        if header is None or header.type not in _PLAIN or data + header.size > len(sample):
            break
        yield header.name, bytes(sample[data : data + header.size])
        begin = data + -(-header.size // _BLOCK) * _BLOCK
    if begin < len(sample):
        with open_tar(io.BytesIO(bytes(sample[begin:]) + TAR_END)) as tar:
            for member in tar:
                if member.isfile() and (file := tar.extractfile(member)) is not None:
                    yield member.name, file.read()


class _HashingReader:
    """A file that is read only forward, so that one pass serves both headers and sha256."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._position = 0
        self._digest = hashlib.sha256()
        self._again = b""
        self.last = b""

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        # read in parts, because a damaged header may claim any size
        parts = []
        while size > 0 and (part := self._read(min(size, _READ_BYTES))):
            parts.append(part)
            size -= len(part)
        self.last = b"".join(parts)
        return self.last

    def _read(self, size: int) -> bytes:
        part, self._again = self._again[:size], self._again[size:]
        if not part:
            try:
                part = self._file.read(size)
            except OSError:
                raise
            except Exception as error:
                # clients of remote storage have errors of their own, which are no damage of the tar
                raise StorageError(f"cannot be read ({type(error).__name__})") from error
            self._digest.update(part)
        self._position += len(part)
        return part

    def seek(self, position: int) -> int:
        if position < self._position:
            raise tarfile.ReadError("a header of negative size")
        while self._position < position and self.read(min(_READ_BYTES, position - self._position)):
            pass
        return self._position

    def skip_zeros(self) -> bool:
        """Skip to the next block that is not all zeros; return False at the end of the file."""
        # what is read beyond the zeros is copied for every later read
        while part := self.read(tarfile.RECORDSIZE):
            filled = len(part) - len(part.lstrip(b"\0"))
            if filled < len(part):
                start = filled // _BLOCK * _BLOCK
                self._again = part[start:] + self._again
                self._position -= len(part) - start
                return True
        return False

    def skip_to_header(self) -> bool:
        """Skip to the next block that is a header; return False at the end of the file."""
        while len(block := self.read(_BLOCK)) == _BLOCK:
            if _CHECKSUM.fullmatch(block[148:156]) and _is_header(block):
                self._again = block + self._again
                self._position -= _BLOCK
                return True
        return False

    def drain(self) -> tuple[int, str]:
        """Read to the end; return the size and sha256 of the whole file."""
        while self.read(_READ_BYTES):
            pass
        return self._position, self._digest.hexdigest()


def _is_header(block: bytes) -> bool:
    try:
        _Header.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def scan_tar(file: IO[bytes]) -> TarScan:
    """Scan an uncompressed tar from its start, and the archives that follow in the same file.

    Raises:
        tarfile.ReadError: the file is not a tar.
        OSError: the file cannot be read.
    """
    reader, samples, problems = _HashingReader(file), list[TarSample](), list[str]()
    left_out: Counter[str] = Counter()
    goes_on = True
    while goes_on:
        begin = reader.tell()
        members, problem = _read_headers(reader)
        if begin and not members and problem:
            problem = f"bytes follow the end mark, at byte {begin}, that are no tar"
        found = list(_group(members, left_out))
        samples += found
        if problem:
            problems.append(problem)
            goes_on = reader.skip_to_header()
            # a cut between two members shows only in that the last sample lacks usual members
            usual = {*samples[0].members, *samples[0].odd} if samples else set()
            if found and {*found[-1].members, *found[-1].odd} < usual:
                samples.pop()
        else:
            goes_on = reader.skip_zeros()
    size, sha256 = reader.drain()
    if samples and samples[-1].end > size:
        samples.pop()
    return TarScan(samples, problems, size, sha256, left_out)


def _read_headers(reader: _HashingReader) -> tuple[list[_Member], str | None]:
    members: list[_Member] = []
    is_first = reader.tell() == 0
    try:
        with open_tar(reader) as tar:
            while (member := tar.next()) is not None:
                if member.size < 0:
                    return members, _damaged(members, member.offset)
                members.append(_Member(member, tar.offset))
            offset = tar.offset
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001
        # for damaged headers tarfile also raises errors that are not its own
        if is_first and not members:
            raise tarfile.ReadError(str(error)) from None
        return members, f"{CUT_OFF} or damaged after {len(members)} members ({error})"
    if len(reader.last) < _BLOCK:
        return members, f"{CUT_OFF} after {len(members)} members (no end mark)"
    if any(reader.last):
        return members, _damaged(members, offset)
    return members, None


def _damaged(members: list[_Member], offset: int) -> str:
    return f"damaged header after {len(members)} members, at byte {offset}"


def _group(members: Iterable[_Member], left_out: Counter[str]) -> Iterator[TarSample]:
    sample: TarSample | None = None
    for member, end in members:
        if member.isdir():
            continue
        name = split_name(member.name)
        if name is None:
            left_out[_passed_over(member.name)] += 1
            continue
        key, extension = name
        # an extension that occurs again begins a second sample of the same key
        if sample is None or key != sample.key or sample.has(extension):
            if sample is not None:
                yield sample
            sample = TarSample(key, member.offset, end)
        sample.end = end
        if reason := _oddity(member):
            sample.odd[extension] = reason
        else:
            sample.members[extension] = member
    if sample is not None:
        yield sample


def _passed_over(name: str) -> str:
    if is_hidden_member(name):
        return "hidden"
    return f".{ending(name)}" if ending(name) else "without an ending"


def _oddity(member: tarfile.TarInfo) -> str:
    if member.issparse():
        return "is a sparse file, which is stored in parts"
    if member.type in _ODD:
        return f"{_ODD[member.type]} {as_text(member.linkname)}"
    return "" if member.isfile() else f"is of the type {member.type!r}"
