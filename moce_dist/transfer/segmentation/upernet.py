r"""A plain ViT with a UPerNet decoder: images to one score per class and pixel.

A plain ViT has one resolution. The outputs of four blocks are resized to four resolutions, which
the UPerNet decoder of segmentation-models-pytorch combines:

    block d/4    (B, D, S/P, S/P)  --x4-->  \
    block d/2                      --x2-->   UPerNet --> classes (B, C, S, S)
    block 3d/4                     --x1-->   /
    block d                        --/2-->  /

Letters: B images, D width, S side of a crop, P patch side, pixels; C classes; d depth.

Source: Xiao et al. 2018, arXiv 1807.10221 (UPerNet); feature pyramid as in mmsegmentation's
configs/mae for ADE20K, without its auxiliary head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

from moce_dist.transfer.fit import layered_adamw

_LAYER_DECAY, _WEIGHT_DECAY = 0.65, 0.05
_DROPOUT = 0.1


class Segmenter(nn.Module):
    """A plain ViT, a feature pyramid and a UPerNet decoder: (B, 3, S, S) -> (B, C, S, S)."""

    vit: Any

    def __init__(self, vit: Any, num_classes: int, channels: int) -> None:
        super().__init__()
        self.vit = vit
        depth, width = len(vit.blocks), vit.embed_dim
        # with fewer than four blocks, some are used twice
        self._taps = [max((i + 1) * depth // 4, 1) - 1 for i in range(4)]
        self.pyramid = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(width, width, 2, stride=2),
                    nn.BatchNorm2d(width),
                    nn.GELU(),
                    nn.ConvTranspose2d(width, width, 2, stride=2),
                ),
                nn.ConvTranspose2d(width, width, 2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )
        self.decoder = UPerNetDecoder([0, 0] + 4 * [width], decoder_channels=channels)
        self.head = nn.Sequential(nn.Dropout2d(_DROPOUT), nn.Conv2d(channels, num_classes, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, C, S, S)."""
        blocks = sorted(set(self._taps))
        maps = self.vit.forward_intermediates(images, indices=blocks, intermediates_only=True)
        of_block = dict(zip(blocks, maps, strict=True))
        levels = [f(of_block[tap]) for f, tap in zip(self.pyramid, self._taps, strict=True)]
        # the decoder ignores its two finest inputs, so these are placeholders
        logits = self.head(self.decoder([images, images, *levels]))
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)

    def optimizer(self) -> torch.optim.AdamW:
        """Make AdamW with layer-wise learning rate decay in the ViT; groups have `lr_scale`."""
        new = [p for name, p in self.named_parameters() if not name.startswith("vit.")]
        return layered_adamw(self.vit, new, weight_decay=_WEIGHT_DECAY, layer_decay=_LAYER_DECAY)
