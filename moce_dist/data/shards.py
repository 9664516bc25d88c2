"""Shards (tar files of samples) and their index.

A sample is a run of tar members that share a key: the member's path up to the first dot of its
last component, as in WebDataset. The index has, per shard, the position of every sample, so that
any sample can be read by one range request and copied without unpacking it:

    tar    | header img | image bytes | header cls | label | header img | ...
           ^ start      ^ offset      ^ offset + size      ^ end = start of the next sample

Paths in `index.json` are relative to its folder, absolute, or URLs.
"""

import json
import logging
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import fsspec
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
)

from moce_dist.data.listing import counted
from moce_dist.data.ranges import PAUSES, described, is_remote, is_transient
from moce_dist.data.tarscan import StorageError, read_files, scan_tar, split_name
from moce_dist.run.environment import check_url
from moce_dist.run.files import replacing
from moce_dist.run.names import as_text
from moce_dist.settings import ConfigError

logger = logging.getLogger(__name__)
T = TypeVar("T")
INDEX_NAME = "index.json"
COLUMNS_NAME = "index.arrow"
"""The part of an index that training reads, see columns.py."""
HOLDOUT = "holdout"
"""Folder, in that of an index, of the index of its held-out images."""
_FORMAT = "moce_dist.index.v1"
_LABEL_BYTES = 200
_MIN_ATTEMPTS = 3


class Fault(NamedTuple):
    """Something unusable; `key` is None for a whole shard or a part of it that is no sample."""

    shard: str
    key: str | None
    reason: str


@dataclass(frozen=True)
class Shard:
    """One tar and its samples: columns of equal length, with byte positions in the tar."""

    path: str
    num_samples: int = 0
    bytes: int = 0
    sha256: str = ""
    cluster: int | None = None
    keys: Sequence[str] = field(default_factory=list)
    starts: Sequence[int] = field(default_factory=list)
    ends: Sequence[int] = field(default_factory=list)
    offsets: Sequence[int] = field(default_factory=list)
    sizes: Sequence[int] = field(default_factory=list)

    def with_samples(self, samples: Iterable[tuple[str, int, int, int, int]]) -> "Shard":
        """Return the entry with other samples, (key, start, end, offset, size) each."""
        columns = list(map(list, zip(*samples, strict=True))) or [[] for _ in range(5)]
        keys, starts, ends, offsets, sizes = columns
        return replace(
            self,
            num_samples=len(keys),
            keys=keys,
            starts=starts,
            ends=ends,
            offsets=offsets,
            sizes=sizes,
        )

    def take(self, rows: Sequence[int]) -> "Shard":
        """Return the entry with only some of its samples; the tar is not changed."""
        return self.with_samples(
            (self.keys[row], self.starts[row], self.ends[row], self.offsets[row], self.sizes[row])
            for row in rows
        )


@dataclass(frozen=True)
class ShardIndex:
    """The shards of a data set, in order, and the folder that relative paths refer to."""

    root: str
    shards: Sequence[Shard]

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    def url(self, shard: Shard) -> str:
        """Return the path or URL of a shard; relative paths are joined to `root`."""
        if "://" in shard.path or shard.path.startswith("/"):
            return shard.path
        return f"{self.root.rstrip('/')}/{shard.path}"


def open_shard(url: str) -> Any:
    """Open a file or URL for reading; a path may contain `::`, which fsspec would interpret."""
    return fsspec.open(url, "rb") if "://" in url else Path(url).open("rb")


def scan_shard(
    url: str, *, path: str | None = None, cluster: int | None = None, deadline_s: float = 240.0
) -> tuple[Shard, list[Fault]]:
    """Index one tar in one pass over its bytes.

    Returns the shard (its path in the index is `path`, by default `url`) and its faults: damaged
    or truncated places, and every image that is lost (`TarSample.problems`). A remote tar is
    scanned again if it could not be read to the end, for `deadline_s` seconds.

    Raises:
        ConfigError: the file is missing or is not a tar.
        OSError: the file cannot be read.
    """
    shard, faults, left_out = index_tar(url, path=path, cluster=cluster, deadline_s=deadline_s)
    if left_out:
        logger.warning("%s: left out: %s", as_text(url), left_out)
    return shard, faults


def index_tar(
    url: str, *, path: str | None = None, cluster: int | None = None, deadline_s: float = 240.0
) -> tuple[Shard, list[Fault], str]:
    """Index one tar like `scan_shard`; also return what was left out, by kind and number."""
    try:
        scan = read_whole(url, scan_tar, deadline_s)
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"{url}: no such shard") from None
    except tarfile.ReadError as error:
        raise ConfigError(f"{url}: is not an uncompressed tar file ({error})") from None
    samples = [
        (sample.key, sample.start, sample.end, image.offset_data, image.size)
        for sample in scan.samples
        if (image := sample.image) is not None
    ]
    shard = Shard(path or url, bytes=scan.bytes, sha256=scan.sha256, cluster=cluster)
    faults = [Fault(url, *problem) for sample in scan.samples for problem in sample.problems()]
    problems = scan.problems or ([] if scan.samples else ["holds no samples"])
    faults += [Fault(url, None, problem) for problem in problems]
    return shard.with_samples(samples), faults, counted(scan.left_out)


