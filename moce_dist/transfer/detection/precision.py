"""Average precision of boxes and masks as COCO defines it, by its own evaluator (pycocotools).

This module only converts its inputs and outputs: predictions to its form (left, upper, width,
height; packed run lengths; COCO's ids), and its results to six figures.

Letters: n detections of an image, H, W its height and width, pixels.

Source: cocodataset.org, detection evaluation; Lin et al. 2014, arXiv 1405.0312.
"""

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from moce_dist.arrays import Float64, Int64
from moce_dist.transfer.detection.coco_json import BoxedImage
from moce_dist.transfer.detection.jitter import to_runs
from moce_dist.transfer.detection.task import Detection

FIGURES = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")

Entry = dict[str, Any]


class Detections(NamedTuple):
    """The objects found in an image, in its pixels; `masks` are packed run lengths."""

    boxes: Float64
    """(n, 4): left, upper, right, lower."""
    scores: Float64
    """(n,) in [0, 1]."""
    labels: Int64
    """(n,) class indices of the task."""
    masks: Sequence[Entry] | None

    def above(self, score: float) -> "Detections":
        """Keep the detections of this score or more."""
        kept = np.flatnonzero(self.scores >= score)
        masks = None if self.masks is None else [self.masks[i] for i in kept.tolist()]
        return Detections(self.boxes[kept], self.scores[kept], self.labels[kept], masks)

    def sizes(self) -> Float64:
        """Return the boxes (n, 4) as left, upper, width, height."""
        corners = np.asarray(self.boxes, np.float64).reshape(-1, 4)
        return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


def pack_mask(mask: NDArray[np.bool_]) -> Entry:
    """Pack a mask (H, W) into run lengths."""
    return dict(run_lengths.encode(np.asfortranarray(mask, np.uint8)))


def ground_truth(images: Sequence[BoxedImage], task: Detection) -> COCO:
    """Make the evaluator's data set of images, with outlines if the task has masks.

    Annotations are renumbered from 1, because the evaluator takes id 0 for no annotation.
    """
    objects = [(boxed, a) for boxed in images for a in boxed.annotations]
    annotations = [
        {
            "id": number,
            "image_id": boxed.id,
            "category_id": a.category,
            "bbox": list(a.box),
            "area": a.area,
            "iscrowd": int(a.is_crowd),
            **_outline(boxed, a.segmentation, a.box, has_masks=task.has_masks),
        }
        for number, (boxed, a) in enumerate(objects, start=1)
    ]
    entries = [{"id": p.id, "width": p.width, "height": p.height} for p in images]
    pairs = zip(task.category_ids, task.classes, strict=True)
    categories = [{"id": number, "name": name} for number, name in pairs]
    return _data_set(entries, categories, annotations)


def _outline(
    boxed: BoxedImage, segmentation: Any, box: Sequence[float], *, has_masks: bool
) -> Entry:
    if not has_masks:
        return {}
    if segmentation is None:
        # only crowds and boxes without area may lack an outline
        x, y, width, height = box
        segmentation = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    return {"segmentation": to_runs(segmentation, boxed.height, boxed.width)}


def _data_set(images: list[Entry], categories: list[Entry], annotations: list[Entry]) -> COCO:
    made = COCO()
    made.dataset = {"images": images, "categories": categories, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        made.createIndex()
    return made


def results_of(
    boxed: BoxedImage, found: Detections, category_ids: Sequence[int], kind: str
) -> list[Entry]:
    """Convert the boxes (`kind` bbox) or masks (segm) of an image to the evaluator's form."""
    shapes: list[Entry]
    if kind == "bbox":
        shapes = [{"bbox": b.tolist(), "area": float(b[2] * b[3])} for b in found.sizes()]
    else:
        shapes = [
            {
                "segmentation": mask,
                "bbox": run_lengths.toBbox(mask).tolist(),
                "area": float(run_lengths.area(mask)),
            }
            for mask in found.masks or ()
        ]
    return [
        {"image_id": boxed.id, "category_id": category_ids[label], "score": float(score), **shape}
        for shape, score, label in zip(shapes, found.scores, found.labels, strict=True)
    ]


def average_precision(truth: COCO, results: Sequence[Entry], kind: str) -> dict[str, float]:
    """Return the six `FIGURES` for `kind` bbox or segm; NaN where there are no objects to find."""
    numbered = [
        {**entry, "id": number, "iscrowd": 0} for number, entry in enumerate(results, start=1)
    ]
    data = truth.dataset
    found = _data_set(data["images"], data["categories"], numbered)
    evaluation = COCOeval(truth, found, kind)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = (float(value) for value in evaluation.stats[: len(FIGURES)])
    # the evaluator returns -1 if no object has the size
    return {n: v if v >= 0 else math.nan for n, v in zip(FIGURES, figures, strict=True)}
