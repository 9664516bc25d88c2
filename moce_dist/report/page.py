"""One self-contained HTML page from a run directory: no script, no network, figures inlined."""

import base64
import io
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from moce_dist.config import Config, to_yaml
from moce_dist.data.images import open_image
from moce_dist.report import figures
from moce_dist.report.comparing import compare_view
from moce_dist.report.figures import evenly
from moce_dist.report.gate import gate_view, read_gate
from moce_dist.report.placement import placement_view
from moce_dist.report.reconstruct import Reconstructions, reconstruct
from moce_dist.report.record import Line, Record, read_record
from moce_dist.report.summary import (
    ONE_PRETRAINING,
    cluster_notes,
    domain_mix,
    fewer_steps,
    label_mix,
    timing_rows,
)
from moce_dist.report.tasks import task_view
from moce_dist.run.directory import starts_of
from moce_dist.run.files import write_atomic
from moce_dist.settings import flatten

PAGE_NAME = "report.html"
_MAX_CLUSTERS = 512
_MAX_SHEETS = 40
_MAX_THUMBS = 128
_MAX_REASONS = 20
_LEAST_EXCESS = 0.02
"""Least excess of the loss that the darkest cell stands for, in the table of experts."""
_THUMBS, _THUMB_SIDE = 4, 64


def write_report(run_root: Path, path: Path | None = None, other: Path | None = None) -> Path:
    """Write the page, by default as `RUN/report.html`, and return its path.

    With `other`, another run directory, the page compares the run with that one.

    Raises:
        ConfigError: `run_root` or `other` is no run directory.
    """
    path = path or run_root / PAGE_NAME
    beside = None if other is None else read_record(other)
    write_atomic(path, render(read_record(run_root), beside))
    return path


def render(record: Record, other: Record | None = None) -> str:
    """Render a record as HTML text; every value from the run is escaped."""
    environment = Environment(
        loader=PackageLoader("moce_dist.report", "."), autoescape=True, undefined=StrictUndefined
    )
    gate = read_gate(record)
    shown = record.attempt(lambda _: reconstruct(record, gate), record.root)
    seen = shown if isinstance(shown, Reconstructions) else None
    changed = []
    if record.config:
        mine, usual = (flatten(c.model_dump(mode="json")) for c in (record.config, Config()))
        changed = [f"{path}: {mine[path]}" for path in mine if mine[path] != usual[path]]
    excess = np.zeros((0, 0))
    if seen is not None and seen.losses.size:
        # loss under the experts of other clusters minus that under the own ones, (R, R)
        excess = seen.losses - np.diag(seen.losses)[:, None]
    mapped = None if gate is None else gate_view(record, gate)
    tasks = [task_view(record, metrics, i) for i, metrics in enumerate(record.transfers)]
    placement = placement_view(record)
    return environment.get_template("page.html.jinja").render(
        name=record.root.name,
        base=record.base or "",
        without_routes=record.without_routes,
        starts=_starts(record),
        last_start=record.provenance.get("time", ""),
        versions=record.provenance.get("versions", {}),
        comparison=None if other is None else compare_view(record, other),
        tiles=_tiles(record),
        reconstructions=seen,
        no_reconstructions=shown if isinstance(shown, str) else "the files above",
        worst=float(excess.max(initial=_LEAST_EXCESS)),
        excess=excess.tolist(),
        gate=mapped,
        thumbs=_thumbs(record, _shown_clusters(seen, mapped, tasks, placement)),
        figures=_figures(record),
        tasks=tasks,
        one_pretraining=ONE_PRETRAINING,
        timing=timing_rows(record),
        placement=placement,
        notes=cluster_notes(record.clusters) if record.clusters else [],
        mix=_mix(record),
        faults=_fault_rows(record.faults),
        fault_count=len(record.faults),
        artefacts=[
            {"name": a.name, "path": a.path, "size": _size_text(a.bytes)}
            for a in record.artefacts
            if a.path.name != PAGE_NAME
        ],
        config=to_yaml(record.config) if record.config else "",
        differences="\n".join(changed),
        # last, because reading files for the page may add problems
        problems=record.problems,
    )


def _starts(record: Record) -> list[dict[str, str]]:
    return [
        {
            "time": start.get("time", ""),
            "command": shlex.join(map(str, start.get("command", []))),
        }
        for start in starts_of(record.provenance)
    ]


