"""Which experts a task gets: its unlabelled images, their clusters, the gate's opinion of these.

    images --cluster.encoder--> features --nearest centroid--> clusters --gate--> mass per expert

The encoder is the one that the clusters were made with (`train/encoder.py`), or distances to their
centroids would mean nothing.

The mass of an expert is the mean over the task's images of the gate's probability. Where the gate
routes under constraints (`gate.assign: balanced`, `gate.groups: shared`) probability is no routing,
so it is the share of the images that the routing table sends to the expert. What a layer becomes:

    vote             the expert of greatest mass
    largest_cluster  the expert of the cluster with most of the task's images
    merge            the mean of all experts, weighted by mass^(1 / merge_temperature)
    average          the plain mean of all experts
    mismatched       the expert of least mass: a study asks what choosing is worth
    validate         whichever of these, or the control, does best on the task (validate.py)

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
    """Choose what every MoE layer becomes for a task whose images lie in `cluster_ids` (n,).

    Returns the content of choice.json; `given` experts override `transfer.select`. `scale`, with
    `gate.combine: prob` only, is to be folded into the layers' outputs: the mean p over the images
    of the chosen expert, or of the experts that they take themselves where several are merged.

    Raises:
        ConfigError: `given` does not name one existing expert per MoE layer.
    """
    blocks, num_experts = moe_shape(weights)
    mass = expert_mass(cluster_ids, weights, config)
    if given is not None:
        check_experts(given, len(blocks), num_experts)
        how, rows = "given", np.eye(num_experts)[list(given)]
    else:
        how = config.transfer.select
        rows = _selected(cluster_ids, mass, weights, config)
    ids, counts = np.unique(cluster_ids, return_counts=True)
    layers = [_layer(layer, block, rows[layer], mass[layer]) for layer, block in enumerate(blocks)]
    return {
        "task": task,
        "select": how,
        **({"temperature": config.transfer.merge_temperature} if how == "merge" else {}),
        "num_images": len(cluster_ids),
        "layers": layers,
        "scale": _mean_probability(cluster_ids, mix_of({"layers": layers}), weights, config),
        "clusters": {str(ids[i]): int(counts[i]) for i in (-counts).argsort(kind="stable")},
        "warning": _warning(layers, len(ids)),
    }


def mix_of(choice: Mapping[str, Any]) -> list[int | list[float]]:
    """Say what every layer becomes, as `customize` takes it: its expert, or weights over all."""
    layers = choice["layers"]
    return [x["weights"] if x["expert"] is None else x["expert"] for x in layers]


def _selected(
    cluster_ids: NDArray[np.int64],
    mass: NDArray[np.float64],
    weights: Mapping[str, Tensor],
    config: Config,
) -> NDArray[np.float64]:
    """Weights of the experts (L, E), every row sums to 1."""
    select, num_experts = config.transfer.select, mass.shape[1]
    if select == "average":
        return np.full(mass.shape, 1 / num_experts)
    if select == "merge":
        # over the greatest, so that no power of it is lost
        shares = (mass / mass.max(axis=1, keepdims=True)) ** (1 / config.transfer.merge_temperature)
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))
    if select == "largest_cluster":
        largest = int(np.bincount(cluster_ids).argmax())
        table = routes(weights, config.gate, num_groups=config.parallel.num_groups)
        experts = table[:, largest].numpy()
    else:
        assert select in ("vote", "mismatched")
        experts = mass.argmin(axis=1) if select == "mismatched" else mass.argmax(axis=1)
    return np.asarray(np.eye(num_experts)[experts])


def _mean_probability(
    cluster_ids: NDArray[np.int64],
    mix: Sequence[int | list[float]],
    weights: Mapping[str, Tensor],
    config: Config,
) -> list[float] | None:
    if config.gate.combine != "prob":
        return None
    p = cluster_probabilities(weights).double()
    table = routes(weights, config.gate, num_groups=config.parallel.num_groups)
    ids = torch.from_numpy(cluster_ids)
    # a layer on purpose badly chosen must be as loud as the others are
    is_own = config.transfer.select != "mismatched"
    return [
        float(p[i, ids, e if is_own and isinstance(e, int) else table[i, ids]].mean())
        for i, e in enumerate(mix)
    ]


def _layer(
    layer: int, block: int, weights: NDArray[np.float64], mass: NDArray[np.float64]
) -> dict[str, Any]:
    is_one = np.count_nonzero(weights) == 1
    expert = int(weights.argmax()) if is_one else None
    others = [int(e) for e in mass.argsort(kind="stable")[::-1] if is_one and e != expert]
    runner_up = others[0] if others else None
    return {
        "layer": layer,
        "block": block,
        "expert": expert,
        "weights": weights.tolist(),
        "mass": None if expert is None else float(mass[expert]),
        "masses": mass.tolist(),
        "runner_up": runner_up,
        "runner_up_mass": 0.0 if runner_up is None else float(mass[runner_up]),
        "entropy": -sum(float(m) * math.log(m) for m in mass if m > 0),
    }


def _warning(layers: Sequence[Mapping[str, Any]], num_clusters: int) -> str | None:
    chosen = [layer for layer in layers if layer["expert"] is not None]
    weak = [layer["layer"] for layer in chosen if layer["mass"] < _MAJORITY]
    if not weak:
        return None
    return (
        f"the task's images are spread over {num_clusters} clusters: in layers {weak} the chosen "
        f"expert has less than half of the mass"
    )
