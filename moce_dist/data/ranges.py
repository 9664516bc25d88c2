"""Reading many samples at once: few long ranges of many tars, remote ranges concurrently.

The samples of some steps are scattered over the tars. They are sorted by position, and neighbours
are joined to one range if few unwanted bytes are between them. Local ranges, also those of the next
steps, are announced to the kernel before the first one is read, so that a disk always has many
requests. Remote ranges are requested together, so that the latency of an object store counts once
and not per sample.

    wanted     [a 0:5] [b 9:4] [a 6:3] [a 90:2]       url, offset:size in KiB
    ranges     a 0..9   a 90..92   b 9..13            the gap 5..6 is read and discarded

An error is returned in place of the sample, never raised, so each sample fails on its own. Errors
of remote storage are described without their own text, which may contain credentials.
"""

import asyncio
import errno
import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar

import fsspec
import fsspec.asyn
from tenacity import RetryError, Retrying, TryAgain, stop_before_delay, wait_random_exponential

from moce_dist.cost.sizes import MAX_OPEN_FILES
from moce_dist.data.cache import SampleCache, SampleRange

T = TypeVar("T")
Content = memoryview | OSError
"""The bytes of a sample, or the error if they cannot be read."""

_MAX_WASTE = 0.2
# reading this many bytes costs less than another read or request
_FREE_GAP = 4096
_MAX_RANGE_BYTES = 8 * 2**20
_PORTION_BYTES = 32 * 2**20
_MAX_REQUESTS = 64
_TRY_AGAIN = (408, 425, 429)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")
_NO_RANGES = "the server ignores byte ranges"
PAUSES = wait_random_exponential(multiplier=0.2, max=10)
"""Seconds between two attempts to read from remote storage."""


def is_remote(url: str) -> bool:
    """Tell whether a shard is read over a network."""
    return "://" in url


class Range(NamedTuple):
    """A byte range of one file that contains some of the wanted samples."""

    url: str
    start: int
    stop: int
    rows: list[int]
    """Indices of the wanted samples in the range."""


def coalesce(wanted: Sequence[SampleRange], rows: Iterable[int] | None = None) -> list[Range]:
    """Join neighbouring samples of a file into ranges of at most 8 MiB, unless one is longer.

    A sample joins a range across a gap of at most 4 KiB, or if at most a sixth of the joined range
    is unwanted. `rows` selects the samples to read, by default all of `wanted`.
    """
    ranges: list[Range] = []
    used = 0
    for row in sorted(range(len(wanted)) if rows is None else rows, key=lambda row: wanted[row]):
        url, offset, size = wanted[row]
        last, stop = (ranges[-1] if ranges else None), offset + size
        if last is not None and last.url == url and _is_worth_it(last, used, offset, stop):
            used += size
            last.rows.append(row)
            ranges[-1] = last._replace(stop=max(last.stop, stop))
        else:
            used = size
            ranges.append(Range(url, offset, stop, [row]))
    return ranges


def _is_worth_it(last: Range, used: int, offset: int, stop: int) -> bool:
    length = stop - last.start
    is_near = offset - last.stop <= _FREE_GAP
    is_dense = length <= (1 + _MAX_WASTE) * (used + stop - offset)
    return length <= _MAX_RANGE_BYTES and (is_near or is_dense)


def one_ahead(portions: Iterator[list[T]]) -> Iterator[T]:
    """Yield the items of all portions; while those of one are used, a thread makes the next."""
    with ThreadPoolExecutor(1, "read-ahead") as thread:
        ahead: Future[list[T]] = thread.submit(next, portions, [])
        while portion := ahead.result():
            ahead = thread.submit(next, portions, [])
            yield from portion


class TruncatedError(OSError):
    """A file ends before a sample does."""


