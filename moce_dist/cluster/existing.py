"""Assign a folder of new features, of any size, to existing clusters.

The unit of work is a block of rows, as for k-means (`blocks.py`), so the result has the same bits
on any number of workers. Only a label and a distance per row stay in memory. A row is compared with
all clusters (no index) and gets argmin_k |x - c_k|^2 - g_k, with the prices g that balanced the
clusters or with none. With prices, new data of the same distribution has sizes near those of the
clustering. Sizes of other data are not controlled, and a cluster may stay empty.

    OUT/  the files of a clustering (assign.py), with copies of its centroids, mean and prices

Letters: n rows, D width, K clusters.
"""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moce_dist.arrays import Float64, Int64
from moce_dist.cluster.assign import (
    artefacts,
    figures_of,
    finished_summary,
    make_clusters,
    read_array,
    read_centroids,
)
from moce_dist.cluster.assignments import write_assignments
from moce_dist.cluster.blocks import (
    Block,
    FeatureFiles,
    Scan,
    group_blocks,
    open_features,
    read_block,
    scan_files,
)
from moce_dist.cluster.sweeps import Sweep
from moce_dist.run.artefacts import COMPLETE, artefact_id, fingerprint, mark_complete, read_marker
from moce_dist.run.files import write_atomic
from moce_dist.run.tasks import HERE, Workers
from moce_dist.settings import ConfigError

_COPIED = ("centroids.npy", "mean.npy", "prices.npy")


