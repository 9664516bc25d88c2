"""Find the objects of pictures with a detector, and score what was found.

Letters: H, W height and width of a picture, pixels; n objects found.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from moce_dist.data.decoders import ImageError
from moce_dist.transfer.drawing import draw_preview
from moce_dist.transfer.instances import Instances, Picture, load_picture
from moce_dist.transfer.loading import Fault, Machine, Progress
from moce_dist.transfer.measure import Measures
from moce_dist.transfer.precision import (
    Detections,
    average_precision,
    box_results,
    ground_truth,
    mask_results,
    pack_mask,
)
from moce_dist.transfer.ranks import from_first, in_order

_NUM_PREVIEWS = 4

Figures = dict[str, dict[str, float]]


class Scored(NamedTuple):
    """Figures of boxes, and of masks where the task has them; pictures that cannot be read."""

    figures: Figures
    faults: list[Fault]

    def measures(self) -> Measures:
        """Return the figures in one row, box AP first, without those that have no objects."""
        return {
            f"{kind} {name}": value
            for kind, values in self.figures.items()
            for name, value in values.items()
            if not math.isnan(value)
        }


@torch.no_grad()
def find(model: Any, picture: Image.Image, machine: Machine) -> Detections:
    """Find the objects of an RGB picture (H, W) with a detector in evaluation mode."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
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


def evaluate(model: Any, instances: Instances, machine: Machine, out: Path) -> Scored:
    """Score a detector in evaluation mode on the test pictures; draw the first few into `out`.

    In a picture that cannot be read nothing is found. Collective over the machine's ranks, which
    take the pictures in turn; the first one scores and draws, and all return the same.
    """
    mine = machine.rows(len(instances.test))
    progress = Progress("detection test", len(mine), "pictures")
    looks = []
    for number in mine:
        looks.append(_look(model, instances.test[number], machine))
        progress.advance()
    looks = in_order(looks, machine)
    figures = _score(looks, instances, out) if machine.rank == 0 else {}
    faults = [look for look in looks if isinstance(look, Fault)]
    return Scored(from_first(figures, machine), faults)


def _look(model: Any, picture: Picture, machine: Machine) -> Detections | Fault:
    try:
        image = load_picture(picture)
    except ImageError as error:
        return Fault(picture.key, f"{picture.image}: {error}")
    return find(model, image, machine)


def _score(looks: Sequence[Detections | Fault], instances: Instances, out: Path) -> Figures:
    boxes, masks = [], []
    for number, (picture, found) in enumerate(zip(instances.test, looks, strict=True)):
        if isinstance(found, Fault):
            continue
        boxes += box_results(picture, found, instances.category_ids)
        if instances.has_masks:
            masks += mask_results(picture, found, instances.category_ids)
        if number < _NUM_PREVIEWS:
            path = out / f"{picture.image.stem}.png"
            draw_preview(path, load_picture(picture), picture, found, instances)
    truth = ground_truth(instances.test, instances)
    figures = {"box": average_precision(truth, boxes, "bbox")}
    if instances.has_masks:
        figures["mask"] = average_precision(truth, masks, "segm")
    return figures
