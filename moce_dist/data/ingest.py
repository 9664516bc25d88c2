"""From a source to shards and their index, which every later stage reads.

Images of folders and sample sets are packed into tars, with their original bytes unless
`data.store_side` shrinks them; existing tars are indexed in place. Some images are held out,
selected by the hash of the key alone; of existing tars, whole tars by the hash of the file name.

    OUT/index.json    OUT/train-000000.tar ...    or OUT/pipe-000000.tar ..., written by commands
    OUT/holdout/index.json    OUT/holdout/holdout-000000.tar ...
    OUT/COMPLETE      written last

Every sample that cannot be read becomes one line in the ledger. If they exceed the fraction
`data.max_fault_fraction` of the data, ingest fails; a single fault fails it only if the fraction is
0. After an error the ledger remains, and the tars that are finished, for the next attempt with the
same files or commands; not if the request is refused (ConfigError) or the disk is full. Scans of
existing tars remain in any case (`scans.py`).
"""

import logging
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from moce_dist.config import DataConfig
from moce_dist.data.columns import open_index, write_columns
from moce_dist.data.packing import (
    Packing,
    PipedTar,
    member_bytes,
    plan_files,
    plan_id,
    share,
    write_files,
    write_piped,
)
from moce_dist.data.progress import track
from moce_dist.data.scans import SCANS_NAME, scan_tars
from moce_dist.data.shards import (
    HOLDOUT,
    INDEX_NAME,
    Fault,
    Shard,
    ShardIndex,
    write_index,
)
from moce_dist.data.sources import (
    PIPE,
    PRETRAIN,
    Folder,
    expand_shards,
    header_problem,
    list_folder,
    parse_source,
)
from moce_dist.data.tarscan import CUT_OFF
from moce_dist.data.writer import ShardSeries, all_or_nothing
from moce_dist.run.artefacts import fingerprint, is_complete, mark_complete, read_marker
from moce_dist.run.files import read_faults, record_fault
from moce_dist.run.names import as_text
from moce_dist.run.tasks import MapTasks, map_here
from moce_dist.settings import ConfigError

logger = logging.getLogger(__name__)

_FILES = (
    INDEX_NAME, "train-*.tar", "pipe-*.tar", f"{HOLDOUT}/{INDEX_NAME}", f"{HOLDOUT}/{HOLDOUT}-*.tar"
)  # fmt: skip
_SCAN_FIRST_BYTES = 10 * 10**9
SampleSource = Callable[[], Iterable[tuple[str, dict[str, bytes]]]]
"""Yields samples, (key, {extension: bytes}) each."""


@dataclass
class _FaultLimit:
    """Write faults to the ledger; fail when they are too large a fraction of the data."""

    ledger: Path
    max_fraction: float
    total: int
    num_faults: int = 0
    _met: set[tuple[str, str | None]] = field(default_factory=set)
    _known: set[Fault] = field(default_factory=set)

    def __post_init__(self) -> None:
        # the ledger may contain lines of an earlier, failed attempt
        lines = (line for line in read_faults(self.ledger) if line["stage"] == "ingest")
        self._known.update(Fault(f["shard"], f["key"], f["reason"]) for f in lines)

    def record(self, faults: Iterable[Fault], *, again: bool = False) -> None:
        """Count and write faults; `again` leaves out samples of which a fault was recorded."""
        for fault in faults:
            if again and (fault.shard, fault.key) in self._met:
                continue
            self.num_faults += 1
            self._met.add((fault.shard, fault.key))
            if fault not in self._known:
                record_fault(self.ledger, stage="ingest", **fault._asdict())

    def check(self, error: type[Exception]) -> None:
        # in a small data set one bad file may exceed the fraction; only a fraction of 0 forbids it
        is_single = self.num_faults == 1 and self.max_fraction > 0
        if self.num_faults > self.max_fraction * self.total and not is_single:
            raise error(
                f"{self.num_faults} of {self.total} samples cannot be used, over "
                f"data.max_fault_fraction = {self.max_fraction}; each is named in {self.ledger}"
            )