@dataclass
class RangeReader:
    """Reads samples; local files stay open up to a limit, then the least recently used close."""

    timeout_s: float = 60.0
    """Seconds after which a remote range is requested again."""
    deadline_s: float = 240.0
    """Seconds after which the requests for remote ranges of one call are given up.

    Clients that read one range after the other (sftp, smb) have a timeout of their own a request.
    """
    cache: SampleCache | None = None
    """Cache of samples of remote shards."""
    _open: OrderedDict[str, int] = field(default_factory=OrderedDict)

    def announce(self, wanted: Sequence[SampleRange]) -> list[Range]:
        """Tell the kernel which local ranges will be read; return all ranges, for `read`.

        Samples that are cached are in no range.
        """
        cache = self.cache
        rows = None if cache is None else [i for i, w in enumerate(wanted) if not cache.has(w)]
        ranges = coalesce(wanted, rows)
        for place in ranges:
            if not is_remote(place.url):
                self._announce(place)
        return ranges

    def read(
        self, wanted: Sequence[SampleRange], ranges: Sequence[Range] | None = None
    ) -> list[Content]:
        """Return the bytes of every sample, in the given order, or the error in their place.

        `ranges` is the result of `announce` for the same samples, if it was called before.
        """
        found: list[Content | None] = [None] * len(wanted)
        self._fill(found, wanted, self.announce(wanted) if ranges is None else ranges)
        if self.cache is not None:
            kept = [row for row, content in enumerate(found) if content is None]
            for row in kept:
                found[row] = self.cache.get(wanted[row])
            # samples that are damaged in the cache are read from their shards
            self._fill(found, wanted, coalesce(wanted, [row for row in kept if found[row] is None]))
        return [OSError() if content is None else content for content in found]

    def _fill(
        self, found: list[Content | None], wanted: Sequence[SampleRange], ranges: Sequence[Range]
    ) -> None:
        local = [place for place in ranges if not is_remote(place.url)]
        remote = [place for place in ranges if is_remote(place.url)]
        contents = dict(zip(map(id, local), map(self._read_local, local), strict=True))
        if remote:
            contents |= dict(zip(map(id, remote), self._read_remote(remote), strict=True))
        for place, content in zip(ranges, [contents[id(place)] for place in ranges], strict=True):
            is_split = isinstance(content, OSError) and len(place.rows) > 1
            for row in place.rows:
                if is_split and not is_remote(place.url):
                    # a bad sector costs only the samples that lie on it
                    part = self._read_alone(wanted[row])
                else:
                    part = _part(content, place.start, wanted[row])
                found[row] = part
                if self.cache is not None and not isinstance(part, OSError):
                    self.cache.keep(wanted[row], part)

    def read_in_turn(self, wanted: Iterable[SampleRange]) -> Iterator[Content]:
        """Yield the results of `read` one by one, holding only a portion of them in memory."""
        for portion in _portions(wanted):
            yield from self.read(portion)

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _announce(self, place: Range) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        try:
            file = self._file(place.url)
            os.posix_fadvise(file, place.start, place.stop - place.start, os.POSIX_FADV_WILLNEED)
        except OSError:
            pass  # reading will meet the same error and report it

    def _read_local(self, place: Range) -> bytes | OSError:
        try:
            file, parts, at = self._file(place.url), [], place.start
            # one call returns at most 2 GiB, and some file systems return less
            while at < place.stop and (part := os.pread(file, place.stop - at, at)):
                parts.append(part)
                at += len(part)
        except OSError as error:
            return error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_alone(self, wanted: SampleRange) -> Content:
        place = Range(wanted.url, wanted.offset, wanted.offset + wanted.size, [])
        return _part(self._read_local(place), place.start, wanted)

    def _file(self, path: str) -> int:
        if path not in self._open:
            if len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, os.O_RDONLY)
        self._open.move_to_end(path)
        return self._open[path]

    def _read_remote(self, ranges: Sequence[Range]) -> list[bytes | OSError]:
        found: dict[int, bytes | BaseException] = {}
        end = time.monotonic() + self.deadline_s

        def attempt() -> None:
            todo = [i for i in range(len(ranges)) if i not in found or is_transient(found[i])]
            fetched = _fetch([ranges[i] for i in todo], self.timeout_s, end)
            for i, result in zip(todo, fetched, strict=True):
                # at the end all time out, whatever the server answered before
                if i not in found or not isinstance(result, TimeoutError):
                    found[i] = result
            if any(is_transient(found[i]) for i in todo):
                raise TryAgain

        # at the deadline, `found` has the last errors
        with suppress(RetryError):
            Retrying(
                stop=stop_before_delay(self.deadline_s),
                wait=PAUSES,
            )(attempt)
        return [_content(found[i], place) for i, place in enumerate(ranges)]


