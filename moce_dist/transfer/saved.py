"""A fitted model on disk: weights as safetensors, everything else as JSON; nothing is pickled.

    FOLDER/model.safetensors    weights
    FOLDER/config.json          architecture, class names, pixels expected; a classifier's is in
                                timm's local-dir format, so timm alone loads it too

    model = timm.create_model("local-dir:FOLDER", pretrained=True)      # classifiers
    model = transformers.AutoModelForImageClassification.from_pretrained("FOLDER")      # the same

Letters: B images, S side in pixels, C classes.

Sources: timm's local-dir format, timm/models/_hub.py (load_model_config_from_path); transformers'
models/timm_wrapper.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moce_dist.config import DetectionConfig
from moce_dist.run.files import naming, write_atomic
from moce_dist.settings import ConfigError
from moce_dist.transfer.backbone import Backbone

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_FORMAT = "moce_dist.model.v1"

Kind = Literal["features", "classify", "segment", "detect"]


@dataclass(frozen=True)
class Spec:
    """What it takes to build a fitted model again and to feed it.

    `is_multi_label` tells whether an image may have several classes; `channels` is the width of a
    segmenter's decoder or a detector's pyramid. The rest is a detector's: whether it finds masks,
    the side of its windows in patches, and that of its anchors in strides.
    """

    kind: Kind
    task: str
    classes: Sequence[str]
    architecture: str
    arguments: Mapping[str, Any]
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    is_multi_label: bool = False
    channels: int = 0
    has_masks: bool = False
    window: int = 0
    anchor_strides: float = 0.0

    def build(self) -> nn.Module:
        """Build the model with weights of its own.

        It maps (B, 3, S, S) to (B, C) or (B, C, S, S); a detector is torchvision's and takes a list
        of pictures.
        """
        vit: nn.Module = timm.create_model(self.architecture, **self.arguments)
        if self.kind == "segment":
            from moce_dist.transfer.upernet import Segmenter

            return Segmenter(vit, len(self.classes), self.channels)
        return self._detector(vit) if self.kind == "detect" else vit

    def _detector(self, vit: nn.Module) -> nn.Module:
        from moce_dist.transfer.vitdet import make_detector

        recipe = DetectionConfig(
            size=self.image_size,
            channels=self.channels,
            window=self.window,
            anchor_strides=self.anchor_strides,
        )
        detector: nn.Module = make_detector(
            vit,
            self.backbone(),
            recipe,
            num_classes=len(self.classes),
            has_masks=self.has_masks,
            autocast=contextlib.nullcontext,
        )
        return detector

    def backbone(self) -> Backbone:
        """Describe what pictures have to look like, as loaders want it."""
        return Backbone(
            self.task,
            self.architecture,
            self.arguments,
            self.image_size,
            mean=tuple(self.mean),
            std=tuple(self.std),
        )


def features_spec(backbone: Backbone) -> Spec:
    """Describe a backbone without a head, (B, 3, S, S) -> (B, D)."""
    return Spec(
        "features",
        backbone.name,
        [],
        backbone.architecture,
        backbone.arguments,
        backbone.image_size,
        backbone.mean,
        backbone.std,
    )


def classifier_spec(
    backbone: Backbone, task: str, classes: Sequence[str], *, is_multi_label: bool, fc_norm: bool
) -> Spec:
    """Describe a backbone with a head; `fc_norm` puts the last norm behind the mean."""
    arguments = {**backbone.arguments, "num_classes": len(classes)}
    if "fc_norm" in backbone.arguments:
        arguments["fc_norm"] = fc_norm
    return replace(
        features_spec(backbone),
        kind="classify",
        task=task,
        classes=list(classes),
        arguments=arguments,
        is_multi_label=is_multi_label,
    )


def segmenter_spec(
    backbone: Backbone, task: str, classes: Sequence[str], *, crop: int, channels: int
) -> Spec:
    """Describe a backbone for pictures of side `crop` with a UPerNet decoder."""
    return replace(
        features_spec(backbone),
        kind="segment",
        task=task,
        classes=list(classes),
        arguments={**backbone.arguments, "img_size": crop, "num_classes": 0},
        image_size=crop,
        channels=channels,
    )


def detector_spec(
    backbone: Backbone,
    task: str,
    classes: Sequence[str],
    recipe: DetectionConfig,
    *,
    has_masks: bool,
) -> Spec:
    """Describe a backbone for squares with pyramid and R-CNN."""
    size = recipe.size
    return replace(
        features_spec(backbone),
        kind="detect",
        task=task,
        classes=list(classes),
        arguments={**backbone.arguments, "img_size": size, "num_classes": 0},
        image_size=size,
        channels=recipe.channels,
        has_masks=has_masks,
        window=recipe.window,
        anchor_strides=recipe.anchor_strides,
    )


def timm_config(spec: Spec, tag: str) -> dict[str, Any]:
    """Make timm's `config.json`: architecture, arguments, and the pictures that it expects.

    transformers wraps such a folder and says itself how many classes there are, so the arguments
    must not.
    """
    num_classes = 0 if spec.kind == "features" else len(spec.classes)
    arguments = {name: value for name, value in spec.arguments.items() if name != "num_classes"}
    return {
        "architecture": spec.architecture,
        "num_classes": num_classes,
        "global_pool": spec.arguments.get("global_pool", "avg"),
        "model_args": arguments,
        **({"label_names": list(spec.classes)} if num_classes else {}),
        "pretrained_cfg": {
            "tag": tag,
            "custom_load": False,
            "input_size": [3, spec.image_size, spec.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(spec.mean),
            "std": list(spec.std),
            "num_classes": num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, so that readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {k: t.detach().cpu().contiguous().clone() for k, t in weights.items()}
    with naming(path):
        save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def save_model(folder: Path, model: nn.Module, spec: Spec, about: Mapping[str, Any]) -> None:
    """Write a fitted model; `about` (its step, what was measured) stands in config.json."""
    write_weights(folder / WEIGHTS, model.state_dict())
    ours = {"format": _FORMAT, **asdict(spec), "about": dict(about)}
    theirs = timm_config(spec, spec.kind) if spec.kind == "classify" else {}
    write_atomic(folder / CONFIG, json.dumps({**theirs, "moce_dist": ours}, indent=1))


def load_model(folder: Path) -> tuple[nn.Module, Spec]:
    """Load a fitted model, or an exported backbone, in evaluation mode on the CPU.

    Raises:
        ConfigError: the folder holds none, or one whose weights do not fit.
    """
    spec = _read_spec(folder)
    try:
        model = spec.build()
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{folder / CONFIG}: describes no model ({reason})") from None
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{folder / WEIGHTS}: {' '.join(str(error).split())[:300]}") from None
    return model.eval(), spec


def _read_spec(folder: Path) -> Spec:
    try:
        config = json.loads((folder / CONFIG).read_text())
        if "moce_dist" in config:
            fields = {**config["moce_dist"]}
            del fields["format"], fields["about"]
            spec = Spec(**fields)
            if spec.kind not in get_args(Kind):
                raise ValueError(f"unknown kind {spec.kind}")
            return spec
        pixels = config["pretrained_cfg"]
        return Spec(
            "features",
            folder.name,
            [],
            config["architecture"],
            {"num_classes": config["num_classes"], **config["model_args"]},
            pixels["input_size"][-1],
            pixels["mean"],
            pixels["std"],
        )
    except FileNotFoundError:
        raise ConfigError(f"{folder}: holds no model (no {CONFIG})") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{folder / CONFIG}: is no model of moce_dist ({reason})") from None
