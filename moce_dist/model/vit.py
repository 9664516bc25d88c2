"""Parts of the vision transformer: position embedding, blocks, initialisation, patches.

Blocks and patch embedding compute the same as timm's, under timm's parameter names, so encoder
weights load into a timm `VisionTransformer` unchanged. timm itself is not used, because it takes
longer to import than everything else in a training run. Autocast would cast every parameter
separately, and many small kernels keep a GPU waiting. So the parameters of a block are cast in one
operation, and so are their gradients.

Letters: B images, N tokens or patches, D width, H heads, P patch side in pixels, S image side in
pixels (N = (S / P)^2 patches).

Source: Dosovitskiy et al. 2021, arXiv 2010.11929; He et al. 2022, arXiv 2111.06377, appendix A.1
(fixed sine-cosine positions, Xavier initialisation).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
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


class _CastTogether(torch.autograd.Function):
    """Cast tensors to a dtype, and their gradients back, with one operation each way."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        return _copied(tensors, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_copied(gradients, ctx.dtype)


class _AddTogether(torch.autograd.Function):
    """Add bases (...) to stacks (E, ...) in their own dtype and cast the sums, all at once."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        stacks, bases = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        ctx.dtype = stacks[0].dtype
        sums = torch._foreach_add(stacks, bases)
        return tuple(sums) if dtype == ctx.dtype else _copied(sums, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        is_cast = gradients[0].dtype != ctx.dtype
        if gradients[0].shape[0] == 1:
            # with one expert on a rank, the usual case, the base's gradient equals the expert's;
            # one copy writes both
            single = [gradient[0] for gradient in gradients]
            if is_cast:
                return None, *_copied([*gradients, *single], ctx.dtype)
            return None, *gradients, *_copied(single, ctx.dtype)
        if is_cast:
            gradients = _copied(gradients, ctx.dtype)
        return None, *gradients, *(gradient.sum(dim=0) for gradient in gradients)


def _copied(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    flat = tensors[0].new_empty(sum(t.numel() for t in tensors), dtype=dtype)
    parts = torch.split(flat, [t.numel() for t in tensors])
    views = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(views, list(tensors))
    return tuple(views)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the type that autocast computes in for `x`, or that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def cast_together(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """Return weight and bias of every linear layer in the dtype that autocast uses for `x`.

    They are the parameters themselves if autocast is off, and under `torch.compile`, which fuses
    casts by itself.
    """
    device = x.device.type
    parameters = tuple(parameter for linear in linears for parameter in linear.parameters())
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled(device):
        return parameters
    cast: tuple[Tensor, ...] = _CastTogether.apply(torch.get_autocast_dtype(device), *parameters)
    return cast


def add_together(x: Tensor, stacks: nn.Module, bases: nn.Module) -> tuple[Tensor, ...]:
    """Add the parameters (...) of `bases` to those (E, ...) of `stacks`; see `cast_together`.

    The sums have the type that autocast computes in for `x`, or that of `x`.
    """
    parameters = (*stacks.parameters(), *bases.parameters())
    added: tuple[Tensor, ...] = _AddTogether.apply(autocast_dtype(x), *parameters)
    return added


class SelfAttention(nn.Module):
    """Attention of all tokens of an image to each other."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens (B, N, D)."""
        return self.attend(x, cast_together(x, self.qkv, self.proj))

    def attend(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Transform tokens (B, N, D) with the cast weights and biases of `qkv` and `proj`."""
        qkv_weight, qkv_bias, weight, bias = weights
        heads = F.linear(x, qkv_weight, qkv_bias).view(*x.shape[:2], 3 * self.num_heads, -1)
        # split before transposing, so that the backward pass writes the gradient once, in place
        parts = torch.split(heads, self.num_heads, dim=2)
        query, key, value = (part.transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(query, key, value)
        return F.linear(y.transpose(1, 2).reshape(x.shape), weight, bias)


class Mlp(nn.Module):
    """Two linear layers with GELU between them; the hidden width is 4 D by default.

    `bias` is that of the output.
    """

    def __init__(self, width: int, hidden: int | None = None, *, bias: bool = True) -> None:
        super().__init__()
        hidden = hidden or 4 * width
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens (B, N, D)."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class DenseBlock(nn.Module):
    """Transformer block of a plain ViT: pre-norm attention and MLP with residual connections."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = SelfAttention(width, num_heads)
        self.norm2 = layer_norm(width)
        self.mlp: nn.Module = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens (B, N, D)."""
        attn, mlp = self.attn, self.mlp
        if not isinstance(mlp, Mlp):
            # a caller has replaced the MLP by experts
            x = x + attn(self.norm1(x))
            x = x + mlp(self.norm2(x))
            return x
        weights = cast_together(x, attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
        *attention, weight1, bias1, weight2, bias2 = weights
        x = x + attn.attend(self.norm1(x), attention)
        hidden = F.gelu(F.linear(self.norm2(x), weight1, bias1))
        return x + F.linear(hidden, weight2, bias2)


class PatchEmbed(nn.Module):
    """Maps images to tokens: one linear map of every patch."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, S, S) as tokens (B, N, D)."""
        tokens: Tensor = self.proj(images)
        return tokens.flatten(2).transpose(1, 2)


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
