"""Shards (tar files of samples) and their index.

A sample is a run of tar members that share a key: the member's path up to the first dot of its
last component, as WebDataset has it. The index keeps, per shard, where every sample stands, so
that any sample can be read by one range request and copied without unpacking it:

    tar    | header img | image bytes | header cls | label | header img | ...
           ^ start      ^ offset      ^ offset + size      ^ end = start of the next sample

`index.json` lies beside the tars; paths in it are relative to its folder, absolute, or URLs.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from moce_dist.config import ConfigError
from moce_dist.data.tarscan import TarSample, scan_tar
from moce_dist.run import write_atomic

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
INDEX_NAME = "index.json"
_FORMAT = "moce_dist.index.v1"
_TAR_END = bytes(1024)


class Fault(NamedTuple):
    """Something unreadable: `key` is None when a whole shard or its tail is meant."""

    shard: str
    key: str | None
    reason: str


@dataclass(frozen=True)
class Shard:
    """One tar and where its samples stand (columns of equal length, byte positions in the tar)."""

    path: str
    num_samples: int = 0
    bytes: int = 0
    sha256: str = ""
    cluster: int | None = None
    keys: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def take(self, rows: list[int]) -> "Shard":
        """Return the entry with some of its samples only; the tar stays as it is."""

        def pick(column: list[Any]) -> list[Any]:
            return [column[row] for row in rows]

        return replace(
            self,
            num_samples=len(rows),
            keys=pick(self.keys),
            starts=pick(self.starts),
            ends=pick(self.ends),
            offsets=pick(self.offsets),
            sizes=pick(self.sizes),
        )


@dataclass(frozen=True)
class ShardIndex:
    """The shards of a data set, in order, and the folder that relative paths refer to."""

    root: str
    shards: list[Shard]

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_clusters(self) -> int:
        """Clusters K; data that was not clustered yet is one cluster."""
        return 1 + max((shard.cluster or 0 for shard in self.shards), default=0)

    def url(self, shard: Shard) -> str:
        """Absolute path or URL of a shard."""
        if "://" in shard.path or shard.path.startswith("/"):
            return shard.path
        return f"{self.root.rstrip('/')}/{shard.path}"


def is_image_name(extension: str) -> bool:
    """Tell whether a member with this extension is the sample's picture."""
    return extension in IMAGE_EXTENSIONS


def scan_shard(
    url: str, *, path: str | None = None, cluster: int | None = None
) -> tuple[Shard, list[Fault]]:
    """Index one tar in one pass over its bytes.

    Returns the shard (`path` as it shall stand in the index, default `url`) and what in it cannot
    be used: a truncated or damaged tail, samples without an image, empty images.

    Raises:
        ConfigError: the file is missing or is no tar at all.
    """
    try:
        with fsspec.open(url, "rb") as file:
            scan = scan_tar(file)
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"{url}: no such shard") from None
    except tarfile.ReadError as error:
        raise ConfigError(f"{url}: is not an uncompressed tar file ({error})") from None
    shard = Shard(path or url, bytes=scan.bytes, sha256=scan.sha256, cluster=cluster)
    faults = [fault for sample in scan.samples if (fault := _add_sample(shard, url, sample))]
    if scan.problem:
        faults.append(Fault(url, None, scan.problem))
    return replace(shard, num_samples=len(shard.keys)), faults


def _add_sample(shard: Shard, url: str, sample: TarSample) -> Fault | None:
    image = next((m for e, m in sample.members.items() if is_image_name(e)), None)
    if image is None:
        return Fault(url, sample.key, "sample has no image member")
    if image.size == 0:
        return Fault(url, sample.key, "image is empty")
    shard.keys.append(sample.key)
    shard.starts.append(sample.start)
    shard.ends.append(sample.end)
    shard.offsets.append(image.offset_data)
    shard.sizes.append(image.size)
    return None