def _portions(wanted: Iterable[SampleRange]) -> Iterator[list[SampleRange]]:
    portion: list[SampleRange] = []
    held = 0
    for place in wanted:
        if held and held + place.size > _PORTION_BYTES:
            yield portion
            portion, held = [], 0
        portion.append(place)
        held += place.size
    yield portion


def _part(content: bytes | OSError, start: int, wanted: SampleRange) -> Content:
    if isinstance(content, OSError):
        return content
    begin = wanted.offset - start
    part = memoryview(content)[begin : begin + wanted.size]
    if len(part) < wanted.size:
        return TruncatedError(f"ends after {len(part)} of {wanted.size} bytes")
    return part


def _content(result: bytes | BaseException, place: Range) -> bytes | OSError:
    if isinstance(result, BaseException):
        return described(result)
    return result if len(result) <= place.stop - place.start else OSError(_NO_RANGES)


def _fetch(ranges: Sequence[Range], timeout_s: float, end: float) -> list[bytes | BaseException]:
    try:
        targets = [fsspec.core.url_to_fs(place.url) for place in ranges]
    except Exception as error:  # noqa: BLE001 - some connect here, or load a library
        return [error] * len(ranges)
    if all(filesystem.async_impl for filesystem, _ in targets):
        limits = (timeout_s, end)
        return list(
            fsspec.asyn.sync(fsspec.asyn.get_loop(), _fetch_together, ranges, targets, *limits)
        )
    found: list[bytes | BaseException] = []
    for place, (filesystem, path) in zip(ranges, targets, strict=True):
        if found and time.monotonic() >= end:
            found.append(TimeoutError())
            continue
        try:
            found.append(filesystem.cat_file(path, start=place.start, end=place.stop))
        except Exception as error:  # noqa: BLE001 - clients of sftp and smb have errors of their own
            found.append(error)
    return found


async def _fetch_together(
    ranges: Sequence[Range], targets: Sequence[tuple[Any, str]], timeout_s: float, end: float
) -> list[bytes | BaseException]:
    gate = asyncio.Semaphore(_MAX_REQUESTS)

    async def fetch(place: Range, filesystem: Any, path: str) -> bytes:
        async with gate:
            request = filesystem._cat_file(path, start=place.start, end=place.stop)
            left_s = end - time.monotonic()
            content: bytes = await asyncio.wait_for(request, min(timeout_s, left_s))
            return content

    calls = (fetch(place, *target) for place, target in zip(ranges, targets, strict=True))
    return await asyncio.gather(*calls, return_exceptions=True)


def is_transient(result: bytes | BaseException) -> bool:
    """Tell whether an attempt to read failed with an error that may pass."""
    # ValueError: a URL that is none, or a server that ignores byte ranges
    lasting = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError)
    if isinstance(result, (bytes, *lasting)) or type(result).__name__ in _NO_CREDENTIALS:
        return False
    status = getattr(result, "status", None)
    if status is not None:
        return bool(status >= 500 or status in _TRY_AGAIN)
    # object stores answer this to a range that begins after the end of the object
    return getattr(result, "errno", None) != errno.EINVAL


def _errno(error: BaseException) -> int | None:
    return error.errno if isinstance(error, OSError) else None


def described(error: BaseException) -> OSError:
    """Describe an error of remote storage without its own text, which may contain credentials."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError("no such file or object")
    status = getattr(error, "status", None)
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or _errno(error) == errno.EINVAL:
        return TruncatedError("ends before the sample begins")  # EINVAL is s3fs's word for it
    if status is not None:
        return OSError(f"the server answers with status {status}")
    if isinstance(error, TimeoutError):
        return TimeoutError("the server does not answer in time")
    if isinstance(error, ValueError) and "range requests" in str(error):
        return OSError(_NO_RANGES)  # these are fsspec's words for it
    return OSError(f"cannot be read ({type(error).__name__})")
