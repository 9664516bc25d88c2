"""Use a fitted model on pictures: classes with their probabilities, coloured masks, or objects.

    {"image": "a.jpg", "classes": [{"name": "cat", "probability": 0.93}, ...]}
    {"image": "b.jpg", "mask": "OUT/b.png", "classes": [{"name": "sky", "share": 0.41}, ...]}
    {"image": "c.jpg", "objects": [{"name": "cat", "score": 0.93, "box": [x, y, width, height],
                                    "mask": {"size": [H, W], "counts": "..."}}, ...]}
    {"image": "d.jpg", "error": "image file is truncated"}

Boxes are in pixels of the picture (upright, as cameras mean it), masks are COCO's run lengths.
Pictures go through the same steps as the test images of the fit, at one scale.

Letters: B images, S side in pixels, C classes, H, W height and width of a picture.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from moce_dist.data.images import eval_image, open_image
from moce_dist.features.encoder import renormalisation
from moce_dist.transfer.drawing import draw_found
from moce_dist.transfer.finding import find
from moce_dist.transfer.loading import Machine
from moce_dist.transfer.precision import Detections
from moce_dist.transfer.saved import Spec
from moce_dist.transfer.segment import Window, class_probabilities, palette
from moce_dist.transfer.tasks import Item

Line = dict[str, Any]


def any_machine(batch_size: int) -> Machine:
    """Choose a GPU when there is one; pictures are decoded in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Machine(device, False, 0, batch_size, 1)


def predict(
    model: nn.Module, spec: Spec, pictures: Sequence[Item], machine: Machine, *, top: int
) -> Iterator[Line]:
    """Yield one line a picture, its `top` likeliest classes; unreadable ones have an `error`."""
    model.to(machine.device)
    backbone = spec.backbone()
    factor, shift = renormalisation(backbone.mean, backbone.std)
    for start in range(0, len(pictures), machine.eval_batch_size):
        some = pictures[start : start + machine.eval_batch_size]
        read = [_pixels(picture, spec.image_size) for picture in some]
        pixels = [x * factor + shift for x in read if not isinstance(x, str)]
        found = iter(_probabilities(model, spec, pixels, machine) if pixels else ())
        for picture, content in zip(some, read, strict=True):
            if isinstance(content, str):
                yield {"image": str(picture.content), "error": content}
            else:
                classes = _likeliest(next(found), spec.classes, top)
                yield {"image": str(picture.content), "classes": classes}


def _pixels(picture: Item, size: int) -> np.ndarray | str:
    try:
        return eval_image(picture.read(), size)
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())


@torch.no_grad()
def _probabilities(
    model: nn.Module, spec: Spec, pixels: Sequence[np.ndarray], machine: Machine
) -> Tensor:
    logits = model(torch.from_numpy(np.stack(pixels)).to(machine.device)).float().cpu()
    return logits.sigmoid() if spec.is_multi_label else logits.softmax(dim=1)


def _likeliest(probabilities: Tensor, classes: Sequence[str], top: int) -> list[Line]:
    values, indices = probabilities.topk(min(top, len(classes)))
    return [
        {"name": classes[i], "probability": round(v, 6)}
        for v, i in zip(values.tolist(), indices.tolist(), strict=True)
    ]


def _opened(picture: Item) -> Image.Image | str:
    try:
        return open_image(picture.read())
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())


def paint(
    model: nn.Module, spec: Spec, pictures: Sequence[tuple[Item, Path]], machine: Machine
) -> Iterator[Line]:
    """Write a coloured mask of every picture's size to its path; yield one line a picture."""
    model.to(machine.device)
    backbone, window = spec.backbone(), Window(spec.image_size)
    colours = palette(len(spec.classes))
    for picture, mask in pictures:
        shown = _opened(picture)
        if isinstance(shown, str):
            yield {"image": str(picture.content), "error": shown}
            continue
        classes = class_probabilities(model, shown, backbone, window, machine).argmax(dim=0)
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours[classes.numpy()]).save(mask)
        shares = _shares(classes, spec.classes)
        yield {"image": str(picture.content), "mask": str(mask), "classes": shares}


def _shares(indices: Tensor, classes: Sequence[str]) -> list[Line]:
    shares = indices.flatten().bincount(minlength=len(classes)) / indices.numel()
    return [
        {"name": classes[i], "share": round(float(shares[i]), 6)}
        for i in shares.argsort(descending=True).tolist()
        if shares[i] > 0
    ]


def locate(
    model: nn.Module,
    spec: Spec,
    pictures: Sequence[tuple[Item, Path | None]],
    machine: Machine,
    *,
    min_score: float,
) -> Iterator[Line]:
    """Yield one line a picture: its objects of a score of `min_score` or more, best first.

    Where a picture has a path it is written there with them, and the line has it as `drawn`.
    """
    model.to(machine.device)
    for picture, path in pictures:
        image = _opened(picture)
        if isinstance(image, str):
            yield {"image": str(picture.content), "error": image}
            continue
        found = find(model, image, machine).above(min_score)
        line = {"image": str(picture.content), "objects": _objects(found, spec.classes)}
        if path is not None:
            draw_found(path, image, found, spec.classes)
            line["drawn"] = str(path)
        yield line


def _objects(found: Detections, classes: Sequence[str]) -> list[Line]:
    objects: list[Line] = [
        {"name": classes[label], "score": float(score), "box": box.tolist()}
        for label, score, box in zip(found.labels, found.scores, found.sizes(), strict=True)
    ]
    for entry, mask in zip(objects, found.masks or (), strict=False):
        entry["mask"] = {"size": list(mask["size"]), "counts": mask["counts"].decode()}
    return objects
