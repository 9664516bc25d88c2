"""Detection: train on squares of random scale, find boxes and masks, measure average precision.

An image that cannot be read is skipped, counted and named in `faults.jsonl` (`skips.py`); in the
test nothing is found in it.

R ranks share the images of a step, and those of a test. The squares, and the scores of a given
model, do not depend on R. The trained weights do, and agree only in distribution: torchvision
samples anchors and proposals from each rank's generator, and its losses are means over the samples
of a rank's micro-batch (the mask loss, over the objects among them).

Letters: B images of a rank, S side of the square, pixels; n objects of a square; R ranks.

Source: recipe of ViTDet, Li et al. 2022, arXiv 2203.16527, appendix A.2.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moce_dist.config import DetectionConfig
from moce_dist.data.images import sample_generator
from moce_dist.run.files import write_atomic
from moce_dist.transfer.detection.coco_json import BoxedImage
from moce_dist.transfer.detection.finding import Scored, evaluate, predict
from moce_dist.transfer.detection.jitter import training_square
from moce_dist.transfer.detection.task import Detection
from moce_dist.transfer.detection.vitdet import make_detector, make_optimizer
from moce_dist.transfer.fit import Fitted, Fitting, Measures, Trial, run_fit, stepped_rate
from moce_dist.transfer.loading import Loaded, TrainingItems, TrainingOrder, rank_draws
from moce_dist.transfer.saved import Spec, dense_spec
from moce_dist.transfer.skips import Skips, training_batches

_WARMUP_STEPS, _WARMUP_SHARE = 250, 0.1

__all__ = ["build", "fit", "predict"]

Target = dict[str, Tensor]
"""Ground truth of a square as torchvision's detectors take it: boxes, labels and maybe masks."""


class Squares(TrainingItems):
    """Training squares of images, drawn by (seed, epoch, key); their labels are targets."""

    def __init__(self, task: Detection, recipe: DetectionConfig, seed: int) -> None:
        super().__init__(task.train)
        self._recipe, self._has_masks, self._seed = recipe, task.has_masks, seed
        # class 0 is the background
        self._classes = {number: i + 1 for i, number in enumerate(task.category_ids)}

    def read(self, item: BoxedImage, epoch: int) -> tuple[NDArray[np.uint8], Target]:
        """Return the square (3, S, S) of an image in [0, 255] and its target."""
        square = training_square(
            item,
            self._recipe.size,
            (self._recipe.scale_min, self._recipe.scale_max),
            has_masks=self._has_masks,
            draws=sample_generator(self._seed, epoch, item.key),
        )
        classes = [self._classes[int(category)] for category in square.categories]
        target = {
            "boxes": torch.from_numpy(square.boxes),
            "labels": torch.tensor(classes, dtype=torch.int64),
        }
        if square.masks is not None:
            target["masks"] = torch.from_numpy(square.masks)
        return square.pixels, target


def stack_squares(squares: Sequence[Loaded]) -> Loaded:
    """Join squares to a batch (B, 3, S, S) in [0, 255]; its label is (joined targets, B counts).

    Between processes every tensor is an open file, so a batch has one of each kind.
    """
    pixels, targets, keys, reasons = zip(*squares, strict=True)
    joined = {name: torch.cat([target[name] for target in targets]) for name in targets[0]}
    counts = [len(target["labels"]) for target in targets]
    return Loaded(torch.from_numpy(np.stack(pixels)), (joined, counts), keys, reasons)


def split_targets(joined: Target, counts: Sequence[int]) -> list[Target]:
    """Return the targets of a batch's squares, which have `counts` objects each."""
    parts = zip(*(torch.split(each, list(counts)) for each in joined.values()), strict=True)
    return [dict(zip(joined, part, strict=True)) for part in parts]


