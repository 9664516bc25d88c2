"""A fitted model from disk, and what it says of images.

    {"image": "a.jpg", "classes": [{"name": "cat", "probability": 0.93}, ...]}
    {"image": "b.jpg", "mask": "OUT/b.png", "classes": [{"name": "sky", "share": 0.41}, ...]}
    {"image": "c.jpg", "objects": [{"name": "cat", "score": 0.93, "box": [x, y, width, height],
                                    "mask": {"size": [H, W], "counts": "..."}}, ...]}
    {"image": "d.jpg", "error": "image file is truncated"}

Boxes are in pixels of the image (upright, as cameras mean it), masks are COCO's run lengths. Images
go through the same steps as the test images of the fit, at one scale.

Letters: H, W height and width of an image.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from moce_dist.settings import ConfigError
from moce_dist.transfer.drawing import Wishes
from moce_dist.transfer.kinds import kind_named
from moce_dist.transfer.loading import Machine
from moce_dist.transfer.saved import CONFIG, FEATURES, WEIGHTS, Spec, read_spec
from moce_dist.transfer.tasks import Item


def load_model(folder: Path) -> tuple[nn.Module, Spec]:
    """Load a fitted model, or an exported backbone, in evaluation mode on the CPU.

    Raises:
        ConfigError: the folder holds none, or one whose weights do not fit.
    """
    spec = read_spec(folder)
    try:
        model = spec.vit() if spec.kind == FEATURES else kind_named(spec.kind)[1].build(spec)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{folder / CONFIG}: describes no model ({reason})") from None
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{folder / WEIGHTS}: {' '.join(str(error).split())[:300]}") from None
    return model.eval(), spec


def predict(
    folder: Path,
    images: Sequence[Item],
    *,
    batch_size: int,
    top: int,
    out: Path | None,
    min_score: float | None,
) -> Iterator[dict[str, Any]]:
    """Yield a line an image by the model of a folder, on a GPU when there is one.

    Raises:
        ConfigError: there is no such model, or a wish is none of its kind's.
    """
    model, spec = load_model(folder)
    if spec.kind == FEATURES:
        raise ConfigError(f"{folder}: is a backbone without classes; fit it to a task first")
    kind, work = kind_named(spec.kind)
    if min_score is not None and not kind.has_scores:
        raise ConfigError(f"--min-score {min_score}: {folder} is no detector")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # images are decoded in this process
    machine = Machine(device, False, 0, batch_size, 1)
    yield from work.predict(model.to(device), spec, images, Wishes(machine, top, out, min_score))
