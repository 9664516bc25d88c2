"""Semantic segmentation: train on crops, predict whole images by sliding windows, measure IoU.

Letters: B images, S side of a crop, H, W height and width, pixels; C classes.

Source: recipe as in mmsegmentation's configs/mae for ADE20K (random scale, its RandomCrop and
mirror, sliding windows; several scales and mirroring as in its aug_test, which averages
probabilities), with half a cosine to 1e-6 where it has a line to 0. Left out are its colour jitter,
and what it adds to the ViT: relative position biases in the attention, and LayerScale. Scores as in
Long et al. 2015, arXiv 1411.4038, section 5.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as geometry

from moce_dist.arrays import Int64, Pixels
from moce_dist.config import SegmentationConfig
from moce_dist.data.decoders import ImageError
from moce_dist.data.images import MEAN_COLOUR, sample_generator, to_planes
from moce_dist.data.progress import track
from moce_dist.run.files import write_atomic
from moce_dist.settings import ConfigError
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.drawing import PredictOptions, drawing_paths, open_item, palette, write_png
from moce_dist.transfer.fit import Fitted, Fitting, Measures, Trial, run_fit
from moce_dist.transfer.loading import (
    Machine,
    TrainingItems,
    TrainingOrder,
    Unread,
    rank_draws,
)
from moce_dist.transfer.ranks import add_up, in_order
from moce_dist.transfer.saved import Spec, dense_spec
from moce_dist.transfer.segmentation.task import (
    IGNORE,
    Labels,
    MaskedImage,
    Segmentation,
    load_masked,
)
from moce_dist.transfer.segmentation.upernet import Segmenter
from moce_dist.transfer.skips import Skips, refuse_all, training_batches
from moce_dist.transfer.tasks import Item

_DROP_PATH = 0.1
_WARMUP_SHARE = 0.01
_NUM_PREVIEWS = 4
_SCALES, _NEW_CROPS = (0.5, 2.0), 10


class Scores(NamedTuple):
    """Mean intersection over union (IoU), pixel accuracy, mean recall, IoU per class or NaN."""

    miou: float
    aacc: float
    macc: float
    iou: list[float]


def scores(confusion: Tensor) -> Scores:
    """Compute scores from counts (C, C) int64, rows = truth, columns = prediction.

    The mean IoU leaves out classes that neither truth nor prediction holds; the mean recall leaves
    out those that the truth does not hold.
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


def scaled(image: Image.Image, short_side: int) -> Image.Image:
    """Resize an image bilinearly so that its shorter side has `short_side` pixels."""
    factor = short_side / min(image.size)
    size = [max(short_side, round(side * factor)) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.BILINEAR)


def is_mixed(mask: Labels, cat_max_ratio: float) -> bool:
    """Tell whether no class has this share or more of the pixels that are not ignored.

    A ratio of 1 allows every mask. One class alone, or nothing but ignored pixels, is not mixed.
    """
    counts = np.bincount(mask[mask != IGNORE])
    return cat_max_ratio == 1 or bool(counts.size and counts.max() < cat_max_ratio * counts.sum())


def training_crop(
    image: Image.Image, mask: Labels, recipe: SegmentationConfig, draws: np.random.Generator
) -> tuple[Pixels, Labels]:
    """Make a training sample: random scale (0.5 to 2 of shorter side = S), crop, mirror.

    Of the crops drawn, the first one is taken whose classes keep to `cat_max_ratio`, or the last.

    Returns pixels (3, S, S) and class indices (S, S); outside the image they are the mean colour
    and `IGNORE`.
    """
    size, factor = recipe.crop, draws.uniform(*_SCALES)
    image = scaled(image, max(1, round(size * factor)))
    width, height = image.size
    # as Pillow resizes the image; a tensor's nearest pixels lie elsewhere
    labels = Image.fromarray(mask.astype(np.int32))
    labels = labels.resize((width, height), Image.Resampling.NEAREST)
    for _ in range(1 + _NEW_CROPS):
        upper, left = (int(draws.integers(max(1, side - size + 1))) for side in (height, width))
        window = upper, left, min(size, height), min(size, width)
        cropped = geometry.crop(labels, *window)
        if is_mixed(np.asarray(cropped), recipe.cat_max_ratio):
            break
    image, labels = geometry.crop(image, *window), cropped
    if draws.random() < 0.5:
        image, labels = geometry.horizontal_flip(image), geometry.horizontal_flip(labels)
    beside = [0, 0, size - window[3], size - window[2]]
    pixels = to_planes(np.asarray(geometry.pad(image, beside, MEAN_COLOUR)))
    classes = np.asarray(labels, np.int64)
    padding = (0, beside[3]), (0, beside[2])
    return pixels, np.pad(classes, padding, constant_values=IGNORE)


