"""What an arm costs: floating-point operations of training, features and clustering.

A multiplication and its addition are two operations. The backward pass costs twice the forward
pass, but for the patch embedding, whose input needs no gradient. An image meets one expert of every
layer, which has the size of the MLP that it replaced, so experts change nothing: these are active
operations. Left out are norms, activations, softmax and the gate, a few per cent of small models.

Letters: N patches, V visible ones, D width, T tokens, P patch side, K clusters, n images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moce_dist.config import Config

_CHANNELS = 3


def blocks_flop(tokens: int, width: int, depth: int) -> int:
    """Forward pass of `depth` transformer blocks with MLPs of ratio 4 on an image's tokens T."""
    # 3 D D of q, k, v, D D of the projection and 8 D D of the MLP a token, twice T T D of attention
    return depth * (2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width)


def _embed_flop(config: Config) -> int:
    values = _CHANNELS * config.model.patch_size**2
    return 2 * config.num_patches * values * config.model.shape.width


def training_flop(config: Config) -> int:
    """Forward and backward pass of one image through the masked autoencoder."""
    model, patches = config.model, config.num_patches
    visible = int(patches * (1 - model.mask_ratio)) + 1
    embed, width = _embed_flop(config), model.decoder_width
    forward = (
        embed
        + blocks_flop(visible, model.shape.width, model.shape.depth)
        + 2 * visible * model.shape.width * width
        + blocks_flop(patches + 1, width, model.decoder_depth)
        + 2 * (patches + 1) * width * _CHANNELS * model.patch_size**2
    )
    return 3 * forward - embed


def features_flop(config: Config) -> int:
    """Forward pass of one whole image through the encoder."""
    shape = config.model.shape
    return _embed_flop(config) + blocks_flop(config.num_patches + 1, shape.width, shape.depth)


def clustering_flop(config: Config, num_images: int, iterations: int) -> int:
    """Distances of all features to all centroids, n K (D + 1) multiplications an iteration."""
    width = config.model.shape.width
    return iterations * 2 * num_images * config.cluster.num_clusters * (width + 1)


@dataclass(frozen=True)
class Cost:
    """Images seen in the stages, and floating-point operations."""

    mae_images: int = 0
    moce_images: int = 0
    training: int = 0
    clustering: int = 0
    """Of the features and of k-means."""

    @property
    def flop(self) -> int:
        """All of them."""
        return self.training + self.clustering


def run_cost(config: Config, images: Mapping[Any, int], iterations: int | None = None) -> Cost:
    """Cost of a run's stages, given the `images` that each of them sees.

    `iterations` of k-means that were run; by default the most that may be.
    """
    mae, moce = images.get("mae", 0), images.get("moce", 0) + images.get("control", 0)
    rounds = config.cluster.iterations if iterations is None else iterations
    clustering = images.get("features", 0) * features_flop(config)
    clustering += clustering_flop(config, images.get("cluster", 0), rounds)
    return Cost(mae, moce, (mae + moce) * training_flop(config), clustering)
