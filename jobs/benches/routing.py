"""Time a step's routing table on the host: made at once, and made during the step before.

All ranks have a gate and no model. `at_once` is the readable reference: rank 0 computes noise,
logits and argmax of all layers on its training thread, and broadcasts the table. `first_rank` and
`other_rank` are the time for which a step waits on rank 0 and on the slowest other rank when its
table was begun a step before. Instead of training, the training thread sleeps, as it does while a
GPU computes, and the gate's weights change. Every table is compared with the reference's.

These steps take at least four times as long as a table, so a wait is only what is left when a table
is ready. The steps of `first_rank_fixed` and `other_rank_fixed` take `bench.step_ms`, however long
a table takes: a table that is late is waited for. A table takes `made_s` seconds; up to L ranks
make a share of its layers each. The figure `made_cpu_s` is the processor time of the rank that
spends most on a table.

Letters: L MoE layers, K clusters, E experts per layer.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benches.harness import Report, run_ranks
from benches.settings import BenchConfig
from benches.synthetic import synthetic_centroids
from moce_dist.arrays import Int64
from moce_dist.model.gate import Gate, NoiseSchedule, logits, routing_table
from moce_dist.parallel.groups import Topology
from moce_dist.settings import ConfigError
from moce_dist.train.routing import Router

_IMAGES_PER_CLUSTER = 313
_TOTAL_STEPS = 10_000
_STEP_OVER_MAKING = 4


def run(config: BenchConfig) -> Report:
    """Measure on `parallel.num_workers` ranks without Ray.

    Raises:
        ConfigError: `parallel.num_workers` is 1, and there is no rank that gets a table.
    """
    if config.parallel.num_workers < 2:
        raise ConfigError("parallel.num_workers (1): routing needs at least 2 ranks")
    result = run_ranks("routing:measure", config)
    report = Report("routing", config).add_variants(result["times"])
    for ours in ("first_rank", "other_rank", "first_rank_fixed", "other_rank_fixed"):
        report.add_ratio(ours, "at_once")
    report.figures = result["figures"]
    return report


def measure(config: BenchConfig) -> dict[str, Any]:
    """Time tables on this rank; collective over all ranks."""
    gate = Gate(len(config.moe_layers), config.moe.num_experts, synthetic_centroids(config))
    sizes = np.full(config.cluster.num_clusters, _IMAGES_PER_CLUSTER)
    topology = Topology(dist.get_world_size(), config.parallel.num_groups)
    router = Router(config, topology, sizes, total_steps=_TOTAL_STEPS)
    noise = NoiseSchedule(
        config.seed, config.gate.noise, int(_TOTAL_STEPS * config.gate.noise_fraction)
    )
    rounds, warmup = config.bench.rounds, config.bench.warmup_rounds
    made = [_timed(router.decide, gate, 1) for _ in range(warmup + rounds)][warmup:]
    pause = _STEP_OVER_MAKING * max(seconds for seconds, _ in made)
    at_once, beside, thread = [], [], []
    expected, steps = router.table, warmup + rounds
    for step in range(1, 1 + steps):
        before, begin_thread = gate.weight.detach().clone(), time.thread_time()
        seconds, _ = _timed(router.refresh, gate, step)
        beside.append(seconds)
        thread.append(time.thread_time() - begin_thread)
        assert (router.table == expected).all(), "the table is the reference's"
        # the step: the training thread waits for a device
        time.sleep(pause)
        _train(gate)
        seconds, table = _timed(_reference, config, gate, noise, before, step + 1)
        at_once.append(seconds)
        expected = table.numpy()
    fixed, tables = _fixed_steps(config, gate, router, range(1 + steps, 1 + 2 * steps))
    # the first table was begun by the last step above
    for step, (weight, table) in enumerate(tables, start=2 + steps):
        reference = _reference(config, gate, noise, weight, step)
        assert (table == reference.numpy()).all(), "the table is the reference's"
    ranks: list[Any] = [None] * dist.get_world_size()
    cpu = [seconds for _, seconds in made]
    dist.all_gather_object(ranks, (beside[warmup:], fixed[warmup:], thread[warmup:], cpu))
    waits, fixed_waits, threads, makers = (list(values) for values in zip(*ranks, strict=True))
    return {
        "times": {
            "at_once": at_once[warmup:],
            "first_rank": waits[0],
            "other_rank": np.max(waits[1:], axis=0).tolist(),
            "first_rank_fixed": fixed_waits[0],
            "other_rank_fixed": np.max(fixed_waits[1:], axis=0).tolist(),
        },
        "figures": {
            # beside wall-clock times, which other processes of a shared machine lengthen
            "first_rank_cpu_ms": 1000 * statistics.median(threads[0]),
            "other_rank_cpu_ms": 1000 * max(statistics.median(of) for of in threads[1:]),
            "made_s": statistics.median(seconds for seconds, _ in made),
            "made_cpu_s": max(statistics.median(of) for of in makers),
            "step_ms": config.bench.step_ms,
        },
    }


def _fixed_steps(
    config: BenchConfig, gate: Gate, router: Router, steps: range
) -> tuple[list[float], list[tuple[torch.Tensor, Int64]]]:
    # returns the wait of every step; and the weights and the table of all steps but the first
    waits, weights, tables = [], [], []
    for step in steps:
        seconds, _ = _timed(router.refresh, gate, step)
        waits.append(seconds)
        tables.append(router.table)
        weights.append(gate.weight.detach().clone())
        begin = time.perf_counter()
        _train(gate)
        time.sleep(max(0.0, config.bench.step_ms / 1000 - (time.perf_counter() - begin)))
    # take the table that is under way: a process must not end while it is sent
    router.decide(gate, _TOTAL_STEPS)
    return waits, list(zip(weights[:-1], tables[1:], strict=True))


def _train(gate: Gate) -> None:
    gate.weight.data += 0.01 * torch.randn(gate.weight.shape)
    dist.broadcast(gate.weight.data, 0)


def _timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    # returns seconds and the result; if there is none, the processor time of all threads
    begin, cpu = time.perf_counter(), time.process_time()
    result = work(*arguments)
    seconds = time.perf_counter() - begin
    return seconds, time.process_time() - cpu if result is None else result


def _reference(
    config: BenchConfig, gate: Gate, noise: NoiseSchedule, weight: torch.Tensor, step: int
) -> torch.Tensor:
    # (L, K); rank 0 makes it and sends it to all
    table = torch.empty((weight.shape[0], config.cluster.num_clusters), dtype=torch.int64)
    if dist.get_rank() == 0:
        scores = logits(weight, gate.cluster_embedding)
        drawn = noise.sample(step, (scores.shape[0], scores.shape[1], scores.shape[2]))
        table = torch.from_numpy(routing_table(scores, config.gate, noise=drawn))
    dist.broadcast(table, 0)
    return table
