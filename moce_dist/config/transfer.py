"""The transfer section: selection of experts, protocols, and the budget of each kind of fit."""

from typing import Annotated, Any, Literal

from pydantic import Field

from moce_dist.config.sections import StageConfig
from moce_dist.settings import Section

_CAT_MAX_RATIO = 0.75
RENAMED = {"segment_": "segmentation", "detect_": "detection"}
"""Field prefixes of version 0.1, and the sections that now hold these fields."""


class FinetuneConfig(Section):
    """Fine-tuning of a whole backbone. Source: arXiv 2111.06377, table 9."""

    epochs: int = Field(100, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(1024, ge=2)
    """Images per step."""
    base_lr: float = Field(5e-4, gt=0)
    """Learning rate per 256 images."""
    layer_decay: float = Field(0.65, gt=0, le=1)
    """Factor of the learning rate from one block to the one below."""
    weight_decay: float = Field(0.05, ge=0)
    """AdamW's weight decay."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth of the last block."""
    mixup: float = Field(0.8, ge=0)
    """Mixup's alpha; 0 turns it off."""
    cutmix: float = Field(1.0, ge=0)
    """CutMix's alpha; 0 turns it off."""
    crop_scale_min: float = Field(0.08, gt=0, le=1)
    """Smallest share of the image's area that a training crop takes."""
    hflip: bool = True
    """Mirror half of the training images."""
    max_train: int | None = Field(None, ge=1)
    """Cap on a fine-tuned classifier's training images, in addition to `transfer.max_train`."""
    warmup_epochs: float = Field(5, ge=0)
    """Linear warm-up."""


class SegmentationConfig(Section):
    """Training and test of segmentation. Source: mmsegmentation's configs/mae for ADE20K."""

    crop: int = Field(512, ge=16)
    """Side of a training crop and of a test window, pixels; a multiple of two patches."""
    steps: int = Field(160_000, ge=1)
    """Steps of training."""
    batch_size: int = Field(16, ge=1)
    """Images per step."""
    cat_max_ratio: float = Field(_CAT_MAX_RATIO, gt=0, le=1)
    """A crop is drawn anew, up to ten times, while a class has this share of its pixels or more."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    channels: int = Field(512, ge=8)
    """Channels of the decoder."""
    scales: tuple[Annotated[float, Field(gt=0, le=4)], ...] = Field((1.0,), min_length=1)
    """Scales at which a test image is predicted; mmsegmentation uses 0.5 to 1.75."""
    flip: bool = False
    """Also predict every test image mirrored."""


class DetectionConfig(Section):
    """Training and test of detection. Source: ViTDet, arXiv 2203.16527, appendix A.2."""

    size: int = Field(1024, ge=32)
    """Side of the square input, pixels; a multiple of 32 and of two patches."""
    steps: int = Field(184_375, ge=1)
    """Steps of training; the rate falls tenfold after 8/9 and 26/27 of them."""
    batch_size: int = Field(64, ge=1)
    """Images per step."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    layer_decay: float = Field(0.7, gt=0, le=1)
    """Factor of the learning rate from one block to the one below."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth of the backbone."""
    scale_min: float = Field(0.1, gt=0, le=1)
    """Smallest factor of large-scale jitter."""
    scale_max: float = Field(2, ge=1)
    """Largest factor of large-scale jitter; test images have factor 1."""
    window: int = Field(14, ge=1)
    """Side of an attention window, patches; four blocks attend to the whole image."""
    anchor_strides: float = Field(8, gt=0)
    """Anchor side of a pyramid level, in strides of it: 8 gives 32 pixels on the finest level."""
    channels: int = Field(256, ge=8)
    """Channels of the feature pyramid and of the heads' convolutions."""
    rois: int = Field(512, ge=4)
    """Proposals per image that the heads learn from."""


class SuiteEntry(Section):
    """One task of a suite (`--task all`)."""

    task: str
    """Name of the task, as `--task` takes it."""
    data: str | None = None
    """Folder of its images; default that of `--data`."""
    name: str = ""
    """Name of its folder and row; default the task's. Two entries of one task need two names."""
    protocol: tuple[str, ...] = ()
    """Protocols; empty: those of `--protocol`."""
    set: tuple[str, ...] = ()
    """Overrides `a.b=value` of the configuration for this task."""


_EXTRAPOLATION = 1.5
Selection = Literal[
    "vote", "largest_cluster", "merge", "average", "extrapolate", "mismatched", "validate"
]


class ContinuedConfig(Section):
    """Further training outside the stages (`--continue-images`): a task's own steps and controls.

    All other settings are those of stage moce; the optimiser starts new.
    """

    batch_size: int | None = Field(None, ge=1)
    """Images per optimiser step; None: as in stage moce."""
    base_lr: float | None = Field(None, gt=0)
    """Learning rate per 256 images; None: as in stage moce."""
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""

    def stage(self, moce: StageConfig, epochs: float) -> StageConfig:
        """Return the optimisation settings of such steps over `epochs` epochs."""
        given = self.model_dump(include={"batch_size", "base_lr"}, exclude_none=True)
        warmup = {"warmup_epochs": self.warmup_fraction * epochs}
        return moce.model_copy(update={**given, **warmup, "epochs": epochs})


class TransferConfig(Section):
    """Downstream tasks: selection of experts, protocols, budgets."""

    task: str = ""
    """Task of a recipe; `--task` overrides it."""
    suite: tuple[SuiteEntry, ...] = ()
    """The tasks of `--task all`."""
    save_models: bool = True
    """Keep fine-tuned and linear models, for `python -m moce_dist predict` and `onnx`."""
    save_every_steps: int = Field(500, ge=1)
    """Steps between two saved states of a fit; an interrupted fit resumes from the newest."""
    view_every_steps: int | None = Field(None, ge=1)
    """Steps between early evaluations of a fit, whose best model is kept; None: no evaluations."""
    select: Selection = "vote"
    """What an MoE layer becomes: one expert, a mix of all, or the best of these (`select.py`)."""
    merge_temperature: float = Field(1.0, gt=0)
    """`merge` weights experts by mass^(1 / T): near 0 it is the vote, when large the average."""
    extrapolation: float = Field(_EXTRAPOLATION, ge=0)
    """Where `extrapolate` lies on the line from the average (0) through the vote (1)."""
    validate_by: Literal["knn", "linear"] = "knn"
    """Protocol with which `validate` scores candidates on folds of the training images."""
    validate_folds: int = Field(5, ge=2)
    """Folds of the training images; each is tested with the others as training set."""
    validate_images: int = Field(2000, ge=2)
    """Most training images that `validate` uses; drawn with the seed."""
    evaluate: Literal["test", "val"] = "test"
    """Images to measure on; `val`, for choices: that folder, or a fifth of the training images."""
    continued: ContinuedConfig = ContinuedConfig()
    """Steps on the images of a task's own clusters."""
    max_train: int | None = Field(None, ge=1)
    """Cap on a task's training images, drawn with the seed; None takes all."""
    knn_k: int = Field(10, ge=1)
    """Neighbours of the k-NN protocol."""
    linear_epochs: int = Field(90, ge=1)
    """Passes of the linear protocol over the stored features."""
    finetune: FinetuneConfig = FinetuneConfig()
    """Fine-tuning protocol."""
    segmentation: SegmentationConfig = SegmentationConfig()
    """Fits of segmentation."""
    detection: DetectionConfig = DetectionConfig()
    """Fits of detection."""

    def flat(self) -> dict[str, Any]:
        """Return all fields under their names of version 0.1, so that old fingerprints hold.

        Fields that were added later are left out at their defaults.
        """
        fields = self.model_dump(mode="json")
        if self.extrapolation == _EXTRAPOLATION:
            del fields["extrapolation"]
        if self.segmentation.cat_max_ratio == _CAT_MAX_RATIO:
            del fields["segmentation"]["cat_max_ratio"]
        for old, section in RENAMED.items():
            fields |= {f"{old}{name}": value for name, value in fields.pop(section).items()}
        return fields

    def budget(self, beginning: str) -> dict[str, Any]:
        """Select what a fit depends on: its images, and `flat` fields that begin with `beginning`.

        The prefix is one of version 0.1, e.g. `segment_`.
        """
        own = {k: value for k, value in self.flat().items() if k.startswith(beginning)}
        return {"max_train": self.max_train, **own}
