"""Scans of existing tars, with notes that outlive an error.

To hash and index thousands of tars takes hours, and one that cannot be read ends it. So each scan
becomes a line of `OUT/.scans.jsonl`, which is removed once the index is written. Another attempt,
also with other tars beside these, scans only tars without a line and those that have changed since:
in size or time, or remote ones in size or the storage's tag. Without a tag, as from plain web
servers, they are scanned again.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import fsspec

from moce_dist.data.progress import track
from moce_dist.data.ranges import is_remote
from moce_dist.data.shards import Fault, Shard, index_tar
from moce_dist.run.files import READER
from moce_dist.run.tasks import MapTasks
from moce_dist.settings import ConfigError

SCANS_NAME = ".scans.jsonl"
_SCANS_PER_TASK = 16
_TAGS = ("ETag", "etag", "generation", "LastModified", "last_modified", "mtime")
"""What storages call the value that changes with an object's content."""

Stamp = list[int | str]


class Scan(NamedTuple):
    """The index entry of a tar, its faults, and what was left out, by kind and number."""

    shard: Shard
    faults: list[Fault]
    left_out: str


_Result = tuple[Stamp | None, Scan] | Exception


def scan_tars(
    urls: Sequence[str], folder: Path, deadline_s: float, map_tasks: MapTasks
) -> list[Scan]:
    """Scan tars, or take the scans of an earlier attempt that were noted in `folder`.

    Raises:
        ConfigError: a tar is missing or is none.
        OSError: a tar cannot be read.
    """
    notes = folder / SCANS_NAME
    done = _known(notes, urls)
    left = [url for url in urls if url not in done]
    if not left:
        return [done[url] for url in urls]
    groups = [left[i : i + _SCANS_PER_TASK] for i in range(0, len(left), _SCANS_PER_TASK)]
    scanned = map_tasks(_scan_group, deadline_s, groups)
    for group in track(scanned, "shards", total=len(left), size=len):
        errors = [result for result in group if isinstance(result, Exception)]
        found = [result for result in group if not isinstance(result, Exception)]
        done.update((scan.shard.path, scan) for _, scan in found)
        if lines := [_line(stamp, scan) for stamp, scan in found if stamp is not None]:
            with notes.open("a", encoding="ascii") as file:
                file.writelines(lines)
        if errors:
            raise errors[0]
    return [done[url] for url in urls]


def _line(stamp: Stamp, scan: Scan) -> str:
    return json.dumps({"stamp": stamp, **scan._asdict(), "shard": vars(scan.shard)}) + "\n"


def _known(notes: Path, urls: Sequence[str]) -> dict[str, Scan]:
    """Return the noted scans of these tars as they are now, and drop a line that was cut off."""
    if not notes.exists():
        return {}
    found: dict[str, Scan] = {}
    with notes.open("rb+") as file, ThreadPoolExecutor(_SCANS_PER_TASK) as pool:
        stamps = dict(zip(urls, pool.map(_stamp, urls), strict=True))
        end = 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            end += len(line)
            note = json.loads(line)
            shard = Shard(**note["shard"])
            if note["stamp"] == stamps.get(shard.path):
                faults = [Fault(*fault) for fault in note["faults"]]
                found[shard.path] = Scan(shard, faults, note["left_out"])
        file.truncate(end)
    return found


def _stamp(url: str) -> Stamp | None:
    """Return what changes when the tar changes; None if there is no such thing."""
    try:
        if not is_remote(url):
            status = os.stat(url)
            return [status.st_size, status.st_mtime_ns]
        files, path = fsspec.core.url_to_fs(url)
        info = files.info(path)
    except Exception:  # noqa: BLE001 - whoever reads the tar says what is wrong with it
        return None
    tags = [str(info[name]) for name in _TAGS if info.get(name)]
    return [info["size"], tags[0]] if tags else None


def _scan_group(deadline_s: float, urls: Sequence[str]) -> list[_Result]:
    # threads: hashing and reading release the GIL, remote shards wait for the network
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix=READER)
    try:
        return list(pool.map(partial(_scan, deadline_s), urls))
    finally:
        # after an interruption the process ends without those that still read
        pool.shutdown(wait=False, cancel_futures=True)


def _scan(deadline_s: float, url: str) -> _Result:
    # before the scan: a tar that changes during it is scanned again
    stamp = _stamp(url)
    try:
        return stamp, Scan(*index_tar(url, deadline_s=deadline_s))
    except (ConfigError, OSError) as error:
        # the other tars of the group count
        return error
