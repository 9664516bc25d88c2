"""Routing and placement over a run: one table per step, one plan per interval.

The ranks make the table on their hosts from the float32 gate weights, one step ahead (tables.py). A
table of a step that begins with a plan is waited for instead. The placement follows the gate at
intervals, without the noise of a step, by changing which group reads which cluster. Experts move
(migrate.py) only when the images that this saves until the next plan have more bytes than the
experts.

Letters: L MoE layers, K clusters, E experts per layer, G expert groups.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moce_dist.arrays import Int64
from moce_dist.config import Config
from moce_dist.cost.sizes import exchange_bytes, expert_bytes
from moce_dist.model.gate import (
    Gate,
    NoiseSchedule,
    certainty,
    logits,
    noisy_scores,
    routing_table,
    runner_up,
    shared_groups,
)
from moce_dist.parallel.groups import ExpertMap, Topology, expert_map
from moce_dist.parallel.placement import (
    Placement,
    Traffic,
    contiguous_placement,
    no_traffic,
    plan_placement,
    predict_traffic,
)
from moce_dist.run.files import write_atomic
from moce_dist.train.tables import TableMaker


@dataclass
class Interval:
    """Steps under one placement: the traffic predicted for an epoch, and that counted so far."""

    begin: int
    predicted: Traffic
    naive_images_exchanged: float
    """What `contiguous_placement` would exchange in an epoch."""
    measured: Traffic
    steps: int = 0

    def to_dict(self, config: Config) -> dict[str, Any]:
        """Return its part of a placement file; the measurement is None before the first step."""
        predicted = self.predicted.to_dict(config)
        predicted["images_exchanged_contiguous"] = self.naive_images_exchanged
        measured = {"steps": self.steps, **self.measured.to_dict(config)}
        return {
            "step": self.begin,
            "predicted_per_epoch": predicted,
            "measured_in_interval": measured if self.steps else None,
        }


class Router:
    """Holds the step's routing table and the current placement; equal on all ranks."""

    def __init__(
        self, config: Config, topology: Topology, cluster_sizes: Int64, *, total_steps: int
    ) -> None:
        self._config, self._topology, self._sizes = config, topology, cluster_sizes
        self._total_steps = total_steps
        noisy_steps = int(total_steps * config.gate.noise_fraction)
        level = 0.0 if config.gate.assign == "fixed" else config.gate.noise
        self._noise = NoiseSchedule(config.seed, level, noisy_steps)
        layers, clusters = len(config.moe_layers), len(cluster_sizes)
        self.table: Int64 = np.zeros((layers, clusters), np.int64)
        shape = layers, config.moe.num_experts, clusters
        self.placement = contiguous_placement(*shape, topology.num_groups)
        self.contiguous = contiguous_placement(*shape, topology.ep_size)
        """Experts and clusters by number over the places, which may be fewer than the groups."""
        self._is_planned = False
        self._experts_moved = 0
        self._maker = TableMaker(config, self._noise, clusters, topology.num_groups)
        self._interval: Interval | None = None

    @property
    def experts(self) -> ExpertMap:
        """Where every expert lives."""
        return expert_map(self.placement.expert_group, self._topology)

    def regroup(self, gate: Gate, step: int) -> None:
        """With shared groups, let every cluster choose its group until the next plan.

        Until then the cluster keeps it, whatever the noise, because readers follow plans, not
        steps. Collective over all ranks.
        """
        if self._config.gate.groups != "shared":
            return
        groups = np.empty(len(self._sizes), np.int64)
        if dist.get_rank() == 0:
            host = self._maker.on_host(gate)
            host.wait()
            scores = logits(host.weight, host.cluster_embedding)
            noise = self._noise.sample(step, (scores.shape[0], scores.shape[1], scores.shape[2]))
            groups = shared_groups(noisy_scores(scores, noise), self._topology.num_groups)
        shared = torch.from_numpy(groups).to(gate.weight.device)
        dist.broadcast(shared, 0)
        gate.cluster_group.copy_(shared)

    def is_planning(self, step: int) -> bool:
        """Tell whether an interval, and so a plan, begins at `step`."""
        return step % self._config.parallel.replan_steps == 0

    def decide(self, gate: Gate, step: int) -> None:
        """Make the table of `step` from the current gate weights; collective over all ranks.

        For a run's start, a plan, and after the last step; `refresh` begins all other tables.
        """
        self._maker.begin(gate, step)
        self._take()

    def refresh(self, gate: Gate, step: int) -> None:
        """Take the table of `step`, and begin that of the next step if one is due.

        Collective over all ranks; waits only if the table is not ready in time.
        """
        self._take()
        following = step + 1
        is_due = following % self._config.gate.refresh_steps == 0
        if is_due and following < self._total_steps and not self.is_planning(following):
            self._maker.begin(gate, following)

    def _take(self) -> None:
        if self._maker.is_pending:
            self.table = self._maker.take()

    def replan(self, gate: Gate, step: int = 0) -> None:
        """Plan readers and experts for the interval that begins at `step`.

        Collective over all ranks. The plan may give experts another group; the caller must then
        move them.
        """
        plan: list[Placement | None] = [None]
        # rank 0 plans for all, because another kind of host might break ties differently
        if dist.get_rank() == 0:
            plan = [self._plan(gate, step)]
        dist.broadcast_object_list(plan, 0)
        assert plan[0] is not None
        moved = int((plan[0].expert_group != self.placement.expert_group).sum())
        self._experts_moved = moved if self._is_planned else 0
        self.placement, self._is_planned = plan[0], True

    def _plan(self, gate: Gate, step: int) -> Placement:
        # with shared groups the gate decides which experts belong together, so they never move
        is_shared = self._config.gate.groups == "shared"
        table = self.table
        if not is_shared and self._noise.level(step) > 0:
            # the noise of this step says nothing about the next ones, which the plan is for
            host = self._maker.on_host(gate)
            host.wait()
            table = routing_table(logits(host.weight, host.cluster_embedding), self._config.gate)
        return plan_placement(
            table,
            self._sizes,
            num_experts=self._config.moe.num_experts,
            num_groups=self._topology.num_groups,
            expert_group=self.placement.expert_group if self._is_planned or is_shared else None,
            move_cost=math.inf if is_shared else self.move_cost(step),
        )

    def move_cost(self, step: int) -> float:
        """Images exchanged per epoch that one expert's move at `step` must save; inf at the end."""
        steps = min(self._config.parallel.replan_steps, self._total_steps - step)
        if steps <= 0:
            return math.inf
        # every replica gets its own copy, while an image is exchanged once
        moved = expert_bytes(self._config) * self._topology.num_replicas
        images = moved / exchange_bytes(self._config)
        return images * self._sizes.sum() / (steps * self._config.moce.batch_size)

    def save(self) -> dict[str, Any]:
        """Return the table of the coming step and the placement, for a checkpoint.

        Collective over all ranks.
        """
        self._take()
        return {"routing": self.table.tolist(), "placement": self.placement.to_dict()}

    def restore(self, position: dict[str, Any]) -> None:
        """Restore what `save` returned."""
        self.table = np.array(position["routing"], np.int64).reshape(self.table.shape)
        self.placement = Placement.from_dict(position["placement"])
        self._is_planned = True

    def begin_interval(self, gate: Gate, folder: Path, step: int) -> None:
        """Write `step_X.json` in routing/, gate/ and, with only the prediction, in placement/.

        That in gate/ holds the gate's probability of the table's expert and of the best other
        expert, both (L, K).
        """
        write_atomic(folder / "routing" / f"step_{step}.json", json.dumps(self.table.tolist()))
        p, table = gate.logits().detach().softmax(dim=2).cpu(), torch.from_numpy(self.table)
        sure = {"chosen": certainty(p, table), "runner_up": runner_up(p, table)}
        rounded = {name: values.numpy().round(4).tolist() for name, values in sure.items()}
        write_atomic(folder / "gate" / f"step_{step}.json", json.dumps(rounded))
        shapes = *self.placement.expert_group.shape, *self.placement.shares.shape
        self._interval = Interval(
            step,
            predict_traffic(self.placement, self.table, self._sizes),
            contiguous_placement(*shapes).images_exchanged(self.table, self._sizes),
            no_traffic(self.placement),
        )
        self.write_placement(folder)

    def measure(self, clusters: Int64) -> None:
        """Count a step: `clusters` (R, b) of every slot of every rank, under the current table."""
        if self._interval is None:  # a stage without experts
            return
        # ranks are ordered by group, so every B / G slots belong to one group
        by_group = clusters.reshape(self._topology.num_groups, -1)
        self._interval.measured.count(by_group, self.table, self.placement)
        self._interval.steps += 1

    def write_placement(self, folder: Path) -> None:
        """Write `placement/step_X.json` of the interval: prediction and measurement side by side.

        The bytes moved are those of all replicas; the first plan of a run moves nothing.
        """
        moved = self._experts_moved
        assert self._interval is not None, "an interval was begun"
        document = {
            **self.placement.to_dict(),
            **self._interval.to_dict(self._config),
            "experts_moved": moved,
            "bytes_moved": moved * expert_bytes(self._config) * self._topology.num_replicas,
        }
        path = folder / "placement" / f"step_{self._interval.begin}.json"
        write_atomic(path, json.dumps(document))
