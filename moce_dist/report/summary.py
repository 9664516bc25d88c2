"""Summary of a run as a screen of text: losses, clusters, experts, tasks and artefacts."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moce_dist.report.record import Clusters, Record, Stage, read_record
from moce_dist.run.rows import (
    backbone_texts,
    difference_text,
    fewer_text,
    most_tasks,
    steps_fewer,
    tasks_text,
    value_text,
)
from moce_dist.train.metrics import training_seconds

_MAX_CLUSTERS = 16
ONE_PRETRAINING = (
    "differences are of one pre-training: a run alone cannot tell them from those between two "
    "seeds of it; jobs/study.py compares over seeds"
)


def summary_lines(run_root: Path) -> list[str]:
    """Summarise a run directory; missing parts are reported as missing.

    Raises:
        ConfigError: there is no run.
    """
    record = read_record(run_root)
    return [
        f"run {record.root}",
        *_losses(record),
        *_clusters(record.clusters),
        *_experts(record),
        *_routing(record.routing),
        *_transfers(record),
        f"faults: {len(record.faults)}",
        "artefacts:",
        *(f"  {a.name:24} {a.path}" for a in record.artefacts if a.bytes is not None),
        *(f"could not read {problem}" for problem in record.problems),
    ]


def fewer_steps(record: Record) -> dict[str, str]:
    """Say behind a stage's loss, by its name, how many steps fewer than another it took."""
    fewer = steps_fewer({n: (s.holdout or {}).get("steps") for n, s in record.stages.items()})
    return {name: fewer_text(fewer.get(name)) for name in record.stages}


def _losses(record: Record) -> Iterator[str]:
    if record.base is not None:
        yield f"goes on from the encoder, clusters and experts of {record.base}"
    fewer = fewer_steps(record)
    for name, stage in record.shown_stages.items():
        title = record.titles[name]
        _, losses = stage.column("loss")
        holdout = stage.holdout
        held_out = f"{holdout['loss']:.4f} on {holdout['images']} images" if holdout else "missing"
        held_out += fewer[name]
        if not losses:
            taken = f"taken as given, held-out: {held_out}" if holdout else "not trained yet"
            yield f"{title} loss: {taken}"
            continue
        yield f"{title} loss: {losses[0]:.4f} -> {losses[-1]:.4f}, held-out: {held_out}"


def domain_mix(counts: np.ndarray, domains: list[str]) -> str:
    """Write one cluster's domains of at least half a percent: `digits 97 %, relief 3 %`."""
    if not counts.any():
        return "no images"
    total = max(1, int(counts.sum()))
    order = [i for i in np.argsort(-counts, kind="stable") if counts[i] >= total / 200]
    return ", ".join(f"{domains[i]} {100 * counts[i] / total:.0f} %" for i in order)


def label_mix(clusters: Clusters, cluster: int) -> str:
    """Write a cluster's commonest labels of at least half a percent; empty without labels."""
    size = max(1, int(clusters.sizes[cluster]))
    shares = {label: 100 * count / size for label, count in clusters.labels(cluster).items()}
    return ", ".join(f"{label} {share:.0f} %" for label, share in shares.items() if share >= 0.5)


def cluster_notes(clusters: Clusters) -> list[str]:
    """Describe in figures how clusters relate to domains, labels, balance and each other."""
    known, free = clusters.summary, clusters.free_sizes
    notes = []
    if "nmi" in known:
        notes.append(f"normalised mutual information of clusters and domains: {known['nmi']:.3f}")
    if known.keys() >= {"label_nmi", "labelled", "num_labels"}:
        notes.append(
            f"normalised mutual information of clusters and labels: {known['label_nmi']:.3f} "
            f"({known['labelled']} images have one of {known['num_labels']} labels)"
        )
    if free is not None:
        notes.append(f"without balance they would have {free.min()} to {free.max()} images")
    if "centroid_distance_median" in known:
        median, least = known["centroid_distance_median"], known["centroid_distance_min"]
        notes.append(
            f"distance of a centroid to the nearest other: {median:.3f} (median), {least:.3f} "
            "(least)"
        )
    return notes


