"""Results of a comparison: one line per fit, written as soon as it is finished, and a summary.

`results.jsonl` is the ledger: every fit appends its line with the fingerprint of what it depends
on, so that an interrupted or extended comparison repeats nothing. `metrics.json` is made from the
lines that are still valid:

    {"task": "digits", "metric": "accuracy",
     "results": [{"backbone": "moce", "protocol": "knn", "seed": 0, "value": 0.93, ...}, ...],
     "summary": [{"backbone": "moce", "protocol": "knn", "mean": 0.93, "std": null}, ...],
     "differences": [{"backbone": "moce", "protocol": "knn", "reference": "control", "mean": 0.02,
     ...}, ...]}

A fit that does not depend on its seed has one row, with `is_drawn` false, whatever `--seeds` says.
A row of a backbone with further steps has their `cost`: {"images": 100000, "seconds": 812.5}.
A summary row has `steps_fewer` if its backbone was trained for fewer steps than another stage of
the run. The metrics.json of a suite has the rows of all its tasks, the means over tasks, and the
failures.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moce_dist.run.artefacts import fingerprint
from moce_dist.run.files import read_jsonl, write_jsonl
from moce_dist.run.rows import VALIDATION
from moce_dist.transfer.request import further_of

Row = dict[str, Any]


class Fit(NamedTuple):
    """One fit: a backbone, a protocol and a seed."""

    backbone: str
    protocol: str
    seed: int

    @property
    def is_trained(self) -> bool:
        """Tell whether the backbone itself is trained, step by step."""
        return self.protocol == "finetune"


@dataclass(frozen=True)
class Ledger:
    """The lines of `results.jsonl` that were made under the present conditions.

    `common` has, per protocol, the fingerprint of task and budget; `own` has, per requested
    backbone, the fingerprint of its weights and choice; `stages` has, for any backbone of the run,
    the fingerprint of the checkpoint that it comes from. `choosing` and `further` are fingerprints
    of how experts are chosen and of the further steps: backbones that are not requested now, and so
    are not made, must have been made in the same way. If `further` is None, rows after the further
    steps that were taken last count, so that all have as many. `select` is how plain `moce`
    chooses, and `control` the fingerprint of the control, a candidate where that is `validate`.
    """

    path: Path
    common: Mapping[str, str]
    own: Mapping[str, str]
    stages: Mapping[str, str] = field(default_factory=dict)
    choosing: str | None = None
    further: str | None = None
    select: str | None = None
    control: str | None = None

    def rows(self) -> dict[Fit, Row]:
        """Return the newest valid row of every fit, requested now or before."""
        return {fit: line["row"] for fit, line in self._lines().items()}

    def identities(self) -> dict[Fit, str]:
        """Return what `identity` was when each of `rows` was made."""
        return {
            fit: fingerprint([line["common"], line["own"], list(fit)])
            for fit, line in self._lines().items()
        }

    def _lines(self) -> dict[Fit, dict[str, Any]]:
        found: dict[Fit, dict[str, Any]] = {}
        lines = read_jsonl(self.path)
        noted = [line["further"] for line in lines if line.get("further")]
        further = self.further or (noted[-1] if noted else None)
        for line in lines:
            row = line["row"]
            fit = Fit(row["backbone"], row["protocol"], row["seed"])
            if fit.backbone in self.own:
                is_same = line["own"] == self.own[fit.backbone]
            else:
                is_same = line.get("stage") in self._origins(fit.backbone, further)
            if is_same and line["common"] == self.common.get(fit.protocol):
                found[fit] = line
        return found

    def _origins(self, backbone: str, further: str | None) -> list[str | None]:
        """Return the origin of a backbone's weights, in this version's form and an earlier one's.

        `further` is the fingerprint of further steps, if the backbone has any.
        Earlier versions counted the images of `control+own` by a choice of experts.
        """
        kind, _, how = backbone.partition("+")[0].partition(":")
        is_chosen, is_further = kind in ("moce", "token"), "+" in backbone
        ways = [further if is_further else None]
        if kind == "moce" and (how or self.select) == "validate":
            ways.append(self.control)
        chosen = [self.choosing, *ways]
        forms = [chosen] if is_chosen else [ways, chosen] if is_further else [ways]
        stage, found = self.stages.get(kind), []
        for form in forms:
            known = [way for way in form if way is not None]
            found.append(fingerprint([stage, *known]) if known else stage)
        return found

    def identity(self, fit: Fit) -> str:
        """Fingerprint of everything that a fit's result depends on."""
        return fingerprint([self.common[fit.protocol], self.own[fit.backbone], list(fit)])

    def add(self, row: Row) -> None:
        """Append the row of a finished fit."""
        line = {
            "common": self.common[row["protocol"]],
            "own": self.own[row["backbone"]],
            "stage": self._origins(row["backbone"], self.further)[0],
            **({"further": self.further} if further_of(row["backbone"]) else {}),
            "row": row,
        }
        # rewrite the file: a line appended behind one that a kill truncated would be lost with it
        write_jsonl(self.path, [*read_jsonl(self.path), line])


def fingerprints(values: Mapping[str, Any]) -> dict[str, str]:
    """Fingerprint every value of a mapping."""
    return {name: fingerprint(value) for name, value in values.items()}


def _spread(values: Sequence[float]) -> Row:
    # a single seed has no deviation, and 0 would claim that it was measured
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std}


