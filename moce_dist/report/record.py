"""What a run directory holds, read once for the page and the summary.

Reading never fails on a run that is unfinished, interrupted or damaged: a missing part is None or
empty, and a file that cannot be read is named in `problems`.

Letters: K clusters, L MoE layers, E experts per layer.
"""

import json
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moce_dist.config import Config
from moce_dist.run.directory import STAGES, Run, is_set_aside, load_run
from moce_dist.run.files import read_faults, read_jsonl
from moce_dist.run.names import one_line
from moce_dist.run.rows import without_deviations
from moce_dist.settings import ConfigError

Line = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """One training stage: its metrics, oldest first, and its held-out loss when it was measured.

    `experts` are the images per expert of the T logged steps, (T, L, E); None without any.
    """

    metrics: list[Line]
    holdout: Line | None
    experts: NDArray[np.int64] | None

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """Return images seen and the values of one metric, on the lines that have both."""
        lines = [line for line in self.metrics if line.get(name) is not None]
        images = [float(line["images_seen"]) for line in lines]
        return images, [float(line[name]) for line in lines]


@dataclass(frozen=True)
class Clusters:
    """Sizes (K,) and domain mix (K, domains) of the clusters; a domain is a key's first folder.

    The clustering counts them. Where it found a single domain, that one is called "all images".
    `summary` is the content of summary.json, `centroids` is (K, D), and `sheets` are the files of
    the gallery by cluster. Each is None or empty if it is missing.
    """

    domains: list[str]
    counts: NDArray[np.int64]
    summary: Line = field(default_factory=dict)
    centroids: NDArray[np.float32] | None = None
    sheets: dict[int, Path] = field(default_factory=dict)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Images per cluster, (K,)."""
        sizes: NDArray[np.int64] = self.counts.sum(axis=1)
        return sizes

    def labels(self, cluster: int) -> dict[str, int]:
        """Images of the commonest labels of a cluster, where labels are known."""
        mixes: list[dict[str, int]] = self.summary.get("labels", [])
        return mixes[cluster] if cluster < len(mixes) else {}

    @property
    def free_sizes(self) -> NDArray[np.int64] | None:
        """Images per cluster (K,) if each were in its nearest one; None if not recorded."""
        sizes = self.summary.get("sizes_without_balance")
        return None if sizes is None else np.array(sizes, np.int64)


@dataclass(frozen=True)
class Certainty:
    """The gate's probabilities at a step, of the chosen expert and of the next best, (L, K)."""

    step: int
    chosen: NDArray[np.float64]
    runner_up: NDArray[np.float64]


@dataclass(frozen=True)
class Artefact:
    """A named file or folder of the run; `bytes` is None when it is not there."""

    name: str
    path: Path
    bytes: int | None


@dataclass
class Record:
    """Everything that a page or a summary says about a run."""

    root: Path
    config: Config | None = None
    provenance: Line = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)
    clusters: Clusters | None = None
    routing: list[tuple[int, NDArray[np.int64]]] = field(default_factory=list)
    certainty: list[Certainty] = field(default_factory=list)
    placements: list[Line] = field(default_factory=list)
    """The documents of `placement/step_X.json`, oldest first."""
    transfers: list[Line] = field(default_factory=list)
    choices: dict[str, Line] = field(default_factory=dict)
    """Content of choice.json by task, for tasks whose clusters chose experts."""
    faults: list[Line] = field(default_factory=list)
    artefacts: list[Artefact] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def shown_stages(self) -> dict[str, Stage]:
        """The training stages that this run has or is to have, by name."""
        config = self.config
        hidden = set()
        if self.base is not None:
            hidden.add("mae")
        is_wanted = config is not None and config.control and config.moe.kind != "dense"
        if not self.stages["control"].metrics and not is_wanted:
            hidden.add("control")
        return {name: stage for name, stage in self.stages.items() if name not in hidden}

    @property
    def titles(self) -> dict[str, str]:
        """What the stages trained, by name: stage moce of a run without experts is the control."""
        kind = "cluster" if self.config is None else self.config.moe.kind
        moce = {"cluster": "MoCE", "token": "TokenMoE", "dense": "control"}[kind]
        return {"mae": "MAE", "moce": moce, "control": "control"}

    @property
    def without_routes(self) -> str:
        """Why the run has no experts that clusters choose; empty if it has."""
        kind = "cluster" if self.config is None else self.config.moe.kind
        why = {"token": "tokens choose the experts", "dense": "no experts"}.get(kind)
        return f"{why} (moe.kind {kind})" if why else ""

    @property
    def run(self) -> Run:
        """The directory and its paths."""
        return Run(self.root)

    @property
    def base(self) -> str | None:
        """The run whose encoder, clusters and experts this one continues from."""
        return None if self.config is None else self.config.base_run

    def attempt(self, read: Callable[[Path], T], path: Path) -> T | None:
        """Read a file that may be missing (None) or damaged (None, and a problem)."""
        if not path.exists():
            return None
        try:
            return read(path)
        except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
            self.problems.append(f"{path.relative_to(self.root)}: {one_line(error)}")
            return None


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def _read_object(path: Path, *required: str) -> Line:
    value = _read_json(path)
    if not isinstance(value, dict):
        raise TypeError(f"must be a JSON object, is a {type(value).__name__}")
    if missing := [name for name in required if name not in value]:
        raise KeyError(f"lacks {', '.join(missing)}")
    return value


