"""Start from weights that users already have: published MAE files, timm's MAE backbones.

All of them use timm's names for the encoder; a published `.pth` keeps its tensors under `model`.
Most files have no decoder: then the decoder is newly initialised, and the log says so. A network
with further parts (LayerScale, registers, more blocks) is refused.

Source: the layout of mae_pretrain_vit_*.pth, arXiv 2111.06377; timm's `vit_*_patch16_224.mae`.
"""

import argparse
import logging
import math
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moce_dist.config import WEIGHT_FILES, Config
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.run.names import one_line
from moce_dist.settings import ConfigError

log = logging.getLogger(__name__)
_HEADS = ("head.", "fc_norm.")


def read_weights(source: str, field: str) -> dict[str, Tensor]:
    """Read a state dict: a local `.pth`, `.pt` or `.safetensors`, or a timm name of the hub.

    `field` is the setting that named it, for errors. Only tensors, plain containers and
    `argparse.Namespace` are unpickled.

    Raises:
        ConfigError: the file is missing, damaged or not a state dict.
    """
    path = Path(source)
    if path.suffix not in WEIGHT_FILES:
        import timm

        try:
            return dict(timm.create_model(source, pretrained=True, num_classes=0).state_dict())
        except (RuntimeError, ValueError, OSError) as error:
            # unknown to timm, not on the hub, or the hub cannot be reached
            raise ConfigError(f"{field} ({source}): {one_line(error)}") from None
    if not path.is_file():
        raise ConfigError(f"{field} ({source}): no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ConfigError(f"{field} ({source}): is damaged ({error})") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        raise ConfigError(
            f"{field} ({source}): is no checkpoint of tensors; nothing else is unpickled"
        ) from None
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not weights or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ConfigError(f"{field} ({source}): holds no state dict")
    return dict(weights)


def initial_weights(config: Config) -> dict[str, Tensor]:
    """Return the dense weights that training starts from: new ones, replaced by `model.init`'s.

    Raises:
        ConfigError: `model.init` cannot be read, or does not fit the configured model.
    """
    if config.model.init is not None:
        return dense_weights(config, config.model.init, "model.init")
    return _new_weights(config)


def _new_weights(config: Config) -> dict[str, Tensor]:
    torch.manual_seed(config.seed)
    return dict(MaskedAutoencoder(config).state_dict())


def dense_weights(config: Config, source: str, field: str) -> dict[str, Tensor]:
    """Replace new weights of the configured MAE by those of `source`, which `field` named.

    Everything in `source` is taken, except a classifier's head.

    Raises:
        ConfigError: the encoder is incomplete, the model has no place for a tensor, or a tensor has
            another shape than the model's.
    """
    weights, found, named = _new_weights(config), read_weights(source, field), f"{field} ({source})"
    _resample_positions(found, config.data.image_size // config.model.patch_size, named)
    taken = {name: tensor.float() for name, tensor in found.items() if name in weights}
    for name, tensor in taken.items():
        if tensor.shape != weights[name].shape:
            raise ConfigError(
                f"{named}: {name} is {tuple(tensor.shape)}, "
                f"the configured model needs {tuple(weights[name].shape)}"
            )
    missing = weights.keys() - taken.keys()
    encoder = [name for name in missing if not name.startswith(("decoder", "mask_token"))]
    if encoder:
        raise ConfigError(f"{named}: lacks {sorted(encoder)[0]}")
    # the rest of a network would not compute what the whole was trained to
    left = [name for name in found if name not in weights and not name.startswith(_HEADS)]
    if left:
        more = f" and {len(left) - 1} more" if left[1:] else ""
        raise ConfigError(f"{named}: the configured model has no place for {left[0]}{more}")
    if missing:
        log.info("%s: %d tensors; no decoder in it, the decoder starts new", field, len(taken))
    return weights | taken


def _resample_positions(found: dict[str, Tensor], side: int, named: str) -> None:
    # in place, for side x side patches
    for name in ("pos_embed", "decoder_pos_embed"):
        positions = found.get(name)
        if positions is None or positions.ndim != 3 or positions.shape[1] == 1 + side**2:
            continue
        patches = positions.shape[1] - 1
        if math.isqrt(abs(patches)) ** 2 != patches:
            raise ConfigError(
                f"{named}: {name} has {patches + 1} positions, "
                "must be one of the class and a square of patches"
            )
        from timm.layers import resample_abs_pos_embed

        found[name] = resample_abs_pos_embed(positions, [side, side])