def read_whole(url: str, read: Callable[[IO[bytes]], T], deadline_s: float) -> T:
    """Return `read(file)` of a shard; a remote one is read again after an error that may pass.

    No attempt begins later than `deadline_s` seconds after the first, but there are three at least.

    Raises:
        OSError: the shard cannot be read; of a remote one without the client's own text.
    """

    def once() -> T:
        with open_shard(url) as file:
            return read(file)

    def may_pass(error: BaseException) -> bool:
        return not isinstance(error, tarfile.ReadError) and is_transient(_origin(url, error))

    def say(state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome and (error := state.outcome.exception()):
            reason = described(_origin(url, error))
            logger.warning("%s: %s; it is read again", as_text(url), reason)

    if not is_remote(url):
        return once()
    retrying = Retrying(
        retry=retry_if_exception(may_pass),
        # one attempt may take longer than the deadline
        stop=stop_after_delay(deadline_s) & stop_after_attempt(_MIN_ATTEMPTS),
        wait=PAUSES,
        before_sleep=say,
        reraise=True,
    )
    try:
        return retrying(once)
    except (tarfile.ReadError, IsADirectoryError):
        raise
    except Exception as error:  # noqa: BLE001 - clients of storage have errors of their own
        reason = described(_origin(url, error))
        raise type(reason)(f"{url}: {reason}") from None


def _origin(url: str, error: BaseException) -> BaseException:
    # of http, fsspec calls whatever goes wrong when a file is opened "not found"
    is_http = isinstance(error, FileNotFoundError) and url.startswith("http")
    cause = error.__cause__ if is_http or isinstance(error, StorageError) else None
    is_missing = getattr(cause, "status", None) == HTTPStatus.NOT_FOUND
    return error if cause is None or is_missing else cause


def write_index(folder: Path, shards: Iterable[Shard]) -> ShardIndex:
    """Write `folder/index.json` and remove the columns of an earlier index."""
    (folder / COLUMNS_NAME).unlink(missing_ok=True)
    index = ShardIndex(str(folder), list(shards))
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / INDEX_NAME) as temporary, temporary.open("w") as file:
        # one shard at a time: the whole document takes several times the memory of the samples
        file.write(f'{{"format": {json.dumps(_FORMAT)}, "shards": [')
        for number, shard in enumerate(index.shards):
            file.write(", " * (number > 0) + json.dumps(vars(shard)))
        file.write("]}")
    return index


def read_index(root: str | Path, deadline_s: float = 240.0) -> ShardIndex:
    """Read the index of a folder or URL; a remote one again after errors, for `deadline_s` seconds.

    Raises:
        ConfigError: there is none, or it has another format.
        OSError: it cannot be read.
    """
    url = f"{str(root).rstrip('/')}/{INDEX_NAME}"
    if "://" in url:
        check_url(url)
    try:
        document = json.loads(read_whole(url, lambda file: file.read(), deadline_s))
        shards = [Shard(**shard) for shard in document["shards"]]
    except FileNotFoundError:
        raise ConfigError(f"{url}: no such index; make it with jobs/ingest.py") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{url}: is not an index of moce_dist ({type(error).__name__}: {error})"
        ) from None
    if document.get("format") != _FORMAT:
        raise ConfigError(f"{url}: format is {document.get('format')!r}, must be {_FORMAT!r}")
    return ShardIndex(str(root), shards)


def read_range(url: str, start: int, size: int) -> bytes:
    """Read `size` bytes of a file or object from `start`, fewer if it ends earlier."""
    with open_shard(url) as file:
        file.seek(start)
        content: bytes = file.read(size)
    return content


def domain_of(key: str) -> str:
    """Return an image's domain: the first folder of its key, "" without one."""
    # `tar cf x.tar -C dir .` writes ./folder/name
    return next((part for part in key.split("/")[:-1] if part not in ("", ".")), "")


def class_label(sample: bytes) -> str | None:
    """Read the class (member `cls`) from the bytes of one sample; None if it has no class.

    A class is a number or a name; a member that is not short UTF-8 text is not a class.
    """
    try:
        for path, content in read_files(sample):
            if (name := split_name(path)) is not None and name[1] == "cls":
                return (content.decode().strip() or None) if len(content) <= _LABEL_BYTES else None
    except (tarfile.TarError, UnicodeDecodeError):
        return None
    return None
