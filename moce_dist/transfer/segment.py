"""Semantic segmentation: train on crops, slide over whole pictures, intersection over union.

Letters: B pictures, S side of a crop, H, W height and width, pixels; C classes.

Source: recipe as in mmsegmentation's configs/mae for ADE20K (random scale, crop and mirror, sliding
evaluation; several scales and mirrored as its aug_test, which averages probabilities), without its
colour jitter; scores as in Long et al. 2015, arXiv 1411.4038, section 5.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from moce_dist.config import SegmentationConfig
from moce_dist.data.decoders import ImageError
from moce_dist.data.images import sample_generator
from moce_dist.features.encoder import renormalisation
from moce_dist.run.files import write_atomic
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.fit import Fitting, Kept, run_fit
from moce_dist.transfer.loading import (
    Draw,
    Fault,
    Look,
    Machine,
    Progress,
    TrainingOrder,
    rank_draws,
    stand_in,
)
from moce_dist.transfer.measure import Measures
from moce_dist.transfer.ranks import add_up, in_order
from moce_dist.transfer.saved import segmenter_spec
from moce_dist.transfer.scenes import (
    IGNORE,
    Scene,
    Scenes,
    load_scene,
    scaled,
    to_pixels,
    training_crop,
)
from moce_dist.transfer.skips import Fitted, Skips, refuse_all, training_batches
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


def count_known(labels: Tensor) -> int:
    """Count the pixels that have a class."""
    return int((labels != IGNORE).sum())


def count_pixels(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Count pixels by (truth, prediction), (C, C) int64; ignored ones are left out."""
    kept = labels != IGNORE
    pairs = labels[kept] * num_classes + predicted[kept]
    return pairs.bincount(minlength=num_classes**2).reshape(num_classes, num_classes)


