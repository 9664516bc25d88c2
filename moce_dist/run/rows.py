"""How a row of a metrics.json is written: on the page, in summaries, tables and model cards.

A row has a backbone, a mean and `std`, its deviation over seeds: null where there was one seed. One
of weights that were trained less than stage moce has the optimiser steps that they lack,
`steps_fewer`, and is never shown without them.
"""

from collections.abc import Iterable, Mapping
from typing import Any


def backbone_text(row: Mapping[str, Any]) -> str:
    """Name the backbone of a summary's row, with the steps that it was trained less."""
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
    """Set the deviation of rows to null: one seed has none."""
    for row in rows:
        row["std"] = None
