"""Write a task's dense ViT as a folder that timm alone loads: weights, architecture, model card.

    model = timm.create_model("local-dir:RUN/transfer/TASK/backbone", pretrained=True)
    features = model(images)                                  # (B, D), mean of the patch tokens
    timm.create_model("local-dir:...", pretrained=True, num_classes=10)      # with a new head
    transformers.AutoModel.from_pretrained("RUN/transfer/TASK/backbone")      # wraps timm

The files themselves are written by saved.py.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moce_dist.run.files import write_atomic
from moce_dist.run.rows import backbone_texts, difference_text, value_text
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.saved import CONFIG, WEIGHTS, features_spec, timm_config, write_weights

_MAX_CLUSTERS = 20
FILES = (WEIGHTS, CONFIG, "README.md")
_DENSE = "A masked autoencoder's encoder, trained without experts."


def export_backbone(backbone: Backbone, folder: Path, card: str) -> list[Path]:
    """Write `model.safetensors`, `config.json` and `README.md` (`card`) and return their paths."""
    assert backbone.weights is not None
    write_weights(folder / WEIGHTS, backbone.weights)
    config = timm_config(features_spec(backbone), backbone.name)
    write_atomic(folder / CONFIG, json.dumps(config, indent=1))
    write_atomic(folder / "README.md", card)
    return [folder / name for name in FILES]


def model_card(
    task: str, choice: dict[str, Any] | None, metrics: dict[str, Any] | None, about: dict[str, str]
) -> str:
    """Write the model card of a task's ViT: what it is, what it is made of, what was measured.

    `choice` is the content of choice.json (None for a model without experts), `metrics` that of
    metrics.json, and `about` holds further lines (run, data, checkpoint).
    """
    chosen = []
    if choice is not None:
        counts = [f"{cluster} ({count})" for cluster, count in choice["clusters"].items()]
        rest = len(counts) - _MAX_CLUSTERS
        more = f" and {rest} more" if rest > 0 else ""
        clusters = f"- their clusters (images): {', '.join(counts[:_MAX_CLUSTERS])}{more}"
        chosen = [
            f"- images: {choice['num_images']}"
            f"{'' if choice.get('candidates') else ', without their labels'}",
            *([clusters] if counts else []),
            *([f"- warning: {choice['warning']}"] if choice["warning"] else []),
            "",
            *_layers(choice["layers"]),
            *_candidates(choice.get("candidates", ())),
        ]
    lines = [
        "---",
        "library_name: timm",
        "tags: [image-feature-extraction, mae, moce]",
        "---",
        "",
        f"# Dense ViT: {task}",
        "",
        *(_DENSE if choice is None else _about(choice), "", "A plain timm ViT:"),
        "",
        "```python",
        'model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True)',
        "features = model(images)  # mean of the patch tokens after the final norm",
        "```",
        "",
        *(f"- {name}: {value}" for name, value in about.items()),
        *chosen,
        "",
        "## Measured",
        "",
        *_results(metrics),
    ]
    return "\n".join(lines) + "\n"


def _about(choice: dict[str, Any]) -> str:
    source = "of a Mixture of Cluster-conditional Experts (arXiv 2402.05382)"
    if choice["select"] == "use":
        return (
            "The experts of a mixture whose tokens choose them (arXiv 2006.16668), averaged by the "
            "share of the images' tokens that each received."
        )
    if not choice["layers"]:
        return "No experts: the dense control, which did best on folds of the task's own images."
    if any(weight < 0 for layer in choice["layers"] for weight in layer.get("weights", ())):
        return (
            f"All experts of every MoE layer {source}, mixed by the weights below: beyond the best "
            "fitting one, as seen from their average."
        )
    if _is_merged(choice["layers"]):
        return f"All experts of every MoE layer {source}, averaged by the weights below."
    if choice["select"] == "mismatched":
        return f"On purpose the least fitting expert of every MoE layer {source}: a comparison."
    return f"One expert of every MoE layer {source}, chosen for the images below."


def _is_merged(layers: Sequence[dict[str, Any]]) -> bool:
    return any(layer["expert"] is None for layer in layers)


def _layers(layers: list[dict[str, Any]]) -> list[str]:
    if not layers:
        return []
    if _is_merged(layers):
        experts = range(len(layers[0]["weights"]))
        head = ["layer", "block", *(f"weight of expert {e}" for e in experts), "entropy (nats)"]
        rows = [
            [layer["layer"], layer["block"], *layer["weights"], layer["entropy"]]
            for layer in layers
        ]
    else:
        head = ["layer", "block", "expert", "mass", "runner-up", "its mass", "entropy (nats)"]
        columns = ("layer", "block", "expert", "mass", "runner_up", "runner_up_mass", "entropy")
        rows = [[layer[column] for column in columns] for layer in layers]
    return _table(head, rows)


def _candidates(tried: Sequence[dict[str, Any]]) -> list[str]:
    if not tried:
        return []
    head = ["candidate, on folds of the training images", "mean of the folds"]
    return _table(head, [[each["name"], each["mean"]] for each in tried])


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    lines = [" | ".join(row) for row in [head, ["---"] * len(head), *cells]]
    return [*(f"| {line} |" for line in lines), ""]


def _results(metrics: dict[str, Any] | None) -> list[str]:
    if metrics is None or not metrics["summary"]:
        return ["Nothing yet."]
    names = backbone_texts(metrics)
    rows = [
        f"| {names[row['backbone']]} | {row['protocol']} | {value_text(row)} |"
        for row in metrics["summary"]
    ]
    notes = [f"- {difference_text(row, names)}" for row in metrics.get("differences", [])]
    head = f"| backbone | protocol | {metrics['metric']} |"
    return [head, "|---|---|---|", *rows, *(["", *notes] if notes else [])]
