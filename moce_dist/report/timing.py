"""Throughput of the stages, and where their time went, from the lines of metrics.jsonl.

A line has images/s since the line before, so the images between two lines give its seconds. Of
these some were spent waiting for images and some saving; the rest are the steps themselves.
"""

import statistics
from itertools import pairwise
from typing import Any

from moce_dist.report.record import Record, Stage


def timing_rows(record: Record) -> list[dict[str, Any]]:
    """Gather a row per trained stage: images/s, seconds and their parts in percent."""
    rows = []
    for name, stage in record.shown_stages.items():
        if (seconds := stage_seconds(stage)) is None:
            continue
        total, waiting, saving = seconds
        _, rates = stage.column("images_per_s")
        parts = {"steps": total - waiting - saving, "waiting": waiting, "saving": saving}
        rows.append(
            {
                "stage": record.titles[name],
                "images": f"{stage.metrics[-1]['images_seen']:,}",
                "rate": f"{statistics.median(rates):,.0f}",
                "time": clock_text(total),
                "parts": {k: 100 * max(0.0, v) / total for k, v in parts.items()},
            }
        )
    return rows


def stage_seconds(stage: Stage) -> tuple[float, float, float] | None:
    """Sum up a stage's seconds: all, those spent waiting for images, those spent saving."""
    lines = [m for m in stage.metrics if m.get("images_per_s")]
    if not lines:
        return None
    total = lines[0]["images_seen"] / lines[0]["images_per_s"] if lines[0]["step"] == 0 else 0.0
    for before, line in pairwise(lines):
        total += max(0, line["images_seen"] - before["images_seen"]) / line["images_per_s"]
    waiting, saving = (sum(m.get(k) or 0.0 for m in lines) for k in ("data_wait_s", "save_s"))
    return (total, waiting, saving) if total > 0 else None


def clock_text(seconds: float) -> str:
    """Write seconds as `3 h 05 min`, `4 min 10 s` or `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