class _Crops(TrainingItems):
    """Training crops of images with masks, drawn by (seed, epoch, key)."""

    def __init__(self, task: Segmentation, recipe: SegmentationConfig, seed: int) -> None:
        super().__init__(task.train)
        self._num_classes, self._recipe, self._seed = len(task.classes), recipe, seed

    def read(self, item: MaskedImage, epoch: int) -> tuple[Pixels, Int64]:
        draws = sample_generator(self._seed, epoch, item.key)
        shown, mask = load_masked(item, self._num_classes)
        pixels, labels = training_crop(shown.image, mask, self._recipe, draws)
        return pixels, np.ascontiguousarray(labels)


def fit(task: Segmentation, trial: Trial) -> Fitted:
    """Train on a task's training images and return mIoU, aAcc and mAcc on its test images.

    Writes `out/scores.json` and a few predictions beside image and truth as PNG. Collective over
    the machine's ranks.
    """
    backbone, machine, seed = trial.backbone, trial.machine, trial.seed
    recipe = trial.transfer.segmentation
    vit = backbone.dense_model(recipe.crop, seed=seed, drop_path=_DROP_PATH)
    model = Segmenter(vit, len(task.classes), recipe.channels).to(machine.device)
    window, skips = Window(recipe.crop, recipe.scales, flip=recipe.flip), Skips(machine, trial.kept)
    crops = _Crops(task, recipe, seed)
    order = TrainingOrder.of_steps(len(task.train), recipe.batch_size, recipe.steps, seed)
    # several ranks have an image each in every micro-batch
    if machine.num_ranks == 1 and order.batch_size < 2 * machine.micro_batches:
        raise ConfigError(
            f"{task.name}: {len(task.train)} training images are too few: batch normalisation "
            f"needs 2 in each of the {machine.micro_batches} micro-batches of a step "
            "(parallel.micro_batches)"
        )

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        draws = rank_draws(order, machine, start, recipe.steps)
        yield from training_batches(crops, draws, machine, start, skips)

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        logits = model(images).float()
        total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        return total / max(1, count_known(labels))

    def view() -> Measures:
        found, skips.test = evaluate(model, task, backbone, window, machine, trial.out)
        return found

    fitting = Fitting(
        name=f"{task.name} {backbone.name} seed {seed}",
        model=model,
        optimizer=model.optimizer(),
        batches=batches,
        loss=loss_of,
        view=view,
        spec=dense_spec(backbone, task, recipe.crop, channels=recipe.channels),
        steps=recipe.steps,
        warmup=round(_WARMUP_SHARE * recipe.steps),
        peak_lr=recipe.lr,
        seed=seed,
        prepare=lambda pixels, labels: (backbone.normalise(pixels), labels),
        weigh=count_known,
    )
    return Fitted(run_fit(fitting, machine, trial.kept), skips.close())


class Window(NamedTuple):
    """How a whole image is predicted: windows of side S, scales, and whether mirrored as well."""

    size: int
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False