class _Crops(Dataset[Look]):
    """Training crops of scenes, drawn by (seed, epoch, key)."""

    def __init__(self, scenes: Scenes, size: int, backbone: Backbone, seed: int) -> None:
        self._scenes, self._size, self._seed = scenes, size, seed
        self._factor, self._shift = renormalisation(backbone.mean, backbone.std)

    def __getitem__(self, draw: Draw) -> Look:
        epoch, index = draw
        return stand_in(
            lambda number: self._read(self._scenes.train[number], epoch),
            lambda number: self._scenes.train[number].key,
            index,
            len(self._scenes.train),
        )

    def _read(self, scene: Scene, epoch: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        draws = sample_generator(self._seed, epoch, scene.key)
        picture, mask = load_scene(scene, len(self._scenes.classes))
        pixels, labels = training_crop(picture, mask, self._size, draws)
        return pixels * self._factor + self._shift, np.ascontiguousarray(labels)


def segment(
    backbone: Backbone,
    scenes: Scenes,
    recipe: SegmentationConfig,
    machine: Machine,
    *,
    seed: int,
    out: Path,
    kept: Kept | None = None,
) -> Fitted:
    """Train on a task's training scenes and return mIoU, aAcc and mAcc on its test scenes.

    Writes `out/scores.json` and a few predictions beside picture and truth as PNG. With `kept` the
    model is saved, and an interrupted fit goes on where it was. Collective over the machine's
    ranks.
    """
    vit = backbone.dense_model(recipe.crop, seed=seed, drop_path=_DROP_PATH)
    model = Segmenter(vit, len(scenes.classes), recipe.channels).to(machine.device)
    window = Window(recipe.crop, tuple(recipe.scales), flip=recipe.flip)

    skips = Skips(machine, kept)

    def view() -> Measures:
        found, skips.test = _evaluate(model, scenes, backbone, window, machine, out)
        return found

    fitting = _fitting(model, backbone, scenes, recipe, seed, skips, view)
    return Fitted(run_fit(fitting, machine, kept), skips.close())


def _fitting(
    model: Segmenter,
    backbone: Backbone,
    scenes: Scenes,
    recipe: SegmentationConfig,
    seed: int,
    skips: Skips,
    view: Callable[[], Measures],
) -> Fitting:
    machine = skips.machine
    steps, num_scenes = recipe.steps, len(scenes.train)
    batch_size = min(recipe.batch_size, num_scenes)
    crops = _Crops(scenes, recipe.crop, backbone, seed)
    order = TrainingOrder(num_scenes, batch_size, -(-steps // (num_scenes // batch_size)), seed)

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        draws = rank_draws(order, machine, start, steps)
        yield from training_batches(crops, draws, machine, start, skips)

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        logits = model(images).float()
        total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        return total / max(1, count_known(labels))

    return Fitting(
        name=f"{scenes.name} {backbone.name} seed {seed}",
        model=model,
        optimizer=model.optimizer(),
        batches=batches,
        loss=loss_of,
        view=view,
        spec=segmenter_spec(
            backbone,
            scenes.name,
            scenes.classes,
            crop=recipe.crop,
            channels=recipe.channels,
        ),
        steps=steps,
        warmup=round(_WARMUP_SHARE * steps),
        peak_lr=recipe.lr,
        seed=seed,
        weigh=count_known,
    )


class Window(NamedTuple):
    """How a whole picture is looked at: windows of side S at some scales, mirrored or not."""

    size: int
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False


def windows(length: int, size: int) -> list[int]:
    """List starts of windows of `size` that cover `length` >= size and overlap by a third."""
    stride = max(1, size * 2 // 3)
    return sorted({min(start, length - size) for start in range(0, length - size + stride, stride)})


def slide(model: nn.Module, pixels: Tensor, size: int, machine: Machine) -> Tensor:
    """Average the logits of overlapping windows over a picture (3, H, W): (C, H, W) on the CPU.

    A picture smaller than a window is filled up with the mean colour.
    """
    height, width = pixels.shape[1:]
    pixels = F.pad(pixels, (0, max(0, size - width), 0, max(0, size - height)))
    total: Tensor | None = None
    hits = torch.zeros(pixels.shape[1:])
    for top, left in itertools.product(*(windows(side, size) for side in pixels.shape[1:])):
        window = (slice(top, top + size), slice(left, left + size))
        with machine.autocast():
            logits = model(pixels[:, *window][None].to(machine.device))[0].float().cpu()
        if total is None:
            total = torch.zeros(logits.shape[0], *pixels.shape[1:])
        total[:, *window] += logits
        hits[window] += 1
    assert total is not None
    return (total / hits)[:, :height, :width]


@torch.no_grad()
def class_probabilities(
    model: nn.Module, picture: Image.Image, backbone: Backbone, window: Window, machine: Machine
) -> Tensor:
    """Mean of the class probabilities (C, H, W) over all scales and mirrorings of a picture."""
    factor, shift = (torch.from_numpy(x) for x in renormalisation(backbone.mean, backbone.std))
    size, looks = [picture.height, picture.width], []
    for scale in window.scales:
        resized = to_pixels(scaled(picture, max(1, round(window.size * scale))))
        pixels = torch.from_numpy(np.ascontiguousarray(resized)) * factor + shift
        for is_mirrored in (False, True)[: 1 + window.flip]:
            look = pixels.flip(2) if is_mirrored else pixels
            logits = slide(model, look, window.size, machine)
            upright = logits.flip(2) if is_mirrored else logits
            full = F.interpolate(upright[None], size=size, mode="bilinear", align_corners=False)
            looks.append(full[0].softmax(dim=0))
    return torch.stack(looks).mean(dim=0)


def _evaluate(
    model: nn.Module,
    scenes: Scenes,
    backbone: Backbone,
    window: Window,
    machine: Machine,
    out: Path,
) -> tuple[Measures, list[Fault]]:
    """Measure on the test scenes that can be read; return also those that cannot."""
    num_classes = len(scenes.classes)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    mine = machine.rows(len(scenes.test))
    progress = Progress("segmentation test", len(mine), "pictures")
    faults: list[Fault | None] = []
    for number in mine:
        progress.advance()
        scene = scenes.test[number]
        try:
            picture, mask = load_scene(scene, num_classes)
        except ImageError as error:
            faults.append(Fault(scene.key, str(error)))
            continue
        faults.append(None)
        labels = torch.from_numpy(mask)
        predicted = class_probabilities(model, picture, backbone, window, machine).argmax(dim=0)
        confusion += count_pixels(labels, predicted, num_classes)
        if number < _NUM_PREVIEWS:
            _preview(out / f"{scene.image.stem}.png", picture, predicted, labels, num_classes)
    unread = [fault for fault in in_order(faults, machine) if fault]
    refuse_all(unread, len(scenes.test))
    found = scores(add_up(confusion, machine))
    means = {"mIoU": found.miou, "aAcc": found.aacc, "mAcc": found.macc}
    if machine.rank == 0:
        _write(means, found.iou, scenes.classes, out)
    return means, unread


def _write(means: Measures, each: Sequence[float], classes: Sequence[str], out: Path) -> None:
    iou = {
        name: None if np.isnan(value) else value for name, value in zip(classes, each, strict=True)
    }
    write_atomic(out / "scores.json", json.dumps({**means, "IoU": iou}, indent=1))


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
