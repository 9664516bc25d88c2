"""Cluster a folder of features, assign single features, and read and write the result files.

`existing.py` assigns a whole folder of new features to existing clusters.

    OUT/centroids.npy        (K, D) float32, means of the final assignment
    OUT/mean.npy             (D,) float32, subtracted before normalising; only for normalised rows
    OUT/prices.npy           (K,) float64; a row's cluster has the least squared distance - price
                             to the last iteration's centroids, so nearly also to centroids.npy
    OUT/assignments.parquet  key, shard, cluster, distance (squared)
    OUT/summary.json         figures
    OUT/state.npz, sample.npy  iterations in progress; removed once COMPLETE is written

Letters: n rows, D width, K clusters.
"""

import json
import logging
import time
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moce_dist.arrays import Float32, Float64, Int64
from moce_dist.cluster.assignments import write_assignments
from moce_dist.cluster.blocks import FeatureFiles, View, check_count, open_features, scan_files
from moce_dist.cluster.domains import centroid_figures, domain_figures, given_labels, label_figures
from moce_dist.cluster.kmeans import (
    Lloyd,
    State,
    directions,
    draw_sample,
    kmeans,
    state_request,
)
from moce_dist.cluster.matrix import Matrix
from moce_dist.cluster.nearest import make_base
from moce_dist.cluster.settle import Settled, settle
from moce_dist.cluster.sweeps import Sweep, as_tensor
from moce_dist.config import ClusterConfig
from moce_dist.run.artefacts import COMPLETE, is_complete, mark_complete, read_marker
from moce_dist.run.files import naming, write_atomic
from moce_dist.run.tasks import HERE, Workers
from moce_dist.settings import ConfigError

_log = logging.getLogger(__name__)
_FEW_DIGITS = 2.0**-22
"""Ratio of the squared distances to centroids and to the mean below which float32, with 24 bits,
cannot tell near centroids apart."""


def make_clusters(
    centroids: NDArray[Any], mean: NDArray[Any] | None, prices: NDArray[Any] | None
) -> Sweep:
    """Prepare centroids (K, D), the mean (D,) that is subtracted from raw features, prices (K,).

    Without `mean`, features are compared as they are. Without `prices`, only distance counts.
    """
    centres = np.asarray(centroids, np.float64)
    # distances do not depend on the origin; one near the centroids loses no digits in float32
    origin = np.zeros(centres.shape[1]) if mean is not None else centres.mean(axis=0)
    view = View(np.asarray(origin if mean is None else mean, np.float32), mean is not None)
    centres = centres - (view.mean.astype(np.float64) if mean is None else 0)
    charged = np.zeros(len(centres)) if prices is None else np.asarray(prices, np.float64)
    return Sweep(view, centres, base=make_base(centres, charged))


def assign_features(
    features: NDArray[Any], centroids: NDArray[Any], *, mean: NDArray[Any] | None = None
) -> tuple[Int64, Float64]:
    """Return the cluster of each feature row (n, D) and its squared distance: (n,) and (n,).

    With `mean` (D,) the features are raw: the mean is subtracted and rows are scaled to length 1.
    Without it, features are compared as they are.
    """
    clusters = make_clusters(centroids, mean, None)
    augmented = torch.ones(len(features), clusters.centroids.shape[1] + 1)
    clusters.view.apply(as_tensor(features), augmented[:, :-1])
    return clusters.assign(augmented)


