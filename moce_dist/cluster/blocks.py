"""A folder of `.npy` files as one matrix of features, read in fixed blocks of rows.

The matrix is the files' rows one after the other, files in sorted order. A block is a range of rows
of one file, so what a block computes depends on the data alone. Reductions add the blocks of a
group in order, then the groups in order. The grouping does not depend on the workers, so sums have
the same bits on any number of them.

    a.npy (20000 rows)                    b.npy (5000 rows)   block_rows 8192
    [0:8192) [8192:16384) [16384:20000)   [0:5000)            global rows 0, 8192, 16384, 20000

Nothing is unpickled. Files are memory mapped, so the whole matrix is never in one memory. A process
with a GPU keeps rows on it from one sweep to the next; rows that do not fit are read again in every
sweep. Resident rows are never evicted: sweeps visit all blocks in the same order, so evicting the
least recently used block would in the end evict all.

Letters: n rows, D feature width. A `View` says how a raw row becomes the vector that is clustered.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moce_dist.arrays import Float32, Float64, Int64
from moce_dist.run.artefacts import file_sha256, fingerprint
from moce_dist.run.names import as_text, clean_label
from moce_dist.run.tasks import MapTasks, map_here
from moce_dist.settings import ConfigError

_log = logging.getLogger(__name__)

SCAN_FIRST_BYTES = 10 * 10**9
"""Bytes of features from which on an unusable row is a `ValueError`, not a `ConfigError`."""
_MAX_GROUPS, _MIN_GROUPS = 128, 8
_MANY_GROUPS, _FULL_GROUP = 32, 4
"""Groups hold up to 4 blocks while that leaves 32 groups: returning each result takes time, too."""
_GROUP_SUMS_BYTES = 2**30
"""Limit on the results of all groups of a sweep together, unless that leaves under 8 groups."""
_SCAN_ROWS = 8192
CACHED_ROWS = 256
"""Rows that fit into the processor's cache between one operation and the next."""
_SHORTEST = 1e-12
"""Least length that a row is divided by."""
_LARGEST_SQUARE = float(np.finfo(np.float32).max) / 16
"""Greatest |f|^2 of a feature; |x - c|^2 with x = f - mean may be 16 times as much, in float32."""


class Block(NamedTuple):
    """Rows `start` to `stop` of one file; `row` is the global number of the first."""

    path: str
    start: int
    stop: int
    row: int


@dataclass(frozen=True)
class View:
    """How a raw feature f becomes what is clustered: x = f - mean, then x / |x| if `normalise`.

    The features of a masked autoencoder share a large common direction that says nothing about the
    image; subtracting the mean removes it. `mean` (D,) is that of the data. Without `centre` it is
    not subtracted.
    """

    mean: Float32
    normalise: bool
    centre: bool = True

    @property
    def origin(self) -> Float32:
        """The vector that is subtracted from every feature, (D,)."""
        return self.mean if self.centre else np.zeros_like(self.mean)

    def apply(self, features: Tensor, out: Tensor) -> None:
        """Write the transformed `features` (n, D), of any float type, into `out` (n, D) float32.

        Both are on the same device.
        """
        origin = torch.from_numpy(self.origin).to(out.device)
        at_once = CACHED_ROWS if out.device.type == "cpu" else len(out)
        for start in range(0, len(out), max(at_once, 1)):
            part = slice(start, start + at_once)
            torch.sub(features[part].float(), origin, out=out[part])
            if self.normalise:
                norms = torch.linalg.vector_norm(out[part], dim=1, keepdim=True)
                out[part] /= norms.clamp_(min=_SHORTEST)


@dataclass(frozen=True)
class FeatureFiles:
    """The files of a folder, their numbers of rows, and the common width D."""

    paths: tuple[Path, ...]
    rows: tuple[int, ...]
    dim: int
    num_bytes: int

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return sum(self.rows)

    def blocks(self, block_rows: int) -> list[Block]:
        """All rows in blocks of at most `block_rows`, in order."""
        firsts = accumulate(self.rows, initial=0)
        return [
            Block(str(path), start, min(start + block_rows, rows), first + start)
            for path, rows, first in zip(self.paths, self.rows, firsts, strict=False)
            for start in range(0, rows, block_rows)
        ]

    def keys(self) -> Iterator[tuple[str, str]]:
        """Yield (shard, key) of every row from the file's `.keys.json`, or (`FILE`, `FILE:ROW`).

        Raises:
            ConfigError: a list of keys does not fit its file.
        """
        for path, rows in zip(self.paths, self.rows, strict=True):
            keys = _keys_of(path, rows)
            shard = as_text(path.name if keys is None else path.stem)
            for row in range(rows):
                yield shard, f"{shard}:{row}" if keys is None else keys[row]

    def labels(self) -> Iterator[tuple[int, list[str | None]]]:
        """Yield the first row and the labels of every file with a readable `.labels.json`."""
        firsts = accumulate(self.rows, initial=0)
        for path, rows, first in zip(self.paths, self.rows, firsts, strict=False):
            if (labels := _labels_of(path, rows)) is not None:
                yield first, labels

    def take(self, rows: Int64, view: View) -> Float32:
        """Read transformed rows by sorted global numbers, with a column of ones, (n, D + 1)."""
        taken = np.ones((len(rows), self.dim + 1), np.float32)
        firsts = list(accumulate(self.rows, initial=0))
        for path, (first, end) in zip(self.paths, pairwise(firsts), strict=True):
            low, high = np.searchsorted(rows, (first, end))
            if low < high:
                part = open_array(path)[rows[low:high] - first]
                view.apply(torch.from_numpy(part), torch.from_numpy(taken[low:high, :-1]))
        return taken