def _figures(record: Record) -> dict[str, list[str]]:
    return {
        "losses": figures.losses(record),
        "gate_losses": figures.gate_losses(record),
        "speed": figures.speed(record),
        "experts": figures.experts(record),
        "traffic": figures.traffic(record),
        "clusters": figures.cluster_sizes(record.clusters),
        "centroids": figures.centroid_distances(record.clusters),
    }


def _shown_clusters(
    seen: Reconstructions | None,
    gate: dict[str, Any] | None,
    tasks: Iterable[dict[str, Any]],
    placement: dict[str, Any] | None,
) -> list[int]:
    """List the clusters that the page shows by their images, from those that matter most."""
    shown = [*seen.clusters] if seen else []
    if gate is not None:
        shown += [row["cluster"] for row in gate["rows"]]
    for task in tasks:
        shown += [c["cluster"] for c in (task["choice"] or {"clusters": []})["clusters"]]
    if gate is not None:
        shown += [c for cards in gate["experts"] for card in cards for c in card["clusters"]]
    if placement is not None:
        shown += [c["cluster"] for group in placement["groups"] for c in group["clusters"]]
    return list(dict.fromkeys(shown))


def _thumbs(record: Record, shown: list[int]) -> dict[int, str]:
    """Cut the images nearest to the centroid from the sheets of clusters: JPEG in base64."""
    sheets = {} if record.clusters is None else record.clusters.sheets

    def cut(path: Path) -> str:
        sheet, buffer = open_image(path.read_bytes()), io.BytesIO()
        side = sheet.height
        # a gap of two pixels between images
        count = max(1, min(_THUMBS, (sheet.width + 2) // (side + 2)))
        row = Image.new("RGB", (_THUMBS * _THUMB_SIDE, _THUMB_SIDE), (208, 213, 221))
        for i in range(count):
            part = sheet.crop((i * (side + 2), 0, i * (side + 2) + side, side))
            row.paste(part.resize((_THUMB_SIDE, _THUMB_SIDE)), (i * _THUMB_SIDE, 0))
        row.save(buffer, "JPEG", quality=82)
        return base64.b64encode(buffer.getvalue()).decode()

    known = [cluster for cluster in shown if cluster in sheets][:_MAX_THUMBS]
    found = {cluster: record.attempt(cut, sheets[cluster]) for cluster in known}
    return {cluster: content for cluster, content in found.items() if content}


def _tile(label: str, value: str | None) -> dict[str, str]:
    return {"label": label, "value": "missing" if value is None else value}


def _tiles(record: Record) -> list[dict[str, str]]:
    tiles, fewer = [], fewer_steps(record)
    for name, stage in record.shown_stages.items():
        holdout = stage.holdout
        tiles.append(
            _tile(
                f"{record.titles[name]} held-out loss{fewer[name]}",
                f"{holdout['loss']:.4f}" if holdout else None,
            )
        )
    clusters = record.clusters
    images = f"{clusters.sizes.sum():,}" if clusters else None
    moce, exchanged = record.stages["moce"], None
    if moce.experts is not None:
        total = max(1, int(moce.experts.sum()))
        exchanged = f"{100 * sum(moce.column('images_exchanged')[1]) / total:.1f} %"
    tiles += [
        _tile("images", images),
        _tile("clusters", f"{len(clusters.sizes):,}" if clusters else None),
        *([] if record.without_routes else [_tile("images exchanged", exchanged)]),
        _tile("faults", f"{len(record.faults):,}"),
    ]
    return tiles


def _mix(record: Record) -> list[dict[str, Any]]:
    clusters = record.clusters
    if clusters is None:
        return []
    # with very many clusters, only those that have a sheet are listed
    ids = list(range(len(clusters.sizes)))
    listed = ids if len(ids) <= _MAX_CLUSTERS else sorted(clusters.sheets) or ids
    listed = evenly(listed, _MAX_CLUSTERS)
    with_sheet = evenly([c for c in listed if c in clusters.sheets], _MAX_SHEETS)
    sheets = {c: record.attempt(Path.read_bytes, clusters.sheets[c]) or b"" for c in with_sheet}
    return [
        {
            "cluster": cluster,
            "size": int(clusters.sizes[cluster]),
            "domains": domain_mix(clusters.counts[cluster], clusters.domains),
            "labels": label_mix(clusters, cluster),
            "sheet": base64.b64encode(sheets.get(cluster, b"")).decode(),
        }
        for cluster in listed
        if cluster < len(ids)
    ]


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


def _size_text(size: int | None) -> str:
    if size is None:
        return "missing"
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
