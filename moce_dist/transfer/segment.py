"""Semantic segmentation: train on crops, slide over whole pictures, intersection over union.

Letters: B pictures, S side of a crop, H, W height and width, pixels; C classes.

Source: recipe as in mmsegmentation's configs/mae for ADE20K (random scale, crop and mirror, sliding
evaluation), without its colour jitter; scores as in Long et al. 2015, arXiv 1411.4038, section 5.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from moce_dist.config import TransferConfig
from moce_dist.data.images import open_image, sample_generator
from moce_dist.run import write_atomic
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.finetune import check_loss, learning_rate, set_learning_rate
from moce_dist.transfer.loading import (
    Machine,
    Progress,
    TrainingOrder,
    backward_in_parts,
    renormalisation,
)
from moce_dist.transfer.scenes import (
    IGNORE,
    Scene,
    Scenes,
    read_mask,
    scaled,
    to_pixels,
    training_crop,
)
from moce_dist.transfer.upernet import Segmenter

_DROP_PATH = 0.1
_WARMUP_SHARE = 0.01
_NUM_PREVIEWS = 4


class Scores(NamedTuple):
    """Mean intersection over union, share of right pixels, mean recall, IoU per class or NaN."""

    miou: float
    aacc: float
    macc: float
    iou: list[float]


def scores(confusion: Tensor) -> Scores:
    """Compute scores from counts (C, C) int64, rows = truth, columns = prediction.

    A class that neither truth nor prediction holds does not count in the means.
    """
    counts = confusion.double()
    hit, truth, predicted = counts.diag(), counts.sum(dim=1), counts.sum(dim=0)
    iou, recall = hit / (truth + predicted - hit), hit / truth
    means = [float(values.nanmean()) for values in (iou, recall)]
    return Scores(means[0], float(hit.sum() / counts.sum()), means[1], iou.tolist())


def count_pixels(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Count pixels by (truth, prediction), (C, C) int64; ignored ones are left out."""
    kept = labels != IGNORE
    pairs = labels[kept] * num_classes + predicted[kept]
    return pairs.bincount(minlength=num_classes**2).reshape(num_classes, num_classes)


