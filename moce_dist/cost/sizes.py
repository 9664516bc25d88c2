"""What a configuration comes to: tokens, parameters, bytes, floating-point operations.

The only home of these formulas: the dry run, the placement's prices, metrics, studies and budgets
all read them here. A multiplication and its addition are two operations. The backward pass costs
twice the forward pass, but for the patch embedding, whose input needs no gradient. An image meets
one expert of every layer, which has the size of the MLP that it replaced, so experts add no
operations. Left out are norms, activations, softmax and the gate, a few per cent of small models.

Letters: N patches, V visible ones, D width, T tokens, P patch side, K clusters, n images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moce_dist.config import Config

CHANNELS = 3
TRANSFERS = 4
"""An image's tokens travel there and back, forward and backward."""
BUCKET_BYTES = 25 * 2**20
"""Gradients that travel together, at most: a bucket."""
MAX_OPEN_FILES = 256
"""Tars that a loader process keeps open."""
_FLOAT32 = 4
_ADAM_TENSORS = 3
"""A weight and its two moments."""


def num_visible(config: Config) -> int:
    """Tokens of an image in the encoder: visible patches and the class token."""
    return int(config.num_patches * (1 - config.model.mask_ratio)) + 1


def element_size(config: Config) -> int:
    """Bytes of a number in the matrix products, the type in which tokens travel."""
    return 2 if config.parallel.precision == "bf16" else 4


def image_bytes(config: Config) -> int:
    """Bytes of an image's tokens on one way."""
    return num_visible(config) * config.model.shape.width * element_size(config)


def expert_parameters(config: Config) -> int:
    """Parameters of an expert: a block's MLP, without the hidden units that experts share."""
    width = config.model.shape.width
    hidden = 4 * width - config.shared_units
    return 2 * width * hidden + hidden + width


def expert_bytes(config: Config) -> int:
    """Bytes of one expert as it moves: float32 weights, and under AdamW two moments."""
    tensors = _ADAM_TENSORS if config.moce.optimizer == "adamw" else 1
    return expert_parameters(config) * _FLOAT32 * tensors


def _block_parameters(width: int) -> int:
    # q, k, v and the projection with their biases, the MLP, two norms
    return 12 * width**2 + 9 * width + 4 * width


def dense_parameters(config: Config) -> int:
    """Trained parameters of the masked autoencoder without experts, decoder included."""
    model, values = config.model, CHANNELS * config.model.patch_size**2
    width, decoder = model.shape.width, model.decoder_width
    encoder = values * width + width + width + model.shape.depth * _block_parameters(width)
    return (
        encoder
        + 2 * width
        + (width * decoder + decoder + decoder)
        + model.decoder_depth * _block_parameters(decoder)
        + 2 * decoder
        + decoder * values
        + values
    )


def shared_parameters(config: Config) -> int:
    """Trained parameters that all ranks hold in stage moce, the gate left out."""
    if config.moe.shared_base:
        return dense_parameters(config)
    return dense_parameters(config) - len(config.moe_layers) * expert_parameters(config)


def local_expert_parameters(config: Config) -> int:
    """Parameters of the experts that one rank holds in stage moce."""
    parallel = config.parallel
    places = min(parallel.num_workers, parallel.num_groups)
    local = config.moe.num_experts // places
    return len(config.moe_layers) * local * expert_parameters(config)


def blocks_flop(tokens: int, width: int, depth: int) -> int:
    """Forward pass of `depth` transformer blocks with MLPs of ratio 4 on an image's tokens T."""
    # 3 D D of q, k, v, D D of the projection and 8 D D of the MLP a token, twice T T D of attention
    return depth * (2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width)


def _embed_flop(config: Config, num_patches: int) -> int:
    return 2 * num_patches * CHANNELS * config.model.patch_size**2 * config.model.shape.width


def training_flop(config: Config) -> int:
    """Forward and backward pass of one image through the masked autoencoder."""
    model, patches, visible = config.model, config.num_patches, num_visible(config)
    embed, width = _embed_flop(config, visible - 1), model.decoder_width
    forward = (
        embed
        + blocks_flop(visible, model.shape.width, model.shape.depth)
        + 2 * visible * model.shape.width * width
        + blocks_flop(patches + 1, width, model.decoder_depth)
        + 2 * (patches + 1) * width * CHANNELS * model.patch_size**2
    )
    return 3 * forward - embed


def features_flop(config: Config) -> int:
    """Forward pass of one whole image through the encoder."""
    shape = config.model.shape
    patches = config.num_patches
    return _embed_flop(config, patches) + blocks_flop(patches + 1, shape.width, shape.depth)


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