def _read_metrics(path: Path) -> list[Line]:
    lines = read_jsonl(path)
    for line in lines:
        if not isinstance(line, dict) or "step" not in line or "images_seen" not in line:
            raise KeyError("a line lacks step or images_seen")
    return lines


def _read_transfer(path: Path) -> Line:
    metrics = _read_object(path, "task", "metric", "results", "summary")
    rows = [*metrics["summary"], *metrics.get("differences", [])]
    for row in rows:
        row["protocol"], row["backbone"], float(row["mean"]), float(row["std"] or 0)
    fits = Counter((r.get("task"), r["backbone"], r["protocol"]) for r in metrics["results"])
    if max(fits.values(), default=1) == 1:
        # files of older versions give one seed a deviation of 0
        without_deviations(rows)
    return metrics


def _read_certainty(path: Path) -> Certainty:
    document = _read_object(path, "chosen", "runner_up")
    chosen, runner_up = (np.array(document[k], np.float64) for k in ("chosen", "runner_up"))
    if chosen.ndim != 2 or chosen.shape != runner_up.shape:
        raise ValueError(f"shapes {chosen.shape} and {runner_up.shape} must be one (L, K)")
    return Certainty(_step_of(path), chosen, runner_up)


def _read_table(path: Path) -> tuple[int, NDArray[np.int64]]:
    table = np.array(_read_json(path), np.int64)
    if table.ndim != 2:
        raise ValueError(f"shape {table.shape} must be (L, K)")
    return _step_of(path), table


def _read_placement(path: Path) -> Line:
    document = _read_object(path, "step", "expert_group", "shape", "shares", "predicted_per_epoch")
    _, _, clusters, groups = document["shape"]
    np.zeros((clusters, groups))[document["shares"]["cluster"], document["shares"]["group"]]
    for part in ("predicted_per_epoch", "measured_in_interval"):
        if (traffic := document.get(part)) is not None:
            float(traffic["local_fraction"]), float(traffic["images_exchanged"])
    return document


def _read_choice(path: Path) -> Line:
    choice = _read_object(path, "layers", "clusters", "num_images")
    for layer in choice["layers"]:
        np.array(layer["masses"], np.float64), layer["layer"], layer["block"], layer["expert"]
        layer["runner_up"], float(layer["runner_up_mass"]), float(layer["mass"] or 0)
    for cluster, images in choice["clusters"].items():
        int(cluster), int(images)
    return choice


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _read_steps(record: Record, folder: Path, read: Callable[[Path], T]) -> list[T]:
    """Read all `step_X.json` of a folder that can be read, in the order of their steps."""
    paths = sorted(folder.glob("step_*.json"), key=lambda path: (len(path.name), path.name))
    found = [record.attempt(read, path) for path in paths]
    return [document for document in found if document is not None]


def _by_domain(
    sizes: NDArray[np.int64], mixes: list[dict[str, int]]
) -> tuple[list[str], NDArray[np.int64]]:
    """Return the domains, the most frequent first, and the images of each, (K, domains).

    `mixes` are those of summary.json, used if they add up to the sizes (K,) of the clusters.
    """
    from moce_dist.cluster.domains import MOST_DOMAINS

    totals = Counter[str]()
    for mix in mixes:
        totals.update(mix)
    rest = sizes - [sum(mix.values()) for mix in mixes] if len(mixes) == len(sizes) else -sizes
    if not totals or (rest < 0).any() or (rest.any() and len(totals) < MOST_DOMAINS):
        return ["all images"], sizes[:, None]
    number = {name: i for i, (name, _) in enumerate(totals.most_common(MOST_DOMAINS))}
    counts = np.zeros((len(mixes), len(number) + 1), np.int64)
    counts[:, -1] = rest
    for cluster, mix in enumerate(mixes):
        for name, images in mix.items():
            counts[cluster, number.get(name, len(number))] += images
    shown = [name or "(no folder)" for name in number]
    return ([*shown, "others"], counts) if counts[:, -1].any() else (shown, counts[:, :-1])


def _read_summary(path: Path) -> Line:
    summary = _read_object(path)
    np.array(summary.get("sizes_without_balance", []), np.int64)
    for name in ("labels", "domains"):
        for mix in summary.get(name, []):
            if not isinstance(mix, dict):
                raise TypeError(f"{name}: must hold a JSON object for every cluster")
            sum(mix.values())
    for name in (
        "seconds",
        "nmi",
        "label_nmi",
        "labelled",
        "centroid_distance_min",
        "centroid_distance_median",
    ):
        float(summary.get(name, 0))
    return summary


