"""A fitted model on disk: weights as safetensors, everything else as JSON; nothing is pickled.

    FOLDER/model.safetensors    weights
    FOLDER/config.json          architecture, class names, expected pixels; for classifiers in
                                timm's local-dir format, so that timm alone can load them

    model = timm.create_model("local-dir:FOLDER", pretrained=True)      # classifiers
    model = transformers.AutoModelForImageClassification.from_pretrained("FOLDER")      # the same

Letters: B images, S side in pixels, C classes.

Sources: timm's local-dir format, timm/models/_hub.py (load_model_config_from_path); transformers'
models/timm_wrapper.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from torch import Tensor, nn

from moce_dist.run.files import replacing, write_atomic
from moce_dist.settings import ConfigError
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.tasks import Task

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_FORMAT = "moce_dist.model.v1"

FEATURES = "features"
"""Kind of a backbone without a head."""


@dataclass(frozen=True)
class Spec:
    """What is needed to rebuild a fitted model and to feed it; `options` depend on its kind."""

    kind: str
    task: str
    classes: Sequence[str]
    architecture: str
    arguments: Mapping[str, Any]
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_multi_label(self) -> bool:
        """Tell whether an image may have several classes."""
        return bool(self.options.get("is_multi_label", False))

    def vit(self) -> nn.Module:
        """Build the ViT with newly initialised weights; a classifier's includes its head."""
        model: nn.Module = timm.create_model(self.architecture, **self.arguments)
        return model

    def backbone(self) -> Backbone:
        """Describe the images that the model expects, in the form that loaders take."""
        return Backbone(
            self.task,
            self.architecture,
            self.arguments,
            self.image_size,
            mean=tuple(self.mean),
            std=tuple(self.std),
        )


_COMMON = [each.name for each in dataclass_fields(Spec) if each.name != "options"]


def features_spec(backbone: Backbone) -> Spec:
    """Describe a backbone without a head, (B, 3, S, S) -> (B, D)."""
    return Spec(
        FEATURES,
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
    """Describe a backbone with a head; `fc_norm` puts the last norm after the mean."""
    arguments = {**backbone.arguments, "num_classes": len(classes)}
    if "fc_norm" in backbone.arguments:
        arguments["fc_norm"] = fc_norm
    return replace(
        features_spec(backbone),
        kind="classify",
        task=task,
        classes=list(classes),
        arguments=arguments,
        options={"is_multi_label": is_multi_label},
    )


def dense_spec(backbone: Backbone, task: Task, image_size: int, **options: Any) -> Spec:
    """Describe a backbone for another image size; `options` are those of the task's kind."""
    return replace(
        features_spec(backbone),
        kind=task.kind,
        task=task.name,
        classes=list(task.classes),
        arguments={**backbone.arguments, "img_size": image_size, "num_classes": 0},
        image_size=image_size,
        options=options,
    )


def timm_config(spec: Spec, tag: str) -> dict[str, Any]:
    """Make timm's `config.json`: architecture, arguments, and the images that it expects.

    transformers wraps such a folder and passes the number of classes itself, so the arguments must
    not contain it.
    """
    num_classes = 0 if spec.kind == FEATURES else len(spec.classes)
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
    """Write tensors as safetensors, atomically: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: t.detach().cpu().contiguous().clone() for k, t in weights.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def save_model(folder: Path, model: nn.Module, spec: Spec, about: Mapping[str, Any]) -> None:
    """Write a fitted model; `about` (its step, measures, identity) is stored in config.json."""
    write_weights(folder / WEIGHTS, model.state_dict())
    common = asdict(spec)
    options = common.pop("options")
    ours = {"format": _FORMAT, **common, **options, "about": dict(about)}
    # timm alone can build a ViT with a head
    theirs = timm_config(spec, spec.kind) if spec.arguments.get("num_classes") else {}
    write_atomic(folder / CONFIG, json.dumps({**theirs, "moce_dist": ours}, indent=1))


def identity_of(folder: Path) -> str | None:
    """Return the identity of the fit that a model was saved by; None where there is none."""
    try:
        found = json.loads((folder / CONFIG).read_text())["moce_dist"]["about"].get("of")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def read_spec(folder: Path) -> Spec:
    """Read the description of a fitted model or of an exported backbone.

    Raises:
        ConfigError: the folder holds none.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        if "moce_dist" in config:
            fields = {**config["moce_dist"]}
            del fields["format"], fields["about"]
            common = {name: fields.pop(name) for name in _COMMON}
            return Spec(**common, options=fields)
        pixels = config["pretrained_cfg"]
        return Spec(
            FEATURES,
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
