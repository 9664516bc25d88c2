"""Held-out loss per cluster: of own experts, of other experts, of their average, of the control.

This shows whether experts specialise. Every held-out image is reconstructed, with the same crop and
the same mask, by several models:

    own       the experts that its cluster takes
    others    the experts s further in every layer, s = 1 .. E - 1; the mean of these losses
    worst     the s with the greatest mean loss on a cluster
    average   the plain mean of all experts
    control   the control, if the run has one

A lower loss says nothing about the quality of features; the downstream tasks measure that.

Letters: B images of a batch, K clusters, L MoE layers, E experts.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moce_dist.arrays import Float64
from moce_dist.cluster.assignments import open_assigned
from moce_dist.config import Config
from moce_dist.data.batches import stream
from moce_dist.data.images import normalise
from moce_dist.data.plan import Plan
from moce_dist.data.shards import HOLDOUT
from moce_dist.data.stream import Batch, StreamSpec
from moce_dist.data.table import SampleTable
from moce_dist.model.customize import cluster_probabilities, customize, routes
from moce_dist.model.device import choose_device
from moce_dist.model.gate import output_scales
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.model.moce import LocalDispatcher, global_names, is_stacked
from moce_dist.run.directory import Run
from moce_dist.settings import ConfigError
from moce_dist.transfer.choosing import need_stage
from moce_dist.transfer.select import CONTROL


class Reconstructors:
    """The models of a run that reconstruct held-out images, on one device."""

    def __init__(self, run: Run, config: Config) -> None:
        """Load the models.

        Raises:
            ConfigError: the run has no experts of clusters.
        """
        if config.moe.kind != "cluster":
            raise ConfigError(
                f"{run.root}: has no experts of clusters (moe.kind {config.moe.kind})"
            )
        self._config, self.device = config, choose_device(config.parallel)
        weights = need_stage(run, "moce").weights
        self._p = cluster_probabilities(weights)
        self._table = routes(weights, config.gate, num_groups=config.parallel.num_groups)
        self._moce = self._load(weights, weights["gate.cluster_embedding"])
        even = [[1 / config.moe.num_experts] * config.moe.num_experts] * len(config.moe_layers)
        scale = None
        if config.gate.combine == "prob":
            # the outputs of an average are scaled as those of own experts are on average
            scale = self._p.gather(2, self._table[:, :, None]).mean(dim=(1, 2)).tolist()
        average = customize(weights, even, scale=scale, with_decoder=True)
        self._dense = {"average": self._load(average)}
        if run.has_control:
            self._dense[CONTROL] = self._load(need_stage(run, CONTROL).weights)

    def _load(
        self, weights: dict[str, Tensor], embedding: Tensor | None = None
    ) -> MaskedAutoencoder:
        config, experts = self._config, self._config.moe.num_experts
        local = 0 if embedding is None else experts
        model = MaskedAutoencoder(config, centroids=embedding, num_local_experts=local)
        residents = [range(experts)] * len(config.moe_layers)
        found = {
            name: torch.stack(
                [weights[n] for n in global_names(name, config.moe_layers, residents)]
            )
            if is_stacked(name)
            else weights[name]
            for name in model.state_dict()
        }
        model.load_state_dict(found)
        return model.to(self.device).eval()

    @torch.inference_mode()
    def losses(self, batch: Batch) -> dict[str, Float64]:
        """Return losses per image: `own`, `average`, `control` (B,) and `others` (E - 1, B).

        Row s - 1 of `others` is the loss of the experts s further.
        """
        config, clusters = self._config, batch.clusters[0]
        images, noise = normalise(batch.images.to(self.device)), batch.noise.to(self.device)
        own = self._table[:, clusters.clamp_min(0)]
        # all experts get the output scale of the own ones, so that only their weights differ
        log_p = self._p.log().clamp_min(-100)  # of p = 0, the difference to itself would be nan
        scales = output_scales(log_p, self._table, clusters, config.gate.combine).to(self.device)
        by_shift = []
        for shift in range(config.moe.num_experts):
            experts = ((own + shift) % config.moe.num_experts).to(self.device)
            dispatcher = LocalDispatcher(experts, config.moe.num_experts)
            by_shift.append(self._moce(images, noise, dispatcher, scales))
        found = {"own": by_shift[0], "others": torch.stack(by_shift[1:] or by_shift)}
        found |= {name: model(images, noise) for name, model in self._dense.items()}
        return {name: loss.double().cpu().numpy() for name, loss in found.items()}


def held_out_losses(run: Run, config: Config) -> Iterator[dict[str, Any]]:
    """Yield a row per cluster and one for all: image count and mean losses (None without images).

    Raises:
        ConfigError: the run has no experts of clusters, or no held-out images.
    """
    table, models = held_out_table(run, config), Reconstructors(run, config)
    clusters, parts = [], []
    for batch in held_out_batches(table, config):
        is_used = batch.weights.numpy() > 0
        clusters.append(batch.clusters[0].numpy()[is_used])
        parts.append({k: v[..., is_used] for k, v in models.losses(batch).items()})
    ids = np.concatenate(clusters)
    losses = {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}
    for cluster in range(config.cluster.num_clusters):
        yield {"cluster": cluster, **_row(losses, ids == cluster)}
    yield {"cluster": "all", **_row(losses, np.ones(len(ids), bool))}


def _row(losses: dict[str, Float64], chosen: NDArray[np.bool_]) -> dict[str, Any]:
    means = {name: values[..., chosen] for name, values in losses.items()}
    others = means.pop("others")
    has_any = bool(chosen.any())
    row = {name: float(values.mean()) if has_any else None for name, values in means.items()}
    row["others"] = float(others.mean()) if has_any else None
    row["worst"] = float(others.mean(axis=1).max()) if has_any else None
    return {"images": int(chosen.sum()), **row}


def held_out_table(run: Run, config: Config) -> SampleTable:
    """Read the held-out images with the clusters that they were assigned to.

    Raises:
        ConfigError: there are none.
    """
    folder, assigned = run.data(config) / HOLDOUT, run.holdout_clusters
    if not folder.is_dir() or not assigned.is_file():
        raise ConfigError(f"{run.root}: has no held-out images (data.holdout_fraction)")
    return open_assigned(folder, assigned)


def held_out_batches(table: SampleTable, config: Config) -> Iterator[Batch]:
    """Yield all samples of a table in batches, as training would read them."""
    plan = Plan(table, config.cluster.batch_size, config.seed)
    # the run's ledger lists unreadable images already
    ledger = Path(os.devnull)
    spec = StreamSpec(plan, config.data, config.num_patches, 1, 0, ledger, HOLDOUT)
    yield from stream(spec, np.zeros_like, start=0, stop=plan.steps_per_epoch)
