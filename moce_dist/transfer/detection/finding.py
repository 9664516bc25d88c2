"""Find the objects of images with a detector: predict, score and draw them.

Letters: H, W height and width of an image, pixels; n objects found.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as run_lengths

from moce_dist.data.decoders import ImageError
from moce_dist.data.progress import track
from moce_dist.transfer.detection.coco_json import BoxedImage, Entry
from moce_dist.transfer.detection.jitter import decode_mask
from moce_dist.transfer.detection.precision import (
    Detections,
    average_precision,
    ground_truth,
    pack_mask,
    results_of,
)
from moce_dist.transfer.detection.task import Detection
from moce_dist.transfer.drawing import PredictOptions, drawing_paths, open_item, palette, write_png
from moce_dist.transfer.fit import Measures
from moce_dist.transfer.loading import Machine, Unread
from moce_dist.transfer.ranks import from_first, in_order
from moce_dist.transfer.saved import Spec
from moce_dist.transfer.tasks import Item

SHOWN_SCORE = 0.5
"""Least score of a detection that is worth showing."""
_OPACITY = 0.4
_MIN_SIDE = 400
_NUM_PREVIEWS = 4

Figures = dict[str, dict[str, float]]


class Scored(NamedTuple):
    """Figures of boxes and, if the task has them, of masks; and the unreadable images."""

    figures: Figures
    unread: list[Unread]

    def measures(self) -> Measures:
        """Return all figures by name, box AP first, without those that have no objects."""
        return {
            f"{kind} {name}": value
            for kind, values in self.figures.items()
            for name, value in values.items()
            if not math.isnan(value)
        }


@torch.no_grad()
def find(model: Any, image: Image.Image, machine: Machine) -> Detections:
    """Find the objects of an RGB image (H, W) with a detector in evaluation mode."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    (found,) = model([pixels.to(machine.device).float() / 255])
    masks = None
    if "masks" in found:
        masks = [pack_mask(mask[0].cpu().numpy() > 0.5) for mask in found["masks"]]
    return Detections(
        found["boxes"].double().cpu().numpy(),
        found["scores"].double().cpu().numpy(),
        found["labels"].cpu().numpy() - 1,
        masks,
    )


def evaluate(model: Any, task: Detection, machine: Machine, out: Path) -> Scored:
    """Score a detector in evaluation mode on the test images; draw the first few into `out`.

    Nothing is found in an unreadable image. Collective over the machine's ranks: they take the
    images in turn, rank 0 scores and draws, and all return the same.
    """
    mine = machine.rows(len(task.test))
    looks: list[Detections | Unread] = []
    for number in track(mine, "images searched for objects", total=len(mine)):
        looks.append(find_in(model, task.test[number], machine))
    looks = in_order(looks, machine)
    figures = _score(looks, task, out) if machine.rank == 0 else {}
    unread = [look for look in looks if isinstance(look, Unread)]
    return Scored(from_first(figures, machine), unread)


def find_in(model: Any, boxed: BoxedImage, machine: Machine) -> Detections | Unread:
    """Find the objects of a test image, or return the reason why it cannot be read."""
    try:
        return find(model, boxed.load().image, machine)
    except ImageError as error:
        return Unread(boxed.key, f"{boxed.image}: {error}")


def _score(looks: Sequence[Detections | Unread], task: Detection, out: Path) -> Figures:
    kinds = {"box": "bbox", "mask": "segm"} if task.has_masks else {"box": "bbox"}
    results: dict[str, list[Entry]] = {kind: [] for kind in kinds.values()}
    for number, (boxed, found) in enumerate(zip(task.test, looks, strict=True)):
        if isinstance(found, Unread):
            continue
        for kind in results:
            results[kind] += results_of(boxed, found, task.category_ids, kind)
        if number < _NUM_PREVIEWS:
            path = out / f"{boxed.image.stem}.png"
            draw_preview(path, boxed.load().image, boxed, found, task)
    truth = ground_truth(task.test, task)
    return {name: average_precision(truth, results[kind], kind) for name, kind in kinds.items()}


