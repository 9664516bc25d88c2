"""Results of a comparison: one line per fit, kept as soon as it is there, and their summary.

`results.jsonl` is the ledger: every fit appends its line with the fingerprint of what it depended
on, so that an interrupted or extended comparison repeats nothing. `metrics.json` is made from the
lines that still hold:

    {"task": "digits", "metric": "accuracy",
     "results": [{"backbone": "moce", "protocol": "knn", "seed": 0, "value": 0.93, ...}, ...],
     "summary": [{"backbone": "moce", "protocol": "knn", "mean": 0.93, "std": 0.0}, ...],
     "differences": [{"backbone": "moce", "protocol": "knn", "reference": "mae", "mean": 0.02, ...},
     ...]}

That of a suite of tasks has the rows of all of them, the means over tasks and what failed.
"""

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moce_dist.config import TransferConfig
from moce_dist.run import fingerprint, read_jsonl, write_atomic

Row = dict[str, Any]


class Fit(NamedTuple):
    """One training or fitting: which backbone, by which protocol, with which seed."""

    backbone: str
    protocol: str
    seed: int

    @property
    def is_trained(self) -> bool:
        """Tell whether the backbone learns too, step by step."""
        return self.protocol == "finetune"


def budget(
    transfer: TransferConfig, protocol: str, *, is_segmentation: bool, is_detection: bool = False
) -> dict[str, Any]:
    """Select the fields of the configuration that a protocol's result depends on."""
    fields: dict[str, Any] = transfer.model_dump(mode="json")
    if is_segmentation or is_detection:
        prefix = "segment_" if is_segmentation else "detect_"
        kept = [name for name in fields if name.startswith(prefix)]
    else:
        kept = {"knn": ["knn_k"], "linear": ["linear_epochs"], "finetune": ["finetune"]}[protocol]
    return {name: fields[name] for name in ["max_train", *kept]}


@dataclass(frozen=True)
class Ledger:
    """The lines of `results.jsonl` that were made under the present conditions.

    `common` has, per protocol, the fingerprint of task, run and budget; `own` has, per requested
    backbone, the fingerprint of its weights and choice.
    """

    path: Path
    common: Mapping[str, str]
    own: Mapping[str, str]

    def rows(self) -> dict[Fit, Row]:
        """Return the newest valid row of every fit, requested now or before."""
        found: dict[Fit, Row] = {}
        for line in read_jsonl(self.path):
            row = line["row"]
            fit = Fit(row["backbone"], row["protocol"], row["seed"])
            is_same = line["common"] == self.common.get(fit.protocol)
            if is_same and line["own"] == self.own.get(fit.backbone, line["own"]):
                found[fit] = row
        return found

    def identity(self, fit: Fit) -> str:
        """Fingerprint of everything that a fit's result depends on."""
        return fingerprint([self.common[fit.protocol], self.own[fit.backbone], list(fit)])

    def add(self, row: Row) -> None:
        """Append the row of a finished fit."""
        line = {
            "common": self.common[row["protocol"]],
            "own": self.own[row["backbone"]],
            "row": row,
        }
        # rewritten whole: an appended line after one that a kill cut off would be lost with it
        lines = [*read_jsonl(self.path), line]
        write_atomic(self.path, "".join(json.dumps(each) + "\n" for each in lines))


def fingerprints(values: Mapping[str, Any]) -> dict[str, str]:
    """Fingerprint every value of a mapping."""
    return {name: fingerprint(value) for name, value in values.items()}


def summarise(rows: Iterable[Row]) -> list[Row]:
    """Mean and standard deviation (of the sample; 0 for one seed) per backbone and protocol."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        values.setdefault((row["backbone"], row["protocol"]), []).append(row["value"])
    return [
        {
            "backbone": backbone,
            "protocol": protocol,
            "mean": statistics.fmean(found),
            "std": statistics.stdev(found) if len(found) > 1 else 0.0,
        }
        for (backbone, protocol), found in values.items()
    ]


def reference_of(rows: Iterable[Row]) -> str | None:
    """Choose what the others are compared with: `mae` if it is there, else the first backbone."""
    names = list(dict.fromkeys(row["backbone"] for row in rows))
    return "mae" if "mae" in names else next(iter(names), None)


def differences(rows: Iterable[Row]) -> list[Row]:
    """Mean and deviation of a backbone's value minus the reference's, seed by seed.

    Fits of one seed met the same images in the same order, so their difference varies less than
    the values. Seeds that only one of the two has are left out.
    """
    ordered = list(rows)
    reference = reference_of(ordered)
    values = {(r["backbone"], r["protocol"], r["seed"]): r["value"] for r in ordered}
    found: dict[tuple[str, str], list[float]] = {}
    for (backbone, protocol, seed), value in values.items():
        other = values.get((reference or "", protocol, seed))
        if backbone != reference and other is not None:
            found.setdefault((backbone, protocol), []).append(value - other)
    return [
        {
            "backbone": backbone,
            "protocol": protocol,
            "reference": reference,
            "mean": statistics.fmean(each),
            "std": statistics.stdev(each) if len(each) > 1 else 0.0,
            "num_seeds": len(each),
        }
        for (backbone, protocol), each in found.items()
    ]


def make_metrics(task: str, metric: str, rows: Iterable[Row]) -> dict[str, Any]:
    """Make the content of metrics.json."""
    ordered = list(rows)
    return {
        "task": task,
        "metric": metric,
        "results": ordered,
        "summary": summarise(ordered),
        "differences": differences(ordered),
    }


def _over_tasks(tables: Iterable[Iterable[Row]]) -> list[Row]:
    """Average rows of several tasks by backbone and protocol.

    Tasks vary independently, so the deviation of their mean is the root of the summed squares over
    their number.
    """
    found: dict[tuple[str, str], list[Row]] = {}
    for rows in tables:
        for row in rows:
            found.setdefault((row["backbone"], row["protocol"]), []).append(row)
    return [
        {
            **{k: v for k, v in rows[0].items() if k in ("backbone", "protocol", "reference")},
            "mean": statistics.fmean(row["mean"] for row in rows),
            "std": sum(row["std"] ** 2 for row in rows) ** 0.5 / len(rows),
            "num_tasks": len(rows),
        }
        for rows in found.values()
    ]


def suite_metrics(tasks: Iterable[Mapping[str, Any]], failed: Mapping[str, str]) -> dict[str, Any]:
    """Make the metrics.json of a suite from those of its tasks and the reasons of failures."""
    done = list(tasks)
    return {
        "task": "all",
        "metric": "mean over tasks",
        "results": [
            {"task": metrics["task"], "metric": metrics["metric"], **row}
            for metrics in done
            for row in metrics["results"]
        ],
        "summary": _over_tasks(metrics["summary"] for metrics in done),
        "differences": _over_tasks(metrics["differences"] for metrics in done),
        "tasks": [{k: v for k, v in metrics.items() if k != "results"} for metrics in done],
        "failed": dict(failed),
    }