def run_clustering(
    features_dir: Path,
    out_dir: Path,
    config: ClusterConfig,
    *,
    seed: int,
    subtract_mean: bool,
    workers: Workers = HERE,
    inputs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Cluster a folder of features and write the result; return its summary.

    With a `cluster.source` other than `features`, the clusters follow from the keys alone. With
    `subtract_mean` rows become normalise(f - mean), as for the features of a run; without it, rows
    are used as they are, or normalised if `cluster.spherical`. COMPLETE records `inputs`, by
    default the fingerprint of the request; a folder that is complete for them is left untouched.

    Raises:
        ConfigError: the features cannot be used (which file, which row), K exceeds their number,
            or, without `inputs`, the folder holds the result of another request.
    """
    started = time.monotonic()
    matrix = _open_matrix(features_dir, config, workers, subtract_mean=subtract_mean)
    given = inputs or {"request": state_request(matrix, config, seed)}
    if (known := finished_summary(out_dir, given)) is not None:
        return known
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / COMPLETE).unlink(missing_ok=True)
    state_file, sample_file = out_dir / "state.npz", out_dir / "sample.npy"
    if config.source == "features":
        lloyd = Lloyd(matrix, draw_sample(matrix, config.num_clusters, seed, sample_file), config)
        state = kmeans(lloyd, seed=seed, state_file=state_file)
        settled = settle(lloyd, state)
    else:
        zeros = np.zeros((config.num_clusters, matrix.files.dim))
        lloyd, state = Lloyd(matrix, matrix, config), State(zeros, zeros[:, 0])
        settled = Settled(given_labels(matrix.files, config, seed), None, {"source": config.source})
    figures = _write_result(out_dir, lloyd, state, settled)
    summary = {
        **figures,
        "iterations": state.iteration,
        "seconds": round(time.monotonic() - started, 3),
        "seed": seed,
        "balance": config.balance,
    }
    write_atomic(out_dir / "summary.json", json.dumps(summary, indent=1))
    mark_complete(out_dir, given, [p for p in artefacts(out_dir) if p.is_file()])
    for file in (state_file, sample_file):
        file.unlink(missing_ok=True)
    return summary


def finished_summary(out_dir: Path, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the summary of a folder that is complete for the inputs `given`, else None.

    Raises:
        ConfigError: `given` is the fingerprint of a request, and the folder holds another one's.
    """
    if is_complete(out_dir, given):
        return read_summary(out_dir)
    if "request" in given and (marker := read_marker(out_dir)) is not None:
        version = marker["versions"].get("moce-dist", "of an unknown version")
        raise ConfigError(
            f"{out_dir}: holds the result of another request, made with moce_dist {version}; "
            "choose another --out, or --fresh"
        )
    return None


def figures_of(
    files: FeatureFiles, centroids: NDArray[Any], labels: NDArray[Any], total: float
) -> dict[str, Any]:
    """Return the figures of labels (n,); `total` is the sum of the squared distances."""
    num_rows, num_clusters = len(labels), len(centroids)
    sizes = np.bincount(labels, minlength=num_clusters)
    return {
        "num_images": num_rows,
        "num_clusters": num_clusters,
        "dim": files.dim,
        "mean_squared_distance": total / num_rows,
        "size_min": int(sizes.min()),
        "size_max": int(sizes.max()),
        **centroid_figures(centroids),
        **domain_figures(map(itemgetter(1), files.keys()), labels, num_clusters),
        **label_figures(files, labels, num_clusters),
    }


def _open_matrix(
    features_dir: Path, config: ClusterConfig, workers: Workers, *, subtract_mean: bool
) -> Matrix:
    files = open_features(features_dir)
    check_count(files, config.num_clusters)
    is_spherical = config.spherical and not subtract_mean
    mean, content = scan_files(files, workers.map_tasks, refuse_zeros=is_spherical)
    return Matrix(
        files,
        View(mean.astype(np.float32), subtract_mean or is_spherical, centre=not is_spherical),
        config.block_rows,
        workers.map_tasks,
        config.index_from,
        config.index_recall,
        workers.device,
        content,
    )


def artefacts(out_dir: Path) -> list[Path]:
    """List the files that a finished folder may hold, except `COMPLETE`."""
    names = ("centroids.npy", "mean.npy", "prices.npy", "assignments.parquet", "summary.json")
    return [out_dir / name for name in names]


def _write_result(out_dir: Path, lloyd: Lloyd, state: State, settled: Settled) -> dict[str, Any]:
    """Write centroids, mean, prices and assignments; return the figures of the summary."""
    matrix = lloyd.matrix
    for stale in artefacts(out_dir):
        stale.unlink(missing_ok=True)
    zero = np.zeros(len(state.centroids))
    sums = settled.sums or matrix.sums(state.centroids, zero, settled.labels)
    # the view shifts features that are used as they are to their mean, for precision: undo that
    origin = 0.0 if matrix.view.normalise else matrix.view.mean.astype(np.float64)
    means = sums.means(state.centroids)
    means = directions(means) if lloyd.config.spherical else means
    centroids = (means + origin).astype(np.float32)
    distances, total = np.empty(len(settled.labels), np.float32), 0.0
    for first, part in matrix.distances(centroids.astype(np.float64) - origin, settled.labels):
        distances[first : first + len(part)] = part
        total += float(part.sum())
    if not matrix.view.normalise and total < _FEW_DIGITS * matrix.squares:
        _log.warning(
            "the features are spread over so large a range (mean squared distance %.3g to their "
            "mean, %.3g to the centroids) that float32 rounds the difference between centroids "
            "away; rescale them, or use cluster.spherical",
            matrix.squares / len(distances),
            total / len(distances),
        )
    with naming(out_dir):
        np.save(out_dir / "centroids.npy", centroids, allow_pickle=False)
        if matrix.view.normalise:
            np.save(out_dir / "mean.npy", matrix.view.origin, allow_pickle=False)
        if settled.prices is not None:
            np.save(out_dir / "prices.npy", settled.prices, allow_pickle=False)
        write_assignments(out_dir / "assignments.parquet", matrix.files, settled.labels, distances)
    return figures_of(matrix.files, centroids, settled.labels, total) | settled.figures


def read_summary(out_dir: Path) -> dict[str, Any]:
    """Return the figures of a finished clustering.

    Raises:
        ConfigError: there are none.
    """
    try:
        summary: dict[str, Any] = json.loads((out_dir / "summary.json").read_text())
    except OSError as error:
        raise ConfigError(f"{out_dir}/summary.json: {error.strerror}") from None
    return summary


def read_centroids(out_dir: Path) -> tuple[Float32, Float32 | None]:
    """Read the centroids (K, D), and the mean (D,) that raw features need subtracted, if any.

    Raises:
        ConfigError: there are no centroids, or a file is damaged.
    """
    centroids, mean = read_array(out_dir / "centroids.npy"), out_dir / "mean.npy"
    return centroids, read_array(mean) if mean.is_file() else None


def read_array(path: Path) -> NDArray[Any]:
    """Read one array file of a clustering.

    Raises:
        ConfigError: it is missing or damaged.
    """
    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path}: is not readable ({error})") from None
    return array
