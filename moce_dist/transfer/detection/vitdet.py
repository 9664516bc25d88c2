r"""A plain ViT as a detector: windowed attention, a simple feature pyramid, torchvision's R-CNN.

The ViT keeps one resolution and most blocks attend inside windows; four blocks, evenly spaced,
attend to the whole image. The pyramid is made from the last map alone:

                               stride 4   ConvTranspose x2   --\
    pixels --> ViT, patch 16   stride 8   ConvTranspose      ---  1x1, 3x3 --> proposals, boxes,
    (B, 3, S, S)               stride 16  as it is           ---               masks
                               stride 32  max-pool           --/

As in ViTDet the class token is left out; unlike there, there are no relative position biases.

Letters: B images, S side of the square, pixels; D width; N patches, g = S/P of them per side; w
side of a window in patches; F channels of the pyramid; C classes.

Source: ViTDet, Li et al. 2022, arXiv 2203.16527, section 3 and appendix A.2; Mask R-CNN, He et al.
2017, arXiv 1703.06870, by torchvision.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from moce_dist.config import DetectionConfig
from moce_dist.settings import ConfigError
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.fit import layered_adamw

_FINEST_STRIDE = 4
_NUM_LEVELS = 4
_NUM_GLOBAL = 4
_HEAD_CONVOLUTIONS = 4
_HEAD_WIDTH = 1024
_WEIGHT_DECAY = 0.1
_ASPECTS = (0.5, 1.0, 2.0)

Autocast = Callable[[], AbstractContextManager[object]]


class WindowAttention(nn.Module):
    """A block's attention inside windows of w x w patches; the grid is padded to whole windows."""

    def __init__(self, attention: nn.Module, grid: int, window: int) -> None:
        super().__init__()
        self.attention, self._grid, self._window = attention, grid, window

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        (images, _, width), grid, window = tokens.shape, self._grid, self._window
        padding = -grid % window
        count, side = (grid + padding) // window, grid + padding
        padded = F.pad(tokens.view(images, grid, grid, width), (0, 0, 0, padding, 0, padding))
        split = padded.view(images, count, window, count, window, width).transpose(2, 3)
        mixed = self.attention(split.reshape(-1, window**2, width), **options)
        joined = mixed.view(images, count, count, window, window, width).transpose(2, 3)
        return joined.reshape(images, side, side, width)[:, :grid, :grid].reshape(tokens.shape)


def global_blocks(depth: int) -> set[int]:
    """Choose the blocks that attend to the whole image: the last of every quarter."""
    return {(i + 1) * depth // _NUM_GLOBAL - 1 for i in range(_NUM_GLOBAL)}


def prepare_vit(vit: Any, window: int) -> None:
    """Remove a timm ViT's class token and restrict its attention to windows, in place.

    Raises:
        ConfigError: it is not a timm ViT.
    """
    if not isinstance(vit, VisionTransformer):
        raise ConfigError("--backbone: must be a plain ViT of timm's for detection")
    grid = vit.patch_embed.grid_size[0]
    if vit.pos_embed is not None:
        vit.pos_embed = nn.Parameter(vit.pos_embed[:, -(grid**2) :].detach().clone())
    vit.cls_token = vit.reg_token = None
    vit.num_prefix_tokens = 0
    if window >= grid:
        return
    whole = global_blocks(len(vit.blocks))
    for index, block in enumerate(vit.blocks):
        if index not in whole:
            block.attn = WindowAttention(block.attn, grid, window)


def _level(width: int, doublings: int) -> tuple[nn.Module, int]:
    # resizes the ViT's map to a level 2 ** doublings times as fine; returns the level's width, too
    if doublings <= 0:
        return nn.MaxPool2d(2**-doublings) if doublings else nn.Identity(), width
    layers: list[nn.Module] = []
    for step in range(doublings):
        layers += [LayerNorm2d(width), nn.GELU()] if step else []
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, stride=2))
        width //= 2
    return nn.Sequential(*layers), width


