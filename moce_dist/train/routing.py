"""Routing and placement over a run: one table per step, one plan per interval.

The table is made on rank 0's host from the float32 gate weights and broadcast; it is the step's
only synchronisation besides the gradients. The placement follows the table at intervals by
changing which group reads which cluster; experts stay where the first plan put them.

Letters: L MoE layers, K clusters, E experts per layer, G expert groups.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from moce_dist.config import Config
from moce_dist.model.gate import Gate, NoiseSchedule, routing_table
from moce_dist.parallel.groups import ExpertMap, Topology, expert_map
from moce_dist.parallel.placement import Placement, contiguous_placement, plan_placement
from moce_dist.run import write_atomic

Ints = NDArray[np.int64]


class Router:
    """Holds the step's routing table and the current placement; equal on all ranks."""

    def __init__(
        self, config: Config, topology: Topology, cluster_sizes: Ints, *, total_steps: int
    ) -> None:
        self._config, self._topology, self._sizes = config, topology, cluster_sizes
        noisy_steps = int(total_steps * config.gate.noise_fraction)
        self._noise = NoiseSchedule(config.seed, config.gate.noise, noisy_steps)
        layers, clusters = len(config.moe_layers), len(cluster_sizes)
        self.table: Ints = np.zeros((layers, clusters), np.int64)
        self.contiguous = contiguous_placement(
            layers, config.moe.num_experts, clusters, topology.num_groups
        )
        self.placement = self.contiguous
        self._is_planned = False

    @property
    def experts(self) -> ExpertMap:
        """Where every expert lives."""
        return expert_map(self.placement.expert_group, self._topology)

    def compute_table(self, gate: Gate, step: int) -> Ints:
        """Compute a step's table (L, K) from the gate's weights; with noise early in training."""
        # float32 on the host: the routing must not depend on the kernels of a device
        logits = gate.logits().detach().cpu()
        noise = self._noise.sample(step, (logits.shape[0], logits.shape[1], logits.shape[2]))
        return routing_table(
            logits, self._config.gate, noise=noise, num_groups=self._topology.num_groups
        )

    def refresh(self, gate: Gate, step: int, *, force: bool = False) -> None:
        """Make the table of `step` when it is due; collective over all ranks."""
        is_due = force or step % self._config.gate.refresh_steps == 0 or not self._is_planned
        if not is_due:
            return
        table = torch.from_numpy(self.compute_table(gate, step))
        device = gate.weight.device
        shared = table.to(device)
        dist.broadcast(shared, 0)
        self.table = shared.cpu().numpy()

    def replan(self) -> None:
        """Plan who reads which cluster from the current table; the first time also the experts."""
        # with shared groups the gate itself says which experts belong together: they stay put
        keep = self._is_planned or self._config.gate.groups == "shared"
        self.placement = plan_placement(
            self.table,
            self._sizes,
            num_experts=self._config.moe.num_experts,
            num_groups=self._topology.num_groups,
            expert_group=self.placement.expert_group if keep else None,
        )
        self._is_planned = True

    def save(self) -> dict[str, Any]:
        """Return what a checkpoint must hold to go on with the same table and placement."""
        return {"routing": self.table.tolist(), "placement": json.loads(self.placement.to_json())}

    def restore(self, position: dict[str, Any]) -> None:
        """Take up what `save` returned."""
        self.table = np.array(position["routing"], np.int64).reshape(self.table.shape)
        self.placement = Placement.from_json(json.dumps(position["placement"]))
        self._is_planned = True

    def write(self, folder: Path, step: int) -> None:
        """Write `routing/step_X.json` and `placement/step_X.json` below a stage's folder."""
        write_atomic(folder / "routing" / f"step_{step}.json", json.dumps(self.table.tolist()))
        predicted = self.placement.images_exchanged(self.table, self._sizes)
        document = json.loads(self.placement.to_json())
        document["predicted_images_exchanged_per_epoch"] = predicted
        write_atomic(folder / "placement" / f"step_{step}.json", json.dumps(document))
