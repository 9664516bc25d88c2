"""The encoder whose features are clustered: the run's MAE, published weights, a timm model.

    cluster.encoder  mae        the trained MAE of the run: mean of the patch tokens after the norm,
                                or of those of an earlier block (cluster.feature_block)
                     pixels     the mean colours of 8 x 8 fields of the image, no model
                     FILE       the same encoder as mae, with the weights of a published file
                     timm:NAME  for a ViT the same mean, for any other model the input of its head

The images of a task must pass the encoder that the clusters were made with, so both build it here.
On a GPU matrix products follow `parallel.precision` (bfloat16); on a CPU everything is float32.
"""

import json
from pathlib import Path

import torch

from moce_dist.config import Config
from moce_dist.cost.sizes import FIELDS
from moce_dist.features.encoder import (
    Encoder,
    EncoderInput,
    check_timm,
    describe_timm,
    field_colours,
    mae_encoder,
    timm_encoder,
    timm_weights,
)
from moce_dist.features.extract import EncoderSpec
from moce_dist.model.device import choose_device
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.run.artefacts import INPUTS, file_sha256, read_marker
from moce_dist.run.directory import Run
from moce_dist.settings import ConfigError
from moce_dist.train.checkpoint import load_weights
from moce_dist.train.pretrained import dense_weights

OWN, PIXELS = "mae", "pixels"
_TIMM, _FIELD = "timm:", "cluster.encoder"


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
    block = config.cluster.feature_block
    return mae_encoder(model, encoder_pixels(config), device, block=block, bf16=bf16)


def encoder_pixels(config: Config) -> EncoderInput:
    """Return the size and framing of the images that the encoder takes.

    Raises:
        ConfigError: timm has no such model.
    """
    encoder = config.cluster.encoder
    if not encoder.startswith(_TIMM):
        return EncoderInput(config.data.image_size)
    return describe_timm(encoder.removeprefix(_TIMM), f"{_FIELD} ({encoder})")


def check_encoder(config: Config) -> None:
    """Check an encoder other than the run's own, before earlier stages spend hours.

    Raises:
        ConfigError: timm has no such model or its features are not (B, D), or a file's weights do
            not fit the configured model.
    """
    encoder = config.cluster.encoder
    if encoder.startswith(_TIMM):
        own, what = encoder_pixels(config), f"{_FIELD} ({encoder})"
        check_timm(encoder.removeprefix(_TIMM), own, what)
    elif encoder not in (OWN, PIXELS):
        dense_weights(config, encoder, _FIELD)


def encoder_id(config: Config) -> str:
    """Identify an encoder other than the run's own by what its features depend on.

    Raises:
        ConfigError: there is no such file, or timm has no such model.
    """
    encoder = config.cluster.encoder
    assert encoder != OWN
    if encoder == PIXELS:
        return f"{PIXELS}, {FIELDS} x {FIELDS} fields"
    if encoder.startswith(_TIMM):
        return f"{_framed_id(config)}, {timm_weights(encoder.removeprefix(_TIMM))}"
    block = config.cluster.feature_block
    try:
        sha256 = f"sha256:{file_sha256(Path(encoder))}"
        return sha256 if block is None else f"{sha256}, block {block}"
    except OSError as error:
        raise ConfigError(f"{_FIELD} ({encoder}): {error.strerror}") from None


def _framed_id(config: Config) -> str:
    # all of the id of a timm model in earlier versions, which did not note its weights
    framing = encoder_pixels(config).framing
    assert framing is not None
    return f"{config.cluster.encoder}, {framing.mode} {framing.crop_pct:g} {framing.method}"


def noted_id(folder: Path, config: Config) -> str:
    """Return `encoder_id`, in the form in which a folder of features notes the same encoder.

    Raises:
        ConfigError: as `encoder_id`.
    """
    now, was = encoder_id(config), _noted(folder)
    is_same = config.cluster.encoder.startswith(_TIMM) and was == _framed_id(config)
    return was if was is not None and is_same else now


def _noted(folder: Path) -> str | None:
    marker, begun = read_marker(folder), folder / INPUTS
    if marker is not None:
        inputs = marker["inputs"]
    else:
        inputs = json.loads(begun.read_text()) if begun.is_file() else {}
    noted: str | None = inputs.get("encoder")
    return noted


def encoder_spec(config: Config, checkpoint: Path | None, *, identity: str = "") -> EncoderSpec:
    """Describe in strings how a worker builds the encoder; paths are absolute.

    A worker runs in another folder. `identity` identifies the weights.
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
    return build_encoder(config, path, choose_device(config.parallel))


def same_encoder(run: Run, config: Config) -> str:
    """Return `noted_id` of an encoder other than the run's MAE, after checking it.

    Raises:
        ConfigError: it is missing, or the run's features were made with another one.
    """
    now, marker = noted_id(run.features, config), read_marker(run.features)
    if marker is not None and (was := marker["inputs"].get("encoder")) != now:
        raise ConfigError(
            f"cluster.encoder ({config.cluster.encoder}): is not what {run.features} was made with "
            f"({was}, now {now})"
        )
    return now