class Pyramid(nn.Module):
    """A ViT and a pyramid of its last map, with the interface of torchvision's R-CNN backbones."""

    def __init__(self, vit: Any, channels: int, autocast: Autocast) -> None:
        super().__init__()
        self.vit, self.out_channels, self._autocast = vit, channels, autocast
        patch = vit.patch_embed.patch_size[0]
        if patch & (patch - 1):
            raise ConfigError(
                f"--backbone: has patches of {patch} pixels, detection needs 4, 8, 16 .."
            )
        # doublings from the ViT's resolution to the finest level's; negative for halvings
        finest = int(math.log2(patch / _FINEST_STRIDE))
        self.strides = [_FINEST_STRIDE * 2**i for i in range(_NUM_LEVELS + 1)]
        levels = []
        for i in range(_NUM_LEVELS):
            resize, width = _level(vit.embed_dim, finest - i)
            branch = nn.Sequential(
                resize,
                nn.Conv2d(width, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            levels.append(branch)
        self.levels = nn.ModuleList(levels)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Return float32 maps (B, F, S/s, S/s) of strides s; the last is only for proposals."""
        with self._autocast():
            (last,) = self.vit.forward_intermediates(images, indices=1, intermediates_only=True)
            maps = [level(last) for level in self.levels]
        # the heads decode boxes in the dtype of the maps; bfloat16 is pixels off at 1024
        named = OrderedDict((str(i), each.float()) for i, each in enumerate(maps))
        named["pool"] = F.max_pool2d(named[str(_NUM_LEVELS - 1)], 1, stride=2)
        return named


class SquareTransform(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Fit images into the upper left of a square; training squares stay as they are."""

    def __init__(self, size: int, backbone: Backbone) -> None:
        mean, std = list(backbone.mean), list(backbone.std)
        super().__init__(size, size, mean, std, size_divisible=size)

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Scale (3, H, W) so that its longer side is S, with antialias as in training."""
        if self.training:
            return image, target
        factor = self.max_size / max(image.shape[-2:])
        size = [max(1, round(side * factor)) for side in image.shape[-2:]]
        scaled = F.interpolate(image[None], size=size, mode="bilinear", antialias=True)
        return scaled[0], target


def _pool(output_size: int, pyramid: Pyramid, size: int) -> MultiScaleRoIAlign:
    pool = MultiScaleRoIAlign(
        [str(i) for i in range(_NUM_LEVELS)], output_size=output_size, sampling_ratio=0
    )
    # it derives its levels' strides once, from its first input, so that must be a full square
    maps = {
        str(i): torch.zeros(1, 1, -(-size // stride), -(-size // stride))
        for i, stride in enumerate(pyramid.strides[:-1])
    }
    pool(maps, [torch.zeros(0, 4)], [(size, size)])
    return pool


def make_detector(
    vit: Any,
    backbone: Backbone,
    recipe: DetectionConfig,
    *,
    num_classes: int,
    has_masks: bool,
    autocast: Autocast,
) -> FasterRCNN:
    """Build the detector around a ViT for squares of side S: Mask R-CNN, or Faster R-CNN.

    Its class 0 is the background; class c of the task is c + 1.

    Raises:
        ConfigError: the ViT is not plain, or its patch size is not a power of two.
    """
    prepare_vit(vit, recipe.window)
    size, channels = recipe.size, recipe.channels
    pyramid = Pyramid(vit, channels, autocast)
    layers = _HEAD_CONVOLUTIONS * [channels]
    anchors = AnchorGenerator(
        tuple((recipe.anchor_strides * stride,) for stride in pyramid.strides),
        len(pyramid.strides) * (_ASPECTS,),
    )
    parts: dict[str, Any] = {
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(channels, len(_ASPECTS), conv_depth=2),
        "box_roi_pool": _pool(7, pyramid, size),
        "box_head": FastRCNNConvFCHead(
            (channels, 7, 7), layers, [_HEAD_WIDTH], norm_layer=LayerNorm2d
        ),
        "box_predictor": FastRCNNPredictor(_HEAD_WIDTH, num_classes + 1),
        "box_batch_size_per_image": recipe.rois,
    }
    if has_masks:
        model = MaskRCNN(
            pyramid,
            **parts,
            mask_roi_pool=_pool(14, pyramid, size),
            mask_head=MaskRCNNHeads(channels, layers, 1, norm_layer=LayerNorm2d),
            mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1),
        )
    else:
        model = FasterRCNN(pyramid, **parts)
    model.transform = SquareTransform(size, backbone)
    return model


def make_optimizer(model: Any, layer_decay: float) -> torch.optim.AdamW:
    """Make AdamW with layer-wise learning rate decay in the ViT; groups have `lr_scale`."""
    new = [p for name, p in model.named_parameters() if not name.startswith("backbone.vit.")]
    return layered_adamw(
        model.backbone.vit, new, weight_decay=_WEIGHT_DECAY, layer_decay=layer_decay
    )
