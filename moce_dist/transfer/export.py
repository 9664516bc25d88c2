"""Write a task's dense ViT as a folder that timm alone loads: weights, architecture, model card.

    model = timm.create_model("local-dir:RUN/transfer/TASK/backbone", pretrained=True)
    features = model(images)                                  # (B, D), mean of the patch tokens
    timm.create_model("local-dir:...", pretrained=True, num_classes=10)      # with a new head

The files themselves are written by saved.py.
"""

import json
from pathlib import Path
from typing import Any

from moce_dist.run import write_atomic
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.saved import CONFIG, WEIGHTS, features_spec, timm_config, write_weights

_MAX_CLUSTERS = 20
FILES = (WEIGHTS, CONFIG, "README.md")


def export_backbone(backbone: Backbone, folder: Path, card: str) -> list[Path]:
    """Write `model.safetensors`, `config.json` and `README.md` (`card`) and return their paths."""
    assert backbone.weights is not None
    write_weights(folder / WEIGHTS, backbone.weights)
    config = timm_config(features_spec(backbone), "moce")
    write_atomic(folder / CONFIG, json.dumps(config, indent=1))
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
        f"# Dense ViT: {choice['task']}",
        "",
        "One expert of every MoE layer of a Mixture of Cluster-conditional Experts "
        "(arXiv 2402.05382), chosen for the images below. A plain timm ViT:",
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
