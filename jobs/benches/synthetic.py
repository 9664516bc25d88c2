"""Make a training state and batches in memory, to time steps without data or a run.

Clusters are equal in size. Centroids are drawn around `E` directions, because related clusters lie
together. The gate is trained on its own two losses before anything is measured. So its routing
table is balanced and decided, like that of a trained gate, with the noise that the schedule gives
halfway through its fall.

Letters: B images of a step, E experts, K clusters, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benches.settings import BenchConfig
from moce_dist.arrays import Pixels
from moce_dist.data.images import Box
from moce_dist.data.plan import Plan
from moce_dist.data.ranges import RangeReader
from moce_dist.data.stream import Batch, GroupOf, PlannedStep, PlannedStream, Readers
from moce_dist.data.table import SampleTable
from moce_dist.model.gate import Gate, balance_loss, confidence_loss
from moce_dist.train.job import StageJob
from moce_dist.train.setup import TrainState, assemble

_GATE_STEPS = 200
_EPOCHS_OF_STEPS = 8


def synthetic_table(num_samples: int, num_clusters: int) -> SampleTable:
    """Make a table of samples that cannot be read; cluster sizes differ by at most one."""
    nothing = np.zeros(num_samples, np.int64)
    return SampleTable(
        urls=[""],
        keys=[f"{number:08d}" for number in range(num_samples)],
        shard=nothing,
        offset=nothing,
        size=nothing,
        before=nothing,
        after=nothing,
        cluster=np.arange(num_samples) % num_clusters,
    )


def synthetic_centroids(config: BenchConfig) -> torch.Tensor:
    """Draw K centroids (K, D): each near one of E directions."""
    generator = torch.Generator().manual_seed(config.seed)
    num_clusters, width = config.cluster.num_clusters, config.model.shape.width
    directions = torch.randn(config.moe.num_experts, width, generator=generator)
    near = directions[torch.arange(num_clusters) % config.moe.num_experts]
    return near + 0.5 * torch.randn(num_clusters, width, generator=generator)


def train_gate(gate: Gate, config: BenchConfig) -> None:
    """Train a gate in place, on its balance and confidence losses alone, over equal clusters."""
    counts = torch.ones(config.cluster.num_clusters, device=gate.weight.device)
    optimizer = torch.optim.Adam([gate.weight], lr=0.01)
    for _ in range(_GATE_STEPS):
        p = gate.logits().softmax(dim=-1)
        loss = balance_loss(p, counts) + 0.1 * confidence_loss(p, counts)
        (gate.weight.grad,) = torch.autograd.grad(loss, gate.weight)
        optimizer.step()
    gate.weight.grad = None


def synthetic_state(config: BenchConfig, device: torch.device) -> TrainState:
    """Build a state of stage moce with a trained gate; collective over all ranks."""
    num_clusters = config.cluster.num_clusters
    num_samples = config.moce.batch_size * _EPOCHS_OF_STEPS
    num_samples -= num_samples % num_clusters
    plan = Plan(synthetic_table(num_samples, num_clusters), config.moce.batch_size, config.seed)
    job = StageJob(config, Path("/nonexistent"), "moce", "")
    state = assemble(job, plan, synthetic_centroids(config), device)
    state.step = int(state.total_steps * config.gate.noise_fraction / 2)
    if (gate := state.model.gate) is not None:
        train_gate(gate, config)
        state.router.regroup(gate, state.step)
        state.router.decide(gate, state.step)
        state.router.replan(gate, state.step)
    return state


@dataclass(frozen=True)
class _Stripes:
    """An image of which every crop consists of stripes."""

    draws: np.random.Generator
    width: int = 64
    height: int = 64

    def crop(self, _: Box, size: int) -> Pixels:
        """Draw a crop (S, S, 3)."""
        column = self.draws.integers(0, 256, (size, 1, 3), np.uint8)
        return np.broadcast_to(column, (size, size, 3))


class _SyntheticStream(PlannedStream):
    """The plan's steps with images of stripes; only the choice of who reads what is real."""

    def _read_windows(
        self, steps: range, group_of: GroupOf, _: RangeReader
    ) -> Iterator[list[PlannedStep]]:
        for number in steps:
            step = self._planned(number, group_of)
            step.contents.extend([None] * len(step.ids))
            yield [step]

    def _image(self, step: PlannedStep, slot: int) -> Any:
        return _Stripes(np.random.default_rng(int(step.ids[slot])))


def synthetic_batches(state: TrainState, count: int) -> list[Batch]:
    """Make the batches of the next `count` steps, as the state's rank reads them."""
    readers = Readers(state.step + count, state.router.placement.readers)
    return list(_SyntheticStream(state.stream_spec(state.plan), state.step, [[readers]]))
