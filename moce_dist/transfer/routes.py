"""The dense ViTs that a MoCE checkpoint contains: which clusters take which experts.

A route is one expert per MoE layer. The clusters of a run take some of the E^L routes. The ViT of
any route can be exported, by the same code as the ViT of a task.

Letters: L MoE layers, E experts, K clusters.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moce_dist.cluster.assignments import count_assignments
from moce_dist.config import Config
from moce_dist.model.customize import customize, moe_shape, routes
from moce_dist.run.directory import Run
from moce_dist.transfer.backbone import run_backbone
from moce_dist.transfer.choosing import TrainedStage, dense_backbone, need_stage
from moce_dist.transfer.export import export_backbone, model_card
from moce_dist.transfer.request import check_experts, stage_of
from moce_dist.transfer.select import choose_experts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Route:
    """One expert per MoE layer, and the number of images of every cluster that takes them."""

    experts: tuple[int, ...]
    clusters: dict[int, int]

    @property
    def num_images(self) -> int:
        """Number of images in all clusters of the route."""
        return sum(self.clusters.values())


def list_routes(run: Run, config: Config, stage: TrainedStage) -> list[Route]:
    """List the routes that clusters take, the one with most images first.

    Raises:
        ConfigError: the checkpoint has no experts, or the assignments are missing.
    """
    table = routes(stage.weights, config.gate, num_groups=config.parallel.num_groups)
    sizes = count_assignments(run.clusters / "assignments.parquet", table.shape[1]).tolist()
    found: dict[tuple[int, ...], dict[int, int]] = {}
    for cluster, experts in enumerate(table.T.tolist()):
        found.setdefault(tuple(experts), {})[cluster] = sizes[cluster]
    made = [Route(experts, clusters) for experts, clusters in found.items()]
    return sorted(made, key=lambda route: (-route.num_images, route.experts))


def route_lines(found: Sequence[Route]) -> list[str]:
    """Write routes as a table: experts, images and their share, clusters with their images."""
    total = sum(route.num_images for route in found)
    rows = [("experts", "images", "share", "clusters (images)")]
    for route in found:
        clusters = ", ".join(f"{cluster} ({size})" for cluster, size in route.clusters.items())
        share = f"{100 * route.num_images / max(1, total):.1f} %"
        rows.append((",".join(map(str, route.experts)), str(route.num_images), share, clusters))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return [
        "   ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]


def export_dense(run: Run, config: Config, name: str, out: Path) -> list[Path]:
    """Write the ViT of `mae` or `control`, which have no experts; return its files.

    Raises:
        ConfigError: the run has no checkpoint of it.
    """
    stage_name = stage_of(name, config) or name
    stage = need_stage(run, stage_name)
    about = {
        "run": run.root.name,
        "data": config.data.source,
        "checkpoint": f"{stage_name}/{stage.checkpoint.name}",
    }
    card = model_card(name, None, None, about)
    return export_backbone(dense_backbone(name, config, stage.dense(name)), out, card)


def export_route(run: Run, config: Config, experts: Sequence[int], out: Path) -> list[Path]:
    """Write the dense ViT of a route, whether clusters take it or not; return its files.

    The figures on its model card, and the p that `gate.combine: prob` folds into it, are computed
    from the images that take the route, or from all images if none does (clusters may be empty).

    Raises:
        ConfigError: the experts do not exist.
    """
    stage = need_stage(run, "moce")
    blocks, num_experts = moe_shape(stage.weights)
    check_experts(experts, len(blocks), num_experts)
    every = list_routes(run, config, stage)
    taken = [route for route in every if route.experts == tuple(experts) and route.num_images]
    if not taken:
        logger.warning("experts %s: no image takes this route", list(experts))
    sizes = {k: v for route in taken or every for k, v in route.clusters.items()}
    ids = np.repeat(np.array(list(sizes), np.int64), list(sizes.values()))
    name = f"route {','.join(map(str, experts))}"
    choice = choose_experts(ids, stage.weights, config, task=name, given=experts)
    weights = customize(stage.weights, list(experts), scale=choice["scale"])
    about = {
        "run": run.root.name,
        "data": config.data.source,
        "checkpoint": f"moce/{stage.checkpoint.name}",
        "selection": "given" if taken else "given; no image takes this route",
    }
    card = model_card(name, choice, None, about)
    return export_backbone(run_backbone("moce", config, weights), out, card)
