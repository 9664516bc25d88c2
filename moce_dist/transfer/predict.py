"""Use a fitted model on pictures: classes with their probabilities, or coloured masks.

    {"image": "a.jpg", "classes": [{"name": "cat", "probability": 0.93}, ...]}
    {"image": "b.jpg", "mask": "OUT/b.png", "classes": [{"name": "sky", "share": 0.41}, ...]}
    {"image": "c.jpg", "error": "image file is truncated"}

Pictures go through the same steps as the test images of the fit, at one scale.

Letters: B images, S side in pixels, C classes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from moce_dist.data.images import eval_image, open_image
from moce_dist.transfer.loading import Machine, renormalisation
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
    factor, shift = renormalisation(spec.backbone())
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


def paint(
    model: nn.Module, spec: Spec, pictures: Sequence[tuple[Item, Path]], machine: Machine
) -> Iterator[Line]:
    """Write a coloured mask of every picture's size to its path; yield one line a picture."""
    model.to(machine.device)
    backbone, window = spec.backbone(), Window(spec.image_size)
    colours = palette(len(spec.classes))
    for picture, mask in pictures:
        try:
            shown = open_image(picture.read())
        except (ValueError, OSError) as error:
            yield {"image": str(picture.content), "error": " ".join(str(error).split())}
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