class _Crops(Dataset[tuple[NDArray[np.float32], NDArray[np.int64]]]):
    """Training crops of scenes, drawn by (seed, epoch, key)."""

    def __init__(self, scenes: Sequence[Scene], size: int, backbone: Backbone, seed: int) -> None:
        self._scenes, self._size, self._seed = scenes, size, seed
        self._factor, self._shift = renormalisation(backbone)

    def __getitem__(self, draw: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        epoch, index = draw
        scene = self._scenes[index]
        draws = sample_generator(self._seed, epoch, scene.key)
        pixels, labels = training_crop(scene, self._size, draws)
        return pixels * self._factor + self._shift, np.ascontiguousarray(labels)


def _crop_batches(
    scenes: Scenes, transfer: TransferConfig, backbone: Backbone, machine: Machine, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    batch_size = min(transfer.segment_batch_size, len(scenes.train))
    epochs = -(-transfer.segment_steps // (len(scenes.train) // batch_size))
    crops = _Crops(scenes.train, transfer.segment_crop, backbone, seed)
    order = TrainingOrder(len(scenes.train), batch_size, epochs, seed)
    first = itertools.islice(order, transfer.segment_steps)
    yield from DataLoader(crops, batch_sampler=first, num_workers=machine.loader_processes)


def segment(
    backbone: Backbone,
    scenes: Scenes,
    transfer: TransferConfig,
    machine: Machine,
    *,
    seed: int,
    out: Path,
) -> float:
    """Train on a task's training scenes and return the mIoU on its test scenes.

    Writes `out/scores.json` and a few predictions beside picture and truth as PNG.
    """
    vit = backbone.dense_model(transfer.segment_crop, seed=seed, drop_path=_DROP_PATH)
    model = Segmenter(vit, len(scenes.classes), transfer.segment_channels).to(machine.device)
    _train(model, _crop_batches(scenes, transfer, backbone, machine, seed), transfer, machine, seed)
    found = _evaluate(model.eval(), scenes, backbone, transfer.segment_crop, machine, out)
    document = {
        "mIoU": found.miou,
        "aAcc": found.aacc,
        "mAcc": found.macc,
        "IoU": {
            name: None if np.isnan(iou) else iou
            for name, iou in zip(scenes.classes, found.iou, strict=True)
        },
    }
    write_atomic(out / "scores.json", json.dumps(document, indent=1))
    return found.miou


def _train(
    model: Segmenter,
    batches: Iterator[tuple[Tensor, Tensor]],
    transfer: TransferConfig,
    machine: Machine,
    seed: int,
) -> None:
    steps = transfer.segment_steps
    optimizer = model.optimizer()
    torch.manual_seed(seed)
    progress = Progress(f"segmentation seed {seed}", steps, "steps")

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images).float(), labels, ignore_index=IGNORE)

    for step, (images, labels) in enumerate(batches):
        warmup = round(_WARMUP_SHARE * steps)
        rate = learning_rate(step, steps=steps, warmup=warmup, peak=transfer.segment_lr)
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad()
        inputs, targets = images.to(machine.device), labels.to(machine.device)
        check_loss(backward_in_parts(inputs, targets, machine, loss_of), "segmentation", step)
        optimizer.step()
        progress.advance()


def windows(length: int, size: int) -> list[int]:
    """List starts of windows of `size` that cover `length` >= size and overlap by a third."""
    stride = max(1, size * 2 // 3)
    return sorted({min(start, length - size) for start in range(0, length - size + stride, stride)})


def slide(model: nn.Module, pixels: Tensor, size: int, machine: Machine) -> Tensor:
    """Average the logits of overlapping windows over a picture (3, H, W): (C, H, W) on the CPU."""
    height, width = pixels.shape[1:]
    total: Tensor | None = None
    hits = torch.zeros(height, width)
    for top, left in itertools.product(windows(height, size), windows(width, size)):
        window = (slice(top, top + size), slice(left, left + size))
        with machine.autocast():
            logits = model(pixels[:, *window][None].to(machine.device))[0].float().cpu()
        if total is None:
            total = torch.zeros(logits.shape[0], height, width)
        total[:, *window] += logits
        hits[window] += 1
    assert total is not None
    return total / hits


@torch.no_grad()
def _evaluate(
    model: nn.Module, scenes: Scenes, backbone: Backbone, size: int, machine: Machine, out: Path
) -> Scores:
    num_classes = len(scenes.classes)
    factor, shift = (torch.from_numpy(x) for x in renormalisation(backbone))
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    progress = Progress("segmentation test", len(scenes.test), "pictures")
    for number, scene in enumerate(scenes.test):
        picture = open_image(scene.image.read_bytes())
        pixels = torch.from_numpy(np.ascontiguousarray(to_pixels(scaled(picture, size))))
        logits = slide(model, pixels * factor + shift, size, machine)
        labels = torch.from_numpy(read_mask(scene.mask))
        full = F.interpolate(logits[None], size=labels.shape, mode="bilinear", align_corners=False)[
            0
        ]
        predicted = full.argmax(dim=0)
        confusion += count_pixels(labels, predicted, num_classes)
        if number < _NUM_PREVIEWS:
            _preview(out / f"{scene.image.stem}.png", picture, predicted, labels, num_classes)
        progress.advance()
    return scores(confusion)


def palette(num_classes: int) -> NDArray[np.uint8]:
    """Return distinct colours (C + 1, 3), the last one, black, for ignored pixels."""
    hues = np.arange(num_classes) * 255 * 0.618034 % 255
    hsv = np.stack([hues, np.full(num_classes, 190), 255 - np.arange(num_classes) % 3 * 55], axis=1)
    colours = np.asarray(Image.fromarray(hsv.astype(np.uint8)[None], "HSV").convert("RGB"))[0]
    return np.concatenate([colours, np.zeros((1, 3), np.uint8)])


def _preview(
    path: Path, picture: Image.Image, predicted: Tensor, labels: Tensor, num_classes: int
) -> None:
    colours = palette(num_classes)
    # IGNORE is -1, the palette's last colour
    panels: list[Any] = [np.asarray(picture), colours[predicted], colours[labels]]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(panels, axis=1)).save(path)