def _clusters(clusters: Clusters | None) -> Iterator[str]:
    if clusters is None:
        yield "clusters: missing"
        return
    sizes = clusters.sizes
    pure = clusters.counts.max(axis=1).sum() / max(1, clusters.counts.sum())
    share = f"; {100 * pure:.0f} % of the images lie with their cluster's main domain"
    known = share if len(clusters.domains) > 1 else ""
    yield f"clusters: {len(sizes)} of {sizes.min()} to {sizes.max()} images{known}"
    yield from (f"  {note}" for note in cluster_notes(clusters))
    for cluster, counts in enumerate(clusters.counts[:_MAX_CLUSTERS]):
        mix = label_mix(clusters, cluster)
        labels = f"; labels {mix}" if mix else ""
        yield f"  cluster {cluster:4}: {domain_mix(counts, clusters.domains)}{labels}"
    if len(sizes) > _MAX_CLUSTERS:
        yield f"  and {len(sizes) - _MAX_CLUSTERS} more, see the report"


def _experts(record: Record) -> Iterator[str]:
    stage = record.stages["moce"]
    experts = stage.experts
    if experts is None:
        yield f"images per expert: {record.without_routes or 'missing'}"
        return
    yield f"images per expert, sum of {len(experts)} logged steps:"
    for layer, counts in enumerate(experts.sum(axis=0)):
        yield f"  MoE layer {layer}: {' '.join(map(str, counts))}"
    exchanged = sum(stage.column("images_exchanged")[1])
    share = 100 * exchanged / max(1, int(experts.sum()))
    yield f"images exchanged: {exchanged:.0f} in these steps, {share:.1f} % of images times layers"
    half = len(experts) // 2
    local, contiguous = (
        100 * (1 - sum(stage.column(name)[1][half:]) / max(1, int(experts[half:].sum())))
        for name in ("images_exchanged", "images_exchanged_contiguous")
    )
    yield (
        f"images local in the second half: {local:.1f} % of images times layers; "
        f"{contiguous:.1f} % if placed by number"
    )


def _routing(tables: Sequence[tuple[int, np.ndarray]]) -> Iterator[str]:
    alike = [table for _, table in tables if table.shape == tables[0][1].shape]
    if len(alike) < 2:
        return
    changed = np.logical_or.reduce([(table != alike[0]).any(axis=0) for table in alike[1:]])
    yield (
        f"clusters that changed an expert after step 0: {100 * changed.mean():.0f} % "
        f"(in {len(alike)} written tables)"
    )


def _transfers(record: Record) -> Iterator[str]:
    if not record.transfers:
        yield "downstream tasks: none yet"
    for metrics in record.transfers:
        names, most = backbone_texts(metrics), most_tasks(metrics["summary"])
        yield f"task {metrics['task']}, {metrics['metric']}:"
        for row in sorted(metrics["summary"], key=lambda row: (row["protocol"], -row["mean"])):
            value = f"{value_text(row, plus_minus='+-')}{tasks_text(row, most)}"
            yield f"  {row['protocol']:10} {names[row['backbone']]:10} {value}"
        differences = metrics.get("differences", [])
        yield from (f"  {difference_text(row, names, plus_minus='+-')}" for row in differences)
    if any(metrics.get("differences") for metrics in record.transfers):
        yield ONE_PRETRAINING


def timing_rows(record: Record) -> list[dict[str, Any]]:
    """Gather one row per stage that notes its time: images/s, time, and its parts in percent.

    These are the training stages and clustering, which has no parts.
    """
    rows = []
    for name, stage in record.shown_stages.items():
        if name == "moce":
            rows += _clustering_rows(record.clusters)
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


def _clustering_rows(clusters: Clusters | None) -> list[dict[str, Any]]:
    if clusters is None or not clusters.summary.get("seconds"):
        return []
    images, seconds = int(clusters.sizes.sum()), float(clusters.summary["seconds"])
    rate, time = f"{images / seconds:,.0f}", clock_text(seconds)
    return [
        {"stage": "clustering", "images": f"{images:,}", "rate": rate, "time": time, "parts": {}}
    ]


def stage_seconds(stage: Stage) -> tuple[float, float, float] | None:
    """Sum up a stage's seconds: total, waiting for images, saving; None if none were logged."""
    lines = [m for m in stage.metrics if m.get("images_per_s")]
    total = training_seconds(lines)
    waiting, saving = (sum(m.get(k) or 0.0 for m in lines) for k in ("data_wait_s", "save_s"))
    return (total, waiting, saving) if total > 0 else None


def clock_text(seconds: float) -> str:
    """Write seconds as `3 h 05 min`, `4 min 10 s` or `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
