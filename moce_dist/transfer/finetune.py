"""Fine-tune a whole backbone on a classification task, by the published MAE recipe.

AdamW whose learning rate falls from block to block towards the input, stochastic depth, Mixup and
CutMix, random resized crops, a cosine after a linear warm-up. Every backbone of a comparison gets
the same steps, images and draws.

Letters: B images, C classes.

Source: He et al. 2022, arXiv 2111.06377, table 9; facebookresearch/mae main_finetune.py
@efb2a80. Without their RandAugment and random erasing.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from moce_dist.config import FinetuneConfig
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.fit import Fitting, Kept, run_fit
from moce_dist.transfer.loading import (
    Fault,
    Machine,
    TaskImages,
    TrainingOrder,
    eval_batches,
    rank_draws,
)
from moce_dist.transfer.measure import Measures, measure, multi_label_loss
from moce_dist.transfer.ranks import in_order
from moce_dist.transfer.saved import classifier_spec
from moce_dist.transfer.skips import Fitted, Skips, readable, training_batches
from moce_dist.transfer.tasks import Task

_LABEL_SMOOTHING = 0.1
_HEAD_STD = 2e-5


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


class _LabelMixup(Mixup):  # type: ignore[misc]
    """Mixup and CutMix of images with several labels, (B, C); a label not counted stays so."""

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        share = self._mix_batch(images)
        other = labels.flip(0)
        mixed = labels * share + other * (1 - share)
        return images, mixed.masked_fill((labels < 0) | (other < 0), -1)


def _mixer(recipe: FinetuneConfig, task: Task) -> Mixup | None:
    if recipe.mixup == 0 and recipe.cutmix == 0:
        return None
    return (_LabelMixup if task.is_multi_label else Mixup)(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        label_smoothing=_LABEL_SMOOTHING,
        num_classes=len(task.classes),
    )


def _loss_of(
    model: nn.Module, task: Task, *, is_smoothed: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    def single(inputs: Tensor, targets: Tensor) -> Tensor:
        smoothing = 0.0 if is_smoothed else _LABEL_SMOOTHING
        return F.cross_entropy(model(inputs).float(), targets, label_smoothing=smoothing)

    def several(inputs: Tensor, targets: Tensor) -> Tensor:
        return multi_label_loss(model(inputs).float(), targets).mean()

    return several if task.is_multi_label else single


def finetune(
    backbone: Backbone,
    task: Task,
    recipe: FinetuneConfig,
    machine: Machine,
    *,
    seed: int,
    kept: Kept | None = None,
) -> Fitted:
    """Fine-tune on the training images; return the task's measures on the test images.

    `seed` draws everything: the head, the order, crops, Mixup, stochastic depth. With `kept` the
    model is saved, and an interrupted fit goes on where it was. Collective over the machine's
    ranks.
    """
    model = backbone.classifier(len(task.classes), seed=seed, drop_path=recipe.drop_path)
    for name, parameter in model.named_parameters():
        if name == "head.weight":
            nn.init.trunc_normal_(parameter, std=_HEAD_STD)
    model.to(machine.device)
    skips = Skips(machine, kept)
    fitting = _fitting(model, backbone, task, recipe, seed, skips)
    return Fitted(run_fit(fitting, machine, kept), skips.close())


def _fitting(
    model: nn.Module,
    backbone: Backbone,
    task: Task,
    recipe: FinetuneConfig,
    seed: int,
    skips: Skips,
) -> Fitting:
    machine = skips.machine
    images = TaskImages(task.train, backbone, machine.pictures, augment=recipe, seed=seed)
    # Mixup swaps an image with its mirror position in the batch, so batches are even
    batch_size = min(recipe.batch_size, len(images)) // 2 * 2
    order = TrainingOrder(len(images), batch_size, recipe.epochs, seed)
    mix = _mixer(recipe, task)

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        draws = rank_draws(order, machine, start, mirrored=True)
        yield from training_batches(images, draws, machine, start, skips)

    def view() -> Measures:
        found, skips.test = evaluate(model, backbone, task, machine)
        return found

    return Fitting(
        name=f"{task.name} finetune {backbone.name} seed {seed}",
        model=model,
        optimizer=make_optimizer(
            model, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay
        ),
        batches=batches,
        loss=_loss_of(model, task, is_smoothed=mix is not None),
        view=view,
        spec=classifier_spec(
            backbone, task.name, task.classes, is_multi_label=task.is_multi_label, fc_norm=True
        ),
        steps=len(order),
        warmup=round(recipe.warmup_epochs * len(order) / recipe.epochs),
        peak_lr=recipe.base_lr * batch_size / 256,
        seed=seed,
        prepare=mix,
    )


@torch.no_grad()
def evaluate(
    model: nn.Module, backbone: Backbone, task: Task, machine: Machine
) -> tuple[Measures, list[Fault]]:
    """Measure a classifier in evaluation mode on the test images that can be read; collective.

    Returns also the images that cannot.

    Raises:
        ValueError: none can.
    """
    found = []
    for images, labels, faults in eval_batches(task.test, backbone, machine):
        found.append((model(images.to(machine.device)).float().cpu(), labels, faults))
    scores, truth, unread = readable(in_order(found, machine))
    return measure(task.metric, scores, truth), unread
