"""Where experts live and which clusters their groups read; the exchange planned and measured.

    group 0   reads clusters 3, 5, 7 (half)   holds experts 0, 2 of layer 0; 1, 3 of layer 1
              24.8 % of the images as planned, 25.1 % of those counted under the plan

Letters: L MoE layers, E experts, K clusters, G expert groups.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moce_dist.report.figures import COLOURS, overlay, shown_layers
from moce_dist.report.gate import expert_colour, prefer
from moce_dist.report.record import Line, Record

_MAX_GROUPS = 16
_MAX_CLUSTERS = 12
_MAX_EXPERTS = 16
_MAX_INTERVALS = 200


def placement_view(record: Record) -> dict[str, Any] | None:
    """Gather the newest placement by group, and the predicted and measured exchange."""
    if not record.placements:
        return None
    last = record.placements[-1]
    homes = np.array(last["expert_group"], np.int64)
    layers, num_experts, _, num_groups = last["shape"]
    sheets = set(record.clusters.sheets) if record.clusters else set[int]()
    shares = last["shares"]
    cluster, group = np.array(shares["cluster"], np.int64), np.array(shares["group"], np.int64)
    share = np.array(shares["share"], np.float64)
    rows = []
    for g in range(min(num_groups, _MAX_GROUPS)):
        read = dict(zip(cluster[group == g].tolist(), share[group == g].tolist(), strict=True))
        listed = prefer(sorted(read, key=lambda c: (-read[c], c)), sheets, _MAX_CLUSTERS)
        rows.append(
            {
                "group": g,
                "clusters": [{"cluster": c, "share": round(100 * read[c])} for c in listed],
                "more": len(read) - len(listed),
                "layers": [
                    _residents(layer, np.flatnonzero(homes[layer] == g), num_experts)
                    for layer in shown_layers(layers)
                ],
                "predicted": _of_group(last["predicted_per_epoch"], g),
                "measured": _of_group(last.get("measured_in_interval"), g),
            }
        )
    return {
        "step": last["step"],
        "groups": rows,
        "layers": layers,
        "more": max(0, num_groups - _MAX_GROUPS),
        "panels": [_locality(record.placements)],
        "intervals": [_interval(p) for p in record.placements[-_MAX_INTERVALS:]],
    }


def _residents(layer: int, experts: NDArray[np.int64], num_experts: int) -> dict[str, Any]:
    """List the experts of a layer that a group holds, with their colours."""
    listed = [
        {"expert": e, "colour": expert_colour(e, num_experts)}
        for e in experts[:_MAX_EXPERTS].tolist()
    ]
    return {"layer": layer, "experts": listed, "more": len(experts) - len(listed)}


def _of_group(traffic: Line | None, group: int) -> str:
    """Write a group's share of the images that were predicted, or counted; "-" if none were."""
    images = [] if traffic is None else traffic["images_per_group"]
    return f"{100 * images[group] / sum(images):.1f} %" if sum(images) else "-"


def _local(traffic: Line | None) -> float | None:
    return None if traffic is None else 100 * float(traffic["local_fraction"])


def _contiguous(placement: Line) -> float | None:
    predicted, layers = placement["predicted_per_epoch"], placement["shape"][0]
    crossings = predicted.get("images", 0) * layers
    naive = predicted.get("images_exchanged_contiguous")
    return 100 * (1 - naive / crossings) if crossings and naive is not None else None


def _interval(placement: Line) -> dict[str, Any]:
    """Put a plan's prediction next to what was counted under it."""
    measured = placement.get("measured_in_interval")

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} %"

    return {
        "step": placement["step"],
        "predicted": percent(_local(placement["predicted_per_epoch"])),
        "measured": percent(_local(measured)),
        "contiguous": percent(_contiguous(placement)),
        "moved": placement.get("experts_moved", 0),
    }


def _locality(placements: list[Line]) -> str:
    """Draw the share of (image, layer) pairs that stayed in their group, one point per interval."""

    def points(values: list[float | None]) -> tuple[list[float], list[float]]:
        known = [(p["step"], v) for p, v in zip(placements, values, strict=True) if v is not None]
        return [float(step) for step, _ in known], [value for _, value in known]

    predicted = points([_local(p["predicted_per_epoch"]) for p in placements])
    measured = points([_local(p.get("measured_in_interval")) for p in placements])
    return overlay(
        "locality",
        "stayed in their group, % over all layers",
        {
            "measured": (measured, COLOURS["moce"], "-"),
            "predicted by the plan": (predicted, "#1d2939", "--"),
            "if placed by number": (points([_contiguous(p) for p in placements]), "#98a2b3", ":"),
        },
        xlabel="step at which the interval began",
    )
