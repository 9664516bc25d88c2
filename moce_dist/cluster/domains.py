"""How clusters and domains agree: a domain is the first folder of an image's key.

Clustering never sees keys, so the agreement says what the clusters are about. Keys are taken one
after the other and only counted.

Source: normalised mutual information by the mean of both entropies, as in scikit-learn.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from numpy.typing import NDArray


def domain_figures(keys: Iterable[str], labels: NDArray[Any], num_clusters: int) -> dict[str, Any]:
    """Compare the clusters (n,) of keys with their domains; nothing where there are none.

    `nmi` is the normalised mutual information; `domains` lists {domain: images} of every cluster.
    """
    mixes: list[Counter[str]] = [Counter() for _ in range(num_clusters)]
    domains: Counter[str] = Counter()
    for key, label in zip(keys, labels, strict=True):
        domain = key.partition("/")[0] if "/" in key else ""
        mixes[label][domain] += 1
        domains[domain] += 1
    if len(domains) < 2:
        return {}
    return {
        "nmi": _mutual_information(mixes, domains),
        "domains": [dict(mix.most_common()) for mix in mixes],
    }


def _mutual_information(mixes: Sequence[Counter[str]], domains: Counter[str]) -> float:
    total, sizes = domains.total(), [mix.total() for mix in mixes]
    information = sum(
        count / total * math.log(count * total / (size * domains[domain]))
        for mix, size in zip(mixes, sizes, strict=True)
        for domain, count in mix.items()
    )
    shares = [n / total for n in (*sizes, *domains.values()) if n]
    entropies = -sum(share * math.log(share) for share in shares)
    return max(0.0, 2 * information / entropies)
