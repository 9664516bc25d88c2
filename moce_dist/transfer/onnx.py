"""A fitted model or an exported backbone as ONNX, which runs without torch.

    FILE.onnx    images (B, 3, S, S) float32, normalised -> logits (B, C), (B, C, S, S), or
                 features (B, D); B is free
    FILE.json    class names, side S, mean and deviation of the pixels

Letters: B images, S side in pixels, C classes, D width.
"""

import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from moce_dist.run.files import write_atomic
from moce_dist.settings import ConfigError
from moce_dist.transfer.kinds import kind_named
from moce_dist.transfer.predict import load_model
from moce_dist.transfer.saved import FEATURES

_OPSET = 17


class _Averages(nn.Module):
    """Adaptive average pooling as two matrix products, for any side; ONNX has none."""

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


def _traceable(model: nn.Module) -> nn.Module:
    """Copy a model with its adaptive poolings replaced."""
    copied = copy.deepcopy(model).cpu().eval()
    for name, module in list(copied.named_modules()):
        if isinstance(module, nn.AdaptiveAvgPool2d):
            parent, _, attribute = name.rpartition(".")
            assert isinstance(module.output_size, int)
            setattr(copied.get_submodule(parent), attribute, _Averages(module.output_size))
    return copied


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
    temporary = path.with_name(f".{path.name}.tmp")
    # the exporter that needs no package besides torch and onnx
    torch.onnx.export(
        _traceable(model),
        (torch.zeros(2, 3, spec.image_size, spec.image_size),),
        temporary,
        input_names=["images"],
        output_names=[output],
        dynamic_axes={"images": {0: "batch"}, output: {0: "batch"}},
        opset_version=_OPSET,
        dynamo=False,
    )
    temporary.replace(path)
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
