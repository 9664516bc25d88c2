"""Shards (tar files of samples) and their index.

A sample is a run of tar members that share a key: the member's path up to the first dot of its
last component, as WebDataset has it. The index keeps, per shard, where every sample stands, so
that any sample can be read by one range request and copied without unpacking it:

    tar    | header img | image bytes | header cls | label | header img | ...
           ^ start      ^ offset      ^ offset + size      ^ end = start of the next sample

`index.json` lies beside the tars; paths in it are relative to its folder, or absolute paths or URLs.

Source: WebDataset's naming rule, webdataset/webdataset tariterators.py (base_plus_ext).
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from moce_dist.config import ConfigError
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


def split_name(name: str) -> tuple[str, str]:
    """Split a member's path into (key, extension), e.g. `a.b/c.seg.png` -> (`a.b/c`, `seg.png`)."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def is_image_name(extension: str) -> bool:
    """Tell whether a member with this extension is the sample's picture."""
    return extension in IMAGE_EXTENSIONS


class _Group(NamedTuple):
    """The members of one sample while a tar is being scanned."""

    key: str
    members: list[tarfile.TarInfo]

    def image(self) -> tarfile.TarInfo | None:
        return next((m for m in self.members if is_image_name(split_name(m.name)[1])), None)


def _members(tar: tarfile.TarFile, url: str, faults: list[Fault]) -> Iterator[tarfile.TarInfo]:
    # a tar cut off in its middle yields what is whole, then one fault for the rest
    try:
        for member in tar:
            if member.isfile():
                yield member
    except (tarfile.TarError, OSError, EOFError) as error:
        faults.append(Fault(url, None, f"truncated or damaged tar: {error}"))


def _groups(members: Iterable[tarfile.TarInfo]) -> Iterator[_Group]:
    group: _Group | None = None
    for member in members:
        key = split_name(member.name)[0]
        if group is None or key != group.key:
            if group is not None:
                yield group
            group = _Group(key, [])
        group.members.append(member)
    if group is not None:
        yield group


def _group_end(group: _Group) -> int:
    last = group.members[-1]
    return last.offset_data + (last.size + 511) // 512 * 512


def scan_shard(
    url: str, *, path: str | None = None, cluster: int | None = None
) -> tuple[Shard, list[Fault]]:
    """Index one tar by reading its headers, and its bytes once for the sha256.

    Returns the shard (`path` as it shall stand in the index, default `url`) and what in it cannot be used: a
    truncated tail, samples without an image, empty images.

    Raises:
        ConfigError: the file is missing or is no tar at all.
    """
    faults: list[Fault] = []
    shard = Shard(path=path or url, cluster=cluster)
    try:
        with fsspec.open(url, "rb") as file:
            size = _scan_samples(file, url, shard, faults)
            file.seek(0)
            digest = hashlib.sha256()
            while block := file.read(2**22):
                digest.update(block)
    except FileNotFoundError:
        raise ConfigError(f"{url}: no such shard") from None
    except tarfile.ReadError as error:
        raise ConfigError(f"{url}: is not a tar file ({error})") from None
    return replace(
        shard, num_samples=len(shard.keys), bytes=size, sha256=digest.hexdigest()
    ), faults


def _scan_samples(file: Any, url: str, shard: Shard, faults: list[Fault]) -> int:
    size = int(file.seek(0, io.SEEK_END))
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for group in _groups(_members(tar, url, faults)):
            image = group.image()
            if image is None:
                faults.append(Fault(url, group.key, "sample has no image member"))
            elif image.size == 0:
                faults.append(Fault(url, group.key, "image is empty"))
            elif _group_end(group) > size:
                faults.append(Fault(url, group.key, "sample is cut off by the end of the tar"))
            else:
                _add_sample(shard, group, image)
    return size


def _add_sample(shard: Shard, group: _Group, image: tarfile.TarInfo) -> None:
    shard.keys.append(group.key)
    shard.starts.append(group.members[0].offset)
    shard.ends.append(_group_end(group))
    shard.offsets.append(image.offset_data)
    shard.sizes.append(image.size)


class ShardWriter:
    """Write one tar from raw members or raw ranges of other tars, indexing while writing.

    The file is written beside its final name and renamed by `close`, so a tar under its name is whole.
    """

    def __init__(self, folder: Path, name: str, *, cluster: int | None = None) -> None:
        self._path, self._cluster = folder / name, cluster
        folder.mkdir(parents=True, exist_ok=True)
        self._temporary = folder / f".{name}.tmp"
        self._file = self._temporary.open("wb")
        self._digest = hashlib.sha256()
        self._position = 0
        self._shard = Shard(path=name, cluster=cluster)

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return self._position

    def _append(self, block: bytes) -> None:
        self._file.write(block)
        self._digest.update(block)
        self._position += len(block)

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
        """Append a sample as its byte range in another tar, the image `image_offset` bytes into it."""
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
        self._file.close()
        self._temporary.replace(self._path)
        return replace(
            self._shard,
            num_samples=len(self._shard.keys),
            bytes=self._position,
            sha256=self._digest.hexdigest(),
        )


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
    with tarfile.open(fileobj=io.BytesIO(read_range(url, start, end - start) + _TAR_END)) as tar:
        return {
            split_name(member.name)[1]: file.read()
            for member in tar
            if (file := tar.extractfile(member))
        }
