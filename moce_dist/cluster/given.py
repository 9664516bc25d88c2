"""Clusters that are not found in features: drawn at random, or the domains of the images.

For comparison with clusters that are. Their centroids are the means of what they hold all the
same, so whatever meets centroids later (gate, held-out images, a task) meets these.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

from moce_dist.cluster.arrays import Int32
from moce_dist.cluster.blocks import FeatureFiles
from moce_dist.config import ClusterConfig
from moce_dist.settings import ConfigError


def domain_of(key: str) -> str:
    """Return an image's domain: the first folder of its key, "" without one."""
    return key.partition("/")[0] if "/" in key else ""


def given_labels(files: FeatureFiles, config: ClusterConfig, seed: int) -> Int32:
    """Return the clusters (n,) of all rows by their keys, as `cluster.source` says.

    Raises:
        ConfigError: there are not as many domains as clusters.
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
