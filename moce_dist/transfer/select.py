"""Choose the experts of a task from its unlabelled images, their clusters, and the gate.

    images --cluster.encoder--> features --nearest centroid--> clusters --gate--> mass per expert

The encoder is the one that the clusters were made with (`train/encoder.py`); with any other,
distances to the centroids would be meaningless.

The mass of an expert is the mean of the gate's probability for it over the task's images. If the
gate routes under constraints (`gate.assign: balanced`, `gate.groups: shared`), probabilities do not
determine the routing; the mass is then the share of the images that the routing table sends to the
expert. `transfer.select` says what a layer becomes:

    vote             the expert of greatest mass
    largest_cluster  the expert of the cluster with most of the task's images
    merge            the mean of all experts, weighted by mass^(1 / merge_temperature)
    average          the plain mean of all experts
    extrapolate      beyond the vote, as seen from the average: mean + x * (vote - mean), where
                     x is `extrapolation`
    mismatched       the expert of least mass, for studies of what choosing is worth
    validate         whichever of the others (but mismatched) or the control does best on the task

To validate, the candidates are tried on folds of the task's own training images. They never get the
test images.

    training images --each candidate--> features --k-NN or logistic regression--> a score a fold

The score of a fold is that of a fit on the other folds. The candidate with the best mean is taken,
and of equal ones the first.

Letters: n images of the task, D width, K clusters, L MoE layers, E experts.

Source: Liu et al. 2023, arXiv 2402.05382, section 3 (customised models for a task); differences of
weights scaled beyond 1 as in Ilharco et al. 2022, arXiv 2212.04089 (task arithmetic).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moce_dist.arrays import Float64, Int64
from moce_dist.cluster.assign import assign_features
from moce_dist.config import Config, TransferConfig
from moce_dist.model.customize import cluster_probabilities, moe_shape, routes
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.classification.frozen import Features, extract, knn, linear
from moce_dist.transfer.loading import Machine
from moce_dist.transfer.request import check_experts
from moce_dist.transfer.tasks import Task

_MAJORITY = 0.5


def task_clusters(features: Tensor, clusters: Path) -> Int64:
    """Assign raw features (n, D) to the nearest centroids of a run; return cluster ids (n,).

    `clusters` is the run's folder with centroids.npy and mean.npy.
    """
    centroids, mean = (np.load(clusters / f"{name}.npy") for name in ("centroids", "mean"))
    ids, _ = assign_features(features.numpy(), centroids, mean=mean)
    return np.asarray(ids, np.int64)


def count_clusters(cluster_ids: Int64) -> dict[str, int]:
    """Count the images, (n,), of every cluster that has any, the one with most images first."""
    ids, counts = np.unique(cluster_ids, return_counts=True)
    return {str(ids[i]): int(counts[i]) for i in (-counts).argsort(kind="stable")}


def expert_mass(cluster_ids: Int64, weights: Mapping[str, Tensor], config: Config) -> Float64:
    """Return the mass (L, E) of experts for images of clusters (n,); every layer sums to 1."""
    p = cluster_probabilities(weights)
    gate = config.gate
    if gate.assign != "argmax" or gate.groups != "free":
        table = routes(weights, gate, num_groups=config.parallel.num_groups)
        p = F.one_hot(table, p.shape[2]).float()
    shares = np.bincount(cluster_ids, minlength=p.shape[1]) / len(cluster_ids)
    return np.asarray(np.einsum("lke,k->le", p.double().numpy(), shares))


def choose_experts(
    cluster_ids: Int64,
    weights: Mapping[str, Tensor],
    config: Config,
    *,
    task: str,
    given: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Choose what every MoE layer becomes for a task whose images lie in `cluster_ids` (n,).

    Returns the content of choice.json; `given` experts override `transfer.select`. With
    `gate.combine: prob`, `scale` is the factor to fold into each layer's output: the mean over the
    images of the chosen expert's p or, for merged and mismatched experts, of the p of the expert
    that the image is routed to.

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
    clusters = count_clusters(cluster_ids)
    layers = [
        layer_choice(
            i, block, row, mass[i], int(row.argmax()) if np.count_nonzero(row) == 1 else None
        )
        for i, (block, row) in enumerate(zip(blocks, rows, strict=True))
    ]
    chosen = [layer for layer in layers if layer["expert"] is not None]
    weak = [layer["layer"] for layer in chosen if layer["mass"] < _MAJORITY]
    warning = (
        f"the task's images are spread over {len(clusters)} clusters: in layers {weak} the chosen "
        "expert has less than half of the mass"
    )
    return {
        "task": task,
        "select": how,
        **({"temperature": config.transfer.merge_temperature} if how == "merge" else {}),
        **({"extrapolation": config.transfer.extrapolation} if how == "extrapolate" else {}),
        "num_images": len(cluster_ids),
        "layers": layers,
        "scale": _mean_probability(
            cluster_ids, mix_of({"layers": layers}), weights, config, is_own=how != "mismatched"
        ),
        "clusters": clusters,
        "warning": warning if weak else None,
    }


def mix_of(choice: Mapping[str, Any]) -> list[int | list[float]]:
    """Return the mix that `customize` takes: per layer its expert, or weights over all experts."""
    layers = choice["layers"]
    return [x["weights"] if x["expert"] is None else x["expert"] for x in layers]


def _selected(
    cluster_ids: Int64, mass: Float64, weights: Mapping[str, Tensor], config: Config
) -> Float64:
    """Return the weights of the experts (L, E); every row sums to 1, some may be negative."""
    select, num_experts = config.transfer.select, mass.shape[1]
    if select == "average":
        return np.full(mass.shape, 1 / num_experts)
    if select == "merge":
        # divided by the greatest mass, so that powers do not underflow
        shares = (mass / mass.max(axis=1, keepdims=True)) ** (1 / config.transfer.merge_temperature)
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))
    if select == "largest_cluster":
        largest = int(np.bincount(cluster_ids).argmax())
        table = routes(weights, config.gate, num_groups=config.parallel.num_groups)
        experts = table[:, largest].numpy()
    else:
        assert select in ("vote", "extrapolate", "mismatched")
        experts = mass.argmin(axis=1) if select == "mismatched" else mass.argmax(axis=1)
    chosen = np.asarray(np.eye(num_experts)[experts])
    if select != "extrapolate":
        return chosen
    beyond = config.transfer.extrapolation
    return (1 - beyond) / num_experts + beyond * chosen


def _mean_probability(
    cluster_ids: Int64,
    mix: Sequence[int | list[float]],
    weights: Mapping[str, Tensor],
    config: Config,
    *,
    is_own: bool,
) -> list[float] | None:
    if config.gate.combine != "prob":
        return None
    p = cluster_probabilities(weights).double()
    table = routes(weights, config.gate, num_groups=config.parallel.num_groups)
    ids = torch.from_numpy(cluster_ids)
    # mismatched experts get the output scale of the routed ones, so that only the choice differs
    return [
        float(p[i, ids, e if is_own and isinstance(e, int) else table[i, ids]].mean())
        for i, e in enumerate(mix)
    ]


def layer_choice(
    layer: int, block: int, weights: Float64, mass: Float64, expert: int | None
) -> dict[str, Any]:
    """Describe what a layer becomes: `expert`, or the experts (E,) merged by their `weights`."""
    ranked = [] if expert is None else mass.argsort(kind="stable")[::-1].tolist()
    runner_up = next((other for other in ranked if other != expert), None)
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


CONTROL = "control"
_TEMPERATURES = (0.5, 1.0, 2.0)


def with_selection(config: Config, select: str, temperature: float | None = None) -> Config:
    """Return a configuration with another selection and, if given, another merge temperature."""
    changes: dict[str, Any] = {"select": select}
    if temperature is not None:
        changes["merge_temperature"] = temperature
    return config.model_copy(update={"transfer": config.transfer.model_copy(update=changes)})


def candidate_configs(config: Config) -> dict[str, Config]:
    """Return the configurations of the candidate selections, by their names in choice.json."""
    merges = {f"merge, T = {t:g}": with_selection(config, "merge", t) for t in _TEMPERATURES}
    return {
        "vote": with_selection(config, "vote"),
        "largest_cluster": with_selection(config, "largest_cluster"),
        **merges,
        "average": with_selection(config, "average"),
        "extrapolate": with_selection(config, "extrapolate"),
    }


def folds_of(labels: Tensor, num_folds: int, seed: int) -> Int64:
    """Split images into folds (n,) by the seed; labels (n,) are stratified, (n, C) are not."""
    order = np.random.default_rng(seed).permutation(len(labels))
    if labels.ndim == 1:
        order = order[labels.numpy()[order].argsort(kind="stable")]
    folds = np.empty(len(labels), np.int64)
    folds[order] = np.arange(len(labels)) % num_folds
    return folds


def score_folds(
    features: Tensor,
    labels: Tensor,
    task: Task,
    transfer: TransferConfig,
    *,
    seed: int,
    device: torch.device,
) -> list[float]:
    """Return the task's metric on every fold, from features (n, D) and labels of its images."""
    folds = torch.from_numpy(folds_of(labels, transfer.validate_folds, seed))
    scores = []
    for fold in range(int(folds.max()) + 1):
        is_held = folds == fold
        parts = Features(
            *(features[~is_held], labels[~is_held], []), *(features[is_held], labels[is_held], [])
        )
        if transfer.validate_by == "knn":
            found = knn(parts, task, transfer, device=device)
        else:
            found, _ = linear(parts, task, transfer, device=device)
        scores.append(next(iter(found.values())))
    return scores