def summarise(rows: Iterable[Row], steps_fewer: Mapping[str, int] | None = None) -> list[Row]:
    """Compute the mean and the sample standard deviation per backbone and protocol.

    `steps_fewer` says, per backbone, how many fewer optimiser steps it took than the longest.
    `skipped_images` is the largest number of images that a fit had to skip.
    """
    fewer = {name: steps for name, steps in (steps_fewer or {}).items() if steps > 0}
    values: dict[tuple[str, str], list[float]] = {}
    skipped: dict[tuple[str, str], int] = {}
    for row in rows:
        key = row["backbone"], row["protocol"]
        values.setdefault(key, []).append(row["value"])
        skipped[key] = max(skipped.get(key, 0), row.get("skipped_images", 0))
    return [
        {
            "backbone": backbone,
            "protocol": protocol,
            **_spread(found),
            **({"steps_fewer": fewer[backbone]} if backbone in fewer else {}),
            **({"skipped_images": most} if (most := skipped[backbone, protocol]) else {}),
        }
        for (backbone, protocol), found in values.items()
    ]


def references_of(backbone: str, names: Sequence[str]) -> list[str]:
    """Choose what a backbone is compared with, out of the backbones at hand.

    With further steps that is the control after as many: on the task's clusters, and on all data;
    for those of the MAE, or where there is no control, the MAE after as many. Otherwise it is the
    control, else `mae`, else the first backbone without further steps.
    """
    base, _, further = backbone.partition("+")
    if further == "all":
        return []
    if further in ("own", "train"):
        control, mae = ("control+own", "control+all"), ("mae+own", "mae+all")
        has_control = any(name.partition("+")[0] == "control" for name in names)
        fair = control if has_control and base != "mae" else mae
        if found := [name for name in fair if name in names and name != backbone]:
            return found
    plain = [name for name in names if name.startswith("timm:") or "+" not in name]
    usual = next((name for name in ("control", "mae", *plain) if name in plain), None)
    return [] if usual in (None, backbone) else [str(usual)]


def differences(rows: Iterable[Row]) -> list[Row]:
    """Compute mean and deviation of a backbone's value minus its reference's, seed by seed.

    Fits of one seed see the same images in the same order, so their difference varies less than
    the values. Seeds that only one of the two has are left out; a value that does not depend on the
    seed stands for all.
    """
    ordered = list(rows)
    names = list(dict.fromkeys(row["backbone"] for row in ordered))
    values = {(r["backbone"], r["protocol"], r["seed"]): r["value"] for r in ordered}
    fixed = {
        (r["backbone"], r["protocol"]): r["value"] for r in ordered if not r.get("is_drawn", True)
    }
    seeds = list(dict.fromkeys(row["seed"] for row in ordered))
    found: dict[tuple[str, str, str], list[float]] = {}
    for backbone, protocol in dict.fromkeys((r["backbone"], r["protocol"]) for r in ordered):
        for reference in references_of(backbone, names):
            pair = [(name, protocol) for name in (backbone, reference)]
            for seed in seeds[:1] if all(each in fixed for each in pair) else seeds:
                mine, other = (values.get((*each, seed), fixed.get(each)) for each in pair)
                if mine is not None and other is not None:
                    found.setdefault((backbone, protocol, reference), []).append(mine - other)
    return [
        {
            "backbone": backbone,
            "protocol": protocol,
            "reference": reference,
            **_spread(each),
            "num_seeds": len(each),
        }
        for (backbone, protocol, reference), each in found.items()
    ]


def make_metrics(
    task: str, metric: str, rows: Iterable[Row], steps_fewer: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Make the content of metrics.json; for `steps_fewer` see `summarise`."""
    ordered = list(rows)
    return {
        "task": task,
        "metric": metric,
        "results": ordered,
        "summary": summarise(ordered, steps_fewer),
        "differences": differences(ordered),
    }


def _over_tasks(tables: Iterable[Iterable[Row]]) -> list[Row]:
    """Average rows of several tasks by backbone, protocol and reference.

    Tasks are taken as independent, so the deviation of their mean is the root of the summed squared
    deviations, divided by the number of tasks. It is None if a task has none.
    """
    found: dict[tuple[Any, ...], list[Row]] = {}
    for rows in tables:
        for row in rows:
            key = tuple(row.get(name) for name in ("backbone", "protocol", "reference"))
            found.setdefault(key, []).append(row)
    kept = ("backbone", "protocol", "reference", "steps_fewer")
    return [
        {
            **{name: value for name, value in rows[0].items() if name in kept},
            "mean": statistics.fmean(row["mean"] for row in rows),
            "std": None
            if any(row["std"] is None for row in rows)
            else sum(row["std"] ** 2 for row in rows) ** 0.5 / len(rows),
            "num_tasks": len(rows),
        }
        for rows in found.values()
    ]


def suite_metrics(tasks: Iterable[Mapping[str, Any]], failed: Mapping[str, str]) -> dict[str, Any]:
    """Make the metrics.json of a suite from those of its tasks and the reasons of failures."""
    done = list(tasks)
    is_validation = done and all(metrics["metric"].endswith(VALIDATION) for metrics in done)
    return {
        "task": "all",
        "metric": f"mean over tasks{VALIDATION if is_validation else ''}",
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
