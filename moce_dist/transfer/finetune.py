"""Fine-tune a whole backbone on a classification task, by the published MAE recipe.

AdamW whose learning rate falls from block to block towards the input, stochastic depth, Mixup and
CutMix, random resized crops, a cosine after a linear warm-up. Every backbone of a comparison gets
the same steps, images and draws.

Letters: B images, C classes.

Source: He et al. 2022, arXiv 2111.06377, table 9; facebookresearch/mae main_finetune.py and
util/lr_sched.py @efb2a80. Without their RandAugment and random erasing.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from moce_dist.config import FinetuneConfig
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.classify import accuracy
from moce_dist.transfer.loading import (
    Machine,
    Progress,
    TaskImages,
    TrainingOrder,
    backward_in_parts,
    eval_batches,
    training_batches,
)
from moce_dist.transfer.tasks import Task

_MIN_LR = 1e-6
_LABEL_SMOOTHING = 0.1
_HEAD_STD = 2e-5


def learning_rate(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """Return the rate of a step counted from 0: linear to `peak`, then half a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return _MIN_LR + (peak - _MIN_LR) * 0.5 * (1 + math.cos(math.pi * share))


def make_optimizer(
    model: nn.Module, *, weight_decay: float, layer_decay: float
) -> torch.optim.AdamW:
    """Make AdamW whose groups carry `lr_scale`, 1 at the head and less block by block below it."""
    groups = param_groups_layer_decay(
        model,
        weight_decay=weight_decay,
        no_weight_decay_list=("pos_embed", "cls_token"),
        layer_decay=layer_decay,
    )
    return torch.optim.AdamW(groups, lr=0.0)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group to `lr` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def _mixer(recipe: FinetuneConfig, num_classes: int) -> Mixup | None:
    if recipe.mixup == 0 and recipe.cutmix == 0:
        return None
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        label_smoothing=_LABEL_SMOOTHING,
        num_classes=num_classes,
    )


def check_loss(loss: Tensor, what: str, step: int) -> None:
    """Stop a fit whose loss is no number.

    Raises:
        FloatingPointError: naming the fit and the step.
    """
    if not torch.isfinite(loss):
        raise FloatingPointError(f"{what}: loss is {loss.item()} in step {step}")


def finetune(
    backbone: Backbone, task: Task, recipe: FinetuneConfig, machine: Machine, *, seed: int
) -> float:
    """Fine-tune on the training images; return the accuracy on the test images.

    `seed` draws everything: the head, the order, crops, Mixup, stochastic depth.
    """
    model = backbone.classifier(len(task.classes), seed=seed, drop_path=recipe.drop_path)
    for name, parameter in model.named_parameters():
        if name == "head.weight":
            nn.init.trunc_normal_(parameter, std=_HEAD_STD)
    model.to(machine.device)
    images = TaskImages(task.train, backbone, augment=recipe, seed=seed)
    _train(model, images, recipe, machine, seed=seed)
    return evaluate(model.eval(), backbone, task, machine)


def _train(
    model: Any, images: TaskImages, recipe: FinetuneConfig, machine: Machine, *, seed: int
) -> None:
    # Mixup swaps an image with its mirror position in the batch, so batches are even
    batch_size = min(recipe.batch_size, len(images)) // 2 * 2
    order = TrainingOrder(len(images), batch_size, recipe.epochs, seed)
    warmup = round(recipe.warmup_epochs * len(order) / recipe.epochs)
    peak = recipe.base_lr * batch_size / 256
    optimizer = make_optimizer(
        model, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay
    )
    mix = _mixer(recipe, model.num_classes)
    torch.manual_seed(seed)
    np.random.seed(seed)  # timm's Mixup draws from numpy's global generator
    name = f"finetune seed {seed}"
    progress = Progress(name, len(order), "steps")

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        smoothing = 0.0 if mix else _LABEL_SMOOTHING
        return F.cross_entropy(model(inputs).float(), targets, label_smoothing=smoothing)

    for step, (pixels, labels) in enumerate(training_batches(images, order, machine)):
        rate = learning_rate(step, steps=len(order), warmup=warmup, peak=peak)
        set_learning_rate(optimizer, rate)
        inputs, targets = pixels.to(machine.device), labels.to(machine.device)
        if mix is not None:
            inputs, targets = mix(inputs, targets)
        optimizer.zero_grad()
        check_loss(backward_in_parts(inputs, targets, machine, loss_of), name, step)
        optimizer.step()
        progress.advance()


@torch.no_grad()
def evaluate(model: nn.Module, backbone: Backbone, task: Task, machine: Machine) -> float:
    """Return the accuracy of a classifier in evaluation mode on a task's test images."""
    predicted, labels = [], []
    for images, batch_labels in eval_batches(task.test, backbone, machine):
        predicted.append(model(images.to(machine.device)).argmax(dim=1).cpu())
        labels.append(batch_labels)
    return accuracy(torch.cat(predicted), torch.cat(labels), len(task.classes))
