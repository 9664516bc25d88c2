"""What a downstream task starts from: a plain timm ViT and where its weights come from.

Every backbone of a comparison is built by timm from a `Backbone`, so all of them meet the same
heads, budgets and images: the customised MoCE and the dense MAE of a run, the same architecture
with random weights, or any model of timm's own.

Letters: B images, S side in pixels, D width.

Source: pooling and norm as in facebookresearch/mae models_vit.py@efb2a80 (mean of the patch tokens;
fine-tuning replaces the encoder's last norm by one after the mean).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

from moce_dist.config import Config
from moce_dist.data.images import MEAN, STD, normalise
from moce_dist.features.encoder import describe_timm
from moce_dist.settings import ConfigError

_ARCHITECTURES = {
    "tiny": "vit_tiny_patch16_224",
    "small": "vit_small_patch16_224",
    "base": "vit_base_patch16_224",
    "large": "vit_large_patch16_224",
    "huge": "vit_huge_patch14_224",
}


def timm_architecture(config: Config) -> tuple[str, dict[str, Any]]:
    """Return the timm architecture of a run's encoder and the arguments that reproduce it.

    The model then returns the mean of the patch tokens after the final norm.
    """
    shape = config.model.shape
    arguments = {
        "img_size": config.data.image_size,
        "patch_size": config.model.patch_size,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.num_heads,
        "qkv_bias": True,
        "class_token": True,
        "global_pool": "avg",
        "fc_norm": False,
        "num_classes": 0,
    }
    return _ARCHITECTURES[config.model.size], arguments


@dataclass(frozen=True)
class Backbone:
    """A timm architecture and the weights to load into it.

    `weights` None keeps timm's own: pre-trained if `pretrained`, else random. `image_size` is the
    side S that the model expects; its images are normalised by `mean` and `std`. `choice` lists,
    per MoE layer, what a customised ViT was made of: an expert, or weights over all experts.
    """

    name: str
    architecture: str
    arguments: Mapping[str, Any]
    image_size: int
    weights: Mapping[str, Tensor] | None = None
    pretrained: bool = False
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    choice: list[int | list[float]] | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, float] | None = None
    """Images and seconds of the further steps, if there were any."""

    @property
    def is_drawn(self) -> bool:
        """Tell whether the weights depend on a seed."""
        return self.weights is None and not self.pretrained

    def features_model(self, seed: int) -> nn.Module:
        """Build the model (B, 3, S, S) -> (B, D) in evaluation mode.

        `seed` initialises parameters that have no weights.
        """
        return self._load(self._create(seed, num_classes=0), strict=True).eval()

    def classifier(self, num_classes: int, *, seed: int, drop_path: float) -> nn.Module:
        """Build the model (B, 3, S, S) -> (B, num_classes) for fine-tuning, in training mode."""
        changes: dict[str, Any] = {"num_classes": num_classes, "drop_path_rate": drop_path}
        if "fc_norm" in self.arguments:
            changes["fc_norm"] = True
        return self._load(self._create(seed, **changes), strict=False).train()

    def dense_model(self, image_size: int, *, seed: int, drop_path: float) -> nn.Module:
        """Build the ViT for another image size; position embeddings are resized bicubically.

        Raises:
            ConfigError: the architecture is not a plain ViT.
        """
        changes = {"img_size": image_size, "num_classes": 0, "drop_path_rate": drop_path}
        try:
            model = self._create(seed, **changes)
        except TypeError:
            raise ConfigError(
                f"--backbone {self.name}: must be a plain ViT for a dense task"
            ) from None
        if not hasattr(model, "patch_embed") or not hasattr(model, "forward_intermediates"):
            raise ConfigError(f"--backbone {self.name}: must be a plain ViT for a dense task")
        return self._load(model, strict=True).train()

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise images (B, 3, S, S) uint8 to what the model takes, on their device."""
        return normalise(images, self.mean, self.std)

    def _create(self, seed: int, **changes: Any) -> nn.Module:
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model(
            self.architecture, pretrained=self.pretrained, **{**self.arguments, **changes}
        )
        return model

    def _load(self, model: nn.Module, *, strict: bool) -> nn.Module:
        if self.weights is None:
            return model
        # timm's own filter resizes the position embeddings to the model's grid
        weights = timm.models.vision_transformer.checkpoint_filter_fn(dict(self.weights), model)
        loaded = model.load_state_dict(weights, strict=strict)
        # a classifier has a new norm after the mean and a new head; nothing else may be missing
        assert all(k.startswith(("fc_norm.", "head.")) for k in loaded.missing_keys), loaded
        assert all(k.startswith("norm.") for k in loaded.unexpected_keys), loaded
        return model


def run_backbone(
    name: str,
    config: Config,
    weights: Mapping[str, Tensor] | None,
    *,
    choice: list[int | list[float]] | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Backbone:
    """Describe a backbone of a run's architecture; without weights it is initialised at random.

    `identity` holds everything about the backbone that its results depend on.
    """
    architecture, arguments = timm_architecture(config)
    size = config.data.image_size
    return Backbone(
        name, architecture, arguments, size, weights, choice=choice, identity=identity or {}
    )


def timm_backbone(name: str) -> Backbone:
    """Describe `timm:NAME` with timm's own pre-trained weights.

    A model is pooled as timm pools it. The exception are the published MAEs (`vit_*.mae`), whose
    class token timm would take: they give the mean of the patch tokens after the final norm, as the
    run's own MAE does, and for fine-tuning a new norm after the mean.

    Raises:
        ConfigError: timm has no such model, or no weights for it.
    """
    known = name.removeprefix("timm:")
    given = describe_timm(known, f"--backbone {name}")
    is_mae = known.startswith("vit_") and known.endswith(".mae")
    pooling = {"global_pool": "avg", "fc_norm": False} if is_mae else {}
    return Backbone(
        name,
        known,
        pooling,
        given.image_size,
        pretrained=True,
        mean=given.mean,
        std=given.std,
        identity={"timm": timm.__version__, **pooling},
    )
