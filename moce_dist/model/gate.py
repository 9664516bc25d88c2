"""The cluster-conditional gate, which chooses an image's expert from its cluster alone.

The gate of a layer sees the centroid of the image's cluster, never the tokens. So all decisions
of a step are one routing table of L x K experts, made before the forward pass. Both auxiliary
losses follow from the K x E probabilities and the step's number of images per cluster.

With `assign: fixed` the gate does not learn: similar clusters share an expert, the same one in all
layers.

Letters: L MoE layers, K clusters, E experts per layer, G expert groups, D width, B images.

Source: Liu et al. 2023, arXiv 2402.05382 (cluster-conditional routing); Riquelme et al. 2021,
arXiv 2106.05974, appendix A.1 (importance loss); Lewis et al. 2021, arXiv 2103.16716 (balanced
assignment).
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moce_dist.arrays import Float32, Float64, Int64
from moce_dist.config import GateConfig

_STARTS = 8
_QUANTILES = 2**16


def standardise(centroids: Tensor) -> Tensor:
    """Centre and scale centroids (K, D) to unit variance over the clusters.

    The centroids of a data set share most of their direction, so without this step most clusters
    would start at the same expert.
    """
    if centroids.shape[0] == 1:
        return centroids - centroids.mean(dim=0)
    deviation = centroids.std(dim=0, correction=0).clamp_min(1e-6)
    return (centroids - centroids.mean(dim=0)) / deviation


def fixed_weight(cluster_embedding: Tensor, num_experts: int, seed: int) -> Tensor:
    """Return gate weights (E, D) whose balanced routing keeps similar clusters together.

    They are the means of a partition of the cluster embeddings (K, D) into E groups of equal size,
    found by alternating between the means and the balanced assignment to them. Because the sizes
    are equal, the assignment with the greatest logits also has the least squared distances. The
    best of several starts, drawn with the seed, is taken.
    """
    points = cluster_embedding.double().numpy()
    draws, best = np.random.default_rng(seed), (-np.inf, np.empty(0))
    for _ in range(_STARTS):
        # a start: group the clusters by their order along a random direction
        order = (points @ draws.standard_normal(points.shape[1])).argsort(kind="stable")
        table = np.empty(len(points), np.int64)
        table[order] = np.arange(len(points)) * num_experts // len(points)
        while True:
            means = np.stack([points[table == e].mean(axis=0) for e in range(num_experts)])
            # products in float32, as the gate computes them
            scores = (points.astype(np.float32) @ means.T.astype(np.float32)).astype(np.float64)
            found = _balanced(scores)
            reached = scores[np.arange(len(points)), found].sum()
            if reached <= scores[np.arange(len(points)), table].sum():
                break
            table = found
        if reached > best[0]:
            best = reached, means
    return torch.from_numpy(best[1]).float()


class Gate(nn.Module):
    """Logits of the experts per cluster: per layer one linear map of the cluster embedding.

    `cluster_group` (K,) int64 is the expert group that every cluster keeps with `groups: shared`.
    It is -1 until the planner decides it, so that the groups match where clusters are read.
    """

    cluster_embedding: Tensor
    cluster_group: Tensor

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        centroids: Tensor,
        *,
        seed: int = 0,
        is_fixed: bool = False,
    ) -> None:
        """Start with logits of about unit variance; `centroids` (K, D).

        With `is_fixed` all layers have `fixed_weight`, which must not be trained.
        """
        super().__init__()
        width = centroids.shape[1]
        # own generator: the weights must not depend on how many experts this rank built before
        draws = torch.randn(
            num_layers, num_experts, width, generator=torch.Generator().manual_seed(seed)
        )
        self.register_buffer("cluster_embedding", standardise(centroids.float()))
        weight = draws * width**-0.5
        if is_fixed:
            weight = fixed_weight(self.cluster_embedding, num_experts, seed).expand_as(draws)
        self.weight = nn.Parameter(weight.clone())
        undecided = torch.full((len(centroids),), -1, dtype=torch.int64)
        self.register_buffer("cluster_group", undecided)

    def logits(self) -> Tensor:
        """Return the logits of every expert for every cluster, (L, K, E), float32."""
        return logits(self.weight, self.cluster_embedding)


def logits(weight: Tensor, cluster_embedding: Tensor) -> Tensor:
    """Map gate weights (L, E, D) and cluster embeddings (K, D) to logits (L, K, E), float32.

    Weights of one layer (E, D) give its logits (K, E).
    """
    # autocast would round the logits that decide the routing
    with torch.autocast(weight.device.type, enabled=False):
        return torch.einsum("...ed,kd->...ke", weight.float(), cluster_embedding.float())


def probabilities(weight: Tensor, cluster_embedding: Tensor) -> Tensor:
    """Map gate weights (L, E, D) and cluster embeddings (K, D) to probabilities p, (L, K, E)."""
    return logits(weight, cluster_embedding).softmax(dim=-1)


def certainty(p: Tensor, table: Tensor) -> Tensor:
    """Pick the probability of every cluster's expert, (L, K), from p (L, K, E) and a table (L, K).

    Under balanced assignment it need not be the cluster's greatest probability.
    """
    return p.gather(2, table[:, :, None]).squeeze(2)


def runner_up(p: Tensor, table: Tensor) -> Tensor:
    """Return the greatest p of an expert other than the table's, (L, K); 0 with one expert."""
    return p.scatter(2, table[:, :, None], 0.0).amax(dim=2)


