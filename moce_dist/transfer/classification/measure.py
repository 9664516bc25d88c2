"""Metrics of class scores: accuracy, mean accuracy per class, mean average precision.

`measure` returns all figures of a metric; the first one is the task's result.

    accuracy              accuracy
    mean_class_accuracy   mean_class_accuracy, accuracy
    mAP                   mAP (11 points, as VOC2007 has it), mAP_all_points (area under the
                          envelope, as VOC has it from 2010 on), mAP_uninterpolated (sum of
                          precision times step of recall)

Precision and recall are taken where the score changes. Images of equal score thus count together,
and the result does not depend on their order.

Letters: n images, C classes.

Source: Everingham et al. 2010, The PASCAL VOC Challenge, section 4.2, and the devkit's VOCap.m;
uninterpolated as in sklearn.metrics.average_precision_score.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moce_dist.transfer.fit import Measures


class AveragePrecision(NamedTuple):
    """Average precision of one class by three conventions."""

    eleven_points: float
    all_points: float
    uninterpolated: float


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the share of images whose predicted class (n,) is their label (n,)."""
    return round(float((predicted == labels).double().mean()), 6)


def mean_class_accuracy(predicted: Tensor, labels: Tensor, num_classes: int) -> float:
    """Return the share of correctly predicted images per class, averaged over non-empty classes."""
    counts = labels.bincount(minlength=num_classes)
    right = labels[predicted == labels].bincount(minlength=num_classes)
    present = counts > 0
    return round(float((right[present].double() / counts[present]).mean()), 6)


def average_precision(scores: Tensor, labels: Tensor) -> AveragePrecision:
    """Measure one class from scores (n,) and labels (n,): 1, 0, or -1, which is left out.

    All three are NaN when no image has the label 1.
    """
    counted = labels >= 0
    order = scores[counted].argsort(descending=True, stable=True)
    sorted_scores, hits = scores[counted][order], labels[counted][order].double()
    if hits.sum() == 0:
        return AveragePrecision(*3 * [float("nan")])
    # the last image of every run of equal scores
    ends = torch.cat([sorted_scores[1:] != sorted_scores[:-1], torch.tensor([True])])
    found = hits.cumsum(0)[ends]
    precision = found / (torch.arange(1, len(hits) + 1)[ends])
    recall = found / hits.sum()
    envelope = precision.flip(0).cummax(0).values.flip(0)
    steps = torch.diff(recall, prepend=torch.zeros(1, dtype=recall.dtype))
    points = torch.arange(11, dtype=recall.dtype) / 10
    # the tolerance lets a recall of, for example, 3 / 10 reach the point 0.3
    best = [envelope[recall >= t - 1e-12].max() if recall[-1] >= t - 1e-12 else 0 for t in points]
    return AveragePrecision(
        float(sum(best)) / 11, float((envelope * steps).sum()), float((precision * steps).sum())
    )


def mean_average_precision(scores: Tensor, labels: Tensor) -> Measures:
    """Average over the classes that have images, from scores and labels (n, C)."""
    each = torch.tensor([average_precision(*c) for c in zip(scores.T, labels.T, strict=True)])
    means = each.double().nanmean(dim=0).tolist()
    names = ("mAP", "mAP_all_points", "mAP_uninterpolated")
    return {name: round(value, 6) for name, value in zip(names, means, strict=True)}


def measure(metric: str, scores: Tensor, labels: Tensor) -> Measures:
    """Compute all figures of a metric from scores (n, C) and labels, (n,) or (n, C) for `mAP`."""
    if metric == "mAP":
        return mean_average_precision(scores, labels)
    predicted, num_classes = scores.argmax(dim=1), scores.shape[1]
    share = accuracy(predicted, labels)
    if metric == "accuracy":
        return {"accuracy": share}
    mean = mean_class_accuracy(predicted, labels, num_classes)
    return {"mean_class_accuracy": mean, "accuracy": share}


def multi_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the binary cross-entropies (B, C) -> (B,) of labels 0 to 1; negative ones are left out.

    Labels that Mixup has mixed are numbers between 0 and 1.
    """
    targets = labels.clamp_min(0).to(logits.dtype)
    each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (each * (labels >= 0)).sum(dim=1)
