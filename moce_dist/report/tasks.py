"""Downstream tasks: the clusters of their images, the experts that these chose, the results.

Every table shows the control next to the MoCE. Rows are always in the same order: MoCE, control,
MAE, others.
"""

from collections import Counter
from typing import Any

from matplotlib.axes import Axes
from scipy.special import stdtrit

from moce_dist.report.figures import COLOURS, GREY, panel, shown_layers
from moce_dist.report.gate import expert_colour
from moce_dist.report.record import Line, Record
from moce_dist.run.rows import (
    backbone_texts,
    difference_text,
    most_tasks,
    tasks_text,
    value_text,
)

_MAX_CLUSTERS = 12
_FIRST = ("moce", "control", "mae")


def task_view(record: Record, metrics: Line, number: int) -> dict[str, Any]:
    """Gather what the page shows of one task; `number` makes the names of its panels unique."""
    names = backbone_texts(metrics)
    cells = {(row["backbone"], row["protocol"]): row for row in metrics["summary"]}
    protocols = sorted({protocol for _, protocol in cells})
    # means over tasks compare only where they are over the same number of tasks
    most = most_tasks(metrics["summary"])
    best = {
        p: max(row["mean"] for (_, q), row in cells.items() if q == p and not tasks_text(row, most))
        for p in protocols
    }
    backbones = sorted(dict.fromkeys(b for b, _ in cells), key=_rank)
    references = {row["protocol"]: row["reference"] for row in metrics.get("differences", [])}

    def cell(backbone: str, protocol: str) -> dict[str, Any]:
        row = cells.get((backbone, protocol))
        if row is None:
            return {"text": "-", "best": False}
        fewer = tasks_text(row, most)
        is_best = len(backbones) > 1 and not fewer and row["mean"] == best[protocol]
        return {"text": f"{value_text(row)}{fewer}", "best": is_best}

    return {
        "name": metrics["task"],
        "metric": metrics["metric"],
        "protocols": protocols,
        "rows": [
            {"backbone": names[b], "cells": [cell(b, p) for p in protocols]} for b in backbones
        ],
        "panels": [
            _values(f"task-{number}-{i}", metrics, p, [b for b in backbones if (b, p) in cells])
            for i, p in enumerate(protocols)
            if len(backbones) > 1
        ],
        "references": sorted(set(references.values())),
        "differences": [difference_text(row, names) for row in metrics.get("differences", [])],
        "failed": [f"{name}: {reason}" for name, reason in metrics.get("failed", {}).items()],
        "choice": _choice(record.choices.get(metrics["task"])),
    }


def _rank(backbone: str) -> tuple[int, str]:
    origin = backbone.partition(":")[0].partition("+")[0]
    return (_FIRST.index(origin) if origin in _FIRST else len(_FIRST)), backbone


def _values(name: str, metrics: Line, protocol: str, backbones: list[str]) -> str:
    """Draw a protocol's means as points, with their 95 % intervals over several seeds."""
    rows = {r["backbone"]: r for r in metrics["summary"] if r["protocol"] == protocol}
    names, half = backbone_texts(metrics), half_widths(metrics, protocol)

    def draw(axes: Axes) -> None:
        for y, backbone in enumerate(reversed(backbones)):
            row = rows[backbone]
            colour = COLOURS.get(backbone.partition(":")[0].partition("+")[0], GREY)
            axes.errorbar(row["mean"], y, xerr=half.get(backbone), fmt="o", color=colour, capsize=3)
            axes.annotate(
                f"{row['mean']:.3f}",
                (row["mean"], y),
                (0, 6),
                textcoords="offset points",
                ha="center",
                color=GREY,
            )
        axes.set_yticks(range(len(backbones)), [names[b] for b in reversed(backbones)])
        axes.set_ylim(-0.6, len(backbones) - 0.2)
        axes.margins(x=0.15)
        axes.set(title=f"{protocol}: {metrics['metric']}")

    return panel(name, draw, height=1.0 + 0.4 * len(backbones))


def half_widths(metrics: Line, protocol: str) -> dict[str, float]:
    """Compute half the 95 % interval of a mean over seeds, by backbone; none with one seed.

    It is Student's t interval. A mean over tasks has as many seeds as its task with the fewest.
    """
    rows = (r for r in metrics["results"] if r["protocol"] == protocol)
    fits = Counter((r["backbone"], r.get("task")) for r in rows)
    found = {}
    for row in metrics["summary"]:
        name, std = row["backbone"], row["std"]
        seeds = min((count for (each, _), count in fits.items() if each == name), default=1)
        if row["protocol"] == protocol and std is not None and seeds > 1:
            found[name] = float(stdtrit(seeds - 1, 0.975)) * std / seeds**0.5
    return found


def _choice(choice: Line | None) -> dict[str, Any] | None:
    """Say which clusters a task's images fell into, and which experts it chose by them."""
    if choice is None:
        return None
    total, layers = max(1, int(choice["num_images"])), choice["layers"]
    num_experts = max((len(layer["masses"]) for layer in layers), default=0)
    clusters = [
        {"cluster": int(cluster), "share": 100 * images / total, "images": images}
        for cluster, images in choice["clusters"].items()
    ]
    return {
        "select": choice.get("select", ""),
        "chosen": choice.get("chosen", ""),
        "images": total,
        "clusters": clusters[:_MAX_CLUSTERS],
        "more": max(0, len(clusters) - _MAX_CLUSTERS),
        "layers": [_layer(layers[i], num_experts) for i in shown_layers(len(layers))],
        "num_layers": len(layers),
        "warning": choice.get("warning") or "",
    }


def _layer(layer: Line, num_experts: int) -> dict[str, Any]:
    """Gather one MoE layer: its masses as parts of a bar, the chosen expert, the runner-up."""
    chosen, second = layer["expert"], layer["runner_up"]
    return {
        "layer": layer["layer"],
        "block": layer["block"],
        "expert": "a mean of all" if chosen is None else f"expert {chosen}",
        "sure": "" if chosen is None else f"{100 * layer['mass']:.0f} %",
        "runner_up": "none"
        if second is None
        else f"expert {second}, {100 * layer['runner_up_mass']:.0f} %",
        "parts": [
            {
                "expert": expert,
                "percent": 100 * mass,
                "colour": expert_colour(expert, num_experts),
                "is_chosen": expert == chosen,
            }
            for expert, mass in enumerate(layer["masses"])
            if mass >= 0.005
        ],
    }
