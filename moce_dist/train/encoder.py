"""The frozen encoder whose features are clustered: the run's MAE, published weights, a timm model.

    cluster.encoder  mae        the trained MAE of the run: mean of the patch tokens after the norm,
                                or of those of a block before (cluster.feature_block)
                     pixels     the mean colours of 8 x 8 fields of the image, no model
                     FILE       the same encoder with the weights of a published file
                     timm:NAME  of a ViT the same mean, of any other model what its own head sees

The images of a task meet the encoder that the clusters were made with, so both build it here. It
takes images as `framed_image` makes them: for a timm model resized and cut as timm evaluates it,
for the others the full centre square, bicubic. They are normalised by ImageNet's statistics; the
step from these to the statistics of a timm model is taken on the device. On a GPU matrix products
are bfloat16 (`parallel.precision`), on a CPU all is float32.

Letters: B images, S side in pixels, N patches, D width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from moce_dist.cluster.features import EncoderSpec
from moce_dist.config import Config, ParallelConfig
from moce_dist.data.framing import BLACK, METHODS, MODES, Framing
from moce_dist.data.images import MEAN, STD
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.run.artefacts import file_sha256, read_marker
from moce_dist.run.directory import Run
from moce_dist.settings import ConfigError
from moce_dist.train.checkpoint import load_weights
from moce_dist.train.pretrained import dense_weights

OWN, PIXELS = "mae", "pixels"
_FIELDS = 8
_TIMM, _FIELD = "timm:", "cluster.encoder"


class Pixels(NamedTuple):
    """Images that a model takes: their side S, and the statistics that they are normalised with.

    `framing` is how a picture is resized and cut; None: its full centre square, bicubic.
    """

    image_size: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    framing: Framing | None = None


def describe_timm(name: str, what: str) -> Pixels:
    """Say what images a model of timm's takes, without loading it; `what` names it in errors.

    Raises:
        ConfigError: timm has no such model, no weights for it, or its images are not (3, S, S) or
            are framed in a way that is not known here.
    """
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
    # timm pads with the mean what it fits in whole, else with black
    fill = tuple(round(255 * level) for level in mean) if given.crop_mode == "border" else BLACK
    framing = Framing(given.crop_pct, given.crop_mode, given.interpolation, fill)
    return Pixels(width, mean, std, framing)


def renormalisation(
    mean: Sequence[float], std: Sequence[float]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return factor and shift, (3, 1, 1) each, from ImageNet's statistics to a model's own."""
    given_mean, given_std, own_mean, own_std = (
        np.array(values, np.float32).reshape(3, 1, 1) for values in (MEAN, STD, mean, std)
    )
    return given_std / own_std, (given_mean - own_mean) / own_std


class Encoder:
    """A frozen encoder on its device; `pixels` are the images that it is called with."""

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        own: Pixels,
        device: torch.device,
        *,
        bf16: bool = False,
    ) -> None:
        """Wrap `features`, (B, 3, S, S) to (B, D), of a model on `device` that takes `own`."""
        self.pixels = Pixels(own.image_size, framing=own.framing)
        self._features, self._device, self._bf16 = features, device, bf16
        difference = renormalisation(own.mean, own.std)
        self._factor, self._shift = (torch.from_numpy(x).to(device) for x in difference)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, S, S) of any device to features (B, D) float32 on the encoder's."""
        pixels = images.to(self._device) * self._factor + self._shift
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            return self._features(pixels).float()


def encoder_device(parallel: ParallelConfig) -> torch.device:
    """Choose this process's device: its GPU, unless there is none or `parallel.use_gpu` forbids."""
    has_gpu = parallel.use_gpu is not False and torch.cuda.is_available()
    return torch.device("cuda" if has_gpu else "cpu")


def build_encoder(config: Config, checkpoint: Path | None, device: torch.device) -> Encoder:
    """Build the encoder that `cluster.encoder` names; `checkpoint` is the run's MAE, for `mae`.

    Raises:
        ConfigError: timm does not know it, or a file's weights do not fit the configured model.
    """
    bf16 = device.type == "cuda" and config.parallel.precision == "bf16"
    name = config.cluster.encoder
    if name == PIXELS:
        return Encoder(field_colours, encoder_pixels(config), device)
    if name.startswith(_TIMM):
        return timm_encoder(name.removeprefix(_TIMM), encoder_pixels(config), device, bf16=bf16)
    if name == OWN:
        assert checkpoint is not None
        weights = load_weights(checkpoint)
    else:
        weights = dense_weights(config, name, _FIELD)
    parallel = config.parallel.model_copy(update={"precision": "bf16" if bf16 else "fp32"})
    model = MaskedAutoencoder(config.model_copy(update={"parallel": parallel}))
    model.load_state_dict(weights)
    frozen, block = _frozen(model, device), config.cluster.feature_block
    features = frozen.features if block is None else partial(frozen.block_features, index=block)
    return Encoder(features, encoder_pixels(config), device, bf16=bf16)


