"""How a row of a metrics.json is written: on the page, in summaries, tables and model cards.

A row has a backbone, a mean and `std`, the deviation over seeds (null with one seed). If its
weights were trained for fewer optimiser steps than stage moce, it also has the difference,
`steps_fewer`, and is never shown without it.
"""

from collections.abc import Iterable, Mapping
from typing import Any


def backbone_text(row: Mapping[str, Any]) -> str:
    """Name the backbone of a summary's row, and how many training steps fewer it has."""
    fewer = row.get("steps_fewer")
    return f"{row['backbone']} ({fewer} steps fewer)" if fewer else str(row["backbone"])


def backbone_texts(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Name the backbones of a metrics.json as `backbone_text` does."""
    return {row["backbone"]: backbone_text(row) for row in metrics["summary"]}


def value_text(row: Mapping[str, Any], sign: str = "", plus_minus: str = "±") -> str:
    """Write mean and deviation; `sign` `+` is for differences."""
    mean = f"{row['mean']:{sign}.4f}"
    return mean if row["std"] is None else f"{mean} {plus_minus} {row['std']:.4f}"


def difference_text(row: Mapping[str, Any], names: Mapping[str, str], plus_minus: str = "±") -> str:
    """Write one difference: `moce - mae (237 steps fewer), knn: +0.0200`."""
    backbone, reference = (names.get(row[k], row[k]) for k in ("backbone", "reference"))
    return f"{backbone} - {reference}, {row['protocol']}: {value_text(row, '+', plus_minus)}"


def without_deviations(rows: Iterable[dict[str, Any]]) -> None:
    """Set the deviation of rows to null, because one seed has none."""
    for row in rows:
        row["std"] = None