@functools.cache
def _normal_quantiles() -> Float32:
    # the middles of 2^16 equally likely parts of the standard normal distribution, in order
    middles = (torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES
    return torch.special.ndtri(middles).float().numpy()


@dataclass(frozen=True)
class NoiseSchedule:
    """Routing noise in training, relative to the spread of the logits, decaying linearly to 0.

    Draws are normal quantiles of 16 random bits: standard deviation 0.99999, at most 4.32. They
    take a sixth of the time of exact normal draws, which would be half of a routing table's.
    """

    seed: int
    relative_std: float
    steps: int

    def level(self, step: int) -> float:
        """Return the standard deviation of a step's noise relative to the spread of the logits."""
        return self.relative_std * max(0.0, 1 - step / self.steps) if self.steps else 0.0

    def layer(self, step: int, layer: int, shape: tuple[int, int]) -> Tensor | None:
        """Draw the noise of a layer in a step, (K, E), keyed by (seed, layer, step, cluster).

        Returns None once the noise has decayed to 0.
        """
        if (level := self.level(step)) == 0:
            return None
        # drawing counts up in the lowest word; a draw of 64 bits serves four values
        bits = np.random.Philox(key=self.seed, counter=[0, 0, layer, step])
        count = shape[0] * shape[1]
        ranks = bits.random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")[:count]
        quantiles = _normal_quantiles() * np.float32(level)
        # every rank is an index; "clip" only spares the check of bounds
        return torch.from_numpy(quantiles.take(ranks, mode="clip").reshape(shape))

    def sample(self, step: int, shape: tuple[int, int, int]) -> Tensor:
        """Draw the noise of all layers in a step, (L, K, E)."""
        layers = [self.layer(step, layer, shape[1:]) for layer in range(shape[0])]
        return torch.stack([torch.zeros(shape[1:]) if n is None else n for n in layers])


def noisy_layer(scores: Tensor, noise: Tensor | None) -> Float32:
    """Add noise (K, E), in units of the spread of the layer's logits, to its logits (K, E)."""
    scores = scores.detach().float().cpu()
    if noise is not None:
        scores = torch.addcmul(scores, noise, scores.std(correction=0))
    return scores.numpy()


def noisy_scores(gate_logits: Tensor, noise: Tensor | None) -> Float64:
    """Add noise (L, K, E), in units of the spread of a layer's logits, to logits (L, K, E)."""
    layers = [
        noisy_layer(scores, None if noise is None else noise[layer])
        for layer, scores in enumerate(gate_logits)
    ]
    return np.stack(layers).astype(np.float64)


def routing_table(
    gate_logits: Tensor,
    gate: GateConfig,
    *,
    noise: Tensor | None = None,
    num_groups: int = 1,
    cluster_group: Tensor | None = None,
) -> Int64:
    """Decide the expert of every cluster in every layer, (L, K), from logits (L, K, E).

    `noise` (L, K, E) is in units of the spread (standard deviation) of a layer's logits. With
    `groups: shared` clusters keep `cluster_group` (K,); if it is undecided, they choose now.
    """
    scores, groups = noisy_scores(gate_logits, noise), None
    if gate.groups == "shared":
        groups = shared_groups(scores, num_groups)
        if cluster_group is not None and bool((cluster_group >= 0).all()):
            groups = cluster_group.cpu().numpy()
    return np.stack([layer_table(layer, gate, groups, num_groups) for layer in scores])


def layer_table(
    scores: NDArray[np.floating],
    gate: GateConfig,
    groups: Int64 | None,
    num_groups: int,
) -> Int64:
    """Decide the expert of every cluster in one layer, (K,), from noisy scores (K, E).

    `groups` (K,) are the clusters' expert groups; None: they choose among all experts.
    """
    is_balanced, per_group = gate.assign != "argmax", scores.shape[1] // num_groups
    if groups is None:
        return _balanced(scores) if is_balanced else scores.argmax(axis=1)
    assert (groups >= 0).all()
    table = np.empty(len(scores), np.int64)
    for group in range(num_groups):
        rows, first = np.flatnonzero(groups == group), group * per_group
        own = scores[rows, first : first + per_group]
        table[rows] = first + (_balanced(own) if is_balanced else own.argmax(axis=1))
    return table


def _balanced(scores: NDArray[np.floating]) -> Int64:
    # late: Numba takes longer to import than everything else here
    from moce_dist.model.balanced import balanced

    return balanced(scores.astype(np.float64))


def shared_groups(scores: Float64, num_groups: int) -> Int64:
    """Give every cluster one expert group for all layers, (K,), from scores (L, K, E).

    The score of a group is the sum over the layers of the score of its best expert. All groups take
    equally many clusters.
    """
    num_layers, num_clusters, num_experts = scores.shape
    by_group = scores.reshape(num_layers, num_clusters, num_groups, num_experts // num_groups)
    return _balanced(by_group.max(axis=3).sum(axis=0))


def output_scales(log_p: Tensor, experts: Tensor, cluster_ids: Tensor, combine: str) -> Tensor:
    """Return the weight of every image's expert output, (L, B): p, or p / stop_gradient(p).

    `log_p` (L, K, E), `experts` (L, K) int64, `cluster_ids` (B,) int64. Padding has id -1 and gets
    the last cluster's weight.
    """
    chosen = log_p.gather(2, experts[:, :, None]).squeeze(2)[:, cluster_ids]
    # a quotient could be 0 / 0, as noise also chooses experts that a sharp gate has given up; this
    # has the same value, 1, and the same gradient, that of log p
    return chosen.exp() if combine == "prob" else chosen - chosen.detach() + 1


def balance_loss(p: Tensor, cluster_counts: Tensor) -> Tensor:
    """Return the layers' mean (std / mean)^2 of the experts' importance in the global batch.

    `p` (L, K, E), `cluster_counts` (K,) images of the step per cluster.
    Source: arXiv 2106.05974, appendix A.1, eq. (2).
    """
    importance = torch.einsum("lke,k->le", p, cluster_counts.to(p.dtype))
    return (importance.var(dim=1, correction=0) / importance.mean(dim=1) ** 2).mean()


def confidence_loss(p: Tensor, cluster_counts: Tensor) -> Tensor:
    """Return the mean entropy of p over the layers and the global batch's images, in nats."""
    entropy = -(p * p.clamp_min(1e-12).log()).sum(dim=2)
    share = cluster_counts.to(p.dtype) / cluster_counts.sum()
    return (entropy * share).sum(dim=1).mean()
