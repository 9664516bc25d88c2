"""Panels of a run as SVG text, to be inlined in the page, one drawing per panel.

A panel is as wide as a phone, and panels are placed side by side where there is room. Text stays
text, ids are derived from the panel's name, and colours follow the page (dark or light). No
creation time is written, so the same run gives the same bytes.

Letters: K clusters, L MoE layers, E experts per layer, T logged steps.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from moce_dist.cluster.domains import nearest_others
from moce_dist.report.record import Clusters, Record, Stage

COLOURS = {"mae": "#4477aa", "moce": "#cc6677", "control": "#228833"}
GREY = "#667085"
_MAX_POINTS = 800
_MAX_COLUMNS = 400
_MAX_CLUSTERS = 512
_MAX_LAYERS = 6
_MAX_HEIGHT = 3.6
_WIDTH, _HEIGHT = 4.6, 2.3
# Paul Tol's muted scheme, readable for colour-blind eyes
_MUTED = ("#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255")
_STYLE = {
    "text.parse_math": False,  # names of folders may have dollar signs
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": "#1d2939",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#98a2b3",
    "axes.facecolor": "none",
    "axes.labelcolor": GREY,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.handlelength": 1.4,
    "axes.titlelocation": "left",
    "figure.facecolor": "none",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.grid": True,
    "grid.color": "#eaecf0",
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 6),
    "legend.frameon": False,
}
# colours that the page changes in dark mode
_OF_PAGE = {
    "#1d2939": "var(--ink)",
    GREY: "var(--soft)",
    "#98a2b3": "var(--axis)",
    "#eaecf0": "var(--line)",
    "#332288": "var(--indigo)",
    "#4477aa": "var(--blue)",
    "#117733": "var(--green)",
    "#228833": "var(--leaf)",
    "#882255": "var(--wine)",
}


def panel(name: str, draw: Callable[[Axes], object], *, height: float = _HEIGHT) -> str:
    """Draw one panel and return it as SVG text; its ids begin with `name`."""
    style = _STYLE | {"svg.hashsalt": name}
    with rc_context(style):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        if isinstance(axes.xaxis.get_major_locator(), MaxNLocator):
            # large numbers would run into each other
            axes.locator_params(axis="x", nbins=5)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    # matplotlib uses the same group ids in every drawing, and ids must be unique in a page
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text[text.index("<svg") :])
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda m: _OF_PAGE.get(m[0], m[0]), text)
    # the page sets the size; a screen reader reads the label of the figure around the panel
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', _SVG_TAG, text, count=1)


_SVG_TAG = (
    r'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" \1'
    r' aria-hidden="true">'
)


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    every = max(1, -(-len(x) // _MAX_POINTS))
    return x[::every], y[::every]


def _plot(axes: Axes, points: tuple[Sequence[float], Sequence[float]], **style: Any) -> None:
    x, y = _thin(*points)
    # a lone point draws no line, so few points get markers
    marker: dict[str, Any] = {"marker": "o", "markersize": 2.5} if len(x) < 40 else {}
    axes.plot(x, y, **{"linewidth": 1.4, **marker, **style})


def _from(axes: Axes, bottom: float) -> None:
    """Start the y axis at `bottom`, and leave room above a curve that hardly changes."""
    top = axes.dataLim.ymax
    axes.set_ylim(bottom, top + 0.06 * (top - bottom) if bottom < top < np.inf else None)


def _trained(record: Record) -> dict[str, Stage]:
    return {name: stage for name, stage in record.stages.items() if stage.metrics}


def losses(record: Record) -> list[str]:
    """Draw the MAE loss of every trained stage against images seen, held-out losses dashed."""

    def draw(axes: Axes, name: str, stage: Stage) -> None:
        _plot(axes, stage.column("loss"), color=COLOURS[name], label="training")
        if stage.holdout:
            held_out = stage.holdout["loss"]
            axes.axhline(held_out, color="#1d2939", ls="--", lw=1, label="held-out")
        axes.set(title=f"stage {name}: MAE loss", xlabel="images seen")
        axes.legend(loc="upper right")

    return [
        panel(f"loss-{name}", lambda axes, n=name, s=stage: draw(axes, n, s))  # type: ignore[misc]
        for name, stage in _trained(record).items()
    ]


def gate_losses(record: Record) -> list[str]:
    """Draw the balance and confidence losses of stage moce."""
    stage = record.stages["moce"]
    if not any(stage.column("loss_balance")[1]):
        # a stage without experts writes zeros
        return []

    def draw(axes: Axes, metric: str) -> None:
        _plot(axes, stage.column(metric), color=COLOURS["moce"])
        axes.set(title=metric, xlabel="images seen")
        _from(axes, 0)

    return [
        panel(metric, lambda axes, m=metric: draw(axes, m))  # type: ignore[misc]
        for metric in ("loss_balance", "loss_confidence")
    ]


def overlay(
    name: str,
    title: str,
    lines: Mapping[str, tuple[tuple[Sequence[float], Sequence[float]], str, str]],
    *,
    xlabel: str = "images seen in the stage",
    bottom: float | None = 0,
) -> str:
    """Draw lines in one panel; `lines` gives by label the points, the colour and the line style."""

    def draw(axes: Axes) -> None:
        for label, (points, colour, style) in lines.items():
            _plot(axes, points, color=colour, linestyle=style, label=_shown(label))
        axes.set(title=title, xlabel=xlabel)
        if bottom is not None:
            _from(axes, bottom)
        if len(lines) > 1:
            axes.legend()

    return panel(name, draw)


def speed(record: Record) -> list[str]:
    """Draw learning rate and images per second of the stages."""
    stages = _trained(record)
    if not stages:
        return []
    return [
        overlay(
            f"speed-{metric}",
            title,
            {f"stage {n}": (s.column(metric), COLOURS[n], "-") for n, s in stages.items()},
        )
        for metric, title in (("lr", "learning rate"), ("images_per_s", "images per second"))
    ]


def experts(record: Record) -> list[str]:
    """Draw the share of images per expert over time, one (E, T) panel per shown layer."""
    stage = record.stages["moce"]
    counts = stage.experts
    if counts is None:
        return []
    steps = [line["step"] for line in stage.metrics if "images_per_expert" in line]
    counts = counts[:: -(-len(counts) // _MAX_COLUMNS)]
    shares = counts / np.maximum(1, counts.sum(axis=2, keepdims=True))
    layers, num_experts = counts.shape[1:]
    top = max(2 / num_experts, float(shares.max()))

    def draw(axes: Axes, layer: int) -> None:
        axes.grid(visible=False)
        image = axes.imshow(
            shares[:, layer].T,
            aspect="auto",
            cmap=ListedColormap([(*to_rgb("#4477aa"), alpha) for alpha in np.linspace(0, 1, 256)]),
            vmin=0,
            vmax=top,
            origin="lower",
            interpolation="nearest",
            extent=(steps[0], max(steps[-1], steps[0] + 1), -0.5, num_experts - 0.5),
        )
        ticks = range(0, num_experts, -(-num_experts // 8))
        title = f"MoE layer {layer}: share of a step (equal: {1 / num_experts:.3f})"
        axes.set(title=title, yticks=ticks, xlabel="step", ylabel="expert")
        axes.figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02)

    height = min(_MAX_HEIGHT, max(1.6, 0.7 + 0.11 * num_experts))
    return [
        panel(f"experts-{layer}", lambda axes, i=layer: draw(axes, i), height=height)  # type: ignore[misc]
        for layer in shown_layers(layers)
    ]


def traffic(record: Record) -> list[str]:
    """Draw images exchanged, and how many clusters changed their expert between tables."""
    x, exchanged = record.stages["moce"].column("images_exchanged")
    if not x and len(record.routing) < 2:
        return []
    steps, changes = routing_changes(record)

    def draw(axes: Axes) -> None:
        axes.bar(
            *_thin(steps, changes),
            width=0.8 * float(np.diff([0, *steps]).min()) if steps else 1.0,
            color=COLOURS["moce"],
        )
        axes.set(title="clusters that changed expert, all layers", xlabel="step")
        axes.set(xlim=(0, None), ylim=(0, None))

    title = "images exchanged in a step, all layers"
    return [
        overlay("exchanged", title, {"": ((x, exchanged), COLOURS["moce"], "-")}),
        panel("changes", draw),
    ]


def routing_changes(record: Record) -> tuple[list[int], list[int]]:
    """Count the entries of the routing table (L, K) that differ from the table before."""
    pairs = list(zip(record.routing, record.routing[1:], strict=False))
    same_shape = [(a, b) for a, b in pairs if a[1].shape == b[1].shape]
    return [step for _, (step, _) in same_shape], [
        int((before != after).sum()) for (_, before), (_, after) in same_shape
    ]


def cluster_sizes(clusters: Clusters | None) -> list[str]:
    """Draw cluster sizes with and without balance; up to `_MAX_CLUSTERS` clusters by domain."""
    if clusters is None or not len(clusters.sizes):
        return []

    def draw(axes: Axes) -> None:
        if len(clusters.sizes) <= _MAX_CLUSTERS:
            _size_bars(axes, clusters)
            return
        sizes = {"images": clusters.sizes, "without balance": clusters.free_sizes}
        colours = (COLOURS["moce"], "#1d2939")
        for (label, values), colour in zip(sizes.items(), colours, strict=True):
            if values is not None:
                ranks, sorted_sizes = _thin(range(len(values)), np.sort(values)[::-1].tolist())
                axes.plot(ranks, sorted_sizes, color=colour, linewidth=1.4, label=_shown(label))
        axes.set(title="images per cluster", xlabel="clusters, largest first", ylim=(0, None))
        axes.legend()

    return [panel("clusters", draw, height=3.2)]


def _shown(name: str) -> str:
    # matplotlib leaves names that begin with an underscore out of a legend
    return f"\u200b{name}" if name.startswith("_") else name


def _size_bars(axes: Axes, clusters: Clusters) -> None:
    order = by_domain(clusters)
    bottom = np.zeros(len(order))
    # the most frequent domains, then the rest together
    count = len(_MUTED)
    stacks = list(zip(clusters.domains, clusters.counts.T, _MUTED, strict=False))
    if (others := len(clusters.domains) - count) > 0:
        rest = clusters.counts[:, count:].sum(axis=1)
        stacks.append((f"{others} others", rest, "#bbbbbb"))
    for domain, counts, colour in stacks:
        axes.bar(range(len(order)), counts[order], 0.9, bottom, color=colour, label=_shown(domain))
        bottom += counts[order]
    if clusters.free_sizes is not None:
        free = clusters.free_sizes[order]
        axes.plot(range(len(order)), free, "_", c="#1d2939", ms=8, label="without balance")
    axes.set(title="images per cluster, by domain", xlabel="clusters, by main domain")
    axes.set_xticks(range(len(order)) if len(order) <= 32 else [])
    if len(order) <= 32:
        axes.set_xticklabels(order, rotation=90 if len(order) > 16 else 0)
    axes.grid(visible=False, axis="x")
    axes.figure.legend(loc="outside lower center", ncols=2)


def by_domain(clusters: Clusters) -> NDArray[np.int64]:
    """Return cluster ids (K,) ordered by main domain, the largest first within a domain."""
    return np.lexsort((-clusters.sizes, clusters.counts.argmax(axis=1)))


def centroid_distances(clusters: Clusters | None) -> list[str]:
    """Draw the distances between centroids, (K, K), in the order of the figure of cluster sizes.

    Of more than `_MAX_CLUSTERS` clusters only that many are drawn, evenly spaced in that order,
    because smaller squares would be less than a pixel.
    """
    if clusters is None or clusters.centroids is None:
        return []
    if not 1 < len(clusters.centroids) == len(clusters.sizes):
        return []
    shown = np.array(evenly(by_domain(clusters).tolist(), _MAX_CLUSTERS))
    centroids = clusters.centroids[shown].astype(np.float64)
    squares = np.square(centroids).sum(axis=1)
    distances = squares[:, None] + squares - 2 * centroids @ centroids.T
    distances = np.sqrt(np.maximum(distances, 0))
    others = nearest_others(clusters.centroids, shown)
    names = shown if len(shown) <= 32 else shown[:0]
    ticks = range(len(names))
    of_all = f" ({len(shown)} of {len(clusters.sizes)})" if len(shown) < len(clusters.sizes) else ""

    def draw_all(axes: Axes) -> None:
        axes.grid(visible=False)
        image = axes.imshow(distances, cmap="viridis", interpolation="nearest")
        axes.set(title="distance between centroids", xlabel=f"clusters, by main domain{of_all}")
        axes.set_xticks(ticks, names, rotation=90)
        axes.set_yticks(ticks, names)
        axes.figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02)

    def draw_nearest(axes: Axes) -> None:
        axes.bar(range(len(others)), others, 0.9, color=GREY)
        axes.set(title="distance to the nearest other centroid", xlabel="clusters, as beside")
        axes.set_xticks(ticks, names, rotation=90)

    return [
        panel("centroids", draw_all, height=3.4),
        panel("nearest-centroids", draw_nearest, height=3.4),
    ]


def shown_layers(num_layers: int) -> list[int]:
    """Choose the layers that the page shows: at most six, evenly spaced, first and last included.

    A layer has its own figures and cards, so a page of all layers of a large model would be slow.
    """
    count = min(num_layers, _MAX_LAYERS)
    return [i * (num_layers - 1) // max(1, count - 1) for i in range(count)]


def evenly(items: Sequence[int], most: int) -> list[int]:
    """Take at most `most` of the items, evenly spaced, including the first one."""
    count = min(len(items), most)
    return [items[i * len(items) // count] for i in range(count)]