def _keys_file(path: Path) -> Path | None:
    names = path.with_suffix(".keys.json")
    return names if names.is_file() else None


def _keys_of(path: Path, rows: int) -> list[str] | None:
    if (names := _keys_file(path)) is None:
        return None
    try:
        keys = json.loads(names.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{names}: is no readable list of keys ({error})") from None
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ConfigError(f"{names}: must be a list of strings, one for every row of {path.name}")
    if len(keys) != rows:
        raise ConfigError(f"{names}: holds {len(keys)} keys for {rows} rows of {path.name}")
    texts = [as_text(key) for key in keys]
    if len(set(texts)) < rows:
        key, times = Counter(texts).most_common(1)[0]
        raise ConfigError(f"{names}: holds the key {key} {times} times, must hold every key once")
    return texts


def _labels_of(path: Path, rows: int) -> list[str | None] | None:
    names = path.with_suffix(".labels.json")
    if not names.is_file():
        return None
    try:
        labels = json.loads(names.read_text())
    except (OSError, ValueError, RecursionError):
        labels = None
    # labels only describe clusters, so unusable ones must not stop a job
    if not isinstance(labels, list) or len(labels) != rows:
        _log.warning("%s: is no list of %d labels; none of them counts", names, rows)
        return None
    return [clean_label(label) for label in labels]


def open_array(path: Path) -> NDArray[Any]:
    """Memory map one file of features, (n, D) float16 or float32.

    Raises:
        ConfigError: it is truncated, no `.npy`, holds objects, or is of another type or shape.
    """
    try:
        # copy on write only because torch warns about read-only arrays; nobody writes
        array: NDArray[Any] = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ConfigError(f"{path}: is not a readable .npy file of numbers ({error})") from None
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4) or not array.dtype.isnative:
        raise ConfigError(
            f"{path}: holds {array.dtype}, must be float16 or float32 in native byte order"
        )
    if array.ndim != 2 or array.shape[1] == 0:
        raise ConfigError(f"{path}: has shape {array.shape}, must be (rows, width)")
    return array