def predict(
    model: Any, spec: Spec, images: Sequence[Item], options: PredictOptions
) -> Iterator[dict[str, Any]]:
    """Yield one record per image: its objects of `options.min_score` or more, best first.

    With `options.out`, the image is also drawn there with its objects; `drawn` is that file.
    """
    paths: Sequence[Path | None] = len(images) * [None]
    if options.out is not None:
        paths = drawing_paths(images, options.out)
    least = SHOWN_SCORE if options.min_score is None else options.min_score
    for item, path in zip(images, paths, strict=True):
        image = open_item(item)
        if isinstance(image, str):
            yield {"image": str(item.content), "error": image}
            continue
        found = find(model, image, options.machine).above(least)
        objects: list[dict[str, Any]] = [
            {"name": spec.classes[label], "score": float(score), "box": box.tolist()}
            for label, score, box in zip(found.labels, found.scores, found.sizes(), strict=True)
        ]
        for entry, mask in zip(objects, found.masks or (), strict=False):
            entry["mask"] = {"size": list(mask["size"]), "counts": mask["counts"].decode()}
        line: dict[str, Any] = {
            "image": str(item.content),
            "objects": objects,
        }
        if path is not None:
            write_png(path, [_draw(image, _found(found, spec.classes))])
            line["drawn"] = str(path)
        yield line


class Drawn(NamedTuple):
    """One object to draw: corners, text, colour, and mask (H, W)."""

    box: tuple[float, float, float, float]
    text: str
    colour: tuple[int, int, int]
    mask: NDArray[np.uint8] | None


def draw_preview(
    path: Path, image: Image.Image, boxed: BoxedImage, found: Detections, task: Detection
) -> None:
    """Write an image twice, side by side: with its sure detections and with its true objects."""
    true = []
    for a in boxed.learnable():
        x, y, width, height = a.box
        label = list(task.category_ids).index(a.category)
        mask: Any = None
        if task.has_masks:
            mask = decode_mask(a.segmentation, boxed.height, boxed.width)
        colour = _colour(label, len(task.classes))
        true.append(Drawn((x, y, x + width, y + height), task.classes[label], colour, mask))
    sure = _found(found.above(SHOWN_SCORE), task.classes)
    write_png(path, [_draw(image, objects) for objects in (sure, true)])


def _colour(label: int, num_classes: int) -> tuple[int, int, int]:
    red, green, blue = palette(num_classes)[label].tolist()
    return red, green, blue


def _found(found: Detections, classes: Sequence[str]) -> list[Drawn]:
    drawn = []
    for i, (score, label) in enumerate(zip(found.scores, found.labels, strict=True)):
        left, upper, right, lower = found.boxes[i].tolist()
        text = f"{classes[label]} {score:.2f}"
        mask = None if found.masks is None else run_lengths.decode(found.masks[i])
        colour = _colour(int(label), len(classes))
        drawn.append(Drawn((left, upper, right, lower), text, colour, mask))
    return drawn


def _draw(image: Image.Image, objects: list[Drawn]) -> NDArray[np.uint8]:
    pixels = np.array(image, np.float32)
    for each in objects:
        if each.mask is not None:
            inside = each.mask == 1
            pixels[inside] += _OPACITY * (np.array(each.colour, np.float32) - pixels[inside])
    # small images are enlarged, so that the text is readable
    factor = max(1, -(-_MIN_SIDE // max(image.size)))
    size = image.width * factor, image.height * factor
    canvas = Image.fromarray(pixels.round().astype(np.uint8)).resize(size)
    draw = ImageDraw.Draw(canvas)
    for each in objects:
        left, upper, right, lower = (edge * factor for edge in each.box)
        draw.rectangle((left, upper, right, lower), outline=each.colour, width=2)
        draw.text(
            (left + 3, max(0, upper)),
            each.text,
            fill=(255, 255, 255),
            stroke_width=1,
            stroke_fill=(0, 0, 0),
        )
    return np.asarray(canvas)
