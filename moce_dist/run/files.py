"""Files of a run: written whole or not at all, linked, read by lines; the ledger of faults."""

import errno
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moce_dist.run import lease

log = logging.getLogger(__name__)
WRITER, READER = "checkpoint", "scan"
"""Name of the threads that write checkpoints; an exiting process need not wait for them."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file to a write error that does not name it, such as "No space left".

    Raises:
        OSError: for every write error, including those that numpy and safetensors raise.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        if error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise OSError(f"{path}: {error}") from None
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raised = OSError(f"{path}: {error}")
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raised.errno = int(number[1])
        raise raised from None


def temporary_name(path: Path) -> Path:
    """Return a name beside `path` to write it under, which no other process has.

    Not by the process's number: pods that share a file system have equal ones, and a lost worker
    that still writes must not damage another worker's file.
    """
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write, which replaces `path` when it is complete.

    Readers see the old file or the new one, never a part.

    Raises:
        OSError: naming `path`, or its folder if the folder cannot be written to.
    """
    temporary = temporary_name(path)
    try:
        with naming(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        lease.check()
        temporary.replace(path)
    except OSError as error:
        # name the folder, which is what the user can correct
        if error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, str(path.parent)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def link_tree(source: Path, target: Path) -> None:
    """Duplicate a folder with hard links to its files, or copies where links are not possible.

    Files of a run are replaced, never changed, so both folders may share them; logs (`.jsonl`) get
    further lines, so they are copied. `target` is replaced when its new content is complete.
    """

    def link(file: str, to: str) -> None:
        try:
            if file.endswith(".jsonl"):
                raise OSError
            os.link(file, to)
        except OSError:
            with naming(Path(to)):
                shutil.copyfile(file, to)

    temporary = temporary_name(target)
    shutil.copytree(source, temporary, copy_function=link, ignore=shutil.ignore_patterns(".*"))
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that readers see the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def write_jsonl(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write objects as a JSON-lines file, by `write_atomic`."""
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))


def record_fault(ledger: Path, **fault: Any) -> None:
    """Append one line to a `faults.jsonl`; lines of several processes of a node do not mix.

    Raises:
        OSError: the line cannot be written as a whole.
    """
    lease.check()
    ledger.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"time": round(time.time(), 3), **fault}) + "\n"
    descriptor = os.open(ledger, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        with naming(ledger):
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                # the line before was cut off
                line = f"\n{line}"
            if os.write(descriptor, line.encode()) < len(line.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(ledger))
    finally:
        os.close(descriptor)


def read_faults(ledger: Path) -> list[dict[str, Any]]:
    """Read all whole lines of a `faults.jsonl`, oldest first; a missing ledger is an empty one.

    Several nodes may append to it on a shared disk, so a line may be damaged; it is left out.
    """
    return read_faults_from(ledger, 0)[0]


def read_faults_from(ledger: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Read the whole lines from byte `offset` on, and return with them the byte after the last."""
    if not ledger.exists():
        return [], 0
    with ledger.open("rb") as file:
        file.seek(offset)
        data = file.read()
    data = data[: data.rfind(b"\n") + 1]
    faults, damaged = [], 0
    for line in data.decode("utf-8", errors="replace").splitlines():
        try:
            faults += [json.loads(line)] if line else []
        except json.JSONDecodeError:
            damaged += 1
    if damaged:
        log.warning("%s: %d damaged lines are left out", ledger, damaged)
    return faults, offset + len(data)


def forget_faults(ledger: Path, stage: str, step: int) -> None:
    """Drop a stage's faults from `step` on: these steps run again and record their faults anew."""
    faults = read_faults(ledger)
    kept = [f for f in faults if f["stage"] != stage or f["step"] < step]
    if len(kept) < len(faults):
        write_jsonl(ledger, kept)
