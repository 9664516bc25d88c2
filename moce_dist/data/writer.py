"""Writing tars: one at a time, as a series of bounded size, and all of them or none.

The bytes of a tar depend only on its samples: headers have no times and no owners.
"""

import errno
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from moce_dist.data.decoders import image_endings
from moce_dist.data.shards import Fault, Shard
from moce_dist.data.tarscan import TAR_END
from moce_dist.run.artefacts import COMPLETE
from moce_dist.run.files import naming, temporary_name, write_atomic
from moce_dist.settings import ConfigError

_BEGUN, _FINISHED = ".begun", ".finished"
_NOTES = (f"{_FINISHED}/*.json", f"*/{_FINISHED}/*.json")


@contextmanager
def all_or_nothing(
    folder: Path, patterns: tuple[str, ...], plan: str | None = None
) -> Iterator[None]:
    """Remove the files of an earlier attempt under `patterns`, and all files if the block fails.

    With `plan`, a fingerprint of what is to be written, tars that were finished (`note_finished`)
    before a kill, an interruption or an error stay for the next attempt of the same plan. After a
    ConfigError, and if the disk is full, no file stays.

    Raises:
        ConfigError: the folder contains matching files that no earlier attempt has written.
        RuntimeError: the disk is full.
    """
    begun = folder / _BEGUN
    # the temporary names of these files
    paths = map(Path, (COMPLETE, *patterns, *_NOTES))
    unfinished = tuple(str(path.with_name(f".{path.stem}.*.tmp")) for path in paths)
    everything = (COMPLETE, *patterns, *_NOTES, *unfinished)
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    if found and not begun.exists() and not (folder / COMPLETE).exists():
        raise ConfigError(f"{folder}: holds {found[0].name} already; choose another folder")
    is_continued = plan is not None and begun.exists() and begun.read_text() == plan
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder, unfinished if is_continued else everything)
    begun.write_text(plan or "")
    try:
        yield
    except BaseException as error:
        has_finished = any(path for pattern in _NOTES for path in folder.glob(pattern))
        is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        is_of_use = not is_full and not isinstance(error, ConfigError)
        if plan is not None and has_finished and is_of_use:
            raise
        _end(folder, everything)
        if is_full:
            raise RuntimeError(
                f"{folder}: no space left on the device; what was written is removed again"
            ) from error
        raise
    _end(folder, (*_NOTES, *unfinished))


def _end(folder: Path, patterns: tuple[str, ...]) -> None:
    _clear(folder, patterns)
    (folder / _BEGUN).unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _clear(folder: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()
            inner = path.parent
            while inner != folder and not any(inner.iterdir()):
                inner.rmdir()
                inner = inner.parent


def note_finished(folder: Path, shard: Shard, faults: Sequence[Fault] = ()) -> None:
    """Note the index entry of a finished tar, so that no later attempt writes it again."""
    with (folder / shard.path).open("rb") as file:
        # on disk before the note, which survives a crash of the host
        os.fsync(file.fileno())
    note = {"shard": vars(shard), "faults": [list(fault) for fault in faults]}
    write_atomic(_note(folder, shard.path), json.dumps(note))


def finished_tar(folder: Path, name: str) -> tuple[Shard, list[Fault]] | None:
    """Return the index entry and faults of a tar if an earlier attempt finished it, else None."""
    try:
        note = json.loads(_note(folder, name).read_text())
    except FileNotFoundError:
        return None
    path = folder / name
    if not path.is_file() or path.stat().st_size != note["shard"]["bytes"]:
        return None
    return Shard(**note["shard"]), [Fault(*fault) for fault in note["faults"]]


def _note(folder: Path, name: str) -> Path:
    return folder / _FINISHED / f"{name}.json"


class ShardWriter:
    """Write one tar and index it while writing.

    The file has a temporary name until `close` renames it, so a tar with its final name is whole.
    """

    def __init__(self, folder: Path, name: str, *, cluster: int | None = None) -> None:
        self._path = folder / name
        self._temporary = temporary_name(self._path)
        self._digest = hashlib.sha256()
        self._position = 0
        self._entry = Shard(path=name, cluster=cluster)
        self._samples: list[tuple[str, int, int, int, int]] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary.open("wb", 2**20)

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return self._position

    def _append(self, block: bytes) -> None:
        with naming(self._temporary):
            self._file.write(block)
        self._digest.update(block)
        self._position += len(block)

    def add(self, key: str, members: dict[str, bytes]) -> None:
        """Append a sample, {extension: bytes}; exactly one member must be an image."""
        start, position = self._position, (0, 0)
        for extension, content in members.items():
            header = tarfile.TarInfo(f"{key}.{extension}")
            header.size = len(content)
            self._append(header.tobuf(tarfile.GNU_FORMAT, encoding="utf-8"))
            if extension in image_endings():
                position = (self._position, len(content))
            self._append(content + bytes(-len(content) % 512))
        self._samples.append((key, start, self._position, *position))

    def close(self) -> Shard:
        """Finish the tar and return its index entry."""
        self._append(TAR_END)
        with naming(self._temporary):
            self._file.close()
        self._temporary.replace(self._path)
        entry = self._entry.with_samples(self._samples)
        return replace(entry, bytes=self._position, sha256=self._digest.hexdigest())


class ShardSeries:
    """Write `PREFIX-000000.tar`, `PREFIX-000001.tar`, ..., each of at most about `shard_bytes`."""

    def __init__(self, folder: Path, prefix: str, shard_bytes: int) -> None:
        self._folder, self._prefix, self._shard_bytes = folder, prefix, shard_bytes
        self._writer: ShardWriter | None = None
        self._shards: list[Shard] = []

    def writer(self, num_bytes: int) -> ShardWriter:
        """Return the tar for the next sample of about `num_bytes`; start a new one if needed."""
        if self._writer is None or self._writer.num_bytes + num_bytes > self._shard_bytes:
            self.close()
            name = f"{self._prefix}-{len(self._shards):06d}.tar"
            self._writer = ShardWriter(self._folder, name)
        return self._writer

    def close(self) -> list[Shard]:
        """Finish the last tar and return the index entries of all tars."""
        if self._writer is not None:
            self._shards.append(self._writer.close())
            self._writer = None
        return self._shards
