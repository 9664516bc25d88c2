"""Metrics against independent computations, on random and on adversarial scores."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve, recall_score
from torch.nn.functional import binary_cross_entropy_with_logits

from moce_dist.transfer.classification.measure import (
    accuracy,
    average_precision,
    mean_average_precision,
    mean_class_accuracy,
    measure,
    multi_label_loss,
)


def direct_eleven_points(scores: np.ndarray, labels: np.ndarray) -> float:
    """VOC2007's definition: the best precision at a recall of t or more, for t in 0, 0.1 ... 1."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    # the curve's last point, precision 1 at recall 0, is no threshold
    best = [max(precision[:-1][recall[:-1] >= t / 10 - 1e-12], default=0) for t in range(11)]
    return sum(best) / 11


def direct_all_points(scores: np.ndarray, labels: np.ndarray) -> float:
    """The devkit's VOCap.m from 2010 on, in a loop over thresholds."""
    recall, precision = [0.0], [0.0]
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        recall.append(labels[chosen].sum() / labels.sum())
        precision.append(labels[chosen].mean())
    recall.append(1.0)
    precision.append(0.0)
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    return sum((recall[i] - recall[i - 1]) * precision[i] for i in range(1, len(recall)))


def cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 2, 200)
    rare = np.zeros(200, np.int64)
    rare[[3, 120, 199]] = 1
    return {
        "random": (draws.normal(size=200), labels),
        "few positives": (draws.normal(size=200), rare),
        "perfect": (labels + draws.uniform(0, 0.5, 200), labels),
        "reversed": (-labels + draws.uniform(0, 0.5, 200), labels),
        "all equal": (np.zeros(200), labels),
        "many ties": (draws.integers(0, 4, 200).astype(float), labels),
        "all positive": (draws.normal(size=200), np.ones(200, np.int64)),
        "infinite": (np.where(labels == 1, np.inf, -np.inf), labels),
    }


@pytest.mark.parametrize("name", cases())
def test_average_precision_equals_its_definitions(name):
    scores, labels = cases()[name]
    found = average_precision(torch.from_numpy(scores), torch.from_numpy(labels))
    reference = average_precision_score(labels, np.clip(scores, -1e9, 1e9))
    assert found.uninterpolated == pytest.approx(reference, abs=1e-9)
    assert found.eleven_points == pytest.approx(
        direct_eleven_points(np.clip(scores, -1e9, 1e9), labels), abs=1e-9
    )
    assert found.all_points == pytest.approx(direct_all_points(scores, labels), abs=1e-9)


def test_average_precision_by_hand():
    # right, wrong, right: precision 1 at recall 1/2, then 2/3 at recall 1
    found = average_precision(torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([1, 0, 1, -1]))
    assert found.eleven_points == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert found.all_points == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found.uninterpolated == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_order_of_images_does_not_matter_even_with_ties():
    draws = torch.Generator().manual_seed(0)
    scores, labels = (torch.randint(0, n, (100,), generator=draws) for n in (3, 2))
    order = torch.randperm(100, generator=draws)
    assert average_precision(scores, labels) == average_precision(scores[order], labels[order])


def test_class_without_images_does_not_count_in_the_mean():
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.3]])
    found = mean_average_precision(scores, torch.tensor([[1, 0], [0, -1]]))
    assert found == {"mAP": 1.0, "mAP_all_points": 1.0, "mAP_uninterpolated": 1.0}


def test_mean_per_class_equals_scikit_learns_macro_recall():
    draws = np.random.default_rng(1)
    labels, predicted = (
        draws.choice(5, 300, p=[0.6, 0.2, 0.1, 0.05, 0.05]),
        draws.integers(0, 5, 300),
    )
    found = mean_class_accuracy(torch.from_numpy(predicted), torch.from_numpy(labels), 6)
    assert found == pytest.approx(recall_score(labels, predicted, average="macro"), abs=1e-6)


def test_metrics_give_all_their_figures():
    scores = torch.eye(3)[[0, 1, 2, 2]]
    labels = torch.tensor([0, 1, 2, 1])
    assert measure("accuracy", scores, labels) == {"accuracy": 0.75}
    assert measure("mean_class_accuracy", scores, labels) == {
        "mean_class_accuracy": pytest.approx((1 + 0.5 + 1) / 3, abs=1e-6),
        "accuracy": 0.75,
    }
    assert accuracy(torch.tensor([1, 1]), torch.tensor([0, 1])) == 0.5


def test_labels_not_counted_have_no_loss():
    logits = torch.randn(4, 3)
    labels = torch.tensor([[1, 0, -1], [0, 0, 1], [-1, -1, -1], [1, 1, 1]])
    found = multi_label_loss(logits, labels)
    kept = labels >= 0
    direct = binary_cross_entropy_with_logits(logits[kept], labels[kept].float(), reduction="sum")
    assert found.sum() == pytest.approx(direct)
    assert found[2] == 0
