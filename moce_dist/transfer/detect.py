"""Detection: train on squares of random scale, find boxes and masks, average precision.

A picture that cannot be read is skipped, counted and named in `faults.jsonl`; in the test nothing
is found in it.

Letters: B pictures, S side of the square, H, W height and width of a picture, pixels; n detections.

Source: recipe of ViTDet, Li et al. 2022, arXiv 2203.16527, appendix A.2.
"""

import itertools
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moce_dist.config import TransferConfig
from moce_dist.data.images import ImageError, sample_generator
from moce_dist.run import record_fault, write_atomic
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.drawing import draw_preview
from moce_dist.transfer.instances import Instances, Picture, load_picture
from moce_dist.transfer.jitter import Sample, training_square
from moce_dist.transfer.loading import Machine, Progress, TrainingOrder
from moce_dist.transfer.precision import (
    Detections,
    average_precision,
    box_results,
    ground_truth,
    mask_results,
    pack_mask,
)
from moce_dist.transfer.schedule import check_loss, set_learning_rate
from moce_dist.transfer.vitdet import make_detector, make_optimizer

logger = logging.getLogger(__name__)
_WARMUP_STEPS, _WARMUP_SHARE = 250, 0.1
# 163889 and 177546 of 184375 steps, there
_MILESTONES = (8 / 9, 26 / 27)
_NUM_PREVIEWS = 4

Target = dict[str, Tensor]
Figures = dict[str, dict[str, float]]


class Fault(NamedTuple):
    """A picture that cannot be used, and why."""

    picture: Picture
    reason: str


