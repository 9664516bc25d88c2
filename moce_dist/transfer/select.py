"""Which experts a task gets: its unlabelled images, their clusters, the gate's opinion of these.

    images --cluster.encoder--> features --nearest centroid--> clusters --gate--> mass per expert

The encoder is the one that the clusters were made with (`train/encoder.py`), or distances to their
centroids would mean nothing.

With `select: vote` a layer's expert is the one of greatest mass, the mean over the task's images of
the gate's probability. Where the gate routes under constraints (`gate.assign: balanced`,
`gate.groups: shared`) probability is no routing, so the mass is the share of the images that the
routing table sends to the expert. With `select: largest_cluster` it is the expert of the cluster
with most of the task's images.

Letters: n images of the task, D width, K clusters, L MoE layers, E experts.

Source: Liu et al. 2023, arXiv 2402.05382, section 3 (customised models for a task).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moce_dist.cluster.assign import assign_features
from moce_dist.config import Config
from moce_dist.model.customize import cluster_probabilities, moe_shape, routes
from moce_dist.transfer.request import check_experts

_MAJORITY = 0.5


def task_clusters(features: Tensor, clusters: Path) -> NDArray[np.int64]:
    """Assign raw features (n, D) to the clusters of a run: ids (n,), by nearest centroid.

    `clusters` is the run's folder with centroids.npy and mean.npy.
    """
    centroids, mean = (np.load(clusters / f"{name}.npy") for name in ("centroids", "mean"))
    ids, _ = assign_features(features.numpy(), centroids, mean=mean)
    return np.asarray(ids, np.int64)


def expert_mass(
    cluster_ids: NDArray[np.int64], weights: Mapping[str, Tensor], config: Config
) -> NDArray[np.float64]:
    """Mass (L, E) of every expert for images of these clusters (n,); every layer sums to 1."""
    p = cluster_probabilities(weights)
    gate = config.gate
    if gate.assign != "argmax" or gate.groups != "free":
        table = routes(weights, gate, num_groups=config.parallel.num_groups)
        p = F.one_hot(table, p.shape[2]).float()
    shares = np.bincount(cluster_ids, minlength=p.shape[1]) / len(cluster_ids)
    return np.asarray(np.einsum("lke,k->le", p.double().numpy(), shares))


def choose_experts(
    cluster_ids: NDArray[np.int64],
    weights: Mapping[str, Tensor],
    config: Config,
    *,
    task: str,
    given: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Choose one expert per MoE layer for a task whose images lie in `cluster_ids` (n,).

    Returns the content of choice.json; `given` experts override the selection. `scale` is the mean
    p of the chosen experts over the images, to be folded into their output, when `gate.combine` is
    `prob`.

    Raises:
        ConfigError: `given` does not name one existing expert per MoE layer.
    """
    blocks, num_experts = moe_shape(weights)
    mass = expert_mass(cluster_ids, weights, config)
    if given is not None:
        check_experts(given, len(blocks), num_experts)
        experts, how = list(given), "given"
    else:
        experts, how = _selected(cluster_ids, mass, weights, config), config.transfer.select
    ids, counts = np.unique(cluster_ids, return_counts=True)
    layers = [
        _layer(layer, block, experts[layer], mass[layer]) for layer, block in enumerate(blocks)
    ]
    return {
        "task": task,
        "select": how,
        "num_images": len(cluster_ids),
        "layers": layers,
        "scale": _mean_probability(cluster_ids, experts, weights, config),
        "clusters": {str(ids[i]): int(counts[i]) for i in (-counts).argsort(kind="stable")},
        "warning": _warning(layers, len(ids)),
    }


def _selected(
    cluster_ids: NDArray[np.int64],
    mass: NDArray[np.float64],
    weights: Mapping[str, Tensor],
    config: Config,
) -> list[int]:
    if config.transfer.select == "vote":
        return [int(e) for e in mass.argmax(axis=1)]
    largest = int(np.bincount(cluster_ids).argmax())
    table = routes(weights, config.gate, num_groups=config.parallel.num_groups)
    return [int(e) for e in table[:, largest]]


def _mean_probability(
    cluster_ids: NDArray[np.int64],
    experts: Sequence[int],
    weights: Mapping[str, Tensor],
    config: Config,
) -> list[float] | None:
    if config.gate.combine != "prob":
        return None
    p = cluster_probabilities(weights).double()
    return [float(p[i, torch.from_numpy(cluster_ids), e].mean()) for i, e in enumerate(experts)]


def _layer(
    layer: int, block: int, expert: int, mass: NDArray[np.float64]
) -> dict[str, int | float | None]:
    others = [int(e) for e in mass.argsort(kind="stable")[::-1] if e != expert]
    runner_up = others[0] if others else None
    return {
        "layer": layer,
        "block": block,
        "expert": expert,
        "mass": float(mass[expert]),
        "runner_up": runner_up,
        "runner_up_mass": 0.0 if runner_up is None else float(mass[runner_up]),
        "entropy": -sum(float(m) * math.log(m) for m in mass if m > 0),
    }


def _warning(layers: Sequence[Mapping[str, Any]], num_clusters: int) -> str | None:
    weak = [layer["layer"] for layer in layers if layer["mass"] < _MAJORITY]
    if not weak:
        return None
    return (
        f"the task's images are spread over {num_clusters} clusters: in layers {weak} the chosen "
        f"expert has less than half of the mass"
    )