def ingest(
    source: str,
    out: Path,
    config: DataConfig,
    ledger: Path,
    map_tasks: MapTasks = map_here,
    *,
    mix: SampleSource | None = None,
) -> ShardIndex:
    """Write shards and index of a source to `out`, or return the index if that was done before.

    `mix` yields the images of the source `sample:pretrain`, (key, {extension: bytes}) each.

    Raises:
        ConfigError: the source is wrong or too damaged, or `out` holds another data set.
        RuntimeError: there were too many faults while packing, or the disk is full.
    """
    out = out.resolve()
    kind, rest = parse_source(source)
    inputs = {"source": f"{kind}:{rest}", "holdout_fraction": config.holdout_fraction}
    if config.store_side is not None:
        if kind != "folder":
            raise ConfigError(
                f"data.store_side ({config.store_side}): is for images of a folder; what is in "
                f"tars already stays as it is ({kind}:{rest})"
            )
        inputs["store_side"] = config.store_side
    if is_complete(out, inputs):
        logger.info("%s: complete already", out)
        return open_index(out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is not a folder")
    marker = read_marker(out)
    if marker is not None and marker["inputs"] != inputs:
        raise ConfigError(
            f"{out}: holds other data ({marker['inputs']}, asked for {inputs}); "
            "choose another folder, or --fresh"
        )
    request = _Request(out, config, ledger, map_tasks)
    if kind == "sample" and rest != PRETRAIN:
        raise ConfigError(f"sample:{rest}: is a downstream task; train on sample:{PRETRAIN}")
    if kind == "folder":
        return _pack_folder(list_folder(Path(rest)), request, inputs)
    if kind == "sample":
        assert mix is not None, "whoever allows sample:pretrain gives `mix`"
        return pack_samples(mix, out, config, inputs)
    urls = expand_shards(rest, allow_pipes=config.allow_pipes)
    has_pipes = any(url.startswith(PIPE) for url in urls)
    with all_or_nothing(out, _FILES, fingerprint({"urls": urls}) if has_pipes else None):
        return _index_in_place(urls, request, inputs)


def pack_samples(
    samples: SampleSource, out: Path, config: DataConfig, inputs: dict[str, Any]
) -> ShardIndex:
    """Write samples as shards with an index to `out`, an artefact that `inputs` identify.

    Raises:
        ConfigError: there are none to train on.
        RuntimeError: the disk is full.
    """
    with all_or_nothing(out, _FILES):
        train = ShardSeries(out, "train", config.shard_bytes)
        holdout = ShardSeries(out / HOLDOUT, HOLDOUT, config.shard_bytes)
        for key, members in track(samples(), "images"):
            series = holdout if share(key) < config.holdout_fraction else train
            series.writer(member_bytes(map(len, members.values()))).add(key, members)
        return _finish(out, config, inputs, train.close(), holdout.close())


class _Request(NamedTuple):
    out: Path
    config: DataConfig
    ledger: Path
    map_tasks: MapTasks

    def limit(self, total: int) -> _FaultLimit:
        return _FaultLimit(self.ledger, self.config.max_fault_fraction, total)


def _pack_folder(folder: Folder, request: _Request, inputs: dict[str, Any]) -> ShardIndex:
    out, config = request.out, request.config
    tars = plan_files(
        folder.files, holdout_fraction=config.holdout_fraction, shard_bytes=config.shard_bytes
    )
    packing = Packing(out, config.store_side)
    with all_or_nothing(out, _FILES, fingerprint([plan_id(tars), config.store_side])):
        limit = _check_headers(folder, request)
        parts: dict[str, list[Shard]] = {"": [], HOLDOUT: []}
        packed = request.map_tasks(write_files, packing, tars)
        written = track(packed, "tars packed", total=len(tars))
        for tar, (shard, faults) in zip(tars, written, strict=True):
            # a damaged header was found by the check already
            limit.record(faults, again=True)
            limit.check(RuntimeError)
            if shard.num_samples:
                parts[tar.folder].append(shard)
        if not any(parts.values()):
            raise ConfigError(f"no image can be read; each is named in {request.ledger}")
        listed = len(folder.files) + len(folder.faults)
        return _finish(out, config, inputs, parts[""], parts[HOLDOUT], listed=listed)


def _check_headers(folder: Folder, request: _Request) -> _FaultLimit:
    # headers of small data sets are checked before anything is packed
    limit = request.limit(len(folder.files) + len(folder.faults))
    limit.record(folder.faults)
    if folder.num_bytes < _SCAN_FIRST_BYTES:
        headers = track(folder.files, "headers", total=len(folder.files))
        checked = [(file, header_problem(file.path)) for file in headers]
        limit.record(Fault(str(file.path), file.key, why) for file, why in checked if why)
    limit.check(ConfigError)
    if limit.num_faults == limit.total:
        raise ConfigError(f"no image can be read; each is named in {request.ledger}")
    return limit


def _finish(
    out: Path,
    config: DataConfig,
    inputs: dict[str, Any],
    train: list[Shard],
    holdout: list[Shard],
    *,
    listed: int = 0,
) -> ShardIndex:
    """Write the indices and the marker; tars of `out` are not read again for their sha256."""
    fraction = config.holdout_fraction
    if not train:
        raise ConfigError(
            f"data.holdout_fraction = {fraction}: holds out every image of so few; "
            "lower it, or give more images"
        )
    if holdout:
        write_columns(write_index(out / HOLDOUT, holdout))
    elif fraction:
        logger.warning("data.holdout_fraction = %s: nothing is held out of so few", fraction)
    index = write_index(out, train)
    write_columns(index)
    known = {str(out / shard.path): shard.sha256 for shard in train}
    known |= {str(out / HOLDOUT / shard.path): shard.sha256 for shard in holdout}
    known = {os.path.relpath(path, out): sha256 for path, sha256 in known.items()}
    files = [path for pattern in _FILES for path in out.glob(pattern)]
    mark_complete(out, inputs, files, known, listed=listed, samples=index.num_samples)
    return index


def _index_in_place(urls: list[str], request: _Request, inputs: dict[str, Any]) -> ShardIndex:
    named = [url for url in urls if not url.startswith(PIPE)]
    scans = scan_tars(named, request.out, request.config.read_deadline_s, request.map_tasks)
    shards = [scan.shard for scan in scans]
    faults = [fault for scan in scans for fault in scan.faults]
    for scan in scans:
        if scan.left_out:
            logger.warning("%s: left out: %s", as_text(scan.shard.path), scan.left_out)
    pipes = (url for url in urls if url.startswith(PIPE))
    tars = [PipedTar(f"pipe-{number:06d}.tar", url) for number, url in enumerate(pipes)]
    written = request.map_tasks(write_piped, request.out, tars)
    for shard, found in track(written, "commands", total=len(tars)) if tars else ():
        shards.append(replace(shard, path=str(request.out / shard.path)))
        faults += found
    if cut := {fault.shard for fault in faults if fault.reason.startswith(CUT_OFF)}:
        rule = "each counts as one fault, however many samples it lacks"
        logger.warning("%d of %d tars have no end mark; %s", len(cut), len(shards), rule)
    keys: set[str] = set()
    unique = [_without_repeats(shard, keys, faults) for shard in shards]
    limit = request.limit(len(keys) + len(faults))
    limit.record(faults)
    limit.check(ConfigError)
    if not keys:
        raise ConfigError(f"no sample can be read; each is named in {request.ledger}")
    for shard, left in zip(shards, unique, strict=True):
        if shard.num_samples and not left.num_samples:
            # such as tars of two data sets that both count from 0
            raise ConfigError(f"{shard.path}: earlier tars have all its keys, which must be unique")
    unique = [shard for shard in unique if shard.num_samples]
    fraction = request.config.holdout_fraction
    held = _held_out(unique, fraction)
    train = [shard for shard in unique if shard.path not in held]
    holdout = [shard for shard in unique if shard.path in held]
    share_held = sum(shard.num_samples for shard in holdout) / len(keys)
    if share_held > 2 * fraction:
        rule = "existing tars are held out whole; data.holdout_fraction = 0 holds out none"
        logger.warning("%.0f %% of the images are held out: %s", 100 * share_held, rule)
    index = _finish(request.out, request.config, inputs, train, holdout, listed=len(urls))
    (request.out / SCANS_NAME).unlink(missing_ok=True)
    return index


def _without_repeats(shard: Shard, keys: set[str], faults: list[Fault]) -> Shard:
    # keep the first sample of every key in the whole data set
    rows = []
    for row, key in enumerate(shard.keys):
        if key in keys:
            faults.append(Fault(shard.path, key, "key was used before"))
        else:
            keys.add(key)
            rows.append(row)
    return shard if len(rows) == shard.num_samples else shard.take(rows)


def _held_out(shards: list[Shard], fraction: float) -> set[str]:
    # whole shards, but always leave one for training
    number = min(math.ceil(fraction * len(shards)), len(shards) - 1)
    paths = [shard.path for shard in shards]
    return set(sorted(paths, key=lambda path: (share(path.rsplit("/")[-1]), path))[:number])
