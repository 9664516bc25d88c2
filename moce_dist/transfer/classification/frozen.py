"""Classification with a frozen backbone: k-NN, linear head or logistic regression on features.

Images are not augmented, so features are computed once per backbone and reused. Fine-tuning, which
trains the backbone too, is in finetune.py.

Letters: n images, D width, C classes. Labels are (n,), or (n, C) of 1, 0 and -1 (not counted) when
an image has several.

Source: weighted k-NN as in Wu et al. 2018, arXiv 1805.01978, section 3.4 (temperature 0.07);
features minus their mean as in the clustering of this package.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from moce_dist.arrays import Float32, Int64
from moce_dist.config import TransferConfig
from moce_dist.data.progress import track
from moce_dist.features.encoder import EncoderInput
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.classification.measure import measure, multi_label_loss
from moce_dist.transfer.classification.task import LOGISTIC, Classification
from moce_dist.transfer.fit import Fitted, Measures, Trial
from moce_dist.transfer.loading import Machine, Unread, eval_batches
from moce_dist.transfer.ranks import in_order
from moce_dist.transfer.saved import classifier_spec, save_model
from moce_dist.transfer.skips import Skips, readable
from moce_dist.transfer.tasks import Item, Task

logger = logging.getLogger(__name__)
_TEMPERATURE = 0.07
_CHUNK, _MOST_PAIRS = 8192, 2**28
_PENALTY = 1.0
_SHARES = tuple(10.0**exponent for exponent in range(-4, 3))
"""Values of scikit-learn's C: weight of the summed losses relative to half the squared weights."""
_DRAWS = 5
_MAX_ITERATIONS = 1000


class Features(NamedTuple):
    """Features (n, D) float32 and labels int64 of the two splits, on the CPU.

    Unreadable images are left out.
    """

    train: Tensor
    train_labels: Tensor
    train_unread: list[Unread]
    test: Tensor
    test_labels: Tensor
    test_unread: list[Unread]


def extract(
    backbone: Backbone, items: list[Item], machine: Machine, *, seed: int = 0
) -> tuple[Tensor, Tensor, list[Unread]]:
    """Compute a backbone's features of items by `encode`; `seed` initialises missing weights.

    Raises:
        ValueError: no item can be read.
    """
    model = backbone.features_model(seed).to(machine.device)

    def features(images: Tensor) -> Tensor:
        return model(backbone.normalise(images))

    return encode(features, backbone, items, machine, name=backbone.name)


@torch.no_grad()
def encode(
    features: Callable[[Tensor], Tensor],
    takes: Backbone | EncoderInput,
    items: Sequence[Item],
    machine: Machine,
    *,
    name: str,
) -> tuple[Tensor, Tensor, list[Unread]]:
    """Compute features (n, D) float32 and labels (n,) of items, in their order, on the CPU.

    `features` maps images (B, 3, S, S) uint8, on the machine's device and as `takes` describes
    them, to (B, D). Unreadable images are left out and returned as a list.

    Raises:
        ValueError: none can be read.
    """
    found = []
    batches, what = eval_batches(items, takes, machine), f"images encoded by {name}"
    for images, labels, faults in track(batches, what, total=len(items), size=lambda b: len(b[1])):
        found.append((features(images.to(machine.device)).float().cpu(), labels, faults))
    return readable(in_order(found, machine))


class Linear(NamedTuple):
    """A linear head on raw features: weight (C, D), bias (C,), on the CPU."""

    weight: Tensor
    bias: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """Return logits (n, C) of features (n, D)."""
        return F.linear(features, self.weight, self.bias)