def _read_clusters(record: Record, folder: Path) -> Clusters | None:
    # imported late, because it needs pyarrow and faiss
    from moce_dist.cluster.assignments import count_assignments

    sizes = record.attempt(lambda path: count_assignments(path, 1), folder / "assignments.parquet")
    if sizes is None:
        return None
    centroids = record.attempt(
        lambda path: np.load(path, allow_pickle=False), folder / "centroids.npy"
    )
    # new images may leave the last clusters of another run empty
    missing = 0 if centroids is None else max(0, len(centroids) - len(sizes))
    summary = record.attempt(_read_summary, folder / "summary.json") or {}
    domains, counts = _by_domain(np.pad(sizes, (0, missing)), summary.get("domains", []))
    return Clusters(
        domains,
        counts,
        summary=summary,
        centroids=centroids,
        sheets={
            int(path.stem.rpartition("-")[2]): path
            for path in (folder / "gallery").glob("cluster-*.jpg")
        },
    )


def _size(path: Path) -> int | None:
    total, files = 0, path.rglob("*") if path.is_dir() else [path]
    for file in files:
        # what writes a file may rename it meanwhile
        with suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total if path.exists() else None


def _newest(folder: Path) -> Path:
    return max(folder.glob("step_*[0-9]"), default=folder / "step_XXXXXXXX")


def _transfer_folders(root: Path) -> list[Path]:
    return [f for f in sorted((root / "transfer").glob("*/")) if not is_set_aside(f)]


def _list_artefacts(run: Run) -> list[Artefact]:
    paths = {
        "configuration": run.root / "config.yaml",
        "ingested shards": run.ingested,
        "MAE checkpoint": _newest(run.stage("mae") / "checkpoints"),
        "features": run.features,
        "centroids": run.clusters / "centroids.npy",
        "assignments": run.clusters / "assignments.parquet",
        "cluster shards": run.shards,
        "MoCE checkpoint": _newest(run.stage("moce") / "checkpoints"),
        "routing tables": run.stage("moce") / "routing",
        "placements": run.stage("moce") / "placement",
    }
    if run.stage("control").exists():
        paths["control checkpoint"] = _newest(run.stage("control") / "checkpoints")
    for folder in _transfer_folders(run.root):
        paths[f"{folder.name}: dense ViT"] = folder / "backbone"
        paths[f"{folder.name}: results"] = folder / "metrics.json"
    if run.faults.exists():
        paths["faults"] = run.faults
    paths["report"] = run.root / "report.html"
    return [Artefact(name, path, _size(path)) for name, path in paths.items()]


def _read_stage(record: Record, folder: Path) -> Stage:
    metrics = record.attempt(_read_metrics, folder / "metrics.jsonl") or []
    holdout = record.attempt(
        lambda path: _read_object(path, "loss", "images"), folder / "holdout.json"
    )
    lines = [line["images_per_expert"] for line in metrics if "images_per_expert" in line]
    experts = None
    # a stage without cluster-routed experts writes empty lists
    if lines and lines[0]:
        experts = record.attempt(lambda _: np.array(lines, np.int64), folder / "metrics.jsonl")
    return Stage(metrics, holdout, experts)


def read_record(root: Path) -> Record:
    """Read all parts of a run that exist.

    Raises:
        ConfigError: `root` is no run directory.
    """
    if not (root / "config.yaml").is_file():
        raise ConfigError(f"{root}: is not a run directory (no config.yaml)")
    run, record = Run(root), Record(root)
    loaded = record.attempt(lambda path: load_run(path.parent), root / "config.yaml")
    record.config = loaded[1] if loaded else None
    record.provenance = record.attempt(_read_object, root / "provenance.json") or {}
    record.stages = {name: _read_stage(record, run.stage(name)) for name in STAGES}
    record.clusters = _read_clusters(record, run.clusters)
    moce = run.stage("moce")
    record.routing = _read_steps(record, moce / "routing", _read_table)
    record.certainty = _read_steps(record, moce / "gate", _read_certainty)
    record.placements = _read_steps(record, moce / "placement", _read_placement)
    for path in [folder / "metrics.json" for folder in _transfer_folders(root)]:
        if path.exists() and (metrics := record.attempt(_read_transfer, path)):
            record.transfers.append(metrics)
            # a choice by token usage has no clusters
            choice = record.attempt(_read_object, path.with_name("choice.json"))
            if choice and choice.get("clusters"):
                found = record.attempt(_read_choice, path.with_name("choice.json"))
                record.choices |= {metrics["task"]: found} if found else {}
    record.faults = record.attempt(read_faults, run.faults) or []
    record.artefacts = _list_artefacts(run)
    return record