class ShardWriter:
    """Write one tar from raw members or raw ranges of other tars, indexing while writing.

    The file is written beside its final name and renamed by `close`, so a tar under its name is
    whole. Between two writes no file is open: thousands of shards can be written at once.
    """

    def __init__(
        self, folder: Path, name: str, *, cluster: int | None = None, buffer_bytes: int = 2**20
    ) -> None:
        self._path, self._buffer_bytes = folder / name, buffer_bytes
        self._temporary = folder / f".{name}.tmp"
        self._buffer = bytearray()
        self._digest = hashlib.sha256()
        self._position = 0
        self._shard = Shard(path=name, cluster=cluster)
        folder.mkdir(parents=True, exist_ok=True)
        self._temporary.write_bytes(b"")

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return self._position

    def _append(self, block: bytes) -> None:
        self._buffer += block
        self._digest.update(block)
        self._position += len(block)
        if len(self._buffer) >= self._buffer_bytes:
            self._flush()

    def _flush(self) -> None:
        with self._temporary.open("ab") as file:
            file.write(self._buffer)
        self._buffer.clear()

    def add(self, key: str, members: dict[str, bytes]) -> None:
        """Append a sample: {extension: bytes}, exactly one of them an image."""
        start, position = self._position, (0, 0)
        for extension, content in members.items():
            header = tarfile.TarInfo(f"{key}.{extension}")
            header.size = len(content)
            self._append(header.tobuf(tarfile.GNU_FORMAT))
            if is_image_name(extension):
                position = (self._position, len(content))
            self._append(content + bytes(-len(content) % 512))
        self._record(key, start, *position)

    def add_raw(self, key: str, content: bytes, image_offset: int, image_size: int) -> None:
        """Append a sample's byte range of another tar; the image lies `image_offset` bytes in."""
        start = self._position
        self._append(content)
        self._record(key, start, start + image_offset, image_size)

    def _record(self, key: str, start: int, offset: int, size: int) -> None:
        shard = self._shard
        shard.keys.append(key)
        shard.starts.append(start)
        shard.ends.append(self._position)
        shard.offsets.append(offset)
        shard.sizes.append(size)

    def close(self) -> Shard:
        """Finish the tar and return its index entry."""
        self._append(_TAR_END)
        self._flush()
        self._temporary.replace(self._path)
        return replace(
            self._shard,
            num_samples=len(self._shard.keys),
            bytes=self._position,
            sha256=self._digest.hexdigest(),
        )


class ShardSeries:
    """Write `PREFIX-000000.tar`, `PREFIX-000001.tar`, ..., each of at most about `shard_bytes`."""

    def __init__(
        self,
        folder: Path,
        prefix: str,
        shard_bytes: int,
        *,
        cluster: int | None = None,
        buffer_bytes: int = 2**20,
    ) -> None:
        self._folder, self._prefix, self._shard_bytes = folder, prefix, shard_bytes
        self._cluster, self._buffer_bytes = cluster, buffer_bytes
        self._writers: list[ShardWriter] = []
        self._shards: list[Shard] = []

    def writer(self, num_bytes: int) -> ShardWriter:
        """Return the tar that the next sample of about `num_bytes` belongs in."""
        is_open = len(self._writers) > len(self._shards)
        if is_open and self._writers[-1].num_bytes + num_bytes <= self._shard_bytes:
            return self._writers[-1]
        if is_open:
            self._shards.append(self._writers[-1].close())
        name = f"{self._prefix}-{len(self._writers):06d}.tar"
        writer = ShardWriter(
            self._folder, name, cluster=self._cluster, buffer_bytes=self._buffer_bytes
        )
        self._writers.append(writer)
        return writer

    def close(self) -> list[Shard]:
        """Finish the last tar and return the index entries of all."""
        if len(self._writers) > len(self._shards):
            self._shards.append(self._writers[-1].close())
        return self._shards


def write_index(folder: Path, shards: Iterable[Shard]) -> ShardIndex:
    """Write `folder/index.json`."""
    index = ShardIndex(str(folder), list(shards))
    document = {"format": _FORMAT, "shards": [asdict(shard) for shard in index.shards]}
    write_atomic(folder / INDEX_NAME, json.dumps(document))
    return index


def read_index(root: str | Path) -> ShardIndex:
    """Read the index of a folder or URL.

    Raises:
        ConfigError: there is none, or it is not one of ours.
    """
    url = f"{str(root).rstrip('/')}/{INDEX_NAME}"
    try:
        with fsspec.open(url, "rb") as file:
            document = json.load(file)
        shards = [Shard(**shard) for shard in document["shards"]]
    except FileNotFoundError:
        raise ConfigError(f"{url}: no such index; make it with jobs/ingest.py") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{url}: is not an index of moce_dist ({type(error).__name__}: {error})"
        ) from None
    if document.get("format") != _FORMAT:
        raise ConfigError(f"{url}: format is {document.get('format')!r}, must be {_FORMAT!r}")
    return ShardIndex(str(root), shards)


def read_range(url: str, start: int, size: int) -> bytes:
    """Read `size` bytes of a file or object from `start`; fewer when it ends before."""
    with fsspec.open(url, "rb") as file:
        file.seek(start)
        content: bytes = file.read(size)
    return content


def read_members(url: str, start: int, end: int) -> dict[str, bytes]:
    """All members of one sample as {extension: bytes}, from its byte range."""
    content = io.BytesIO(read_range(url, start, end - start) + _TAR_END)
    (sample,) = scan_tar(content).samples
    members = {}
    for extension, member in sample.members.items():
        content.seek(member.offset_data)
        members[extension] = content.read(member.size)
    return members
