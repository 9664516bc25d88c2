"""Two runs side by side: the differences of their configurations and of their results."""

from collections.abc import Sequence
from typing import Any

from moce_dist.report.figures import COLOURS, overlay
from moce_dist.report.record import Line, Record, Stage
from moce_dist.report.summary import clock_text, stage_seconds
from moce_dist.run.rows import VALIDATION, backbone_text, value_text
from moce_dist.settings import flatten

_MAX_FIELDS = 60
_OTHER = "#98a2b3"
_ABSENT = Stage([], None, None)


def compare_view(record: Record, other: Record) -> dict[str, Any]:
    """Gather the differences of two runs; figures of `record` come first."""
    panels, mine = [], record.root.name
    theirs = f"{other.root.name or 'other'}{' (the other)' if mine == other.root.name else ''}"
    ours, others = _by_title(record), _by_title(other)
    for metric, what in (("loss", "MAE loss"), ("images_per_s", "images per second")):
        for title in [title for title in ours if title in others]:
            (name, stage), (_, beside) = ours[title], others[title]
            if not (stage.metrics and beside.metrics):
                continue
            lines = {
                theirs: (beside.column(metric), _OTHER, "-"),
                f"{mine} (this run)": (stage.column(metric), COLOURS[name], "-"),
            }
            bottom = None if metric == "loss" else 0
            label = f"{title}: {what}"
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
        "more_fields": max(0, len(fields) - _MAX_FIELDS),
        "rows": [
            row for row in _figures(ours, others) if row["mine"] != "-" or row["theirs"] != "-"
        ],
        "panels": panels,
        "tasks": _tasks(record, other),
        "problems": other.problems,
    }


def _by_title(record: Record) -> dict[str, tuple[str, Stage]]:
    # stages that have results, by what they trained: stage moce of a run without experts is the
    # control, and compares with the control of another run
    return {
        record.titles[name]: (name, stage)
        for name, stage in record.stages.items()
        if stage.metrics or stage.holdout
    }


def _row(label: str, values: Sequence[float | None], form: str) -> dict[str, str]:
    mine, theirs = values

    def text(value: float | None) -> str:
        return "-" if value is None else format(value, form)

    difference = "-" if mine is None or theirs is None else format(mine - theirs, f"+{form}")
    return {"label": label, "mine": text(mine), "theirs": text(theirs), "difference": difference}


def _figures(
    ours: dict[str, tuple[str, Stage]], others: dict[str, tuple[str, Stage]]
) -> list[dict[str, str]]:
    rows = []
    for title in {**ours, **others}:
        pair = [named[title][1] if title in named else _ABSENT for named in (ours, others)]
        held_out = [s.holdout["loss"] if s.holdout else None for s in pair]
        rows.append(_row(f"{title}: held-out loss", held_out, ".4f"))
        last = [next(reversed(s.column("loss")[1]), None) for s in pair]
        rows.append(_row(f"{title}: last training loss", last, ".4f"))
        spent = [stage_seconds(s) for s in pair]
        rates = [
            s.metrics[-1]["images_seen"] / t[0] if t else None
            for s, t in zip(pair, spent, strict=True)
        ]
        rows.append(_row(f"{title}: images/s", rates, ",.0f"))
        times = [clock_text(t[0]) if t else "-" for t in spent]
        rows.append(
            {"label": f"{title}: time", "mine": times[0], "theirs": times[1], "difference": ""}
        )
    return rows


def _tasks(record: Record, other: Record) -> list[dict[str, str]]:
    def values(which: Record) -> dict[tuple[str, str, str], dict[str, Any]]:
        # like is compared with like: validation images, and means over as many tasks
        return {
            (f"{metrics['task']}{_mark(metrics, row)}", row["protocol"], row["backbone"]): row
            for metrics in which.transfers
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
                "backbone": " / ".join(dict.fromkeys(backbone_text(r) for r in (a, b) if r)),
                "mine": value_text(a) if a else "-",
                "theirs": value_text(b) if b else "-",
                "difference": f"{a['mean'] - b['mean']:+.4f}" if a and b else "-",
            }
        )
    return rows


def _mark(metrics: Line, row: Line) -> str:
    number = f", {row['num_tasks']} tasks" if "num_tasks" in row else ""
    return number + (VALIDATION if metrics["metric"].endswith(VALIDATION) else "")
