"""Two runs side by side: the differences of their configurations and of their results."""

from collections.abc import Sequence
from typing import Any

from moce_dist.report.figures import COLOURS, overlay
from moce_dist.report.record import Record
from moce_dist.report.summary import clock_text, stage_seconds
from moce_dist.run.rows import value_text
from moce_dist.settings import flatten

_MAX_FIELDS = 60
_OTHER = "#98a2b3"


def compare_view(record: Record, other: Record) -> dict[str, Any]:
    """Gather the differences of two runs; figures of `record` come first."""
    panels, mine = [], record.root.name
    theirs = f"{other.root.name or 'other'}{' (the other)' if mine == other.root.name else ''}"
    for metric, title in (("loss", "MAE loss"), ("images_per_s", "images per second")):
        for name, stage in record.stages.items():
            beside = other.stages[name]
            if not (stage.metrics and beside.metrics):
                continue
            lines = {
                theirs: (beside.column(metric), _OTHER, "-"),
                f"{mine} (this run)": (stage.column(metric), COLOURS[name], "-"),
            }
            bottom = None if metric == "loss" else 0
            label = f"{record.titles[name]}: {title}"
            panels.append(overlay(f"compare-{metric}-{name}", label, lines, bottom=bottom))
    fields = []
    if record.config is not None and other.config is not None:
        left, right = (flatten(c.model_dump(mode="json")) for c in (record.config, other.config))
        fields = [
            {"field": k, "mine": str(left.get(k)), "theirs": str(right.get(k))}
            for k in {**left, **right}
            if left.get(k) != right.get(k)
        ]
    return {
        "name": theirs,
        "path": other.root,
        "fields": fields[:_MAX_FIELDS],
        "rows": [
            row for row in _figures(record, other) if row["mine"] != "-" or row["theirs"] != "-"
        ],
        "panels": panels,
        "tasks": _tasks(record, other),
        "problems": other.problems,
    }


def _row(label: str, values: Sequence[float | None], form: str) -> dict[str, str]:
    mine, theirs = values

    def text(value: float | None) -> str:
        return "-" if value is None else format(value, form)

    difference = "-" if mine is None or theirs is None else format(mine - theirs, f"+{form}")
    return {"label": label, "mine": text(mine), "theirs": text(theirs), "difference": difference}


def _figures(record: Record, other: Record) -> list[dict[str, str]]:
    rows = []
    for name, stage in record.stages.items():
        title, beside = record.titles[name], other.stages[name]
        held_out = [s.holdout["loss"] if s.holdout else None for s in (stage, beside)]
        rows.append(_row(f"{title}: held-out loss", held_out, ".4f"))
        last = [next(reversed(s.column("loss")[1]), None) for s in (stage, beside)]
        rows.append(_row(f"{title}: last training loss", last, ".4f"))
        spent = [stage_seconds(s) for s in (stage, beside)]
        rates = [
            s.metrics[-1]["images_seen"] / t[0] if t else None
            for s, t in zip((stage, beside), spent, strict=True)
        ]
        rows.append(_row(f"{title}: images/s", rates, ",.0f"))
        times = [clock_text(t[0]) if t else "-" for t in spent]
        rows.append(
            {"label": f"{title}: time", "mine": times[0], "theirs": times[1], "difference": ""}
        )
    return rows


def _tasks(record: Record, other: Record) -> list[dict[str, str]]:
    def values(which: Record) -> dict[tuple[str, str, str], dict[str, Any]]:
        return {
            (f"{metrics['task']}{mark}", row["protocol"], row["backbone"]): row
            for metrics in which.transfers
            # validation images are compared with validation images
            for mark in (" (val)" if metrics["metric"].endswith(" (val)") else "",)
            for row in metrics["summary"]
        }

    mine, theirs = values(record), values(other)
    rows = []
    for key in sorted({**mine, **theirs}):
        a, b = mine.get(key), theirs.get(key)
        rows.append(
            {
                "task": key[0],
                "protocol": key[1],
                "backbone": key[2],
                "mine": value_text(a) if a else "-",
                "theirs": value_text(b) if b else "-",
                "difference": f"{a['mean'] - b['mean']:+.4f}" if a and b else "-",
            }
        )
    return rows
