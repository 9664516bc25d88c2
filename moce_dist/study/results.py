"""The results of a study: every value, the tables made of them, and the cost of every arm.

    RUN/transfer/TASK/metrics.json, RUN/STAGE --collect--> study.json

A table holds the tasks of one protocol and metric. Where tasks of classification have different
metrics, one table holds them all: its metric is `classification`, and its `metrics` is
{TASK: METRIC}. If several protocols measure the same tasks by the same metric, a further table
holds the means over these protocols; if they measure different ones, `why_no_mean` says so.

Every arm of a table, and every difference to another arm, is
{"mean": SPREAD or null, "over": {"seeds": [...], "tasks": [...]}, "tasks": {TASK: SPREAD}}.
`mean` is over all pairs of the seeds and tasks of `over`; each of `tasks` is over all its seeds.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import psutil
import torch

from moce_dist.config import identity
from moce_dist.run.artefacts import fingerprint, versions
from moce_dist.run.directory import Run
from moce_dist.run.files import read_jsonl
from moce_dist.run.rows import VALIDATION
from moce_dist.study.plan import Kind, PlannedRun
from moce_dist.study.request import partners_of
from moce_dist.study.runner import Runner
from moce_dist.study.statistics import Table, rectangle, spread
from moce_dist.train.metrics import METRICS_NAME, training_seconds

Line = dict[str, Any]
MEAN = "mean"
CLASSIFICATION = "classification"
_OF_CLASSES = ("accuracy", "mean_class_accuracy", "mAP")


def collect(runner: Runner, split: str) -> Line:
    """Make the content of study.json from what is finished."""
    plan, study = runner.plan, runner.plan.study
    values = read_values(runner)
    return {
        "title": study.title,
        "split": split,
        "reference": study.reference,
        "seeds": list(study.seeds),
        "arms": {name: _arm(runner, name, values) for name in study.arms},
        "tables": tables(values, partners_of(study), study.draws),
        "values": values,
        "runs": {name: _run(runner, run) for name, run in plan.runs.items()},
        "failed": runner.failed,
        "left": len(plan.pieces) - len(runner.done),
        "study": study.model_dump(mode="json"),
        "machine": machine(),
        "versions": versions(),
        "command": sys.argv,
        "time": time.strftime("%FT%TZ", time.gmtime()),
    }


def machine() -> Line:
    """Describe this machine."""
    return {
        "name": platform.node(),
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def read_values(runner: Runner) -> list[Line]:
    """Read the values of all cells whose comparison is finished."""
    found = []
    folders = {(p.run, p.request.folder): p for p in runner.plan.pieces if p.request is not None}
    for cell in runner.plan.cells:
        piece = folders[cell.run, cell.request.folder]
        if piece.id not in runner.done:
            continue
        metrics = json.loads((piece.folder / "metrics.json").read_text())
        for row in metrics["results"]:
            is_mine = row["backbone"] == cell.backbone and row["protocol"] in cell.request.protocols
            if is_mine and row["seed"] == cell.seed:
                known = {k: row[k] for k in ("num_train", "num_test", "choice", "cost") if k in row}
                found.append(
                    {
                        "arm": cell.arm,
                        "seed": cell.seed,
                        "task": cell.task,
                        "protocol": row["protocol"],
                        # the study says itself which images were used
                        "metric": metrics["metric"].removesuffix(VALIDATION),
                        "value": row["value"],
                        "run": cell.run,
                        "folder": cell.request.folder,
                        "backbone": cell.backbone,
                        **known,
                    }
                )
    return found


def tables(values: Iterable[Line], partners: Mapping[str, str | None], draws: int) -> list[Line]:
    """Make a table per protocol and metric, and the tables of means over protocols.

    `partners` maps every arm to the arm that its differences are taken to, or to None.
    """
    values = list(values)
    metrics = {value["task"]: value["metric"] for value in values}
    is_mixed = len(set(metrics.values()).intersection(_OF_CLASSES)) > 1
    found: dict[tuple[str, str], dict[tuple[str, int, str], float]] = {}
    for value in values:
        key, metric = (value["arm"], value["seed"], value["task"]), value["metric"]
        group = CLASSIFICATION if is_mixed and metric in _OF_CLASSES else metric
        found.setdefault((value["protocol"], group), {})[key] = value["value"]
    for metric in dict.fromkeys(metric for _, metric in found):
        alike = [cells for (_, of), cells in found.items() if of == metric]
        common = set.intersection(*(set(cells) for cells in alike))
        tasks = [{task for *_, task in cells} for cells in alike]
        if len(alike) > 1 and all(each == tasks[0] for each in tasks):
            means = {
                key: statistics.fmean(cells[key] for cells in alike)
                for key in alike[0]
                if key in common
            }
            if means:
                found[MEAN, metric] = means
    made = []
    for (protocol, metric), cells in found.items():
        table = {"protocol": protocol, "metric": metric, **_table(cells, partners, draws)}
        if metric == CLASSIFICATION:
            table["metrics"] = {task: metrics[task] for task in table["tasks"]}
        made.append(table)
    return made


def why_no_mean(tables: Sequence[Line]) -> list[str]:
    """Say of every metric whose protocols have no table of means why they have none.

    A task that lacks a protocol is not averaged over the others: its mean would be of other
    measures than those of the tasks beside it.
    """
    found = []
    for metric in dict.fromkeys(table["metric"] for table in tables):
        of = {table["protocol"]: table["tasks"] for table in tables if table["metric"] == metric}
        if len(of) < 2 or MEAN in of:
            continue
        every = dict.fromkeys(task for tasks in of.values() for task in tasks)
        lacking = [
            f"{', '.join(lost)} by {protocol}"
            for protocol, tasks in of.items()
            if (lost := [task for task in every if task not in tasks])
        ]
        why = f"no value of {'; '.join(lacking)}" if lacking else "no arm has a value by all"
        found.append(f"{', '.join(of)} ({metric}) have no mean: {why}.")
    return found


def _table(
    cells: dict[tuple[str, int, str], float], partners: Mapping[str, str | None], draws: int
) -> Line:
    seeds = list(dict.fromkeys(seed for _, seed, _ in cells))
    tasks = list(dict.fromkeys(task for _, _, task in cells))
    of_arm = {
        arm: np.array([[cells.get((arm, seed, task), np.nan) for task in tasks] for seed in seeds])
        for arm in partners
    }
    rows = {}
    for arm, table in of_arm.items():
        rows[arm] = _row(table, seeds, tasks, draws)
        if (partner := partners[arm]) is not None:
            # a cell that one of the two arms lacks is missing here
            difference = _row(table - of_arm[partner], seeds, tasks, draws)
            rows[arm]["difference"] = {"to": partner, **difference}
    return {"tasks": tasks, "arms": rows}


def _row(table: Table, seeds: Sequence[int], tasks: Sequence[str], draws: int) -> Line:
    """Describe one arm, or one difference, by its table (S, T); NaN is a missing cell."""
    rows, columns = rectangle(table)
    mean = spread(table[np.ix_(rows, columns)], draws)
    each = {task: spread(table[:, i : i + 1], draws) for i, task in enumerate(tasks)}
    return {
        "mean": mean and mean._asdict(),
        "over": {"seeds": [seeds[i] for i in rows], "tasks": [tasks[i] for i in columns]},
        "tasks": {task: found._asdict() for task, found in each.items() if found},
    }


def _arm(runner: Runner, name: str, values: list[Line]) -> Line:
    plan, arm = runner.plan, runner.plan.study.arms[name]
    runs, kinds = plan.runs_of(name), plan.stages_of(name)
    costs = []
    for run in runs:
        try:
            summary = json.loads((Run(run.root).clusters / "summary.json").read_text())
        except OSError:
            summary = {}
        costs.append(plan.cost(name, run, summary.get("iterations")))
    seconds = [stage_seconds(runner, run, kinds) for run in runs]
    known = [each for each in seconds if each is not None]
    further = [v["cost"]["seconds"] for v in values if v["arm"] == name and v.get("cost")]
    return {
        **arm.model_dump(mode="json"),
        "runs": [run.name for run in runs],
        "cost": {
            "mae_images": statistics.fmean(cost.mae_images for cost in costs),
            "moce_images": statistics.fmean(cost.moce_images for cost in costs),
            "training_flop": statistics.fmean(cost.training for cost in costs),
            "clustering_flop": statistics.fmean(cost.clustering for cost in costs),
            "seconds": statistics.fmean(known) + (statistics.fmean(further) if further else 0)
            if known
            else None,
        },
    }


def stage_seconds(runner: Runner, run: PlannedRun, kinds: Sequence[Kind]) -> float | None:
    """Return the seconds that a run's stages took, whichever run made them; None if unfinished.

    For a training stage, only the time between logged steps counts, so interruptions do not.
    """
    total = 0.0
    for kind in kinds:
        maker = runner.plan.runs[run.makers[kind]]
        took = runner.journal.seconds(f"{maker.name}/{kind}")
        if took is None:
            return None
        trained = training_seconds(read_jsonl(maker.root / kind / METRICS_NAME))
        total += trained or took
    return total


def _run(runner: Runner, run: PlannedRun) -> Line:
    return {
        "config_sha256": fingerprint(identity(run.config)),
        "seed": run.config.seed,
        "data": run.source.name,
        "num_images": run.source.num_images,
        "stages": {
            stage: {
                "made_by": maker,
                "images": run.images(stage),
                "seconds": runner.journal.seconds(f"{maker}/{stage}"),
            }
            for stage, maker in run.makers.items()
        },
    }
