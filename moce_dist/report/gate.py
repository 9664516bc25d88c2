"""Which cluster goes to which expert, and how sure the gate is: the current map, and its history.

The current map is computed from the newest checkpoint of stage moce; without one it is the last
written table. The history is in `routing/` and `gate/`, one file per interval.

Letters: K clusters, L MoE layers, E experts per layer, T written tables.
"""

import base64
import colorsys
import io
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError

from moce_dist.config import Config
from moce_dist.report.figures import evenly, overlay, shown_layers
from moce_dist.report.record import Record
from moce_dist.train.checkpoint import complete_checkpoints, tensor_reader

# Paul Tol's bright and muted schemes, readable for colour-blind eyes and under black text
_COLOURS = (
    "#ee8866",
    "#77aadd",
    "#bbcc33",
    "#ffaabb",
    "#44bb99",
    "#eedd88",
    "#b8a1d9",
    "#99ddff",
)
_LAYER_COLOURS = ("#4477aa", "#cc6677", "#228833", "#999933", "#88ccee", "#882255", "#332288")
_FAINTEST = 0.18
_MAX_MAPPED = 48
_MAX_EXPERTS = 16
_ON_CARD = 8
_MAX_TABLES = 200
_MAX_STRIP = 256
_SHADES = 15


@dataclass(frozen=True)
class GateView:
    """Experts of the clusters, and the gate's probabilities where they are known."""

    table: NDArray[np.int64]
    """(L, K)"""
    chosen: NDArray[np.float64]
    """(L, K) probability of the table's expert; NaN where it is not known."""
    runner_up: NDArray[np.int64]
    """(L, K) the best other expert; -1 where it is not known."""
    runner_up_p: NDArray[np.float64]
    """(L, K) its probability."""
    num_experts: int
    where: str
    """What it was read from."""

    def cell(self, layer: int, cluster: int) -> dict[str, Any]:
        """Describe the expert of a cluster in a layer as the page shows it."""
        expert, p = int(self.table[layer, cluster]), float(self.chosen[layer, cluster])
        second, p_second = int(self.runner_up[layer, cluster]), self.runner_up_p[layer, cluster]
        who = f"next {second}" if second >= 0 else "next"
        return {
            "expert": expert,
            "colour": expert_colour(expert, self.num_experts),
            "percent": round(100 * p) if np.isfinite(p) else None,
            "second": f"{who}: {100 * p_second:.0f}" if np.isfinite(p_second) else "",
        }


def read_gate(record: Record) -> GateView | None:
    """Read the current routing; None if clusters choose no experts, or if there is none yet."""
    config = record.config
    if config is None or config.moe.kind != "cluster":
        return None
    checkpoints = complete_checkpoints(record.run.stage("moce") / "checkpoints")
    for checkpoint in checkpoints[:1]:
        if (found := record.attempt(partial(_of_checkpoint, config), checkpoint)) is not None:
            return found
    if not record.routing:
        return None
    step, table = record.routing[-1]
    chosen, runner_up_p = np.full(table.shape, np.nan), np.full(table.shape, np.nan)
    known = {c.step: c for c in record.certainty}
    if step in known and known[step].chosen.shape == table.shape:
        chosen, runner_up_p = known[step].chosen, known[step].runner_up
    nobody = np.full(table.shape, -1)
    num_experts = max(config.moe.num_experts, int(table.max()) + 1)
    where = f"the table of step {step}"
    return GateView(table, chosen, nobody, runner_up_p, num_experts, where)


def _of_checkpoint(config: Config, checkpoint: Path) -> GateView | None:
    # torch is slow to import, and a run without checkpoints does not need it
    from moce_dist.model.customize import cluster_probabilities, routes
    from moce_dist.model.gate import certainty, runner_up

    names = ("gate.weight", "gate.cluster_embedding", "gate.cluster_group")
    try:
        read = tensor_reader(checkpoint)
        found = {name: read(f"weight/{name}") for name in names}
    except SafetensorError as error:
        raise ValueError(f"{error}") from None
    weights = {name: tensor for name, tensor in found.items() if tensor is not None}
    if "gate.weight" not in weights:
        return None
    table = routes(weights, config.gate, num_groups=config.parallel.num_groups)
    p = cluster_probabilities(weights).double()
    best = p.scatter(2, table[:, :, None], -1.0).argmax(dim=2)
    return GateView(
        table.numpy(),
        certainty(p, table).numpy(),
        best.numpy(),
        runner_up(p, table).numpy(),
        p.shape[2],
        f"checkpoint moce/{checkpoint.name}",
    )


def expert_colour(expert: int, num_experts: int) -> str:
    """Return an expert's colour on the page, `#rrggbb`; black text is readable on it."""
    if num_experts <= len(_COLOURS):
        return _COLOURS[expert]
    # experts with neighbouring numbers are far apart in hue
    red, green, blue = colorsys.hls_to_rgb(expert * 0.618034 % 1, 0.7, 0.6)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def strength(p: float, num_experts: int) -> float:
    """Opacity of a probability: faint at 1 / E, where the gate is undecided, full at 1."""
    if not np.isfinite(p):
        return 1.0
    above = (p - 1 / num_experts) / max(1e-9, 1 - 1 / num_experts)
    return _FAINTEST + (1 - _FAINTEST) * min(1.0, max(0.0, above))


def prefer(clusters: Sequence[int], pictured: Container[int], most: int) -> list[int]:
    """Take at most `most` clusters, in their order and evenly spaced, those with pictures first."""
    first = evenly([c for c in clusters if c in pictured], most)
    rest = evenly([c for c in clusters if c not in pictured], most - len(first))
    taken = {*first, *rest}
    return [c for c in clusters if c in taken]


