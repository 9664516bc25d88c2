"""Choosing by evidence: a few candidates, tried on folds of a task's own training images.

    training images --each candidate--> features --k-NN or logistic regression--> a score a fold

A fold is judged by a fit on the others; the candidate of the best mean is taken, the earlier one of
equals. Test images are not among what is handed over here.

Letters: n images, D width.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moce_dist.config import Config, TransferConfig
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.classification.frozen import Features, extract, knn, linear
from moce_dist.transfer.loading import Machine
from moce_dist.transfer.tasks import Task

CONTROL = "control"
_TEMPERATURES = (0.5, 1.0, 2.0)


def with_selection(config: Config, select: str, temperature: float | None = None) -> Config:
    """Lay a selection, and a temperature of its merge, over a configuration."""
    changes: dict[str, Any] = {"select": select}
    if temperature is not None:
        changes["merge_temperature"] = temperature
    return config.model_copy(update={"transfer": config.transfer.model_copy(update=changes)})


def candidate_configs(config: Config) -> dict[str, Config]:
    """List the selections that are tried, by the names that choice.json gives them."""
    merges = {f"merge, T = {t:g}": with_selection(config, "merge", t) for t in _TEMPERATURES}
    return {
        "vote": with_selection(config, "vote"),
        "largest_cluster": with_selection(config, "largest_cluster"),
        **merges,
        "average": with_selection(config, "average"),
    }


def folds_of(labels: Tensor, num_folds: int, seed: int) -> NDArray[np.int64]:
    """Deal images with labels (n,), or (n, C), to folds (n,) by the seed, class by class."""
    order = np.random.default_rng(seed).permutation(len(labels))
    if labels.ndim == 1:
        order = order[labels.numpy()[order].argsort(kind="stable")]
    folds = np.empty(len(labels), np.int64)
    folds[order] = np.arange(len(labels)) % num_folds
    return folds


def score_folds(
    features: Tensor, labels: Tensor, task: Task, transfer: TransferConfig, seed: int
) -> list[float]:
    """Judge features (n, D) of images with `labels`: the task's metric on every fold."""
    folds = torch.from_numpy(folds_of(labels, transfer.validate_folds, seed))
    scores = []
    for fold in range(int(folds.max()) + 1):
        is_held = folds == fold
        parts = Features(
            *(features[~is_held], labels[~is_held], []), *(features[is_held], labels[is_held], [])
        )
        if transfer.validate_by == "knn":
            found = knn(parts, task, transfer)
        else:
            found, _ = linear(parts, task, transfer, device=torch.device("cpu"))
        scores.append(next(iter(found.values())))
    return scores


def try_candidates(
    candidates: Iterable[Backbone], task: Task, config: Config, machine: Machine
) -> list[dict[str, Any]]:
    """Score every candidate on a task's training images; the best one stands first.

    Raises:
        ValueError: no training image can be read.
    """
    transfer = config.transfer
    seen = replace(task.subset(transfer.validate_images, config.seed), test=[])
    tried = []
    for candidate in candidates:
        features, labels, _ = extract(candidate, list(seen.train), machine, seed=config.seed)
        scores = score_folds(features, labels, seen, transfer, config.seed)
        tried.append({"name": candidate.name, "mean": float(np.nanmean(scores)), "folds": scores})
    return sorted(tried, key=lambda each: -each["mean"])


def validated(
    choices: Mapping[str, dict[str, Any]], tried: list[dict[str, Any]], transfer: TransferConfig
) -> dict[str, Any]:
    """Make the content of choice.json: that of the best candidate, and what all have scored.

    Where the control is best there are no experts: `layers` is empty.
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