def windows(length: int, size: int) -> list[int]:
    """List the starts of windows of `size` that cover `length` >= size, overlapping by a third."""
    stride = max(1, size * 2 // 3)
    return sorted({min(start, length - size) for start in range(0, length - size + stride, stride)})


def slide(model: nn.Module, pixels: Tensor, size: int, machine: Machine) -> Tensor:
    """Average the logits of overlapping windows over an image (3, H, W): (C, H, W), on the device.

    An image smaller than a window is padded with the mean colour.
    """
    height, width = pixels.shape[1:]
    padding = (0, max(0, size - width), 0, max(0, size - height))
    pixels = F.pad(pixels.to(machine.device), padding)
    total: Tensor | None = None
    hits = pixels.new_zeros(pixels.shape[1:])
    for top, left in itertools.product(*(windows(side, size) for side in pixels.shape[1:])):
        window = (slice(top, top + size), slice(left, left + size))
        with machine.autocast():
            logits = model(pixels[:, *window][None])[0].float()
        if total is None:
            total = logits.new_zeros(len(logits), *pixels.shape[1:])
        total[:, *window] += logits
        hits[window] += 1
    assert total is not None
    return total.div_(hits)[:, :height, :width]


@torch.no_grad()
def class_probabilities(
    model: nn.Module, image: Image.Image, backbone: Backbone, window: Window, machine: Machine
) -> Tensor:
    """Average the class probabilities (C, H, W) over all scales and mirrorings, on the device."""
    size, number = [image.height, image.width], 0
    # summed in place: looks of a large image with many classes take gigabytes
    total: Tensor | None = None
    for scale in window.scales:
        resized = scaled(image, max(1, round(window.size * scale)))
        pixels = torch.from_numpy(to_planes(np.asarray(resized))).to(machine.device)
        for is_mirrored in (False, True)[: 1 + window.flip]:
            look = backbone.normalise(pixels.flip(2) if is_mirrored else pixels)
            logits = slide(model, look, window.size, machine)
            upright = logits.flip(2) if is_mirrored else logits
            full = F.interpolate(upright[None], size=size, mode="bilinear", align_corners=False)
            found = full[0].softmax(dim=0)
            total, number = found if total is None else total.add_(found), number + 1
    assert total is not None
    return total.div_(number)


def evaluate(
    model: nn.Module,
    task: Segmentation,
    backbone: Backbone,
    window: Window,
    machine: Machine,
    out: Path,
) -> tuple[Measures, list[Unread]]:
    """Measure on the readable test images; return the unreadable ones, too. Collective."""
    num_classes = len(task.classes)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    mine = machine.rows(len(task.test))
    faults: list[Unread | None] = []
    for number in track(mine, "images segmented", total=len(mine)):
        masked = task.test[number]
        try:
            shown, mask = load_masked(masked, num_classes)
        except ImageError as error:
            faults.append(Unread(masked.key, str(error)))
            continue
        faults.append(None)
        labels = torch.from_numpy(mask)
        found = class_probabilities(model, shown.image, backbone, window, machine)
        predicted = found.argmax(dim=0).cpu()
        confusion += count_pixels(labels, predicted, num_classes)
        if number < _NUM_PREVIEWS:
            colours = palette(num_classes)
            # IGNORE is -1, the palette's last colour
            panels: list[Any] = [np.asarray(shown.image), colours[predicted], colours[labels]]
            write_png(out / f"{masked.image.stem}.png", panels)
    unread = [fault for fault in in_order(faults, machine) if fault]
    refuse_all(unread, len(task.test))
    result = scores(add_up(confusion, machine))
    means = {"mIoU": result.miou, "aAcc": result.aacc, "mAcc": result.macc}
    if machine.rank == 0:
        each = zip(task.classes, result.iou, strict=True)
        iou = {name: None if np.isnan(value) else value for name, value in each}
        write_atomic(out / "scores.json", json.dumps({**means, "IoU": iou}, indent=1))
    return means, unread


def build(spec: Spec) -> nn.Module:
    """Build the model (B, 3, S, S) -> (B, C, S, S)."""
    return Segmenter(spec.vit(), len(spec.classes), spec.options["channels"])


def predict(
    model: nn.Module, spec: Spec, images: Sequence[Item], options: PredictOptions
) -> Iterator[dict[str, Any]]:
    """Write a coloured mask of every image's size into `options.out`; yield one record per image.

    Raises:
        ConfigError: no folder is named.
    """
    if options.out is None:
        raise ConfigError("--out: name a folder for the masks")
    backbone, window, colours = spec.backbone(), Window(spec.image_size), palette(len(spec.classes))
    for item, path in zip(images, drawing_paths(images, options.out), strict=True):
        image = open_item(item)
        if isinstance(image, str):
            yield {"image": str(item.content), "error": image}
            continue
        probabilities = class_probabilities(model, image, backbone, window, options.machine)
        found = probabilities.argmax(dim=0).cpu()
        write_png(path, [colours[found.numpy()]])
        shares = found.flatten().bincount(minlength=len(spec.classes)) / found.numel()
        classes = [
            {"name": spec.classes[i], "share": round(float(shares[i]), 6)}
            for i in shares.argsort(descending=True).tolist()
            if shares[i] > 0
        ]
        yield {"image": str(item.content), "mask": str(path), "classes": classes}
