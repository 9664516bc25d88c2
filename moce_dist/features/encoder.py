"""Frozen encoders that turn images into features, each with a description of its input images.

An encoder takes images from `framed_image`: for a timm model resized and cut as in timm's
evaluation, for others the full centre square, bicubic. The device normalises them. The caller
chooses whether matrix products are bfloat16. `train/encoder.py` chooses the encoder of a run.

Letters: B images, S side in pixels, N patches, D width.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moce_dist.cost.sizes import FIELDS
from moce_dist.data.images import MEAN, STD, normalise
from moce_dist.features.decoding import BLACK, METHODS, MODES, Framing
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.run.names import one_line
from moce_dist.settings import ConfigError


class EncoderInput(NamedTuple):
    """The images that a model takes: their side S and the statistics of their normalisation.

    `framing` is how an image is resized and cut; None: its full centre square, bicubic.
    """

    image_size: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    framing: Framing | None = None


def describe_timm(name: str, what: str) -> EncoderInput:
    """Describe the images that a timm model takes, without loading it; `what` names it in errors.

    Raises:
        ConfigError: timm has no such model or no weights for it, or its images are not (3, S, S) or
            are framed in a way that is not supported here.
    """
    import timm

    if not timm.is_model(name) or not timm.is_model_pretrained(name):
        raise ConfigError(f"{what}: is no model of timm's with weights")
    given = timm.get_pretrained_cfg(name)
    channels, height, width = given.input_size
    if channels != 3 or height != width:
        raise ConfigError(f"{what}: takes images of {given.input_size}, must be (3, S, S)")
    mean, std = tuple(given.mean), tuple(given.std)
    if given.crop_mode not in MODES or given.interpolation not in METHODS:
        raise ConfigError(
            f"{what}: takes images by {given.interpolation} and {given.crop_mode}, must be of "
            f"{', '.join(METHODS)} and {', '.join(MODES)}"
        )
    # timm pads with the mean colour in crop mode `border`, else with black
    fill = tuple(round(255 * level) for level in mean) if given.crop_mode == "border" else BLACK
    framing = Framing(given.crop_pct, given.crop_mode, given.interpolation, fill)
    return EncoderInput(width, mean, std, framing)


def timm_weights(name: str) -> str:
    """Identify the weights that this version of timm takes for a model: their tag and place."""
    import timm

    given = timm.get_pretrained_cfg(name)
    return f"{given.tag} of {given.hf_hub_id or given.url}"


def check_timm(name: str, own: EncoderInput, what: str) -> None:
    """Check the shape of a timm model's features without its weights, on no device.

    Raises:
        ConfigError: they are not (B, D); `what` names the model.
    """
    import timm

    with suppress(NotImplementedError, RuntimeError), torch.device("meta"), torch.inference_mode():
        # not all operations of all models can go without data; then the first batch is checked
        model = timm.create_model(name, pretrained=False, num_classes=0).eval()
        features = pooled_features(model)(torch.empty(2, 3, own.image_size, own.image_size))
        _checked(features, 2, what)


def _checked(features: Any, num_images: int, what: str) -> Tensor:
    shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != num_images:
        raise ConfigError(f"{what}: gives features of {shape}, must be ({num_images}, D)")
    return features


class Encoder:
    """A frozen encoder on its device; `takes` describes the images that it is called with."""

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        own: EncoderInput,
        device: torch.device,
        *,
        bf16: bool = False,
        name: str = "encoder",
    ) -> None:
        """Wrap `features`, (B, 3, S, S) to (B, D), of a model on `device` that takes `own`.

        `name` names it in errors.
        """
        self._name, self.takes = name, own
        self._features, self._device, self._bf16 = features, device, bf16

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, S, S) uint8 of any device to features (B, D) float32 on its own.

        Raises:
            ConfigError: the model's features have another shape.
        """
        pixels = normalise(images.to(self._device), self.takes.mean, self.takes.std)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            return _checked(self._features(pixels), len(images), self._name).float()


def mae_encoder(
    model: MaskedAutoencoder,
    own: EncoderInput,
    device: torch.device,
    *,
    block: int | None = None,
    bf16: bool = False,
) -> Encoder:
    """Build the encoder of an MAE: the mean of its patch tokens after the norm or a `block`."""
    frozen = _frozen(model, device)
    features = frozen.features if block is None else partial(frozen.block_features, index=block)
    return Encoder(features, own, device, bf16=bf16)


def field_colours(images: Tensor) -> Tensor:
    """Average images (B, 3, S, S) over 8 x 8 fields: (B, 192)."""
    return F.adaptive_avg_pool2d(images, FIELDS).flatten(1)


def timm_encoder(
    name: str,
    own: EncoderInput,
    device: torch.device,
    *,
    bf16: bool = False,
    pretrained: bool = True,
) -> Encoder:
    """Build the encoder of a timm model that takes `own`; random weights unless `pretrained`.

    Raises:
        ConfigError: the weights are not on the hub, or it cannot be reached.
    """
    import timm

    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"cluster.encoder (timm:{name}): {one_line(error)}") from None
    features = pooled_features(_frozen(model, device))
    return Encoder(features, own, device, bf16=bf16, name=f"timm:{name}")


def pooled_features(model: Any) -> Callable[[Tensor], Tensor]:
    """Return the map (B, 3, S, S) -> (B, D) of a timm model without classifier.

    A ViT whose timm output is its class token or a learned pooling gives the mean of its patch
    tokens (B, N, D) after the final norm instead. Any other model gives its timm output.
    """

    def mean_of_patches(images: Tensor) -> Tensor:
        tokens: Tensor = model.forward_features(images)
        return tokens[:, model.num_prefix_tokens :].float().mean(dim=1)

    # a ViT that pools by the mean applies its final norm after pooling, so its output is used
    is_asked = getattr(model, "global_pool", "avg") == "avg"
    return model if is_asked or not hasattr(model, "num_prefix_tokens") else mean_of_patches


def _frozen(model: Any, device: torch.device) -> Any:
    assert isinstance(model, nn.Module)
    return model.to(device).eval().requires_grad_(requires_grad=False)
