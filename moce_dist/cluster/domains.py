"""How clusters agree with domains and labels: a domain is the first folder of an image's key.

Clustering sees neither keys nor labels, so the agreement says what the clusters are about. They are
taken one after the other and only counted.

Source: normalised mutual information by the mean of both entropies, as in scikit-learn.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from numpy.typing import NDArray

from moce_dist.cluster.blocks import FeatureFiles
from moce_dist.cluster.given import domain_of

_MOST_LABELS = 8
"""Labels that are listed of a cluster, the commonest ones."""


def domain_figures(keys: Iterable[str], labels: NDArray[Any], num_clusters: int) -> dict[str, Any]:
    """Compare the clusters (n,) of keys with their domains; nothing where there are none.

    `nmi` is the normalised mutual information; `domains` lists {domain: images} of every cluster.
    """
    mixes: list[Counter[str]] = [Counter() for _ in range(num_clusters)]
    domains: Counter[str] = Counter()
    for key, label in zip(keys, labels, strict=True):
        domain = domain_of(key)
        mixes[label][domain] += 1
        domains[domain] += 1
    if len(domains) < 2:
        return {}
    return {
        "nmi": _mutual_information(mixes, domains),
        "domains": [dict(mix.most_common()) for mix in mixes],
    }


def label_figures(files: FeatureFiles, clusters: NDArray[Any], num_clusters: int) -> dict[str, Any]:
    """Compare the clusters (n,) of features with the labels beside them; nothing without any two.

    `label_nmi` is the normalised mutual information over the `labelled` images, of `num_labels`
    labels; `labels` lists {label: images} of every cluster, the commonest 8.
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
