"""The page of a study: one HTML file that needs no network and no script.

Every metric is a fraction, shown in points (per cent). The bar beside a difference shows its
interval on a scale that all rows of a table share.
"""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from moce_dist.settings import dump_yaml
from moce_dist.study.results import MEAN, why_no_mean

Line = dict[str, Any]


def render(found: Line) -> str:
    """Render the content of study.json as HTML text; every value is escaped."""
    environment = Environment(
        loader=PackageLoader("moce_dist.study", "."), autoescape=True, undefined=StrictUndefined
    )
    arms = found["arms"]
    base = arms[found["reference"]]["cost"]
    total = base["training_flop"] + base["clustering_flop"]
    rows = []
    for name, arm in arms.items():
        cost = arm["cost"]
        flop = cost["training_flop"] + cost["clustering_flop"]
        rows.append(
            {
                "arm": name,
                "about": arm["about"],
                "backbone": arm["backbone"],
                "images": f"{cost['mae_images']:,.0f} + {cost['moce_images']:,.0f}",
                "training": f"{cost['training_flop'] / 1e12:,.2f}",
                "clustering": f"{cost['clustering_flop'] / 1e12:,.2f}",
                "ratio": f"{flop / total:.3f}" if total else "-",
                "seconds": "-" if cost["seconds"] is None else f"{cost['seconds']:,.0f}",
                "runs": len(arm["runs"]),
            }
        )
    return environment.get_template("page.html.jinja").render(
        found=found,
        tables=[
            _table(table, found["reference"])
            for table in sorted(found["tables"], key=lambda table: table["protocol"] != MEAN)
        ],
        no_means=why_no_mean(found["tables"]),
        fewest_seeds=_fewest_seeds(found["tables"]),
        costs=rows,
        study=dump_yaml(found["study"]),
    )


def points(share: float | None, *, sign: bool = False) -> str:
    """Format a fraction in points (per cent); None is a dash."""
    return "-" if share is None else f"{100 * share:{'+' if sign else ''}.2f}"


def _fewest_seeds(tables: list[Line]) -> int | None:
    """Return the fewest seeds that an interval of the bootstrap is from; None without one.

    A difference on a single task has Student's interval instead.
    """
    spreads = [row.get("difference", {}).get("mean") for t in tables for row in t["arms"].values()]
    return min(
        (s["num_seeds"] for s in spreads if s and s["low"] is not None and s["num_tasks"] > 1),
        default=None,
    )


def _table(table: Line, reference: str) -> Line:
    rows = [(name, row) for name, row in table["arms"].items() if row["mean"] is not None]
    ends = [
        abs(spread[end])
        for _, row in rows
        if (spread := row.get("difference", {}).get("mean"))
        for end in ("low", "high", "mean")
        if spread[end] is not None
    ]
    scale = max(ends, default=0) or 1.0
    protocol = "mean of the protocols" if table["protocol"] == MEAN else table["protocol"]
    metrics = table.get("metrics", {})
    is_alone = len(table["tasks"]) == 1
    return {
        "protocol": protocol,
        "metric": metrics.get(table["tasks"][0], table["metric"]) if is_alone else table["metric"],
        "metrics": metrics,
        "tasks": table["tasks"],
        "scale": points(scale),
        "rows": [_row(name, row, table["tasks"], scale, reference) for name, row in rows],
    }


def _row(name: str, row: Line, tasks: list[str], scale: float, reference: str) -> Line:
    mean, to = row["mean"], row.get("difference") or {}
    difference, each = to.get("mean"), to.get("tasks", {})
    return {
        "arm": name,
        "mean": _with_deviation(mean),
        "num_seeds": mean["num_seeds"],
        "num_tasks": mean["num_tasks"],
        "difference": points(difference["mean"], sign=True) if difference else "",
        "to": to["to"] if to and to["to"] != reference else "",
        "interval": _interval(difference),
        "of": _other(to["over"], row["over"]) if difference else "",
        "over_seeds": _over_seeds(difference),
        "bar": _bar(difference, scale),
        "verdict": _verdict(difference),
        "tasks": [
            {
                "value": _with_deviation(row["tasks"].get(task)),
                "difference": points(spread["mean"], sign=True) if spread else "",
                "verdict": _verdict(spread),
            }
            for task, spread in ((task, each.get(task)) for task in tasks)
        ],
    }


def _other(difference: Line, mean: Line) -> str:
    """Count the seeds, or tasks, of a difference if they are not those of its arm's mean."""
    found = [
        f"{len(difference[what])} of the {what}"
        for what in ("seeds", "tasks")
        if difference[what] != mean[what]
    ]
    return " and ".join(found)


def _with_deviation(spread: Line | None) -> str:
    if spread is None:
        return "-"
    deviation = "" if spread["std"] is None else f" ± {points(spread['std'])}"
    return f"{points(spread['mean'])}{deviation}"


def _interval(spread: Line | None) -> str:
    if spread is None or spread["low"] is None:
        return ""
    return f"{points(spread['low'], sign=True)} to {points(spread['high'], sign=True)}"


def _over_seeds(spread: Line | None) -> str:
    if spread is None or spread["half"] is None:
        return ""
    ends = (points(spread["mean"] + side * spread["half"], sign=True) for side in (-1, 1))
    return " to ".join(ends)


def _verdict(spread: Line | None) -> str:
    """Name the side of 0 on which both intervals lie; "" if one of them holds 0."""
    if spread is None or spread["low"] is None:
        return ""
    low = min(spread["low"], spread["mean"] - spread["half"])
    high = max(spread["high"], spread["mean"] + spread["half"])
    return "better" if low > 0 else "worse" if high < 0 else ""


def _bar(spread: Line | None, scale: float) -> Line | None:
    """Place mean and interval on a line from 0 to 200, where 100 is a difference of 0."""
    if spread is None:
        return None
    low, high = (spread["mean"] if spread[end] is None else spread[end] for end in ("low", "high"))
    place = {"mean": spread["mean"], "low": low, "high": high}
    return {end: round(100 + 92 * value / scale, 1) for end, value in place.items()}
