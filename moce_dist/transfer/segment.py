r"""Semantic segmentation: UPerNet on a plain ViT, sliding evaluation, intersection over union.

A plain ViT has one resolution; four of its blocks are brought to four, then a kept UPerNet decoder
(segmentation-models-pytorch) joins them:

    block d/4    (B, D, S/P, S/P)  --x4-->  \
    block d/2                      --x2-->   UPerNet --> classes (B, C, S, S)
    block 3d/4                     --x1-->   /
    block d                        --/2-->  /

Letters: B pictures, D width, S side of a crop, P patch side, H, W height and width, pixels; C
classes.

Source: Xiao et al. 2018, arXiv 1807.10221 (UPerNet); feature pyramid and recipe as in
mmsegmentation's configs/mae for ADE20K, without its auxiliary head and colour jitter.
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
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from moce_dist.config import TransferConfig
from moce_dist.data.images import open_image, sample_generator
from moce_dist.run import write_atomic
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.finetune import check_loss, learning_rate, set_learning_rate
from moce_dist.transfer.loading import Machine, Progress, TrainingOrder, renormalisation
from moce_dist.transfer.scenes import (
    IGNORE,
    Scene,
    Scenes,
    read_mask,
    scaled,
    to_pixels,
    training_crop,
)

_LAYER_DECAY, _WEIGHT_DECAY, _DROP_PATH = 0.65, 0.05, 0.1
_WARMUP_SHARE = 0.01
_DROPOUT = 0.1
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


class Segmenter(nn.Module):
    """A plain ViT, a feature pyramid and a UPerNet decoder: (B, 3, S, S) -> (B, C, S, S)."""

    vit: Any

    def __init__(self, vit: Any, num_classes: int, channels: int) -> None:
        super().__init__()
        self.vit = vit
        depth, width = len(vit.blocks), vit.embed_dim
        self._taps = [(i + 1) * depth // 4 - 1 for i in range(4)]
        self.pyramid = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(width, width, 2, stride=2),
                    nn.BatchNorm2d(width),
                    nn.GELU(),
                    nn.ConvTranspose2d(width, width, 2, stride=2),
                ),
                nn.ConvTranspose2d(width, width, 2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )
        self.decoder = UPerNetDecoder([0, 0] + 4 * [width], decoder_channels=channels)
        self.head = nn.Sequential(nn.Dropout2d(_DROPOUT), nn.Conv2d(channels, num_classes, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, C, S, S)."""
        maps = self.vit.forward_intermediates(images, indices=self._taps, intermediates_only=True)
        levels = [resize(x) for resize, x in zip(self.pyramid, maps, strict=True)]
        # the decoder skips two levels finer than it needs
        logits = self.head(self.decoder([images, images, *levels]))
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)

    def optimizer(self) -> torch.optim.AdamW:
        """Make AdamW with layer-wise decay in the ViT; groups carry `lr_scale`."""
        groups = param_groups_layer_decay(
            self.vit,
            weight_decay=_WEIGHT_DECAY,
            no_weight_decay_list=("pos_embed", "cls_token"),
            layer_decay=_LAYER_DECAY,
        )
        new = [p for name, p in self.named_parameters() if not name.startswith("vit.")]
        groups.append({"params": new, "lr_scale": 1.0, "weight_decay": _WEIGHT_DECAY})
        return torch.optim.AdamW(groups, lr=0.0)


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
    for step, (images, labels) in enumerate(batches):
        warmup = round(_WARMUP_SHARE * steps)
        rate = learning_rate(step, steps=steps, warmup=warmup, peak=transfer.segment_lr)
        set_learning_rate(optimizer, rate)
        with machine.autocast():
            logits = model(images.to(machine.device))
        loss = F.cross_entropy(logits.float(), labels.to(machine.device), ignore_index=IGNORE)
        check_loss(loss.detach(), f"segmentation seed {seed}", step)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
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
