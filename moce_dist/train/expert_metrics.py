"""Metrics of a step's experts and of the exchange between ranks, for metrics.jsonl.

They follow from the plan and the routing table, so all ranks know them without communication.
`images_exchanged_contiguous` is what the same step would have exchanged with experts and clusters
placed by number alone: the baseline that shows the gain of the scheduler.
"""

from typing import Any

import numpy as np

from moce_dist.cost.sizes import element_size, exchange_bytes, num_visible
from moce_dist.data.stream import Batch
from moce_dist.parallel.exchange import images_exchanged
from moce_dist.parallel.token import token_bytes_exchanged
from moce_dist.train.setup import TrainState


def moe_metrics(
    state: TrainState, batch: Batch, loss: float, auxiliary: tuple[float, float]
) -> dict[str, Any]:
    """Metrics of the experts, from the plan and the routing table alone.

    `auxiliary` holds the step's balance and confidence losses.
    """
    config, router = state.job.config, state.router
    if state.job.stage != "moce":
        return {"loss_total": loss}
    gate, (balance, confidence) = config.gate, auxiliary
    metrics: dict[str, Any] = {
        "loss_total": loss + gate.balance_weight * balance + gate.confidence_weight * confidence,
        "loss_balance": balance,
        "loss_confidence": confidence,
    }
    if state.model.gate is None:
        return metrics | {
            "images_per_expert": [],
            "images_exchanged": 0,
            "bytes_exchanged": token_bytes(state) if config.moe.kind == "token" else 0,
        }
    counts = batch.cluster_counts.numpy()
    exchanged = images_exchanged(
        batch.clusters, router.table, router.experts, state.topology.num_replicas
    )
    return metrics | {
        "images_per_expert": [
            np.bincount(row, counts, config.moe.num_experts).astype(int).tolist()
            for row in router.table
        ],
        "images_exchanged": exchanged,
        "images_exchanged_contiguous": router.contiguous.images_exchanged(router.table, counts),
        "bytes_exchanged": exchanged * exchange_bytes(config),
    }


def token_bytes(state: TrainState) -> int:
    """Bytes that all ranks of a token-routed model exchange in a step."""
    config, ranks = state.job.config, state.topology.num_ranks
    images = state.plan.batch_size // ranks // state.micro_batches
    one_pass = token_bytes_exchanged(
        config,
        state.topology.ep_size,
        tokens=images * num_visible(config),
        element_size=element_size(config),
    )
    return one_pass * ranks * state.micro_batches