def field_colours(images: Tensor) -> Tensor:
    """Average images (B, 3, S, S) over 8 x 8 fields: (B, 192)."""
    return F.adaptive_avg_pool2d(images, _FIELDS).flatten(1)


def timm_encoder(
    name: str, own: Pixels, device: torch.device, *, bf16: bool = False, pretrained: bool = True
) -> Encoder:
    """Build the encoder of a timm model that takes `own`; unless `pretrained`, draw its weights."""
    model = timm.create_model(name, pretrained=pretrained, num_classes=0)
    return Encoder(pooled_features(_frozen(model, device)), own, device, bf16=bf16)


def pooled_features(model: Any) -> Callable[[Tensor], Tensor]:
    """Return (B, 3, S, S) -> (B, D) of a timm model without classifier.

    Of a ViT that would give its class token or a learned pooling: the mean of its patch tokens
    (B, N, D) after the final norm. Of any other what timm gives.
    """

    def mean_of_patches(images: Tensor) -> Tensor:
        tokens: Tensor = model.forward_features(images)
        return tokens[:, model.num_prefix_tokens :].float().mean(dim=1)

    # a ViT that pools by the mean has its final norm behind it, so it is asked itself
    is_asked = getattr(model, "global_pool", "avg") == "avg"
    return model if is_asked or not hasattr(model, "num_prefix_tokens") else mean_of_patches


def _frozen(model: Any, device: torch.device) -> Any:
    assert isinstance(model, nn.Module)
    return model.to(device).eval().requires_grad_(requires_grad=False)


def encoder_pixels(config: Config) -> Pixels:
    """Say what images the model behind the encoder takes.

    Raises:
        ConfigError: timm has no such model.
    """
    encoder = config.cluster.encoder
    if not encoder.startswith(_TIMM):
        return Pixels(config.data.image_size)
    return describe_timm(encoder.removeprefix(_TIMM), f"{_FIELD} ({encoder})")


def check_encoder(config: Config) -> None:
    """Check an encoder that is not the run's own, before hours are spent on what precedes it.

    Raises:
        ConfigError: timm has no such model, or a file's weights do not fit the configured one.
    """
    encoder = config.cluster.encoder
    if encoder.startswith(_TIMM):
        encoder_pixels(config)
    elif encoder not in (OWN, PIXELS):
        dense_weights(config, encoder, _FIELD)


def encoder_id(config: Config) -> str:
    """Name an encoder that is not the run's own by what its features depend on.

    Raises:
        ConfigError: there is no such file, or timm has no such model.
    """
    encoder = config.cluster.encoder
    assert encoder != OWN
    if encoder == PIXELS:
        return f"{PIXELS}, {_FIELDS} x {_FIELDS} fields"
    if (framing := encoder_pixels(config).framing) is not None:
        return f"{encoder}, {framing.mode} {framing.crop_pct:g} {framing.method}"
    block = config.cluster.feature_block
    try:
        sha256 = f"sha256:{file_sha256(Path(encoder))}"
        return sha256 if block is None else f"{sha256}, block {block}"
    except OSError as error:
        raise ConfigError(f"{_FIELD} ({encoder}): {error.strerror}") from None


def encoder_spec(config: Config, checkpoint: Path | None, *, identity: str = "") -> EncoderSpec:
    """Say in strings how a worker builds the encoder; it stands in a folder of its own.

    `identity` is what the weights are known by.
    """
    cluster = config.cluster
    if cluster.encoder not in (OWN, PIXELS) and not cluster.encoder.startswith(_TIMM):
        path = str(Path(cluster.encoder).absolute())
        cluster = cluster.model_copy(update={"encoder": path})
    resolved = config.model_copy(update={"cluster": cluster})
    arguments = (resolved.model_dump_json(), str(checkpoint or ""))
    return EncoderSpec(load_encoder, arguments, identity)


def load_encoder(config_json: str, checkpoint: str) -> Encoder:
    """Build the encoder in a worker, on the worker's own device and number of threads."""
    config = Config.model_validate_json(config_json)
    torch.set_num_threads(config.parallel.threads_per_worker)
    path = Path(checkpoint) if checkpoint else None
    return build_encoder(config, path, encoder_device(config.parallel))


def same_encoder(run: Run, config: Config) -> str:
    """Return `encoder_id` of an encoder other than the run's MAE.

    Raises:
        ConfigError: it is gone, or is not the one that the clusters' features were made with.
    """
    now, marker = encoder_id(config), read_marker(run.features)
    if marker is not None and (was := marker["inputs"].get("encoder")) != now:
        raise ConfigError(
            f"cluster.encoder ({config.cluster.encoder}): is not what {run.features} was made with "
            f"({was}, now {now})"
        )
    return now