def open_features(folder: Path) -> FeatureFiles:
    """Read the headers of all `*.npy` of a folder, and check the lists of keys beside them.

    A key may occur once per file; different files may have the same one.

    Raises:
        ConfigError: no folder, no files, an unreadable file, files of different width, or a list of
            keys that is unreadable, does not fit its file or has a key twice.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder of features")
    paths = tuple(sorted(p for p in folder.glob("*.npy") if not p.name.startswith(".")))
    if not paths:
        raise ConfigError(f"{folder}: holds no .npy file")
    dim, rows, num_bytes = 0, [], 0
    for path in paths:
        # one at a time: each memory map holds a file open
        array = open_array(path)
        dim = dim or array.shape[1]
        if array.shape[1] != dim:
            raise ConfigError(f"{path}: has width {array.shape[1]}, {paths[0].name} has {dim}")
        rows.append(len(array))
        num_bytes += array.nbytes
        _keys_of(path, len(array))
    return FeatureFiles(paths, tuple(rows), dim, num_bytes)


def check_count(files: FeatureFiles, num_clusters: int) -> None:
    """Check that there is a row for every cluster.

    Raises:
        ConfigError: there is not.
    """
    if num_clusters > files.num_rows:
        raise ConfigError(
            f"cluster.num_clusters ({num_clusters}) must be at most the number of features "
            f"({files.num_rows}) in {files.paths[0].parent}"
        )


def read_block(
    block: Block, view: View, device: str = "cpu", chosen: Int64 | None = None
) -> Tensor:
    """Read the transformed rows of a block with a last column of ones, (n, D + 1) float32.

    With `chosen`, sorted row numbers within the block, read only these rows.
    """
    path = Path(block.path)

    def read(some: Int64 | None = None) -> Tensor:
        array = open_array(path)[block.start : block.stop]
        array = array if some is None else array[some]
        return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device)

    if device == "cpu":
        raw = read(chosen)
    else:
        key = (block.path, block.start, block.stop, path.stat().st_mtime_ns)
        raw = residents().rows(key, read)
        raw = raw if chosen is None else raw[torch.from_numpy(chosen).to(device)]
    augmented = torch.empty(len(raw), raw.shape[1] + 1, device=device)
    view.apply(raw, augmented[:, :-1])
    augmented[:, -1] = 1
    return augmented


def group_blocks(blocks: Sequence[Block], result_bytes: int = 0) -> list[tuple[Block, ...]]:
    """Split blocks into at most 128 groups, by their number and the size of a result alone."""
    fitting = _GROUP_SUMS_BYTES // max(result_bytes, 1)
    size = -(-len(blocks) // min(max(fitting, _MIN_GROUPS), _MAX_GROUPS))
    size = max(size, min(len(blocks) // _MANY_GROUPS, _FULL_GROUP), 1)
    return [tuple(blocks[i : i + size]) for i in range(0, len(blocks), size)]


class _Scanned(NamedTuple):
    """Column sums and sha256 of a group of blocks, and the problem of its first unusable row."""

    sums: Float64
    sha256: bytes
    problem: str | None = None


class _Checks(NamedTuple):
    """What a scan checks: the width D, and whether it refuses rows of zeros."""

    dim: int
    refuse_zeros: bool


def _problem(block: Block, rows: NDArray[Any], checks: _Checks) -> str | None:
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("nd,nd->n", rows, rows, dtype=np.float32)
    # the comparison is false for NaN, too
    bad = np.flatnonzero(~(squares <= _LARGEST_SQUARE) | (checks.refuse_zeros & (squares == 0)))
    if not len(bad):
        return None
    values = rows[bad[0]]
    if not squares[bad[0]]:
        return f"{block.path}: row {block.start + bad[0]}: is zero, and has no direction"
    too_large = f"squared norm above {_LARGEST_SQUARE:.3g}, 1/16 of the largest float32"
    what = too_large if np.isfinite(values).all() else "NaN or infinity"
    return f"{block.path}: row {block.start + bad[0]}: {what}"


def scan_group(checks: _Checks, group: tuple[Block, ...]) -> _Scanned:
    """Sum the columns of some blocks in order, (D,) float64; stop at the first unusable row."""
    view = View(np.zeros(checks.dim, np.float32), normalise=False)
    sums: Float64 | None = None
    digest = hashlib.sha256()
    for block in group:
        rows = read_block(block, view)[:, :-1].numpy()
        if problem := _problem(block, rows, checks):
            return _Scanned(np.zeros(0), b"", problem)
        raw = open_array(Path(block.path))[block.start : block.stop]
        digest.update(np.ascontiguousarray(raw).data)
        part = rows.sum(axis=0, dtype=np.float64)
        sums = part if sums is None else sums + part
    assert sums is not None
    return _Scanned(sums, digest.digest())


class Scan(NamedTuple):
    """The mean of all rows, (D,) float64, and the sha256 of rows and keys in their order."""

    mean: Float64
    content: str


def scan_files(
    files: FeatureFiles, map_blocks: MapTasks = map_here, *, refuse_zeros: bool = False
) -> Scan:
    """Check every value; return the mean of all rows and the sha256 of all rows and keys.

    Raises:
        ConfigError: naming the first row with NaN, infinity, a squared norm above 1/16 of the
            largest float32 or, with `refuse_zeros`, only zeros. From 10 GB on it is a ValueError,
            found by a running job.
    """
    total, digest = np.zeros(files.dim), hashlib.sha256()
    checks = _Checks(files.dim, refuse_zeros)
    for scanned in map_blocks(scan_group, checks, group_blocks(files.blocks(_SCAN_ROWS))):
        if scanned.problem:
            refusal = ConfigError if files.num_bytes < SCAN_FIRST_BYTES else ValueError
            raise refusal(scanned.problem)
        total += scanned.sums
        digest.update(scanned.sha256)
    names = [_keys_file(path) for path in files.paths]
    keys = [None if name is None else file_sha256(name) for name in names]
    return Scan(total / max(files.num_rows, 1), fingerprint([digest.hexdigest(), keys]))


_KEPT_FREE = 0.3
"""Share of the device's memory that is kept free for computation."""

Key = tuple[str, int, int, int]
"""File, first row, row after the last, time of the file's last change."""


class Residents:
    """The blocks of rows, (n, D) each, that this process keeps on its device."""

    def __init__(self) -> None:
        self._rows: dict[Key, Tensor] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, key: Key, read: Callable[[], Tensor]) -> Tensor:
        """Return resident rows, or `read` them and keep them if there is room."""
        if (kept := self._rows.get(key)) is not None:
            return kept
        rows = read()
        free, total = torch.cuda.mem_get_info(rows.device)
        # memory that torch's allocator has reserved but not handed out is free as well
        unused = torch.cuda.memory_reserved(rows.device) - torch.cuda.memory_allocated(rows.device)
        if free + unused > _KEPT_FREE * total:
            self._rows[key] = rows
        return rows


@lru_cache(maxsize=1)
def residents() -> Residents:
    """Return this process's `Residents`."""
    return Residents()
