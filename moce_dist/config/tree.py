"""The complete configuration, and the rules between its fields."""

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from moce_dist.config.sections import (
    WEIGHT_FILES,
    CheckpointConfig,
    ClusterConfig,
    Continued,
    DataConfig,
    GateConfig,
    HardwareConfig,
    LoggingConfig,
    ModelConfig,
    MoeConfig,
    ParallelConfig,
    RunConfig,
    Runtime,
    StageConfig,
)
from moce_dist.config.transfer import RENAMED, TransferConfig
from moce_dist.settings import Section


class ExpertStageConfig(StageConfig):
    """Optimisation of stages moce and control."""

    epochs: float = Field(200, ge=0, le=1e6)
    """Passes over the data."""


class Config(Section):
    """The complete configuration of a request."""

    RENAMED: ClassVar[dict[str, str]] = {
        f"transfer.{old}": f"transfer.{new}." for old, new in RENAMED.items()
    }
    seed: Continued[int] = Field(0, ge=0)
    """Key of every random draw of a run."""
    base_run: Continued[str | None] = None
    """Finished run whose encoder, clusters and experts this run continues from, on data.source."""
    run: Runtime[RunConfig] = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    moe: MoeConfig = MoeConfig()
    gate: GateConfig = GateConfig()
    cluster: ClusterConfig = ClusterConfig()
    mae: Continued[StageConfig] = StageConfig()
    moce: Continued[ExpertStageConfig] = ExpertStageConfig()
    control: Runtime[bool] = False
    """Also continue training the MAE on the images and steps of stage moce, to compare fairly."""
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: Runtime[CheckpointConfig] = CheckpointConfig()
    logging: Runtime[LoggingConfig] = LoggingConfig()
    transfer: Runtime[TransferConfig] = TransferConfig()
    hardware: Runtime[HardwareConfig] = HardwareConfig()

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the encoder blocks that carry experts."""
        if self.moe.kind == "dense":
            return ()
        if self.moe.layers is not None:
            return self.moe.layers
        depth = self.model.shape.depth
        return tuple(range((depth + 1) % 2, depth, 2))

    @property
    def shared_units(self) -> int:
        """Hidden units of an MoE block that its experts share: a multiple of 8, to suit GPUs."""
        return 8 * round(self.moe.shared_fraction * self.model.shape.width / 2)

    @property
    def has_base(self) -> bool:
        """Whether the experts of a layer are offsets of one MLP."""
        return self.moe.shared_base and self.moe.kind == "cluster"

    @property
    def without_experts(self) -> "Config":
        """The same request for a model without experts."""
        return self.model_copy(update={"moe": self.moe.model_copy(update={"kind": "dense"})})

    @property
    def with_absolute_init(self) -> "Config":
        """The same request, valid in any folder: `model.init` is absolute if it is a file."""
        init = self.model.init
        if init is None or Path(init).suffix not in WEIGHT_FILES:
            return self
        model = self.model.model_copy(update={"init": str(Path(init).absolute())})
        return self.model_copy(update={"model": model})

    @property
    def index(self) -> Path | None:
        """Absolute folder of `data.source: index:DIR`; None for images that are to be ingested."""
        kind, _, folder = self.data.source.partition(":")
        return Path(folder).absolute() if kind == "index" else None

    @property
    def num_patches(self) -> int:
        """Patches of an image, N."""
        return (self.data.image_size // self.model.patch_size) ** 2


def _model_rules(config: Config) -> Iterable[str]:
    data, model, shape = config.data, config.model, config.model.shape
    if data.image_size % model.patch_size:
        yield (
            f"data.image_size ({data.image_size}) must be a multiple of "
            f"model.patch_size ({model.patch_size})"
        )
    if shape.width % shape.num_heads:
        yield (
            f"model.width ({shape.width}) must be a multiple of model.num_heads ({shape.num_heads})"
        )
    if shape.width % 4:
        yield f"model.width ({shape.width}) must be a multiple of 4 (2-d sine position embedding)"
    if model.decoder_width % model.decoder_num_heads or model.decoder_width % 4:
        yield (
            f"model.decoder_width ({model.decoder_width}) must be a multiple of 4 and of "
            f"model.decoder_num_heads ({model.decoder_num_heads})"
        )
    if list(config.moe_layers) != sorted(set(config.moe_layers)) or not all(
        0 <= layer < shape.depth for layer in config.moe_layers
    ):
        yield (
            f"moe.layers ({list(config.moe_layers)}) must be distinct blocks below {shape.depth}, "
            "in ascending order"
        )
    if config.moe.kind != "dense" and not config.moe_layers:
        yield f"moe.layers ([]) must name a block when moe.kind is {config.moe.kind}"
    if int(config.num_patches * (1 - model.mask_ratio)) < 1:
        yield (
            f"model.mask_ratio ({model.mask_ratio:g}) must leave one of the {config.num_patches} "
            "patches of an image"
        )
    if (steps := config.logging.profile_steps) and not 0 <= steps[0] < steps[1]:
        yield f"logging.profile_steps ({list(steps)}) must be a first step and a later one"


def _stage_rules(config: Config) -> Iterable[str]:
    if config.mae.epochs == 0 and config.model.init is None and config.base_run is None:
        yield "mae.epochs (0) needs model.init, the weights that are to be taken as they are"
    if config.moce.epochs == 0:
        yield "moce.epochs (0) must be greater than 0"


def _expert_rules(config: Config) -> Iterable[str]:
    moe, hidden = config.moe, 4 * config.model.shape.width
    if moe.shared_fraction and not 0 < config.shared_units < hidden:
        yield (
            f"moe.shared_fraction ({moe.shared_fraction:g}) must leave eight or more of the "
            f"{hidden} hidden units to either side"
        )
    if config.gate.assign == "fixed" and config.gate.combine == "prob":
        yield (
            "gate.combine = 'prob': must be straight_through when gate.assign is fixed, whose gate "
            "has no opinion"
        )
    if moe.kind == "token":
        for name, value, usual in (
            ("shared_fraction", moe.shared_fraction, 0.0),
            ("mean_decay", moe.mean_decay, None),
        ):
            if value != usual:
                yield f"moe.{name} ({value:g}) needs experts of clusters, moe.kind is token"
    if config.has_base and moe.mean_decay is not None:
        yield "moe.mean_decay needs moe.shared_base=false: offsets of a base decay towards it"


def _cluster_rules(config: Config) -> Iterable[str]:
    cluster, depth = config.cluster, config.model.shape.depth
    if config.base_run is not None and cluster.source != "features":
        yield (
            f"cluster.source = {cluster.source!r}: must be features with base_run, whose clusters "
            "are taken"
        )
    if (block := cluster.feature_block) is not None:
        if cluster.encoder == "pixels" or cluster.encoder.startswith("timm:"):
            yield (
                f"cluster.feature_block ({block}): needs cluster.encoder mae or a file of its "
                f"weights, not {cluster.encoder}"
            )
        if block >= depth:
            yield f"cluster.feature_block ({block}) must be a block below {depth}"


def _parallel_rules(config: Config) -> Iterable[str]:
    parallel, groups = config.parallel, config.parallel.num_groups
    workers = parallel.num_workers
    if parallel.fewest_workers > workers:
        yield (
            f"parallel.min_workers ({parallel.min_workers}) must not be more than "
            f"parallel.num_workers ({workers})"
        )
    has_experts = bool(config.moe_layers)
    if has_experts and config.moe.num_experts % groups:
        yield (
            f"moe.num_experts ({config.moe.num_experts}) must be a multiple of "
            f"parallel.num_groups ({groups})"
        )
    assign = config.gate.assign
    uneven = config.cluster.num_clusters % config.moe.num_experts
    if has_experts and assign != "argmax" and uneven:
        yield (
            f"cluster.num_clusters ({config.cluster.num_clusters}) must be a multiple of "
            f"moe.num_experts ({config.moe.num_experts}) when gate.assign is {assign}"
        )
    if has_experts and config.gate.groups == "shared" and config.cluster.num_clusters % groups:
        yield (
            f"cluster.num_clusters ({config.cluster.num_clusters}) must be a multiple of "
            f"parallel.num_groups ({groups}) when gate.groups is shared"
        )
    for name, stage in (("mae", config.mae), ("moce", config.moce)):
        legal = parallel.legal_worker_counts(stage.batch_size)
        if workers % groups and groups % workers:
            yield (
                f"parallel.num_workers ({workers}) must be a multiple or a divisor of "
                f"parallel.num_groups ({groups}); legal here: {legal}"
            )
            break
        unit = max(workers, groups) * parallel.micro_batches
        if stage.batch_size % unit:
            yield (
                f"{name}.batch_size ({stage.batch_size}) must be a multiple of "
                f"max(parallel.num_workers, parallel.num_groups) * parallel.micro_batches "
                f"({unit}); legal workers here: {legal}"
            )


def cross_field_errors(config: Config) -> list[str]:
    """List every rule between fields that `config` breaks."""
    rules = (_model_rules, _stage_rules, _expert_rules, _cluster_rules, _parallel_rules)
    broken, data = [text for rule in rules for text in rule(config)], config.data
    if data.read_deadline_s >= (stall := data.stall_timeout_s):
        broken.append(
            f"data.read_deadline_s ({data.read_deadline_s:g}) must be below {stall:g}, "
            "data.stall_timeout_s"
        )
    return broken
