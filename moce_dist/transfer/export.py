"""Write a task's dense ViT as a folder that timm alone loads: weights, architecture, model card.

    model = timm.create_model("local-dir:RUN/transfer/TASK/backbone", pretrained=True)
    features = model(images)                                  # (B, D), mean of the patch tokens
    timm.create_model("local-dir:...", pretrained=True, num_classes=10)      # with a new head

Source: timm's local-dir format, timm/models/_hub.py (load_model_config_from_path).
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from moce_dist.run import write_atomic
from moce_dist.transfer.backbone import Backbone

_MAX_CLUSTERS = 20
FILES = ("model.safetensors", "config.json", "README.md")


def timm_config(backbone: Backbone) -> dict[str, Any]:
    """Make `config.json`: the architecture, its arguments and the pictures that it expects."""
    return {
        "architecture": backbone.architecture,
        "num_classes": 0,
        "global_pool": backbone.arguments["global_pool"],
        "model_args": dict(backbone.arguments),
        "pretrained_cfg": {
            "tag": "moce",
            "custom_load": False,
            "input_size": [3, backbone.image_size, backbone.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def export_backbone(backbone: Backbone, folder: Path, card: str) -> list[Path]:
    """Write `model.safetensors`, `config.json` and `README.md` (`card`) and return their paths."""
    assert backbone.weights is not None
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".model.safetensors.tmp"
    tensors = {name: tensor.contiguous().clone() for name, tensor in backbone.weights.items()}
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")
    write_atomic(folder / "config.json", json.dumps(timm_config(backbone), indent=1))
    write_atomic(folder / "README.md", card)
    return [folder / name for name in FILES]


def model_card(
    choice: dict[str, Any], metrics: dict[str, Any] | None, about: dict[str, str]
) -> str:
    """Write the model card: what it is, which experts, which clusters, what was measured.

    `choice` and `metrics` are the contents of choice.json and metrics.json, `about` further lines
    (run, data, checkpoint).
    """
    lines = [
        "---",
        "library_name: timm",
        "tags: [image-feature-extraction, mae, moce]",
        "---",
        "",
        f"# Dense ViT for the task {choice['task']}",
        "",
        "One expert of every MoE layer of a Mixture of Cluster-conditional Experts "
        "(arXiv 2402.05382), chosen for this task's images. A plain timm ViT:",
        "",
        "```python",
        'model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True)',
        "features = model(images)  # mean of the patch tokens after the final norm",
        "```",
        "",
        *(f"- {name}: {value}" for name, value in about.items()),
        f"- images: {choice['num_images']}, without their labels",
        f"- their clusters (images): {_histogram(choice['clusters'])}",
        *([f"- warning: {choice['warning']}"] if choice["warning"] else []),
        "",
        "| layer | block | expert | mass | runner-up | its mass | entropy (nats) |",
        "|---|---|---|---|---|---|---|",
        *(_layer_row(layer) for layer in choice["layers"]),
        "",
        "## Measured",
        "",
        *_results(metrics),
    ]
    return "\n".join(lines) + "\n"


def _histogram(clusters: dict[str, int]) -> str:
    shown = [f"{cluster} ({count})" for cluster, count in list(clusters.items())[:_MAX_CLUSTERS]]
    rest = len(clusters) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def _layer_row(layer: dict[str, Any]) -> str:
    return (
        f"| {layer['layer']} | {layer['block']} | {layer['expert']} | {layer['mass']:.3f} "
        f"| {layer['runner_up']} | {layer['runner_up_mass']:.3f} | {layer['entropy']:.3f} |"
    )


def _results(metrics: dict[str, Any] | None) -> list[str]:
    if metrics is None or not metrics["summary"]:
        return ["Nothing yet."]
    rows = [
        f"| {row['backbone']} | {row['protocol']} | {row['mean']:.4f} | {row['std']:.4f} |"
        for row in metrics["summary"]
    ]
    head = f"| backbone | protocol | {metrics['metric']} (mean over seeds) | standard deviation |"
    return [head, "|---|---|---|---|", *rows]