def try_candidates(
    candidates: Iterable[Backbone], task: Task, config: Config, machine: Machine
) -> list[dict[str, Any]]:
    """Score every candidate on training images that fits may use too; return the best one first.

    Raises:
        ValueError: fewer than two training images can be read.
    """
    transfer = config.transfer
    allowed = task.subset(transfer.max_train, config.seed)
    seen = replace(allowed.subset(transfer.validate_images, config.seed), test=[])
    tried = []
    for candidate in candidates:
        features, labels, _ = extract(candidate, list(seen.train), machine, seed=config.seed)
        if len(features) < 2:
            raise ValueError("transfer.select validate needs two training images that can be read")
        scores = score_folds(
            features, labels, seen, transfer, seed=config.seed, device=machine.device
        )
        tried.append({"name": candidate.name, "mean": float(np.nanmean(scores)), "folds": scores})
    return sorted(tried, key=lambda each: -each["mean"])


def validated(
    choices: Mapping[str, dict[str, Any]], tried: list[dict[str, Any]], transfer: TransferConfig
) -> dict[str, Any]:
    """Make the content of choice.json: that of the best candidate, and the scores of all.

    If the control is best there are no experts, and `layers` is empty.
    """
    best = tried[0]["name"]
    chosen = next(iter(choices.values())) if best == CONTROL else choices[best]
    nothing: dict[str, Any] = (
        {"layers": [], "scale": None, "warning": None} if best == CONTROL else {}
    )
    return {
        **chosen,
        **nothing,
        "select": "validate",
        "chosen": best,
        "validated_by": transfer.validate_by,
        "candidates": tried,
    }
