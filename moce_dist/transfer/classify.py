"""Classification with a frozen backbone: nearest neighbours and a linear head on its features.

Both see each image once, uncropped: features are computed once per backbone and reused.
Fine-tuning, which moves the backbone, is in finetune.py.

Letters: n images, D width, C classes.

Source: weighted k-NN as in Wu et al. 2018, arXiv 1805.01978, section 3.4 (temperature 0.07);
features minus their mean as in the clustering of this package.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from moce_dist.config import TransferConfig
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.loading import Machine, Progress, eval_batches
from moce_dist.transfer.tasks import Item, Task

_TEMPERATURE = 0.07
_CHUNK = 8192
_PENALTY = 1.0


class Features(NamedTuple):
    """Features (n, D) float32 and labels (n,) int64 of the two splits, on the CPU."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@torch.no_grad()
def extract(
    backbone: Backbone, items: list[Item], machine: Machine, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Compute features (n, D) float32 and labels (n,) of items, in their order, on the CPU.

    Raises:
        ValueError: an image cannot be read.
    """
    model = backbone.features_model(seed).to(machine.device)
    progress = Progress(f"{backbone.name} features", len(items), "images")
    features, labels = [], []
    for images, batch_labels in eval_batches(items, backbone, machine):
        features.append(model(images.to(machine.device)).float().cpu())
        labels.append(batch_labels)
        progress.advance(len(batch_labels))
    return torch.cat(features), torch.cat(labels)


def task_features(backbone: Backbone, task: Task, machine: Machine, *, seed: int) -> Features:
    """Compute the features of both splits of a task."""
    train = extract(backbone, list(task.train), machine, seed=seed)
    test = extract(backbone, list(task.test), machine, seed=seed)
    return Features(*train, *test)


def accuracy(predicted: Tensor, labels: Tensor, num_classes: int) -> float:
    """Share of the images whose predicted class (n,) is their label (n,)."""
    share = multiclass_accuracy(predicted, labels, num_classes=num_classes, average="micro")
    return round(float(share), 6)


def knn_predict(features: Features, *, k: int, num_classes: int) -> Tensor:
    """Vote of the k training images of greatest cosine similarity, weighted by exp(similarity / T).

    Returns the class (n,) of every test image. The training mean is subtracted from all features
    first.
    """
    mean = features.train.mean(dim=0)
    train = F.normalize(features.train - mean, dim=1)
    test = F.normalize(features.test - mean, dim=1)
    one_hot = F.one_hot(features.train_labels, num_classes).float()
    votes = []
    for chunk in torch.split(test, _CHUNK):
        similarity, neighbours = (chunk @ train.T).topk(min(k, len(train)), dim=1)
        weights = (similarity / _TEMPERATURE).exp()
        votes.append(torch.einsum("nk,nkc->nc", weights, one_hot[neighbours]))
    return torch.cat(votes).argmax(dim=1)


def linear_predict(
    features: Features, *, passes: int, num_classes: int, device: torch.device
) -> Tensor:
    """Fit a linear head on standardised features; return the class (n,) of every test image.

    Multinomial logistic regression with an L2 penalty, by L-BFGS from zero: at most `passes` over
    the training features, and nothing drawn.
    """
    mean, deviation = features.train.mean(dim=0), features.train.std(dim=0).clamp_min(1e-6)
    train = ((features.train - mean) / deviation).to(device)
    labels = features.train_labels.to(device)
    head = nn.Linear(train.shape[1], num_classes, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer: Any = torch.optim.LBFGS(
        head.parameters(), max_iter=passes, max_eval=passes, line_search_fn="strong_wolfe"
    )

    def loss_and_gradient() -> Tensor:
        optimizer.zero_grad()
        total = _PENALTY / 2 / len(train) * head.weight.square().sum()
        torch.autograd.backward(total)
        for rows, targets in zip(
            torch.split(train, _CHUNK), torch.split(labels, _CHUNK), strict=True
        ):
            part = F.cross_entropy(head(rows), targets, reduction="sum") / len(train)
            torch.autograd.backward(part)
            total = total + part.detach()
        return total

    optimizer.step(loss_and_gradient)
    with torch.no_grad():
        test = ((features.test - mean) / deviation).to(device)
        predicted: Tensor = head(test).argmax(dim=1).cpu()
    return predicted


def knn(features: Features, num_classes: int, transfer: TransferConfig) -> float:
    """Return the test accuracy of the k-NN protocol."""
    predicted = knn_predict(features, k=transfer.knn_k, num_classes=num_classes)
    return accuracy(predicted, features.test_labels, num_classes)


def linear(
    features: Features, num_classes: int, transfer: TransferConfig, *, device: torch.device
) -> float:
    """Return the test accuracy of the linear protocol."""
    predicted = linear_predict(
        features, passes=transfer.linear_epochs, num_classes=num_classes, device=device
    )
    return accuracy(predicted, features.test_labels, num_classes)
