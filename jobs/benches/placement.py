"""Measure speed and quality of the gating scheduler's plans at the size of large clusters.

The routing table imitates that of a gate in training: K centroids are scattered around 2 E themes
(clusters of a theme are alike, so every layer tends to route them alike). Each layer has a random
linear gate, with noise of 0.3 of the spread of its logits. All of it is seeded. Every plan is made
in a separate process, so that its peak memory is its own. Only `plan_placement` is timed.

Letters: L MoE layers, K clusters, E experts per layer, G expert groups, D width of a centroid.
"""

import json
import resource
import sys
import time
from typing import Any, NamedTuple

import numpy as np

from benches.harness import Report, run_fresh
from benches.settings import BenchConfig
from moce_dist.arrays import Int64
from moce_dist.parallel.placement import contiguous_placement, plan_placement

_IMAGES_PER_CLUSTER = 313


class Shape(NamedTuple):
    """Size of a planning problem."""

    clusters: int
    experts: int
    layers: int
    groups: int
    """For example 64 groups of 8 GPUs."""


PLAN_4096 = Shape(4096, 64, 12, 64)
PLAN_65536 = Shape(65536, 256, 24, 256)


def run(config: BenchConfig, small: Shape = PLAN_4096, large: Shape = PLAN_65536) -> Report:
    """Measure both sizes, and report the figures of each.

    The larger one is planned twice, whatever `bench.rounds` says.
    """
    rounds = config.bench.rounds
    figures = [
        run_fresh("benches.placement", *small, config.seed)
        for _ in range(config.bench.warmup_rounds + rounds)
    ]
    figures = figures[config.bench.warmup_rounds :]
    largest = [run_fresh("benches.placement", *large, config.seed) for _ in range(2)]
    report = Report("placement", config)
    report.add_variants({"plan_4096": [f["seconds"] for f in figures]})
    report.add_variants({"plan_65536": [f["seconds"] for f in largest]})
    for name in ("max_over_mean_images", "local_fraction", "local_fraction_contiguous"):
        report.figures[name] = figures[0][name]
        report.figures[f"{name}_65536"] = largest[0][name]
    # beside wall-clock times, which other processes of a shared machine lengthen
    report.figures["cpu_s_4096"] = min(f["cpu_seconds"] for f in figures)
    report.figures["cpu_s_65536"] = min(f["cpu_seconds"] for f in largest)
    report.figures["peak_rss_gib"] = max(f["peak_rss_gib"] for f in largest)
    report.figures["peak_rss_gib_4096"] = max(f["peak_rss_gib"] for f in figures)
    return report


def gated_table(layers: int, clusters: int, experts: int, *, seed: int, width: int = 64) -> Int64:
    """Make the routing table (L, K) of random gates over clustered centroids (K, D)."""
    draws = np.random.default_rng(seed)
    themes = draws.standard_normal((2 * experts, width), np.float32)
    centroids = themes[draws.integers(0, len(themes), clusters)]
    centroids += 0.5 * draws.standard_normal((clusters, width), np.float32)
    centroids = (centroids - centroids.mean(axis=0)) / centroids.std(axis=0)
    table = np.empty((layers, clusters), np.int64)
    for row in table:
        logits = centroids @ draws.standard_normal((width, experts), np.float32)
        row[:] = (logits + 0.3 * logits.std() * draws.standard_normal(logits.shape)).argmax(1)
    return table


def plan_once(shape: Shape, seed: int) -> dict[str, Any]:
    """Plan in this process; return seconds, figures of the plan, and peak memory."""
    routing = gated_table(shape.layers, shape.clusters, shape.experts, seed=seed)
    sizes = np.full(shape.clusters, _IMAGES_PER_CLUSTER)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    plan = plan_placement(routing, sizes, num_experts=shape.experts, num_groups=shape.groups)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    naive = contiguous_placement(shape.layers, shape.experts, shape.clusters, shape.groups)
    crossings, images = shape.layers * sizes.sum(), sizes @ plan.shares
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "max_over_mean_images": float(images.max() / images.mean()),
        "local_fraction": 1 - plan.images_exchanged(routing, sizes) / crossings,
        "local_fraction_contiguous": 1 - naive.images_exchanged(routing, sizes) / crossings,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


if __name__ == "__main__":
    *numbers, number = map(int, sys.argv[1:])
    sys.stdout.write(json.dumps(plan_once(Shape(*numbers), number)))
