"""Fine-tune a whole backbone on a classification task, by the published MAE recipe.

The recipe has AdamW with layer-wise learning rate decay, stochastic depth, Mixup and CutMix, random
resized crops, and a cosine schedule after a linear warm-up. Every backbone of a comparison gets the
same steps, images and draws.

Letters: B images, C classes.

Source: He et al. 2022, arXiv 2111.06377, table 9; facebookresearch/mae main_finetune.py
@efb2a80. Without their RandAugment and random erasing.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor, nn

from moce_dist.config import FinetuneConfig
from moce_dist.run.names import one_line
from moce_dist.settings import ConfigError
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.classification import frozen
from moce_dist.transfer.classification.measure import measure, multi_label_loss
from moce_dist.transfer.classification.task import Classification
from moce_dist.transfer.drawing import PredictOptions
from moce_dist.transfer.fit import Fitted, Fitting, Measures, Trial, layered_adamw, run_fit
from moce_dist.transfer.loading import (
    Machine,
    TaskImages,
    TrainingOrder,
    Unread,
    eval_batches,
    rank_draws,
)
from moce_dist.transfer.saved import Spec, classifier_spec
from moce_dist.transfer.skips import Skips, training_batches
from moce_dist.transfer.tasks import Item

logger = logging.getLogger(__name__)
_LABEL_SMOOTHING = 0.1
_HEAD_STD = 2e-5


class LabelMixup(Mixup):  # type: ignore[misc]
    """Mixup and CutMix of images with several labels, (B, C); uncounted labels (-1) stay -1."""

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix images (B, 3, S, S) in place, and their labels (B, C)."""
        share = self._mix_batch(images)
        other = labels.flip(0)
        mixed = labels * share + other * (1 - share)
        return images, mixed.masked_fill((labels < 0) | (other < 0), -1)


def _mixer(recipe: FinetuneConfig, task: Classification) -> Mixup | None:
    if recipe.mixup == 0 and recipe.cutmix == 0:
        return None
    return (LabelMixup if task.is_multi_label else Mixup)(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        label_smoothing=_LABEL_SMOOTHING,
        num_classes=len(task.classes),
    )


def fit(task: Classification, trial: Trial) -> Fitted:
    """Fine-tune, or fit the features of a frozen backbone, as the protocol says."""
    return (finetune if trial.protocol == "finetune" else frozen.fit)(task, trial)


def build(spec: Spec) -> nn.Module:
    """Build the ViT (B, 3, S, S) -> (B, C); timm adds the head."""
    return spec.vit()


def _even_batch(recipe: FinetuneConfig, task: Classification) -> int:
    # Mixup pairs images at mirror positions in the batch
    if len(task.train) < 2:
        raise ConfigError(
            f"{task.name}: fine-tuning needs 2 training images, has {len(task.train)}"
        )
    return min(recipe.batch_size, len(task.train)) // 2 * 2


def finetune(task: Classification, trial: Trial) -> Fitted:
    """Fine-tune on the training images; return the task's measures on the test images.

    The seed determines all draws: the head, the order, crops, Mixup, stochastic depth. Collective
    over the machine's ranks.
    """
    backbone, machine, seed = trial.backbone, trial.machine, trial.seed
    recipe, skips = trial.transfer.finetune, Skips(machine, trial.kept)
    model = backbone.classifier(len(task.classes), seed=seed, drop_path=recipe.drop_path)
    for name, parameter in model.named_parameters():
        if name == "head.weight":
            nn.init.trunc_normal_(parameter, std=_HEAD_STD)
    model.to(machine.device)
    images = TaskImages(task.train, backbone, machine.kept_images, augment=recipe, seed=seed)
    order = TrainingOrder(len(images), _even_batch(recipe, task), recipe.epochs, seed)
    mix = _mixer(recipe, task)

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        draws = rank_draws(order, machine, start, mirrored=True)
        yield from training_batches(images, draws, machine, start, skips)

    def prepare(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = backbone.normalise(pixels)
        return (images, labels) if mix is None else mix(images, labels)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = model(inputs).float()
        if task.is_multi_label:
            return multi_label_loss(logits, targets).mean()
        # Mixup smooths labels itself
        smoothing = _LABEL_SMOOTHING if mix is None else 0.0
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def view() -> Measures:
        found, skips.test = evaluate(model, backbone, task, machine)
        return found

    if machine.rank == 0:
        _check_warm_up(recipe)
    fitting = Fitting(
        name=f"{task.name} finetune {backbone.name} seed {seed}",
        model=model,
        optimizer=layered_adamw(
            model, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay
        ),
        batches=batches,
        loss=loss,
        view=view,
        spec=classifier_spec(
            backbone, task.name, task.classes, is_multi_label=task.is_multi_label, fc_norm=True
        ),
        steps=len(order),
        warmup=round(recipe.warmup_epochs * len(order) / recipe.epochs),
        peak_lr=recipe.base_lr * order.batch_size / 256,
        seed=seed,
        prepare=prepare,
    )
    return Fitted(run_fit(fitting, machine, trial.kept), skips.close())


def _check_warm_up(recipe: FinetuneConfig) -> None:
    if recipe.warmup_epochs >= recipe.epochs:
        logger.warning(
            "transfer.finetune.warmup_epochs (%g) is not below transfer.finetune.epochs (%g): the "
            "learning rate rises to the end",
            *(recipe.warmup_epochs, recipe.epochs),
        )


def evaluate(
    model: nn.Module, backbone: Backbone, task: Classification, machine: Machine
) -> tuple[Measures, list[Unread]]:
    """Measure a classifier in evaluation mode on the readable test images; collective.

    Also returns the unreadable images.

    Raises:
        ValueError: no image can be read.
    """
    scores, truth, unread = frozen.encode(
        lambda images: model(backbone.normalise(images)),
        *(backbone, task.test, machine),
        name="the classifier",
    )
    return measure(task.metric, scores, truth), unread


@torch.no_grad()
def predict(
    model: nn.Module, spec: Spec, images: Sequence[Item], options: PredictOptions
) -> Iterator[dict[str, Any]]:
    """Yield one record per image: its `options.top` likeliest classes with their probabilities."""
    shown, top = iter(images), min(options.top, len(spec.classes))
    backbone = spec.backbone()
    for pixels, _, faults in eval_batches(images, backbone, options.machine):
        logits = model(backbone.normalise(pixels.to(options.machine.device))).float().cpu()
        shares = logits.sigmoid() if spec.is_multi_label else logits.softmax(dim=1)
        # `shown` is last: it must not lose an image where a batch ends
        for share, fault, item in zip(shares, faults, shown, strict=False):
            if fault:
                yield {"image": str(item.content), "error": one_line(fault.reason)}
                continue
            values, indices = share.topk(top)
            classes = [
                {"name": spec.classes[i], "probability": round(v, 6)}
                for v, i in zip(values.tolist(), indices.tolist(), strict=True)
            ]
            yield {"image": str(item.content), "classes": classes}
