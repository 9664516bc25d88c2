"""Figures of a run as SVG text, to be inlined in the page.

Text stays text, ids are derived from the figure's name, no time of making is written: the same run
gives the same bytes.

Letters: K clusters, L MoE layers, E experts per layer, T logged steps.
"""

import io
import re
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moce_dist.cluster.spread import nearest_others
from moce_dist.report.record import Clusters, Record, Stage

COLOURS = {"mae": "#4477aa", "moce": "#cc6677", "control": "#228833"}
_GREY = "#667085"
_MAX_POINTS = 800
_MAX_CLUSTERS = 512
# Paul Tol's muted scheme, readable for colour-blind eyes
_MUTED = ("#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255")
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#98a2b3",
    "axes.labelcolor": _GREY,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "axes.grid": True,
    "grid.color": "#eaecf0",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
_TITLES = {"mae": "stage mae", "moce": "stage moce", "control": "stage control"}


def _canvas(rows: int, columns: int, height: float) -> tuple[Figure, NDArray[np.object_]]:
    figure = Figure(figsize=(9.2, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(rows, columns, squeeze=False).ravel())


def _svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    # matplotlib numbers its groups alike in every figure, and ids must be unique in a page
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text[text.index("<svg") :])


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    every = max(1, -(-len(x) // _MAX_POINTS))
    return x[::every], y[::every]


def _plot(axes: Axes, stage: Stage, metric: str, colour: str, label: str = "") -> None:
    x, y = _thin(*stage.column(metric))
    marker = "o" if len(x) < 40 else ""
    axes.plot(x, y, color=colour, linewidth=1.4, label=label, marker=marker, markersize=2.5)


def _trained(record: Record) -> dict[str, Stage]:
    return {name: stage for name, stage in record.stages.items() if stage.metrics}


def losses(record: Record) -> str | None:
    """Draw the MAE loss of the stages against images seen, held-out losses dashed."""
    stages = _trained(record)
    if not stages:
        return None
    with rc_context(_STYLE):
        figure, panels = _canvas(1, len(stages), 2.7)
        for axes, (name, stage) in zip(panels, stages.items(), strict=True):
            _plot(axes, stage, "loss", COLOURS[name], "training")
            if stage.holdout:
                axes.axhline(stage.holdout["loss"], color="#222", ls="--", lw=1, label="held-out")
            axes.set(title=f"{_TITLES[name]}: MAE loss", xlabel="images seen")
            axes.legend(loc="upper right")
        return _svg(figure, "losses")


def gate_losses(record: Record) -> str | None:
    """Draw the balance and confidence losses of stage moce."""
    stage = record.stages["moce"]
    if not any(stage.column("loss_balance")[1]):
        # a stage without experts writes zeros
        return None
    with rc_context(_STYLE):
        figure, panels = _canvas(1, 2, 2.1)
        for axes, metric in zip(panels, ("loss_balance", "loss_confidence"), strict=True):
            _plot(axes, stage, metric, COLOURS["moce"])
            axes.set(title=metric, xlabel="images seen", ylim=(0, None))
        return _svg(figure, "gate")


def speed(record: Record) -> str | None:
    """Draw learning rate and images per second of the stages."""
    stages = _trained(record)
    if not stages:
        return None
    with rc_context(_STYLE):
        figure, panels = _canvas(1, 2, 2.3)
        for axes, (metric, title) in zip(
            panels, (("lr", "learning rate"), ("images_per_s", "images per second")), strict=True
        ):
            for name, stage in stages.items():
                _plot(axes, stage, metric, COLOURS[name], _TITLES[name])
            axes.set(title=title, xlabel="images seen in the stage", ylim=(0, None))
        panels[0].legend()
        return _svg(figure, "speed")


def experts(record: Record) -> str | None:
    """Draw every layer's share of images per expert over time, (E, T) a panel."""
    counts = record.stages["moce"].experts
    if counts is None:
        return None
    counts = counts[:: -(-len(counts) // _MAX_POINTS)]
    shares = counts / np.maximum(1, counts.sum(axis=2, keepdims=True))
    layers, num_experts = counts.shape[1:]
    with rc_context(_STYLE | {"axes.grid": False}):
        columns = min(3, layers)
        rows = -(-layers // columns)
        figure, panels = _canvas(rows, columns, 0.4 + rows * max(1.5, 0.7 + 0.11 * num_experts))
        top = max(2 / num_experts, float(shares.max()))
        for axes in panels[layers:]:
            axes.remove()
        for layer, axes in enumerate(panels[:layers]):
            image = axes.imshow(
                shares[:, layer].T, aspect="auto", cmap="Blues", vmin=0, vmax=top, origin="lower"
            )
            ticks = range(0, num_experts, -(-num_experts // 8))
            axes.set(title=f"MoE layer {layer}", yticks=ticks, xlabel="logged step")
            axes.set_ylabel("expert" if layer % columns == 0 else "")
        bar = figure.colorbar(image, ax=list(panels[:layers]), shrink=0.8, pad=0.01)
        bar.set_label(f"share (equal: {1 / num_experts:.3f})")
        return _svg(figure, "experts")


def traffic(record: Record) -> str | None:
    """Draw images exchanged, and how many clusters changed their expert between tables."""
    x, exchanged = record.stages["moce"].column("images_exchanged")
    if not x and len(record.routing) < 2:
        return None
    with rc_context(_STYLE):
        figure, panels = _canvas(1, 2, 2.3)
        panels[0].plot(*_thin(x, exchanged), color=COLOURS["moce"], linewidth=1.4)
        panels[0].set(title="images exchanged in a step, summed over layers", xlabel="images seen")
        steps, changes = routing_changes(record)
        panels[1].bar(*_thin(steps, changes), width=_bar_width(steps), color=COLOURS["moce"])
        panels[1].set(title="clusters that changed expert, summed over layers", xlabel="step")
        for axes in panels:
            axes.set(xlim=(0, None), ylim=(0, None))
        return _svg(figure, "traffic")


def _bar_width(steps: Sequence[int]) -> float:
    return 0.8 * float(np.diff([0, *steps]).min()) if steps else 1.0


def routing_changes(record: Record) -> tuple[list[int], list[int]]:
    """Count the entries of the routing table (L, K) that differ from the table before."""
    pairs = list(zip(record.routing, record.routing[1:], strict=False))
    same_shape = [(a, b) for a, b in pairs if a[1].shape == b[1].shape]
    return [step for _, (step, _) in same_shape], [
        int((before != after).sum()) for (_, before), (_, after) in same_shape
    ]


def cluster_sizes(clusters: Clusters | None) -> str | None:
    """Draw cluster sizes, with and without balance; of up to `_MAX_CLUSTERS` what each holds."""
    if clusters is None or not len(clusters.sizes):
        return None
    with rc_context(_STYLE):
        figure, (axes,) = _canvas(1, 1, 2.8)
        if len(clusters.sizes) <= _MAX_CLUSTERS:
            _size_bars(axes, clusters)
        else:
            _size_curves(axes, clusters)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _svg(figure, "clusters")


def _size_bars(axes: Axes, clusters: Clusters) -> None:
    order = _by_domain(clusters)
    bottom = np.zeros(len(order))
    for domain, counts, colour in _stacked_domains(clusters):
        axes.bar(range(len(order)), counts[order], 0.9, bottom, color=colour, label=domain)
        bottom += counts[order]
    if clusters.free_sizes is not None:
        free = clusters.free_sizes[order]
        axes.plot(range(len(order)), free, "k_", markersize=8, label="without balance")
    axes.set(title="images per cluster, by domain", xlabel="clusters, by main domain")
    axes.set_xticks(range(len(order)) if len(order) <= 32 else [])
    if len(order) <= 32:
        axes.set_xticklabels(order)
    axes.grid(visible=False, axis="x")


def _size_curves(axes: Axes, clusters: Clusters) -> None:
    sizes = {"images": clusters.sizes, "without balance": clusters.free_sizes}
    for (label, values), colour in zip(sizes.items(), (COLOURS["moce"], "black"), strict=True):
        if values is not None:
            ranks, sorted_sizes = _thin(range(len(values)), np.sort(values)[::-1].tolist())
            axes.plot(ranks, sorted_sizes, color=colour, linewidth=1.4, label=label)
    axes.set(title="images per cluster", xlabel="clusters, largest first", ylim=(0, None))


def _stacked_domains(clusters: Clusters) -> Iterator[tuple[str, NDArray[np.int64], str]]:
    """Name, images per cluster (K,) and colour of the most frequent domains, then of the rest."""
    for column, colour in enumerate(_MUTED[: len(clusters.domains)]):
        yield clusters.domains[column], clusters.counts[:, column], colour
    if (others := len(clusters.domains) - len(_MUTED)) > 0:
        yield f"{others} others", clusters.counts[:, len(_MUTED) :].sum(axis=1), "#bbbbbb"


def _by_domain(clusters: Clusters) -> NDArray[np.int64]:
    return np.lexsort((-clusters.sizes, clusters.counts.argmax(axis=1)))


def centroid_distances(clusters: Clusters | None) -> str | None:
    """Draw the distances between centroids, (K, K), clusters in the order of their sizes' figure.

    Of more than `_MAX_CLUSTERS` only so many, evenly spaced in that order, are drawn: squares
    would be smaller than a pixel.
    """
    if clusters is None or clusters.centroids is None:
        return None
    if not 1 < len(clusters.centroids) == len(clusters.sizes):
        return None
    shown = np.array(evenly(_by_domain(clusters).tolist(), _MAX_CLUSTERS))
    centroids = clusters.centroids[shown].astype(np.float64)
    squares = np.square(centroids).sum(axis=1)
    distances = squares[:, None] + squares - 2 * centroids @ centroids.T
    distances = np.sqrt(np.maximum(distances, 0))
    others = nearest_others(clusters.centroids, shown)
    names = shown if len(shown) <= 32 else shown[:0]
    ticks = range(len(names))
    of_all = f" ({len(shown)} of {len(clusters.sizes)})" if len(shown) < len(clusters.sizes) else ""
    with rc_context(_STYLE | {"axes.grid": False}):
        figure, (axes, beside) = _canvas(1, 2, 3.4)
        image = axes.imshow(distances, cmap="viridis")
        axes.set(title="distance between centroids", xlabel=f"clusters, by main domain{of_all}")
        axes.set_xticks(ticks, names, rotation=90)
        axes.set_yticks(ticks, names)
        figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02)
        beside.bar(range(len(others)), others, 0.9, color=_GREY)
        beside.set(title="distance to the nearest other centroid", xlabel="clusters, as left")
        beside.set_xticks(ticks, names, rotation=90)
        return _svg(figure, "centroids")


def evenly(items: Sequence[int], most: int) -> list[int]:
    """Take at most so many of the items, evenly spaced, the first one included."""
    count = min(len(items), most)
    return [items[i * len(items) // count] for i in range(count)]
