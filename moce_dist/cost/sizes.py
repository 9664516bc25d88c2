"""The sizes of a configuration: tokens, parameters, bytes, floating-point operations.

These formulas are defined only here; the dry run, the placement's costs, metrics, studies and
budgets all use them. A multiply-add counts as two operations. The backward pass costs twice the
forward pass, except for the patch embedding, whose input needs no gradient. An image uses one
expert per layer, as large as the MLP that it replaced, so experts add no operations. Norms,
activations, softmax and the gate are left out; they are a few per cent in small models.

Letters: N patches, V visible ones, D width, T tokens, P patch side, K clusters, n images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moce_dist.config import Config

CHANNELS = 3
TRANSFERS = 4
"""All-to-alls per layer: an image's tokens travel there and back, forward and backward."""
BUCKET_BYTES = 25 * 2**20
"""Size at which a bucket of gradients is closed."""
FIELDS = 8
"""For `cluster.encoder: pixels`, the fields per side of an image whose mean colours are its
features."""
MAX_OPEN_FILES = 256
"""Most tars that a loader process keeps open."""
_FLOAT32 = 4
_ADAM_TENSORS = 3
"""A weight and its two moments."""


def num_visible(config: Config) -> int:
    """Return the tokens of an image in the encoder: visible patches and the class token."""
    return int(config.num_patches * (1 - config.model.mask_ratio)) + 1


def element_size(config: Config) -> int:
    """Return the bytes of a number in the matrix products, which is also how tokens travel."""
    return 2 if config.parallel.precision == "bf16" else 4


def image_bytes(config: Config) -> int:
    """Return the bytes of an image's tokens in one all-to-all."""
    return num_visible(config) * config.model.shape.width * element_size(config)


def exchange_bytes(config: Config) -> int:
    """Return the bytes of an image in all transfers of a layer, where its expert is elsewhere."""
    return image_bytes(config) * TRANSFERS


def expert_parameters(config: Config) -> int:
    """Return the parameters of an expert: a block's MLP without the shared hidden units."""
    width = config.model.shape.width
    hidden = 4 * width - config.shared_units
    return 2 * width * hidden + hidden + width


def expert_bytes(config: Config) -> int:
    """Return the bytes of one expert when it moves: float32 weights, with AdamW two moments."""
    tensors = _ADAM_TENSORS if config.moce.optimizer == "adamw" else 1
    return expert_parameters(config) * _FLOAT32 * tensors


def _block_parameters(width: int) -> int:
    # q, k, v and the projection with their biases, the MLP, two norms
    return 12 * width**2 + 9 * width + 4 * width


def dense_parameters(config: Config) -> int:
    """Return the trained parameters of the dense masked autoencoder, including the decoder."""
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
    """Return the trained parameters that all ranks hold in stage moce, without the gate."""
    if config.has_base:
        return dense_parameters(config)
    return dense_parameters(config) - len(config.moe_layers) * expert_parameters(config)


def local_expert_parameters(config: Config) -> int:
    """Return the parameters of the experts that one rank holds in stage moce."""
    parallel = config.parallel
    places = min(parallel.num_workers, parallel.num_groups)
    local = config.moe.num_experts // places
    return len(config.moe_layers) * local * expert_parameters(config)


def blocks_flop(tokens: int, width: int, depth: int) -> int:
    """Return the FLOPs of a forward pass of T tokens through blocks with MLPs of ratio 4."""
    # multiply-adds: per token 3 D^2 for q, k, v, D^2 for the projection and 8 D^2 for the MLP; per
    # image 2 T^2 D for attention
    return depth * (2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width)


def _embed_flop(config: Config, num_patches: int) -> int:
    return 2 * num_patches * CHANNELS * config.model.patch_size**2 * config.model.shape.width


def training_flop(config: Config) -> int:
    """Return the FLOPs of one image's forward and backward pass through the masked autoencoder."""
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
    """Return the FLOPs of a forward pass of one whole image through the encoder of the features.

    A model of timm is counted as the run's own.
    """
    if config.cluster.encoder == "pixels":
        return 0
    shape, patches, block = config.model.shape, config.num_patches, config.cluster.feature_block
    depth = shape.depth if block is None else block + 1
    return _embed_flop(config, patches) + blocks_flop(patches + 1, shape.width, depth)


def clustering_flop(config: Config, num_images: int, iterations: int) -> int:
    """Return the FLOPs of all distances to centroids: n K (D + 1) multiply-adds per iteration."""
    width = config.model.shape.width
    if config.cluster.encoder == "pixels":
        width = CHANNELS * FIELDS**2
    return iterations * 2 * num_images * config.cluster.num_clusters * (width + 1)


@dataclass(frozen=True)
class Cost:
    """Images seen per stage, and the FLOPs of training and of clustering."""

    mae_images: int = 0
    moce_images: int = 0
    training: int = 0
    clustering: int = 0
    """FLOPs of the features and of k-means."""

    @property
    def flop(self) -> int:
        """All FLOPs."""
        return self.training + self.clustering


def run_cost(config: Config, images: Mapping[Any, int], iterations: int | None = None) -> Cost:
    """Return the cost of a run's stages, given the number of `images` that each of them sees.

    `iterations` are the k-means iterations that were run; by default the configured maximum.
    """
    mae, moce = images.get("mae", 0), images.get("moce", 0) + images.get("control", 0)
    rounds = config.cluster.iterations if iterations is None else iterations
    clustering = images.get("features", 0) * features_flop(config)
    clustering += clustering_flop(config, images.get("cluster", 0), rounds)
    return Cost(mae, moce, (mae + moce) * training_flop(config), clustering)
