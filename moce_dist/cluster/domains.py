"""Describe clusters: their agreement with domains and labels, and the distances of their centroids.

A domain is the first folder of an image's key. Clustering sees neither keys nor labels, so the
agreement with them tells what clusters are about. Two centroids that nearly coincide split what one
cluster could hold. A median distance far above the spread within clusters means that the clusters
are distinct.

For comparison, clusters can also be drawn at random, or be the domains themselves. Their centroids
are the means of their rows, so all later users of centroids (gate, held-out images, a task) work
with them unchanged.

Letters: n rows, K clusters, D width.

Source: normalised mutual information, divided by the mean of both entropies as in scikit-learn.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moce_dist.arrays import Float64, Int32, Int64
from moce_dist.cluster.blocks import FeatureFiles
from moce_dist.config import ClusterConfig
from moce_dist.data.shards import domain_of
from moce_dist.settings import ConfigError

MOST_DOMAINS = 2048
"""Number of domains, the most frequent ones of all images, that are listed."""
_MOST_LABELS = 8
"""Number of labels, the most frequent ones, that are listed for a cluster."""


def domain_figures(keys: Iterable[str], labels: NDArray[Any], num_clusters: int) -> dict[str, Any]:
    """Compare the clusters (n,) of keys with their domains; nothing for fewer than two domains.

    `nmi` is the normalised mutual information; `domains` lists {domain: images} of every cluster,
    of the 2,048 domains with most images.
    """
    mixes: list[Counter[str]] = [Counter() for _ in range(num_clusters)]
    domains: Counter[str] = Counter()
    for key, label in zip(keys, labels, strict=True):
        domain = domain_of(key)
        mixes[label][domain] += 1
        domains[domain] += 1
    if len(domains) < 2:
        return {}
    listed = {name for name, _ in domains.most_common(MOST_DOMAINS)}
    return {
        "nmi": _mutual_information(mixes, domains),
        "domains": [{d: n for d, n in mix.most_common() if d in listed} for mix in mixes],
    }


def label_figures(files: FeatureFiles, clusters: NDArray[Any], num_clusters: int) -> dict[str, Any]:
    """Compare the clusters (n,) of features with the stored labels; nothing for fewer than two.

    `label_nmi` is the normalised mutual information over the `labelled` images, which have
    `num_labels` labels; `labels` lists {label: images} of every cluster, the 8 most frequent.
    """
    mixes: list[Counter[str]] = [Counter() for _ in range(num_clusters)]
    known: Counter[str] = Counter()
    for first, labels in files.labels():
        for label, cluster in zip(labels, clusters[first : first + len(labels)], strict=True):
            if label is not None:
                mixes[cluster][label] += 1
                known[label] += 1
    if len(known) < 2:
        return {}
    return {
        "label_nmi": _mutual_information(mixes, known),
        "labelled": known.total(),
        "num_labels": len(known),
        "labels": [dict(mix.most_common(_MOST_LABELS)) for mix in mixes],
    }


def _mutual_information(mixes: Sequence[Counter[str]], kinds: Counter[str]) -> float:
    total, sizes = kinds.total(), [mix.total() for mix in mixes]
    information = sum(
        count / total * math.log(count * total / (size * kinds[kind]))
        for mix, size in zip(mixes, sizes, strict=True)
        for kind, count in mix.items()
    )
    shares = [n / total for n in (*sizes, *kinds.values()) if n]
    entropies = -sum(share * math.log(share) for share in shares)
    return max(0.0, 2 * information / entropies)


_BLOCK = 512
_LOOKED_AT = 4096


def nearest_others(centroids: NDArray[Any], some: Int64 | None = None) -> Float64:
    """Return the distance of every centroid (K, D) to the nearest other one, (K,).

    With `some`, (k,) ids, do so for these only, (k,).

    Raises:
        ValueError: there is no other one.
    """
    if len(centroids) < 2:
        raise ValueError("one centroid has no other")
    exact = np.asarray(centroids, np.float64)
    # float32 is fast enough to find the neighbour; centring keeps a far origin from costing digits
    centred = (exact - exact.mean(axis=0)).astype(np.float32)
    squares = np.einsum("kd,kd->k", centred, centred)
    ids = np.arange(len(exact)) if some is None else some
    distances = np.empty(len(ids))
    for start in range(0, len(ids), _BLOCK):
        rows = ids[start : start + _BLOCK]
        to_all = squares - 2 * (centred[rows] @ centred.T)
        to_all[np.arange(len(rows)), rows] = np.inf
        neighbours = to_all.argmin(axis=1)
        apart = exact[rows] - exact[neighbours]
        distances[start : start + _BLOCK] = np.sqrt(np.einsum("kd,kd->k", apart, apart))
    return distances


def centroid_figures(centroids: NDArray[Any]) -> dict[str, float]:
    """Return the least and median distance from a centroid (K, D) to the nearest, for summary.json.

    Of more than 4,096 clusters, that many, evenly spaced, are measured. One cluster has no figures.
    """
    if len(centroids) < 2:
        return {}
    some = np.linspace(0, len(centroids) - 1, min(len(centroids), _LOOKED_AT)).astype(np.int64)
    distances = nearest_others(centroids, some)
    return {
        "centroid_distance_min": float(distances.min()),
        "centroid_distance_median": float(np.median(distances)),
    }


def given_labels(files: FeatureFiles, config: ClusterConfig, seed: int) -> Int32:
    """Return the clusters (n,) of all rows, from their keys, as `cluster.source` says.

    Raises:
        ConfigError: the source is `folder`, and there are not as many domains as clusters.
    """
    keys = (key for _, key in files.keys())  # noqa: SIM118 - they are no mapping
    if config.source == "random":
        return random_clusters(keys, config.num_clusters, seed)
    return domain_clusters(keys, config.num_clusters)


def random_clusters(keys: Iterable[str], num_clusters: int, seed: int) -> Int32:
    """Deal images to clusters in an order drawn by (seed, key); sizes differ by at most one."""
    drawn = [hashlib.sha256(f"{seed}/{key}".encode()).digest() for key in keys]
    labels = np.empty(len(drawn), np.int32)
    labels[sorted(range(len(drawn)), key=drawn.__getitem__)] = np.arange(len(drawn)) % num_clusters
    return labels


def domain_clusters(keys: Iterable[str], num_clusters: int) -> Int32:
    """Make every domain a cluster, numbered in the order of their names.

    Raises:
        ConfigError: there are not as many domains as clusters.
    """
    names, domains = np.unique([domain_of(key) for key in keys], return_inverse=True)
    if len(names) != num_clusters:
        raise ConfigError(
            f"cluster.num_clusters ({num_clusters}) must be {len(names)}, the number of first "
            "folders of the images' keys, when cluster.source is folder"
        )
    return domains.astype(np.int32)
