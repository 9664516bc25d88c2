"""Detection: train on squares of random scale, find boxes and masks, measure average precision.

An image that cannot be read is skipped, counted and named in `faults.jsonl`; in the test nothing
is found in it (`skips.py`).

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

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from moce_dist.config import DetectionConfig
from moce_dist.data.decoders import ImageError
from moce_dist.data.images import sample_generator
from moce_dist.run.files import write_atomic
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.detection.finding import Scored, evaluate, predict
from moce_dist.transfer.detection.jitter import PlacedSample, training_square
from moce_dist.transfer.detection.task import Detection
from moce_dist.transfer.detection.vitdet import make_detector, make_optimizer
from moce_dist.transfer.fit import Fitted, Fitting, Measures, Trial, run_fit, stepped_rate
from moce_dist.transfer.loading import Machine, TrainingOrder, Unread, rank_draws
from moce_dist.transfer.saved import Spec, dense_spec
from moce_dist.transfer.skips import Skips

_WARMUP_STEPS, _WARMUP_SHARE = 250, 0.1

__all__ = ["build", "fit", "predict"]

Target = dict[str, Tensor]
Targets = Sequence[Target | None]
"""Ground truth of the squares of a batch; None for a blank square, which has weight 0."""


class Squares(Dataset[PlacedSample | Unread]):
    """Training squares of images, drawn by (seed, epoch, key)."""

    def __init__(self, task: Detection, recipe: DetectionConfig, seed: int) -> None:
        self._task, self._recipe, self._seed = task, recipe, seed

    def __getitem__(self, draw: tuple[int, int]) -> PlacedSample | Unread:
        epoch, index = draw
        boxed, recipe = self._task.train[index], self._recipe
        try:
            return training_square(
                boxed,
                recipe.size,
                (recipe.scale_min, recipe.scale_max),
                has_masks=self._task.has_masks,
                draws=sample_generator(self._seed, epoch, boxed.key),
            )
        except ImageError as error:
            return Unread(boxed.key, f"{boxed.image}: {error}")


def count_images(targets: Targets) -> int:
    """Count the squares that show an image."""
    return sum(target is not None for target in targets)


class DetectorFit:
    """One fit: a detector, the task that it learns, and the machine that it runs on."""

    def __init__(
        self, backbone: Backbone, task: Detection, recipe: DetectionConfig, machine: Machine
    ) -> None:
        self.backbone, self.task = backbone, task
        self.recipe, self.machine = recipe, machine
        # class 0 is the background
        self._classes = {number: i + 1 for i, number in enumerate(task.category_ids)}

    def build(self, seed: int) -> Any:
        """Build the detector, in training mode; `seed` draws its new weights."""
        recipe = self.recipe
        vit = self.backbone.dense_model(recipe.size, seed=seed, drop_path=recipe.drop_path)
        return make_detector(
            vit,
            self.backbone,
            recipe,
            num_classes=len(self.task.classes),
            has_masks=self.task.has_masks,
            autocast=self.machine.autocast,
        ).to(self.machine.device)

    def batches(self, seed: int, start: int, skips: Skips) -> Iterator[tuple[Tensor, Targets]]:
        """Yield this rank's squares (B, 3, S, S) in [0, 255] and targets from step `start` on.

        Unreadable images are missing from their batch. Collective over the ranks.

        Raises:
            ConfigError: a step has too few images for so many ranks.
            ValueError: no image of a step can be read; on all ranks.
        """
        recipe, num_images = self.recipe, len(self.task.train)
        order = TrainingOrder.of_steps(num_images, recipe.batch_size, recipe.steps, seed)
        loader = self.machine.load(
            Squares(self.task, recipe, seed),
            batch_sampler=rank_draws(order, self.machine, start, recipe.steps),
            collate_fn=list,
        )
        skips.start(start)
        for step, items in enumerate(loader, start):
            mine = [item if isinstance(item, Unread) else None for item in items]
            faults = skips.note(step, mine)
            if len(faults) == order.batch_size:
                raise ValueError(faults[-1].reason)
            yield self.batch([item for item in items if isinstance(item, PlacedSample)])

    def batch(self, samples: Sequence[PlacedSample]) -> tuple[Tensor, Targets]:
        """Stack samples into squares (B, 3, S, S) in [0, 255] and their ground truth.

        Without samples there is one blank square, because a rank without readable images must
        still take part in the collectives of a step.
        """
        if not samples:
            size = self.recipe.size
            return torch.zeros(1, 3, size, size, dtype=torch.uint8), [None]
        targets = []
        for sample in samples:
            classes = [self._classes[int(category)] for category in sample.categories]
            target = {
                "boxes": torch.from_numpy(sample.boxes),
                "labels": torch.tensor(classes, dtype=torch.int64),
            }
            if sample.masks is not None:
                target["masks"] = torch.from_numpy(sample.masks)
            targets.append(target)
        return torch.stack([torch.from_numpy(sample.pixels) for sample in samples]), targets

    def loss(self, model: Any) -> Callable[[Tensor, Targets], Tensor]:
        """Return the sum of a detector's losses as a function of squares and targets."""
        device, size = self.machine.device, self.recipe.size
        nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        if self.task.has_masks:
            nothing["masks"] = torch.zeros(0, size, size, dtype=torch.uint8)

        def of(squares: Tensor, targets: Targets) -> Tensor:
            known = [nothing if target is None else target for target in targets]
            moved = [{name: x.to(device) for name, x in target.items()} for target in known]
            # the detector itself chooses which of its parts run in bfloat16
            with torch.autocast(device.type, enabled=False):
                losses: dict[str, Tensor] = model(list(squares.float() / 255), moved)
            return torch.stack(list(losses.values())).sum()

        return of

    def fitting(self, model: Any, seed: int, skips: Skips, view: Callable[[], Measures]) -> Fitting:
        """Describe the training of a detector."""
        recipe, steps = self.recipe, self.recipe.steps
        return Fitting(
            name=f"{self.task.name} {self.backbone.name} seed {seed}",
            model=model,
            optimizer=make_optimizer(model, recipe.layer_decay),
            batches=lambda start: self.batches(seed, start, skips),
            loss=self.loss(model),
            view=view,
            spec=dense_spec(
                self.backbone,
                self.task,
                recipe.size,
                channels=recipe.channels,
                has_masks=self.task.has_masks,
                window=recipe.window,
                anchor_strides=recipe.anchor_strides,
            ),
            steps=steps,
            warmup=min(_WARMUP_STEPS, math.ceil(_WARMUP_SHARE * steps)),
            peak_lr=recipe.lr,
            seed=seed,
            schedule=stepped_rate,
            weigh=count_images,
        )


def fit(task: Detection, trial: Trial) -> Fitted:
    """Train on a task's training images and return box (and mask) figures on its test images.

    Writes `out/scores.json` and a few predictions beside the truth as PNG. A figure without objects
    to find is None. Collective over the machine's ranks; rank 0 writes.

    Raises:
        ConfigError: a step has too few images for so many ranks.
        ValueError: no image of a step can be read.
    """
    machine, seed = trial.machine, trial.seed
    learner = DetectorFit(trial.backbone, task, trial.transfer.detection, machine)
    model, skips = learner.build(seed), Skips(machine, trial.kept)
    scored: list[Scored] = []

    def view() -> Measures:
        scored.append(evaluate(model, task, machine, trial.out))
        skips.test = scored[-1].unread
        return scored[-1].measures()

    run_fit(learner.fitting(model, seed, skips, view), machine, trial.kept)
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