def detection_rate(step: int, *, steps: int, peak: float) -> float:
    """Return the rate of a step counted from 0: linear to `peak`, a tenth twice near the end."""
    warmup = min(_WARMUP_STEPS, math.ceil(_WARMUP_SHARE * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return float(peak * 0.1 ** sum(step >= share * steps for share in _MILESTONES))


class _Squares(Dataset[Sample | Fault]):
    """Training squares of pictures, drawn by (seed, epoch, key)."""

    def __init__(self, instances: Instances, transfer: TransferConfig, seed: int) -> None:
        self._instances, self._transfer, self._seed = instances, transfer, seed

    def __getitem__(self, draw: tuple[int, int]) -> Sample | Fault:
        epoch, index = draw
        picture, transfer = self._instances.train[index], self._transfer
        try:
            return training_square(
                picture,
                transfer.detect_size,
                (transfer.detect_scale_min, transfer.detect_scale_max),
                has_masks=self._instances.has_masks,
                draws=sample_generator(self._seed, epoch, picture.key),
            )
        except ImageError as error:
            return Fault(picture, str(error))


def _as_list(items: list[Sample | Fault]) -> list[Sample | Fault]:
    return items


def _batches(
    instances: Instances, transfer: TransferConfig, machine: Machine, seed: int
) -> Iterator[list[Sample | Fault]]:
    batch_size = min(transfer.detect_batch_size, len(instances.train))
    epochs = -(-transfer.detect_steps // (len(instances.train) // batch_size))
    order = TrainingOrder(len(instances.train), batch_size, epochs, seed)
    yield from DataLoader(
        _Squares(instances, transfer, seed),
        batch_sampler=itertools.islice(order, transfer.detect_steps),
        num_workers=machine.loader_processes,
        collate_fn=_as_list,
    )


def _to_model(
    sample: Sample, labels: dict[int, int], device: torch.device
) -> tuple[Tensor, Target]:
    # 0 is the background
    classes = [labels[int(category)] + 1 for category in sample.categories]
    target = {
        "boxes": torch.from_numpy(sample.boxes).to(device),
        "labels": torch.tensor(classes, dtype=torch.int64, device=device),
    }
    if sample.masks is not None:
        target["masks"] = torch.from_numpy(sample.masks).to(device)
    return torch.from_numpy(sample.pixels).to(device).float() / 255, target


class Detection:
    """One fit: a detector, the task that it learns, and the machine that it runs on."""

    def __init__(
        self, backbone: Backbone, instances: Instances, transfer: TransferConfig, machine: Machine
    ) -> None:
        self.backbone, self.instances = backbone, instances
        self.transfer, self.machine = transfer, machine
        self.labels = {number: i for i, number in enumerate(instances.category_ids)}
        self.faults: list[Fault] = []

    def build(self, seed: int) -> Any:
        """Build the detector, in training mode; `seed` draws its new weights."""
        transfer = self.transfer
        vit = self.backbone.dense_model(
            transfer.detect_size, seed=seed, drop_path=transfer.detect_drop_path
        )
        return make_detector(
            vit,
            self.backbone,
            transfer,
            num_classes=len(self.instances.classes),
            has_masks=self.instances.has_masks,
            autocast=self.machine.autocast,
        ).to(self.machine.device)

    def train(self, model: Any, seed: int) -> None:
        """Train a detector for the steps of the configuration.

        Raises:
            ValueError: no picture of a step can be read.
        """
        steps, peak = self.transfer.detect_steps, self.transfer.detect_lr
        optimizer = make_optimizer(model, self.transfer.detect_layer_decay)
        torch.manual_seed(seed)
        name = f"detection seed {seed}"
        progress = Progress(name, steps, "steps")
        batches = _batches(self.instances, self.transfer, self.machine, seed)
        for step, items in enumerate(batches):
            samples = self._readable(items)
            set_learning_rate(optimizer, detection_rate(step, steps=steps, peak=peak))
            optimizer.zero_grad()
            check_loss(self._backward(model, samples), name, step)
            optimizer.step()
            progress.advance()

    def _readable(self, items: Sequence[Sample | Fault]) -> list[Sample]:
        samples = [item for item in items if isinstance(item, Sample)]
        self._skip([item for item in items if isinstance(item, Fault)])
        if not samples:
            raise ValueError(f"{self.faults[-1].picture.image}: {self.faults[-1].reason}")
        return samples

    def _skip(self, faults: Sequence[Fault]) -> None:
        for fault in faults:
            logger.warning("%s: skipped: %s", fault.picture.image, fault.reason)
        self.faults += faults

    def _backward(self, model: Any, samples: list[Sample]) -> Tensor:
        # gradients of the parts of a batch add up, weighted by their number of pictures
        total = torch.zeros((), device=self.machine.device)
        size = -(-len(samples) // self.machine.micro_batches)
        for start in range(0, len(samples), size):
            part = samples[start : start + size]
            pairs = [_to_model(sample, self.labels, self.machine.device) for sample in part]
            images, targets = zip(*pairs, strict=True)
            losses: dict[str, Tensor] = model(list(images), list(targets))
            loss = torch.stack(list(losses.values())).sum() * (len(part) / len(samples))
            torch.autograd.backward(loss)
            total += loss.detach()
        return total

    @torch.no_grad()
    def find(self, model: Any, picture: Image.Image) -> Detections:
        """Find the objects of a picture with a detector in evaluation mode."""
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        (found,) = model([pixels.to(self.machine.device).float() / 255])
        masks = None
        if self.instances.has_masks:
            masks = [pack_mask(mask[0].cpu().numpy() > 0.5) for mask in found["masks"]]
        return Detections(
            found["boxes"].double().cpu().numpy(),
            found["scores"].double().cpu().numpy(),
            found["labels"].cpu().numpy() - 1,
            masks,
        )

    def evaluate(self, model: Any, out: Path) -> Figures:
        """Score a detector on the test pictures; draw the first few of them into `out`."""
        boxes, masks = [], []
        instances, test = self.instances, self.instances.test
        progress = Progress("detection test", len(test), "pictures")
        for number, picture in enumerate(test):
            progress.advance()
            try:
                image = load_picture(picture)
            except ImageError as error:
                self._skip([Fault(picture, str(error))])
                continue
            found = self.find(model, image)
            boxes += box_results(picture, found, instances.category_ids)
            if instances.has_masks:
                masks += mask_results(picture, found, instances.category_ids)
            if number < _NUM_PREVIEWS:
                draw_preview(out / f"{picture.image.stem}.png", image, picture, found, instances)
        truth = ground_truth(test, instances)
        figures = {"box": average_precision(truth, boxes, "bbox")}
        if instances.has_masks:
            figures["mask"] = average_precision(truth, masks, "segm")
        return figures


def detect(
    fit: Detection, *, seed: int, out: Path, ledger: Path
) -> dict[str, dict[str, float | None]]:
    """Train on a task's training pictures and return box (and mask) figures on its test pictures.

    Writes `out/scores.json` and a few predictions beside the truth as PNG; skipped pictures go to
    `ledger`. A figure without objects to find is None.

    Raises:
        ValueError: no picture of a step can be read.
    """
    model = fit.build(seed)
    fit.train(model, seed)
    found = fit.evaluate(model.eval(), out)
    figures = {
        kind: {name: None if math.isnan(v) else v for name, v in values.items()}
        for kind, values in found.items()
    }
    for fault in fit.faults:
        record_fault(ledger, stage="transfer", key=fault.picture.key, reason=fault.reason)
    document = {**figures, "skipped_pictures": len(fit.faults)}
    write_atomic(out / "scores.json", json.dumps(document, indent=1))
    return figures