def read_clusters(folder: Path, *, with_prices: bool = False) -> Sweep:
    """Read the clusters that a finished clustering left in a folder.

    Raises:
        ConfigError: it is no such folder, or one of its files is missing or of another shape.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder of clusters")
    if read_marker(folder) is None:
        raise ConfigError(
            f"{folder}: holds no finished clustering (no {COMPLETE}); name what jobs/cluster.py "
            "wrote to --out, of a run its clusters/"
        )
    centroids, mean = read_centroids(folder)
    _check_array(folder / "centroids.npy", centroids, (None, None))
    if mean is not None:
        _check_array(folder / "mean.npy", mean, (centroids.shape[1],))
    path, prices = folder / "prices.npy", None
    if with_prices:
        if not path.is_file():
            raise ConfigError(
                f"{path}: is missing; clusters made with cluster.balance off have none"
            )
        prices = read_array(path)
        _check_array(path, prices, (len(centroids),))
    return make_clusters(centroids, mean, prices)


def _check_array(path: Path, array: NDArray[Any], shape: tuple[int | None, ...]) -> None:
    is_right = len(shape) == array.ndim and all(
        want in (None, size) for want, size in zip(shape, array.shape, strict=True)
    )
    if not is_right or array.dtype.kind != "f" or not np.isfinite(array).all():
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ConfigError(
            f"{path}: holds {array.dtype} {array.shape}, must be finite numbers of shape ({wanted})"
        )


def open_new_features(folder: Path, clusters: Sweep) -> FeatureFiles:
    """Read headers and keys of features that are to be assigned to `clusters`.

    Raises:
        ConfigError: the folder cannot be used, holds no rows, or rows of another width.
    """
    files, dim = open_features(folder), clusters.centroids.shape[1]
    if files.dim != dim:
        raise ConfigError(f"{files.paths[0]}: has width {files.dim}, the centroids have {dim}")
    if not files.num_rows:
        raise ConfigError(f"{folder}: holds no rows")
    return files


def scan_features(files: FeatureFiles, clusters: Sweep, workers: Workers = HERE) -> Scan:
    """Check every value of new features; return their mean and sha256.

    Raises:
        ConfigError: naming file and row of the first one that cannot be assigned (a ValueError
            from 10 GB on, as in `scan_files`).
    """
    # spherical clusters have a mean of zeros; then a row of zeros has no direction
    is_spherical = clusters.view.normalise and not clusters.view.mean.any()
    return scan_files(files, workers.map_tasks, refuse_zeros=is_spherical)


class Assigned(NamedTuple):
    """Clusters of rows and the squared distances to their centroids, (n,) each."""

    labels: Int64
    distances: Float64


def assign_group(clusters: Sweep, group: tuple[Block, ...]) -> Assigned:
    """Assign the rows of some blocks, one block in memory at a time."""
    blocks = (read_block(block, clusters.view, clusters.device) for block in group)
    found = [clusters.assign(rows) for rows in blocks]
    labels, distances = zip(*found, strict=True)
    return Assigned(np.concatenate(labels), np.concatenate(distances))


def assign_files(
    files: FeatureFiles, clusters: Sweep, *, block_rows: int, workers: Workers = HERE
) -> Assigned:
    """Assign all rows of a folder of features whose values `scan_features` has checked."""
    done = Assigned(np.empty(files.num_rows, np.int64), np.empty(files.num_rows))
    shared, groups = replace(clusters, device=workers.device), files.blocks(block_rows)
    first = 0
    for part in workers.map_tasks(assign_group, shared, group_blocks(groups)):
        rows = slice(first, first + len(part.labels))
        done.labels[rows], done.distances[rows] = part
        first = rows.stop
    return done


def assign_table(
    features_dir: Path,
    clusters_dir: Path,
    table: Path,
    *,
    block_rows: int,
    workers: Workers = HERE,
) -> None:
    """Assign a folder of features by distance alone, and write nothing but the assignment table.

    Raises:
        ConfigError: clusters or features cannot be used (which file, which row).
    """
    clusters = read_clusters(clusters_dir)
    files = open_new_features(features_dir, clusters)
    scan_features(files, clusters, workers)
    done = assign_files(files, clusters, block_rows=block_rows, workers=workers)
    table.parent.mkdir(parents=True, exist_ok=True)
    write_assignments(table, files, *done)


def assign_folder(
    features_dir: Path,
    clusters_dir: Path,
    out_dir: Path,
    *,
    block_rows: int,
    with_prices: bool = False,
    workers: Workers = HERE,
    inputs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Assign a folder of features to existing clusters; write the result, return its summary.

    Where the clusters have a mean, rows become normalise(f - mean); else they are used as they are.
    `inputs` are as in `run_clustering`.

    Raises:
        ConfigError: clusters or features cannot be used (which file, which row), or, without
            `inputs`, the folder holds the result of another request.
    """
    started = time.monotonic()
    if out_dir.resolve() == clusters_dir.resolve():
        raise ConfigError(f"{out_dir}: holds the clusters themselves; choose another --out")
    clusters = read_clusters(clusters_dir, with_prices=with_prices)
    files = open_new_features(features_dir, clusters)
    scanned = scan_features(files, clusters, workers)
    request = {
        "content": scanned.content,
        "files": [(path.name, rows) for path, rows in zip(files.paths, files.rows, strict=True)],
        "mean": scanned.mean.tobytes().hex(),
        "clusters": artefact_id(clusters_dir),
        "with_prices": with_prices,
        "block_rows": block_rows,
    }
    given = inputs or {"request": fingerprint(request)}
    if (known := finished_summary(out_dir, given)) is not None:
        return known
    done = assign_files(files, clusters, block_rows=block_rows, workers=workers)
    summary = {
        **figures_of(files, clusters.centroids, done.labels, float(done.distances.sum())),
        "seconds": round(time.monotonic() - started, 3),
        "balance": "assigned",
        "prices": with_prices,
        "assigned_to": str(clusters_dir.resolve()),
    }
    _write(out_dir, clusters_dir, files, done, summary)
    mark_complete(out_dir, given, [path for path in artefacts(out_dir) if path.is_file()])
    return summary


def _write(
    out_dir: Path, clusters_dir: Path, files: FeatureFiles, done: Assigned, summary: dict[str, Any]
) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    for stale in (out_dir / COMPLETE, *artefacts(out_dir)):
        stale.unlink(missing_ok=True)
    for name in _COPIED:
        if (clusters_dir / name).is_file():
            shutil.copyfile(clusters_dir / name, out_dir / name)
    write_assignments(out_dir / "assignments.parquet", files, *done)
    write_atomic(out_dir / "summary.json", json.dumps(summary, indent=1))
