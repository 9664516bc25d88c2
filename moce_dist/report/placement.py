"""Where experts live and which clusters their groups read; the exchange planned and measured.

    group 0   reads clusters 3, 5, 7 (half)   holds experts 0, 2 of layer 0; 1, 3 of layer 1
              12,000 images an epoch planned, 410 of the interval's 430 stayed

Letters: L MoE layers, E experts, K clusters, G expert groups.
"""

from typing import Any

import numpy as np

from moce_dist.report.figures import COLOURS, overlay
from moce_dist.report.record import Line, Record

_MAX_GROUPS = 32
_MAX_CLUSTERS = 12
_MAX_INTERVALS = 200


def placement_view(record: Record) -> dict[str, Any] | None:
    """Gather the newest placement by group, and the predicted and measured exchange."""
    if not record.placements:
        return None
    last = record.placements[-1]
    homes = np.array(last["expert_group"], np.int64)
    _, _, _, num_groups = last["shape"]
    shares = last["shares"]
    cluster, group = np.array(shares["cluster"], np.int64), np.array(shares["group"], np.int64)
    share = np.array(shares["share"], np.float64)
    rows = []
    for g in range(min(num_groups, _MAX_GROUPS)):
        mine = np.flatnonzero(group == g)
        mine = mine[np.argsort(-share[mine], kind="stable")]
        rows.append(
            {
                "group": g,
                "clusters": [
                    {"cluster": int(cluster[i]), "share": round(100 * float(share[i]))}
                    for i in mine[:_MAX_CLUSTERS]
                ],
                "more": max(0, len(mine) - _MAX_CLUSTERS),
                "experts": [np.flatnonzero(layer == g).tolist() for layer in homes],
                "predicted": _of_group(last["predicted_per_epoch"], g),
                "measured": _of_group(last.get("measured_in_interval"), g),
            }
        )
    return {
        "step": last["step"],
        "groups": rows,
        "more": max(0, num_groups - _MAX_GROUPS),
        "panels": [_locality(record.placements)],
        "intervals": [_interval(p) for p in record.placements[-_MAX_INTERVALS:]],
    }


def _of_group(traffic: Line | None, group: int) -> str:
    return "-" if traffic is None else f"{traffic['images_per_group'][group]:,.0f}"


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
        "stayed in their group, % of images times layers",
        {
            "measured": (measured, COLOURS["moce"], "-"),
            "predicted by the plan": (predicted, "#1d2939", "--"),
            "if placed by number": (points([_contiguous(p) for p in placements]), "#98a2b3", ":"),
        },
        xlabel="step at which the interval began",
    )
