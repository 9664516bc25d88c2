"""One self-contained HTML page from a run directory: no script, no network, figures inlined."""

import base64
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from moce_dist.config import Config, to_yaml
from moce_dist.report import figures
from moce_dist.report.figures import evenly
from moce_dist.report.record import Line, Record, read_record
from moce_dist.report.summary import cluster_notes, domain_mix, label_mix
from moce_dist.run.files import write_atomic
from moce_dist.run.rows import backbone_texts, difference_text, value_text
from moce_dist.settings import flatten

PAGE_NAME = "report.html"
_MAX_CLUSTERS = 512
_MAX_SHEETS = 64
_MAX_REASONS = 20


def write_report(run_root: Path, path: Path | None = None) -> Path:
    """Write the page, by default as `RUN/report.html`, and return its path.

    Raises:
        ConfigError: `run_root` is no run directory.
    """
    path = path or run_root / PAGE_NAME
    write_atomic(path, render(read_record(run_root)))
    return path


def render(record: Record) -> str:
    """Render a record as HTML text; every value from the run is escaped."""
    environment = Environment(
        loader=PackageLoader("moce_dist.report", "."), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html.jinja").render(
        name=record.root.name,
        base=record.base or "",
        without_routes=record.without_routes,
        started=record.provenance.get("time", ""),
        command=shlex.join(map(str, record.provenance.get("command", []))),
        versions=record.provenance.get("versions", {}),
        problems=record.problems,
        tiles=_tiles(record),
        figures=_figures(record),
        tasks=[_task(metrics) for metrics in record.transfers],
        notes=cluster_notes(record.clusters) if record.clusters else [],
        mix=_mix(record),
        faults=_fault_rows(record.faults),
        fault_count=len(record.faults),
        artefacts=[
            {"name": a.name, "path": a.path, "size": _human(a.bytes)}
            for a in record.artefacts
            if a.path.name != PAGE_NAME
        ],
        config=to_yaml(record.config) if record.config else "",
        differences=_differences(record.config) if record.config else "",
    )


def _figures(record: Record) -> dict[str, str | None]:
    return {
        "losses": figures.losses(record),
        "gate_losses": figures.gate_losses(record),
        "speed": figures.speed(record),
        "experts": figures.experts(record),
        "traffic": figures.traffic(record),
        "clusters": figures.cluster_sizes(record.clusters),
        "centroids": figures.centroid_distances(record.clusters),
    }


def _tile(label: str, value: str | None) -> dict[str, str]:
    return {"label": label, "value": "missing" if value is None else value}


def _tiles(record: Record) -> list[dict[str, str]]:
    tiles = []
    for name, stage in record.shown_stages.items():
        holdout = stage.holdout
        tiles.append(
            _tile(
                f"{record.titles[name]} held-out loss",
                f"{holdout['loss']:.4f}" if holdout else None,
            )
        )
    clusters = record.clusters
    images = f"{clusters.sizes.sum():,}" if clusters else None
    tiles += [
        _tile("images", images),
        _tile("clusters", str(len(clusters.sizes)) if clusters else None),
        *([] if record.without_routes else [_tile("images exchanged", _exchanged(record))]),
        _tile("faults", str(len(record.faults))),
    ]
    return tiles


def _exchanged(record: Record) -> str | None:
    stage = record.stages["moce"]
    if stage.experts is None:
        return None
    total = max(1, int(stage.experts.sum()))
    return f"{100 * sum(stage.column('images_exchanged')[1]) / total:.1f} %"


def _task(metrics: Line) -> dict[str, Any]:
    cells = {(row["backbone"], row["protocol"]): row for row in metrics["summary"]}
    protocols = sorted({protocol for _, protocol in cells})
    best = {p: max(row["mean"] for (_, q), row in cells.items() if q == p) for p in protocols}
    names = backbone_texts(metrics)

    def cell(backbone: str, protocol: str) -> dict[str, Any]:
        row = cells.get((backbone, protocol))
        if row is None:
            return {"text": "-", "best": False}
        return {"text": value_text(row), "best": row["mean"] == best[protocol]}

    backbones = dict.fromkeys(backbone for backbone, _ in cells)
    return {
        "name": metrics["task"],
        "metric": metrics["metric"],
        "protocols": protocols,
        "rows": [
            {"backbone": names[b], "cells": [cell(b, p) for p in protocols]} for b in backbones
        ],
        "differences": [difference_text(row, names) for row in metrics.get("differences", [])],
        "failed": [f"{name}: {reason}" for name, reason in metrics.get("failed", {}).items()],
    }


def _mix(record: Record) -> list[dict[str, Any]]:
    clusters = record.clusters
    if clusters is None:
        return []
    # of very many clusters those are listed that have a sheet
    ids = list(range(len(clusters.sizes)))
    listed = ids if len(ids) <= _MAX_CLUSTERS else sorted(clusters.sheets) or ids
    listed = evenly(listed, _MAX_CLUSTERS)
    pictured = set(evenly([c for c in listed if c in clusters.sheets], _MAX_SHEETS))
    return [
        {
            "cluster": cluster,
            "size": int(clusters.sizes[cluster]),
            "domains": domain_mix(clusters.counts[cluster], clusters.domains),
            "labels": label_mix(clusters, cluster),
            "sheet": _inline(record, clusters.sheets[cluster]) if cluster in pictured else "",
        }
        for cluster in listed
        if cluster < len(ids)
    ]


def _inline(record: Record, path: Path) -> str:
    content = record.attempt(Path.read_bytes, path)
    return base64.b64encode(content).decode() if content else ""


def _fault_rows(faults: list[Line]) -> list[dict[str, Any]]:
    reasons = Counter(str(fault.get("reason", "no reason given")) for fault in faults)
    examples = {str(fault.get("reason", "no reason given")): fault for fault in reversed(faults)}
    return [
        {
            "reason": reason,
            "count": count,
            "example": " ".join(str(examples[reason].get(k) or "") for k in ("shard", "key")),
        }
        for reason, count in reasons.most_common(_MAX_REASONS)
    ]


def _differences(config: Config) -> str:
    mine, defaults = (flatten(c.model_dump(mode="json")) for c in (config, Config()))
    return "\n".join(f"{path}: {mine[path]}" for path in mine if mine[path] != defaults[path])


def _human(size: int | None) -> str:
    if size is None:
        return "missing"
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