def make_model(task: Detection, trial: Trial) -> Any:
    """Make the detector of a fit, in training mode, on the machine's device."""
    recipe, machine = trial.transfer.detection, trial.machine
    vit = trial.backbone.dense_model(recipe.size, seed=trial.seed, drop_path=recipe.drop_path)
    return make_detector(
        vit,
        trial.backbone,
        recipe,
        num_classes=len(task.classes),
        has_masks=task.has_masks,
        autocast=machine.autocast,
    ).to(machine.device)


def make_loss(model: Any, device: torch.device) -> Callable[[Tensor, Sequence[Target]], Tensor]:
    """Return the sum of a detector's losses as a function of squares (B, 3, S, S) and targets."""

    def loss_of(squares: Tensor, targets: Sequence[Target]) -> Tensor:
        moved = [{name: x.to(device) for name, x in target.items()} for target in targets]
        # the detector itself chooses which of its parts run in bfloat16
        with torch.autocast(device.type, enabled=False):
            losses: dict[str, Tensor] = model(list(squares.float() / 255), moved)
        return torch.stack(list(losses.values())).sum()

    return loss_of


def fit(task: Detection, trial: Trial) -> Fitted:
    """Train on a task's training images and return box (and mask) figures on its test images.

    Writes `out/scores.json` and a few predictions beside the truth as PNG. A figure without objects
    to find is None. Collective over the machine's ranks; rank 0 writes.

    Raises:
        ConfigError: a step has too few images for so many ranks.
        ValueError: no image can be read.
    """
    machine, recipe, seed = trial.machine, trial.transfer.detection, trial.seed
    model, skips = make_model(task, trial), Skips(machine, trial.kept)
    squares = Squares(task, recipe, seed)
    order = TrainingOrder.of_steps(len(task.train), recipe.batch_size, recipe.steps, seed)
    scored: list[Scored] = []

    def batches(start: int) -> Iterator[tuple[Tensor, list[Target]]]:
        draws = rank_draws(order, machine, start, recipe.steps)
        found = training_batches(squares, draws, machine, start, skips, collate_fn=stack_squares)
        return ((pixels, split_targets(*targets)) for pixels, targets in found)

    def view() -> Measures:
        scored.append(evaluate(model, task, machine, trial.out))
        skips.test = scored[-1].unread
        return scored[-1].measures()

    fitting = Fitting(
        name=f"{task.name} {trial.backbone.name} seed {seed}",
        model=model,
        optimizer=make_optimizer(model, recipe.layer_decay),
        batches=batches,
        loss=make_loss(model, machine.device),
        view=view,
        spec=dense_spec(
            *(trial.backbone, task, recipe.size),
            channels=recipe.channels,
            has_masks=task.has_masks,
            window=recipe.window,
            anchor_strides=recipe.anchor_strides,
        ),
        steps=recipe.steps,
        warmup=min(_WARMUP_STEPS, math.ceil(_WARMUP_SHARE * recipe.steps)),
        peak_lr=recipe.lr,
        seed=seed,
        schedule=stepped_rate,
    )
    run_fit(fitting, machine, trial.kept)
    figures: dict[str, Any] = {
        kind: {name: None if math.isnan(v) else v for name, v in values.items()}
        for kind, values in scored[-1].figures.items()
    }
    skipped = skips.close()
    if machine.rank == 0:
        document = {**figures, "skipped_images": len({skip["key"] for skip in skipped})}
        write_atomic(trial.out / "scores.json", json.dumps(document, indent=1))
    return Fitted({task.metric: figures["box"]["AP"]}, skipped, figures)


def build(spec: Spec) -> nn.Module:
    """Build torchvision's detector, which takes a list of images."""
    options = spec.options
    recipe = DetectionConfig(
        size=spec.image_size,
        channels=options["channels"],
        window=options["window"],
        anchor_strides=options["anchor_strides"],
    )
    detector: nn.Module = make_detector(
        spec.vit(),
        spec.backbone(),
        recipe,
        num_classes=len(spec.classes),
        has_masks=options["has_masks"],
        autocast=contextlib.nullcontext,
    )
    return detector
