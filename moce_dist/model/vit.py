"""Parts of the vision transformer: position embedding, blocks, initialisation, patches.

Blocks and patch embedding are timm's, under timm's names, so encoder weights load into a timm
`VisionTransformer` as they are.

Letters: B images, N patches, D width, P patch side in pixels, S image side in pixels (N = (S /
P)^2).

Source: Dosovitskiy et al. 2021, arXiv 2010.11929; He et al. 2022, arXiv 2111.06377, appendix A.1
(fixed sine-cosine positions, Xavier initialisation).
"""

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

layer_norm = partial(nn.LayerNorm, eps=1e-6)


def _sine_cosine(positions: Tensor, width: int) -> Tensor:
    # positions (N,), returns (N, width): sines then cosines at geometric frequencies
    frequencies = 10_000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = positions.double()[:, None] * frequencies[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def position_embedding(side: int, width: int) -> Tensor:
    """Return the fixed 2-d position embedding of `side` x `side` patches, (1, 1 + N, D).

    The first half of D encodes the column, the second the row; the class token has zeros.
    """
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    halves = [_sine_cosine(axis.flatten(), width // 2) for axis in (columns, rows)]
    patches = torch.cat(halves, dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), patches])[None].float()


def make_block(width: int, num_heads: int) -> Block:
    """Make one transformer block: pre-norm attention and MLP of ratio 4, biases everywhere."""
    return Block(width, num_heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=layer_norm)


def initialise(module: nn.Module) -> None:
    """Xavier-initialise a linear layer, reset a norm; for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, 3, S, S) into patches (B, N, P * P * 3), channels last inside a patch."""
    batch, channels, side, _ = images.shape
    n = side // patch_size
    grid = images.reshape(batch, channels, n, patch_size, n, patch_size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, n * n, patch_size**2 * channels)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Put patches (B, N, P * P * 3) together to images (B, 3, S, S)."""
    batch, count, size = patches.shape
    n, channels = round(count**0.5), size // patch_size**2
    grid = patches.reshape(batch, n, n, patch_size, patch_size, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, n * patch_size, n * patch_size)