def knn_scores(features: Features, *, k: int, num_classes: int, device: torch.device) -> Tensor:
    """Let the k most similar training images vote, weighted by exp(cosine similarity / T).

    Computed on `device`. Returns shares of the votes (n, C) for the test images, on the CPU. The
    training mean is subtracted from all features first.
    """
    mean = features.train.mean(dim=0)
    train = F.normalize(features.train - mean, dim=1).to(device)
    test = F.normalize(features.test - mean, dim=1)
    labels, votes = features.train_labels.to(device), []
    for rows in torch.split(test, max(1, min(_CHUNK, _MOST_PAIRS // len(train)))):
        chunk = rows.to(device)
        similarity, neighbours = (chunk @ train.T).topk(min(k, len(train)), dim=1)
        weights = (similarity / _TEMPERATURE).exp()
        shares = weights / weights.sum(dim=1, keepdim=True)
        if labels.ndim == 1:
            none = shares.new_zeros(len(chunk), num_classes)
            votes.append(none.scatter_add_(1, labels[neighbours], shares).cpu())
        else:
            truth = labels[neighbours].clamp_min(0).float()
            votes.append(torch.einsum("nk,nkc->nc", shares, truth).cpu())
    return torch.cat(votes)


def fit_linear(
    features: Features, *, passes: int, num_classes: int, device: torch.device
) -> Linear:
    """Fit a linear head on standardised features; the standardisation is folded into it.

    Logistic regression (multinomial, or one per class for several labels) with an L2 penalty, by
    L-BFGS from zero. It makes at most `passes` over the training features and draws nothing.
    """
    # the deviation of a single row is nan
    mean, deviation = features.train.mean(dim=0), features.train.std(dim=0).nan_to_num()
    deviation = deviation.clamp_min(1e-6)
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
            logits = head(rows)
            if targets.ndim == 2:
                losses = multi_label_loss(logits, targets)
            else:
                losses = F.cross_entropy(logits, targets, reduction="none")
            part = losses.sum() / len(train)
            torch.autograd.backward(part)
            total = total + part.detach()
        return total

    optimizer.step(loss_and_gradient)
    weight = head.weight.detach().cpu() / deviation
    return Linear(weight, head.bias.detach().cpu() - weight @ mean)


def knn(
    features: Features, task: Task, transfer: TransferConfig, *, device: torch.device
) -> Measures:
    """Measure the k-NN protocol on the test images."""
    num_classes = len(task.classes)
    scores = knn_scores(features, k=transfer.knn_k, num_classes=num_classes, device=device)
    return measure(task.metric, scores, features.test_labels)


def linear(
    features: Features, task: Task, transfer: TransferConfig, *, device: torch.device
) -> tuple[Measures, Linear]:
    """Fit and measure the linear protocol; also return the head."""
    head = fit_linear(
        features, passes=transfer.linear_epochs, num_classes=len(task.classes), device=device
    )
    return measure(task.metric, head.scores(features.test), features.test_labels), head


def logistic(features: Features, task: Classification, few: int | None, *, seed: int) -> Measures:
    """Measure logistic regression, whose penalty is chosen on a part of the training images.

    With `few` labels per class, results are means over `_DRAWS` draws of these labels by `seed`.
    Every image has one label.
    """
    labels = features.train_labels.numpy()
    if len(np.unique(labels)) < 2:
        raise ValueError(f"{task.name}: logistic regression needs training images of two classes")
    mean, deviation = features.train.mean(dim=0), features.train.std(dim=0).clamp_min(1e-6)
    train, test = (((f - mean) / deviation).numpy() for f in (features.train, features.test))
    found = []
    for draw in range(1 if few is None else _DRAWS):
        rng = np.random.default_rng([seed, draw])
        rows = rng.permutation(len(labels))
        if few is not None:
            kept = [rows[labels[rows] == label][:few] for label in np.unique(labels)]
            rows = rng.permutation(np.concatenate(kept))
        model = fit_logistic(train[rows], labels[rows])
        scores = torch.full((len(test), len(task.classes)), -torch.inf)
        scores[:, model.classes_] = torch.from_numpy(model.predict_log_proba(test)).float()
        found.append(measure(task.metric, scores, features.test_labels))
    return {name: sum(each[name] for each in found) / len(found) for name in found[0]}


def fit_logistic(rows: Float32, labels: Int64) -> Any:
    """Fit logistic regression to rows (n, D) in random order; held-out rows choose the penalty."""

    # rows (n, D) in random order
    def fit(share: float, x: Float32, y: Int64) -> Any:
        return LogisticRegression(C=share, max_iter=_MAX_ITERATIONS).fit(x, y)

    classes, counts = np.unique(labels, return_counts=True)
    # a class of one row cannot be in both parts
    is_split = np.isin(labels, classes[counts > 1])
    num_split, num_held = (counts > 1).sum(), max((counts > 1).sum(), is_split.sum() // 5)
    if num_split < 2 or num_held + num_split > is_split.sum():
        return fit(1.0, rows, labels)
    x, held_x, y, held_y = train_test_split(
        *(rows[is_split], labels[is_split]),
        test_size=int(num_held),
        stratify=labels[is_split],
        random_state=0,
    )
    x, y = np.concatenate([x, rows[~is_split]]), np.concatenate([y, labels[~is_split]])
    losses = []
    for share in _SHARES:
        model = fit(share, x, y)
        # a rare class may be among these rows alone
        losses.append(log_loss(held_y, model.predict_proba(held_x), labels=model.classes_))
    return fit(_SHARES[int(np.argmin(losses))], rows, labels)


def fit(task: Classification, trial: Trial) -> Fitted:
    """Measure a frozen backbone by k-NN, a linear head or logistic regression on its features.

    Features that protocols and seeds share are computed once. A linear head is saved with its
    backbone as one classifier.

    Raises:
        ValueError: no image of a split can be read.
    """
    backbone, machine, seed, protocol = trial.backbone, trial.machine, trial.seed, trial.protocol
    # features depend on the seed if it draws the weights or a part of the training images
    is_drawn = backbone.is_drawn or len(task.train) == trial.transfer.max_train
    key = (backbone.name, seed if is_drawn else 0)
    if trial.shared.get("key") != key:
        train, test = (
            extract(backbone, list(items), machine, seed=seed) for items in (task.train, task.test)
        )
        features = Features(*train, *test)
        trial.shared.update(key=key, features=features)
    features = trial.shared["features"]
    skips = Skips(machine)
    skips.test = [*features.train_unread, *features.test_unread]
    if protocol == "knn":
        return Fitted(knn(features, task, trial.transfer, device=machine.device), skips.close())
    if found := LOGISTIC.fullmatch(protocol):
        few = int(found[1]) if found[1] else None
        return Fitted(logistic(features, task, few, seed=seed), skips.close())
    measures, head = linear(features, task, trial.transfer, device=machine.device)
    if trial.kept is not None and trial.kept.models:
        spec = classifier_spec(
            backbone, task.name, task.classes, is_multi_label=task.is_multi_label, fc_norm=False
        )
        model: Any = spec.vit()
        classifier = model.get_classifier()
        if isinstance(classifier, nn.Linear) and classifier.weight.shape == head.weight.shape:
            features_of = backbone.features_model(seed).state_dict()
            odd = model.load_state_dict(features_of, strict=False)
            assert not odd.unexpected_keys and len(odd.missing_keys) == len(head), odd
            classifier.load_state_dict({"weight": head.weight, "bias": head.bias})
            about = {**measures, "of": trial.kept.identity}
            save_model(trial.kept.folder / "last", model, spec, about)
        else:
            logger.warning("%s: its classifier is no linear layer; not saved", backbone.name)
    return Fitted(measures, skips.close())
