"""A fitted model from disk: its predictions for images, and its export to ONNX.

    {"image": "a.jpg", "classes": [{"name": "cat", "probability": 0.93}, ...]}
    {"image": "b.jpg", "mask": "OUT/b.png", "classes": [{"name": "sky", "share": 0.41}, ...]}
    {"image": "c.jpg", "objects": [{"name": "cat", "score": 0.93, "box": [x, y, width, height],
                                    "mask": {"size": [H, W], "counts": "..."}}, ...]}
    {"image": "d.jpg", "error": "image file is truncated"}

Boxes are in pixels of the image after its EXIF rotation, masks are COCO's run lengths. Images are
processed like the test images of the fit, at one scale.

ONNX runs without torch; a backbone without a head can be exported too.

    FILE.onnx    images (B, 3, S, S) float32, normalised -> logits (B, C), (B, C, S, S), or
                 features (B, D); B is dynamic
    FILE.json    class names, side S, mean and deviation of the pixels

Letters: B images, S side in pixels, C classes, D width; H, W height and width of an image.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from moce_dist.config import ParallelConfig
from moce_dist.model.device import choose_device
from moce_dist.run.files import replacing, write_atomic
from moce_dist.run.names import one_line
from moce_dist.settings import ConfigError
from moce_dist.transfer.drawing import PredictOptions
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
        reason = one_line(error)[:300]
        raise ConfigError(f"{folder / CONFIG}: describes no model ({reason})") from None
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{folder / WEIGHTS}: {one_line(error)[:300]}") from None
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
    """Yield one record per image by the model of a folder, on a GPU if there is one.

    Raises:
        ConfigError: there is no such model, or an option does not apply to its kind.
    """
    model, spec = load_model(folder)
    if spec.kind == FEATURES:
        raise ConfigError(f"{folder}: is a backbone without classes; fit it to a task first")
    kind, work = kind_named(spec.kind)
    if min_score is not None and not kind.has_scores:
        raise ConfigError(f"--min-score {min_score}: {folder} is no detector")
    device = choose_device(ParallelConfig())
    # images are decoded in this process
    machine = Machine(device, False, 0, batch_size, 1)
    yield from work.predict(
        model.to(device), spec, images, PredictOptions(machine, top, out, min_score)
    )


_OPSET = 17


class _Averages(nn.Module):
    """Adaptive average pooling as two matrix products, for any side; ONNX has no such operator."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, D, size, size)."""
        rows, columns = (averages(int(side), self._size) for side in x.shape[-2:])
        return rows.to(x) @ x @ columns.T.to(x)


def averages(length: int, size: int) -> Tensor:
    """Return the (size, length) matrix that averages as nn.AdaptiveAvgPool1d does."""
    matrix = torch.zeros(size, length)
    for i in range(size):
        start, stop = i * length // size, -(-(i + 1) * length // size)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def export_onnx(folder: Path, path: Path) -> list[Path]:
    """Write a folder's model to `path`, and the JSON file beside it; return both.

    Raises:
        ConfigError: there is no such model, or ONNX cannot hold it.
    """
    model, spec = load_model(folder)
    output = FEATURES if spec.kind == FEATURES else kind_named(spec.kind)[0].onnx_output
    if not output:
        raise ConfigError(f"{folder}: is a detector, which onnx does not write; use predict")
    path.parent.mkdir(parents=True, exist_ok=True)
    # adaptive poolings become matrix products, in a copy
    copied = copy.deepcopy(model).cpu().eval()
    for name, module in list(copied.named_modules()):
        if isinstance(module, nn.AdaptiveAvgPool2d):
            parent, _, attribute = name.rpartition(".")
            assert isinstance(module.output_size, int)
            setattr(copied.get_submodule(parent), attribute, _Averages(module.output_size))
    with replacing(path) as temporary:
        torch.onnx.export(
            copied,
            (torch.zeros(2, 3, spec.image_size, spec.image_size),),
            temporary,
            input_names=["images"],
            output_names=[output],
            dynamic_axes={"images": {0: "batch"}, output: {0: "batch"}},
            opset_version=_OPSET,
            # this exporter needs no package besides torch and onnx
            dynamo=False,
        )
    about = {
        "kind": spec.kind,
        "task": spec.task,
        "classes": list(spec.classes),
        "is_multi_label": spec.is_multi_label,
        "image_size": spec.image_size,
        "mean": list(spec.mean),
        "std": list(spec.std),
    }
    beside = path.with_suffix(".json")
    write_atomic(beside, json.dumps(about, indent=1))
    return [path, beside]
