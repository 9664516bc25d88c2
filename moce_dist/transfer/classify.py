"""Classification with a frozen backbone: nearest neighbours and a linear head on its features.

Both see each image once, uncropped: features are computed once per backbone and reused.
Fine-tuning, which moves the backbone, is in finetune.py.

Letters: n images, D width, C classes.

Source: weighted k-NN as in Wu et al. 2018, arXiv 1805.01978, section 3.4 (temperature 0.07);
features minus their mean as in the clustering of this package.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from moce_dist.config import TransferConfig
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.loading import Machine, Progress, eval_batches
from moce_dist.transfer.tasks import Item, Task

_TEMPERATURE = 0.07
_CHUNK = 1024
_LINEAR_BATCH = 256
_LINEAR_LR = 3e-3
_LINEAR_DECAY = 0.01


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
    return float(multiclass_accuracy(predicted, labels, num_classes=num_classes, average="micro"))


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
    features: Features, *, epochs: int, num_classes: int, device: torch.device, seed: int
) -> Tensor:
    """Train a linear head on standardised features; return the class (n,) of every test image.

    AdamW with a cosine from its first step, weights from zero; `seed` draws the order of the
    images.
    """
    mean, deviation = features.train.mean(dim=0), features.train.std(dim=0).clamp_min(1e-6)
    train = ((features.train - mean) / deviation).to(device)
    labels = features.train_labels.to(device)
    head = nn.Linear(train.shape[1], num_classes, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=_LINEAR_LR, weight_decay=_LINEAR_DECAY)
    steps = epochs * -(-len(train) // _LINEAR_BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    draws = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(len(train), generator=draws), _LINEAR_BATCH):
            rows = chosen.to(device)
            loss = F.cross_entropy(head(train[rows]), labels[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        test = ((features.test - mean) / deviation).to(device)
        predicted: Tensor = head(test).argmax(dim=1).cpu()
    return predicted


def knn(features: Features, num_classes: int, transfer: TransferConfig) -> float:
    """Return the test accuracy of the k-NN protocol."""
    predicted = knn_predict(features, k=transfer.knn_k, num_classes=num_classes)
    return accuracy(predicted, features.test_labels, num_classes)


def linear(
    features: Features,
    num_classes: int,
    transfer: TransferConfig,
    *,
    device: torch.device,
    seed: int,
) -> float:
    """Return the test accuracy of the linear protocol."""
    predicted = linear_predict(
        features,
        epochs=transfer.linear_epochs,
        num_classes=num_classes,
        device=device,
        seed=seed,
    )
    return accuracy(predicted, features.test_labels, num_classes)
