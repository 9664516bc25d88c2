"""How a row of a metrics.json is written: on the page, in summaries, tables and model cards.

A row has a backbone, a mean and `std`, the deviation over seeds (null with one seed). If its
weights were trained for fewer optimiser steps than those of the longest stage, it also has the
difference, `steps_fewer`, and is never shown without it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

VALIDATION = " (val)"
"""The end of a metric that was measured on validation images."""


def backbone_text(row: Mapping[str, Any]) -> str:
    """Name the backbone of a summary's row, and how many training steps fewer it has."""
    return f"{row['backbone']}{fewer_text(row.get('steps_fewer'))}"


def fewer_text(steps_fewer: int | None) -> str:
    """Say that something was trained for fewer optimiser steps; nothing for 0 and None."""
    return f" ({steps_fewer} steps fewer)" if steps_fewer else ""


def steps_fewer(steps: Mapping[str, int | None]) -> dict[str, int]:
    """Return how many optimiser steps fewer than the longest each of the stages took, by name.

    Stages whose steps are not known (None) are left out.
    """
    known = {name: number for name, number in steps.items() if number is not None}
    return {name: max(known.values()) - number for name, number in known.items()}


def backbone_texts(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Name the backbones of a metrics.json as `backbone_text` does."""
    return {row["backbone"]: backbone_text(row) for row in metrics["summary"]}


def value_text(row: Mapping[str, Any], sign: str = "", plus_minus: str = "±") -> str:
    """Write mean, deviation and skipped images; `sign` `+` is for differences."""
    deviation = "" if row["std"] is None else f" {plus_minus} {row['std']:.4f}"
    skipped = f" ({row['skipped_images']} images skipped)" if row.get("skipped_images") else ""
    return f"{row['mean']:{sign}.4f}{deviation}{skipped}"


def difference_text(row: Mapping[str, Any], names: Mapping[str, str], plus_minus: str = "±") -> str:
    """Write one difference: `moce - mae (237 steps fewer), knn: +0.0200`.

    In a suite it says over how many tasks: `..., knn: +0.0200 over 9 tasks`.
    """
    backbone, reference = (names.get(row[k], row[k]) for k in ("backbone", "reference"))
    over = f" over {row['num_tasks']} tasks" if row.get("num_tasks") else ""
    value = value_text(row, "+", plus_minus)
    return f"{backbone} - {reference}, {row['protocol']}: {value}{over}"


def most_tasks(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return over how many tasks a suite's means are at most, by protocol; 1 outside of a suite."""
    most: dict[str, int] = {}
    for row in rows:
        most[row["protocol"]] = max(row.get("num_tasks", 1), most.get(row["protocol"], 1))
    return most


def tasks_text(row: Mapping[str, Any], most: Mapping[str, int]) -> str:
    """Mark a mean over fewer tasks than others of its protocol, ` (9 tasks)`; `most_tasks`."""
    number = row.get("num_tasks", 1)
    return f" ({number} tasks)" if number < most[row["protocol"]] else ""


def without_deviations(rows: Iterable[dict[str, Any]]) -> None:
    """Set the deviation of rows to null, because one seed has none."""
    for row in rows:
        row["std"] = None
