"""Masked autoencoder, dense or with experts: encoder of visible patches, light decoder, pixel loss.

    image --patchify--> N patches --mask--> V visible --encoder--> tokens --decoder--> N predicted

    loss = mean squared error on the N - V masked patches, each normalised by its own mean and
           variance

The caller draws the noise per image that decides which patches are masked, so the model holds no
random state. Encoder weights have the names of timm's VisionTransformer, decoder weights those of
the published checkpoints.

Letters: B images, N patches, V visible patches, D encoder width, P patch side, S image side
(pixels).

Source: He et al. 2022, arXiv 2111.06377, sections 3 and A.1.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moce_dist.config import Config
from moce_dist.model.gate import Gate
from moce_dist.model.moce import Dispatcher, MoceBlock
from moce_dist.model.vit import (
    DenseBlock,
    PatchEmbed,
    cast_together,
    initialise,
    layer_norm,
    patchify,
    position_embedding,
)


class MaskedAutoencoder(nn.Module):
    """The MAE; with `centroids` it has a gate, and experts in its MoE layers."""

    pos_embed: Tensor
    decoder_pos_embed: Tensor

    def __init__(
        self, config: Config, *, centroids: Tensor | None = None, num_local_experts: int = 0
    ) -> None:
        """Build from the configuration; `centroids` (K, D) makes the MoE form."""
        super().__init__()
        self.config = config
        self._build_encoder()
        self._build_decoder()
        self.apply(initialise)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        for token in (self.cls_token, self.mask_token):
            nn.init.normal_(token, std=0.02)
        self.gate: Gate | None = None
        if centroids is not None:
            for layer, index in enumerate(self.config.moe_layers):
                block = self.blocks[index]
                assert isinstance(block, DenseBlock)
                self.blocks[index] = MoceBlock(
                    block,
                    num_local_experts,
                    layer,
                    shared_units=config.shared_units,
                    has_base=config.has_base,
                )
            self.gate = Gate(
                len(config.moe_layers),
                config.moe.num_experts,
                centroids,
                seed=config.seed,
                is_fixed=config.gate.assign == "fixed",
            )

    def _build_encoder(self) -> None:
        model, size = self.config.model, self.config.data.image_size
        width, depth, heads = model.shape
        self.patch_embed = PatchEmbed(model.patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", position_embedding(size // model.patch_size, width))
        self.blocks = nn.ModuleList([DenseBlock(width, heads) for _ in range(depth)])
        self.norm = layer_norm(width)

    def _build_decoder(self) -> None:
        model, side = self.config.model, self.config.data.image_size // self.config.model.patch_size
        width = model.decoder_width
        self.decoder_embed = nn.Linear(model.shape.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("decoder_pos_embed", position_embedding(side, width))
        self.decoder_blocks = nn.ModuleList(
            [DenseBlock(width, model.decoder_num_heads) for _ in range(model.decoder_depth)]
        )
        self.decoder_norm = layer_norm(width)
        self.decoder_pred = nn.Linear(width, model.patch_size**2 * 3)

    def _autocast(self, images: Tensor) -> torch.autocast:
        enabled = self.config.parallel.precision == "bf16"
        return torch.autocast(images.device.type, torch.bfloat16, enabled=enabled)

    def _embed(self, images: Tensor) -> Tensor:
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def _embed_some(self, patches: Tensor, ids: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # embeds only those of the patches (B, N, P * P * 3) that are at ids (B, V): (B, V, D)
        chosen = patches.gather(1, ids[:, :, None].expand(-1, -1, patches.shape[2]))
        # a non-overlapping convolution is a matrix product; channels come last in a patch
        weight = weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(chosen, weight, bias) + self.pos_embed[0, 1:][ids]

    def _with_token(self, x: Tensor) -> Tensor:
        # x (B, V, D) embedded patches; returns (B, 1 + V, D) with the class token first
        token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([token, x], dim=1)

    def _encode(self, x: Tensor, dispatcher: Dispatcher | None, scales: Tensor | None) -> Tensor:
        x = self._with_token(x)
        # unbind gives one view per layer, and its backward stacks all their gradients at once
        by_layer = () if scales is None else scales.unbind()
        for block in self.blocks:
            x = block(x, dispatcher, by_layer) if isinstance(block, MoceBlock) else block(x)
        return self.norm(x)

    def random_masking(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Order patches by noise (B, N); return the V ids kept (B, V) and `ids_restore` (B, N)."""
        num_keep = int(noise.shape[1] * (1 - self.config.model.mask_ratio))
        # stable, so that equal noise gives the same mask on every device
        ids_shuffle = noise.argsort(dim=1, stable=True)
        return ids_shuffle[:, :num_keep], ids_shuffle.argsort(dim=1)

    def decode(self, latent: Tensor, ids_restore: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Predict all patches (B, N, P * P * 3) from the encoder's output (B, 1 + V, D).

        `weights` are weight and bias of `decoder_embed` and of `decoder_pred`.
        """
        embed_weight, embed_bias, weight, bias = weights
        x = F.linear(latent, embed_weight, embed_bias)
        batch, num_patches = ids_restore.shape
        hidden = self.mask_token.to(x.dtype).expand(batch, num_patches + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], hidden], dim=1)
        patches = patches.gather(1, ids_restore[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return F.linear(self.decoder_norm(x), weight, bias)[:, 1:]

    def target(self, images: Tensor) -> Tensor:
        """Return the target of the prediction, (B, N, P * P * 3), float32."""
        patches = patchify(images, self.config.model.patch_size)
        if not self.config.model.norm_pix_loss:
            return patches
        variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
        return (patches - mean) / (variance + 1e-6) ** 0.5

    def predict(
        self,
        images: Tensor,
        noise: Tensor,
        dispatcher: Dispatcher | None = None,
        scales: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict all patches from the visible ones: (B, N, P * P * 3) in the space of `target`.

        Also returns which patches are masked, (B, N) bool. `images` (B, 3, S, S) are normalised by
        ImageNet's statistics, `noise` is (B, N). A model with experts also takes a `dispatcher` and
        `scales` (L, B), the weights of the experts' outputs.
        """
        ids_keep, ids_restore = self.random_masking(noise)
        patches = patchify(images, self.config.model.patch_size)
        with self._autocast(images):
            outer = self.patch_embed.proj, self.decoder_embed, self.decoder_pred
            weight, bias, *decoder = cast_together(images, *outer)
            visible = self._embed_some(patches, ids_keep, weight, bias)
            latent = self._encode(visible, dispatcher, scales)
            prediction = self.decode(latent, ids_restore, decoder)
        return prediction.to(images.dtype), ids_restore >= ids_keep.shape[1]

    def forward(
        self,
        images: Tensor,
        noise: Tensor,
        dispatcher: Dispatcher | None = None,
        scales: Tensor | None = None,
    ) -> Tensor:
        """Return the reconstruction loss of every image, (B,), float32; arguments as `predict`."""
        prediction, is_masked = self.predict(images, noise, dispatcher, scales)
        error = ((prediction - self.target(images)) ** 2).mean(dim=2)
        masked = is_masked.to(error.dtype)
        return (error * masked).sum(dim=1) / masked.sum(dim=1)

    def features(
        self, images: Tensor, dispatcher: Dispatcher | None = None, scales: Tensor | None = None
    ) -> Tensor:
        """Encode whole images (B, 3, S, S) as the mean of the normed patch tokens, (B, D)."""
        with self._autocast(images):
            tokens = self._encode(self._embed(images), dispatcher, scales)
        return tokens[:, 1:].to(images.dtype).mean(dim=1)

    def block_features(self, images: Tensor, index: int) -> Tensor:
        """Encode whole images (B, 3, S, S) with a dense model up to block `index`, (B, D).

        Every patch token is scaled to zero mean and unit variance, as the next block's norm without
        its parameters would do. The result is the mean of these tokens.
        """
        with self._autocast(images):
            x = self._with_token(self._embed(images))
            for block in self.blocks[: index + 1]:
                x = block(x)
        tokens = x[:, 1:].to(images.dtype)
        return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6).mean(dim=1)