def strip(record: Record, gate: GateView, layer: int, order: list[int]) -> str | None:
    """Draw a layer over time as a data URI: rows are clusters, columns tables, colours experts.

    None with fewer than two tables.
    """
    tables = [(s, t) for s, t in record.routing if t.shape == gate.table.shape]
    if len(tables) < 2:
        return None
    tables = tables[:: -(-len(tables) // _MAX_TABLES)]
    known = {c.step: c.chosen for c in record.certainty if c.chosen.shape == gate.table.shape}
    colours = [expert_colour(e, gate.num_experts) for e in range(gate.num_experts)]
    rgb = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours], np.uint8)
    pixels = np.full((len(order), len(tables), 4), 255, np.uint8)
    for column, (step, table) in enumerate(tables):
        pixels[:, column, :3] = rgb[table[layer, order] % gate.num_experts]
        if step in known:
            p = known[step][layer, order]
            # few shades, because a PNG of noise would be large
            shades = [round(_SHADES * strength(x, gate.num_experts)) for x in p]
            pixels[:, column, 3] = np.array(shades) * (255 // _SHADES)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def gate_view(record: Record, gate: GateView) -> dict[str, Any]:
    """Gather the map of clusters to experts, strips over time, and what experts see.

    At most `_MAX_MAPPED` clusters, six layers and `_MAX_EXPERTS` experts of a layer are shown.
    """
    clusters, (layers, num_clusters) = record.clusters, gate.table.shape
    domains = np.zeros(num_clusters, np.int64)
    sizes = np.zeros(num_clusters, np.int64)
    mains = num_clusters * ["no images"]
    if clusters is not None and len(clusters.sizes) == num_clusters and clusters.domains:
        domains, sizes = clusters.counts.argmax(axis=1), clusters.sizes
        mains = [
            clusters.domains[d] if n else "no images" for d, n in zip(domains, sizes, strict=True)
        ]
    # those of one route are together, then by main domain
    order = [int(cluster) for cluster in np.lexsort([domains, *gate.table])]
    sheets = set(clusters.sheets) if clusters is not None else set[int]()
    mapped = prefer(order, sheets, _MAX_MAPPED)
    shown, known = shown_layers(layers), [row[np.isfinite(row)] for row in gate.chosen]
    blocks = dict(enumerate(record.config.moe_layers if record.config else ()))
    on_strip = evenly(order, _MAX_STRIP)
    cards = _Cards(gate, np.array(order), sizes, sheets, sheets.intersection(mapped))
    return {
        "where": gate.where,
        "layers": layers,
        "shown": [{"layer": i, "block": blocks.get(i, "?")} for i in shown],
        "num_experts": gate.num_experts,
        "num_clusters": num_clusters,
        "rows": [
            {
                "cluster": c,
                "images": int(sizes[c]),
                "what": mains[c],
                "cells": [gate.cell(layer, c) for layer in shown],
            }
            for c in mapped
        ],
        "more": num_clusters - len(mapped),
        "sure": [f"{100 * row.mean():.0f} %" if len(row) else "-" for row in known],
        "experts": [cards.layer(layer) for layer in shown],
        "legend": [
            {"expert": e, "colour": expert_colour(e, gate.num_experts)}
            for e in range(min(gate.num_experts, _MAX_EXPERTS))
        ],
        "strips": [strip(record, gate, layer, on_strip) for layer in shown],
        "first": record.routing[0][0] if record.routing else 0,
        "last": record.routing[-1][0] if record.routing else 0,
        "panels": _sureness(record, shown),
    }


class _Cards(NamedTuple):
    """What the cards of experts are made from."""

    gate: GateView
    order: NDArray[np.int64]
    """(K,) clusters in the order of the map."""
    sizes: NDArray[np.int64]
    """(K,) images."""
    sheets: set[int]
    """Clusters that have pictures."""
    mapped: set[int]
    """Those of them that the map shows, whose pictures the page has anyway."""

    def layer(self, layer: int) -> list[dict[str, Any]]:
        """Describe the experts of a layer that have the most images, in their own order."""
        table, num_experts = self.gate.table[layer], self.gate.num_experts
        images = np.zeros(num_experts, np.int64)
        np.add.at(images, table, self.sizes)
        largest = np.argsort(-images, kind="stable")[:_MAX_EXPERTS]
        return [self._card(layer, int(e), int(images[e])) for e in np.sort(largest)]

    def _card(self, layer: int, expert: int, images: int) -> dict[str, Any]:
        members = self.order[self.gate.table[layer, self.order] == expert].tolist()
        pictured = [c for c in members if c in self.mapped]
        pictured = pictured or [c for c in members if c in self.sheets]
        listed = evenly(pictured or members, _ON_CARD)
        return {
            "expert": expert,
            "colour": expert_colour(expert, self.gate.num_experts),
            "images": images,
            "share": 100 * images / max(1, int(self.sizes.sum())),
            "clusters": listed,
            "more": len(members) - len(listed),
        }


def _sureness(record: Record, layers: list[int]) -> list[str]:
    """Draw the mean probability of the chosen expert over the run, one line per shown layer."""
    if len(record.certainty) < 2:
        return []
    steps = [float(c.step) for c in record.certainty]
    lines = {
        f"MoE layer {layer}": (
            (steps, [100 * float(c.chosen[layer].mean()) for c in record.certainty]),
            colour,
            "-",
        )
        for layer, colour in zip(layers, _LAYER_COLOURS, strict=False)
        if all(len(c.chosen) > layer for c in record.certainty)
    }
    return [overlay("sureness", "probability of the chosen expert, %", lines, xlabel="step")]
