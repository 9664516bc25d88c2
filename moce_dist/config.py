"""Typed configuration: one frozen tree, YAML files that hold only differences, `--set` overrides.

Every default lives here and nowhere else. A YAML file names what differs; `load_config` merges file
and overrides, refuses what it does not know, and reports every mistake of a request at once, each
with its dotted path, the value and the rule. Derived values are properties, never written back.
Identity fields decide what a run learns (data, model, clusters, seed, batch, groups); a run
directory belongs to one identity. `RUNTIME_FIELDS` may change between two starts of a run.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import Field

from moce_dist.hardware import HardwareConfig
from moce_dist.rules import cross_field_errors
from moce_dist.settings import ConfigError, Section, dump_yaml, flatten, read_tree, validate
from moce_dist.workers import legal_worker_counts

RUNTIME_FIELDS = (
    "run",
    "control",
    "data.loader_processes",
    "data.prefetch_batches",
    "data.stall_timeout_s",
    "data.read_ahead_bytes",
    "data.read_timeout_s",
    "data.read_deadline_s",
    "data.keep",
    "data.keep_bytes",
    "data.cache",
    "data.cache_bytes",
    "data.allow_pipes",
    "data.max_fault_fraction",
    "data.shard_bytes",
    "cluster.border_rows",
    "parallel.num_workers",
    "parallel.min_workers",
    "parallel.micro_batches",
    "parallel.zero_stage",
    "parallel.threads_per_worker",
    "parallel.compile",
    "parallel.deterministic",
    "parallel.activation_checkpointing",
    "parallel.max_failures",
    "parallel.max_preemptions",
    "parallel.start_timeout_s",
    "parallel.step_timeout_s",
    "checkpoint",
    "logging",
    "transfer",
    "hardware",
)


class RunConfig(Section):
    """Where run directories live."""

    root: str = "runs"
    """Folder in which a relative `--run` is resolved."""


class DataConfig(Section):
    """What is read, and how one image becomes a training sample."""

    source: str = ""
    """`folder:PATH`, `shards:PATTERN`, `sample:NAME`, `index:DIR` (ingested, with index.json)."""
    image_size: int = Field(224, ge=8, le=2048)
    """Side of the square crop, pixels."""
    crop_scale_min: float = Field(0.2, gt=0, le=1)
    """Smallest share of the picture's area that RandomResizedCrop takes."""
    hflip: bool = True
    """Mirror half of the images."""
    holdout_fraction: float = Field(0.01, ge=0, lt=0.5)
    """Share of the images kept out of training, for the held-out loss."""
    shard_bytes: int = Field(256 * 2**20, ge=2**16)
    """Size at which a tar is closed, bytes."""
    decode_on: Literal["loader", "device"] = "loader"
    """`device`: JPEG crops of training are decoded by the GPU (nvImageCodec), not by loaders."""
    loader_processes: int = Field(4, ge=0)
    """Decoding processes per worker, threads where a GPU makes features; 0: the worker decodes."""
    prefetch_batches: int = Field(2, ge=1)
    """Batches that every loader process keeps ready."""
    stall_timeout_s: float = Field(300, gt=0)
    """A loader that delivers nothing for so long ends the run, seconds."""
    read_ahead_bytes: int = Field(32 * 2**20, ge=1)
    """What a loader process reads of coming steps at once, bytes; it holds twice as much."""
    read_timeout_s: float = Field(60, gt=0)
    """A request to remote storage that takes longer is repeated, seconds."""
    read_deadline_s: float = Field(240, gt=0)
    """Requests are repeated for so long; then the samples are faults. Less than the stall's."""
    keep: Literal["none", "memory"] = "none"
    """`memory`: a worker keeps samples after their first use, small ones decoded; transfers too."""
    keep_bytes: int = Field(2**30, ge=1)
    """What a worker keeps at most; what does not fit is read at every use."""
    cache: str | None = None
    """Folder on a node's own disk for samples of remote shards; all ranks of the node share it."""
    cache_bytes: int = Field(100 * 2**30, ge=1)
    """What a data set may take of it: as many samples as fit are kept, and always the same ones."""
    allow_pipes: bool = False
    """Let ingest run the shell commands of `shards:pipe:COMMAND`, which write a tar each."""
    max_fault_fraction: float = Field(0.01, ge=0, le=1)
    """Share of unreadable images of a data set over which a job stops."""


WEIGHT_FILES = (".pth", ".pt", ".safetensors")
"""Endings of files with weights; another name is one of timm's hub."""


class ViTShape(NamedTuple):
    """Width D, depth and heads of an encoder."""

    width: int
    depth: int
    num_heads: int


VIT_SIZES = {
    "tiny": ViTShape(192, 12, 3),
    "small": ViTShape(384, 12, 6),
    "base": ViTShape(768, 12, 12),
    "large": ViTShape(1024, 24, 16),
    "huge": ViTShape(1280, 32, 16),
}


class ModelConfig(Section):
    """The masked autoencoder. Source: He et al. 2022, arXiv 2111.06377, table 8 and section 3."""

    size: Literal["tiny", "small", "base", "large", "huge"] = "base"
    """Named encoder shape; `width`, `depth` and `num_heads` override single numbers of it."""
    width: int | None = Field(None, ge=8)
    """Encoder width D."""
    depth: int | None = Field(None, ge=1)
    """Encoder blocks."""
    num_heads: int | None = Field(None, ge=1)
    """Attention heads of the encoder."""
    patch_size: int = Field(16, ge=1)
    """Side of a patch, pixels."""
    decoder_width: int = Field(512, ge=8)
    """Decoder width."""
    decoder_depth: int = Field(8, ge=1)
    """Decoder blocks."""
    decoder_num_heads: int = Field(16, ge=1)
    """Attention heads of the decoder."""
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of patches hidden from the encoder."""
    norm_pix_loss: bool = True
    """Predict patches normalised by their own mean and variance."""
    init: str | None = None
    """Weights to start from: a published MAE `.pth`, a timm `.safetensors`, or a timm hub name."""

    @property
    def shape(self) -> ViTShape:
        """Encoder shape after overrides."""
        named = VIT_SIZES[self.size]
        return ViTShape(
            self.width or named.width, self.depth or named.depth, self.num_heads or named.num_heads
        )


class MoeConfig(Section):
    """Which encoder blocks carry experts, and what routes to them."""

    kind: Literal["cluster", "token", "dense"] = "cluster"
    """MoCE; the baseline whose tokens choose experts, by DeepSpeed's own layer; no experts."""
    capacity_factor: float = Field(1.25, gt=0)
    """Tokens that an expert takes over its even share (kind token); more are dropped."""
    num_experts: int = Field(8, ge=1)
    """Experts per MoE layer, E."""
    layers: tuple[int, ...] | None = None
    """Blocks whose MLP becomes experts, by index; default every second one, the last included."""

    shared_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of an MoE block's hidden units that are no expert's: all images go through them."""
    lr_scale: float = Field(1.0, gt=0)
    """The experts' learning rate over the model's."""
    mean_decay: float | None = Field(None, ge=0)
    """Weight decay of experts towards their mean, in place of the stage's towards 0."""

    def layer_indices(self, depth: int) -> tuple[int, ...]:
        """Return the indices of the MoE blocks of an encoder of `depth` blocks."""
        if self.kind == "dense":
            return ()
        if self.layers is not None:
            return self.layers
        return tuple(range((depth + 1) % 2, depth, 2))


class GateConfig(Section):
    """Cluster-conditional gate. Source: Liu et al. 2023, arXiv 2402.05382, section 3."""

    combine: Literal["prob", "straight_through"] = "straight_through"
    """Weight of an expert's output: its probability p, or p / stop_gradient(p)."""
    assign: Literal["argmax", "balanced", "fixed"] = "argmax"
    """A cluster's best expert; the best at equal loads; similar clusters share one, unlearnt."""
    groups: Literal["free", "shared"] = "free"
    """Choose among all experts, or keep a cluster in one expert group in all layers."""
    noise: float = Field(1.0, ge=0)
    """Training noise at the start: standard deviation over the spread of the logits."""
    noise_fraction: float = Field(0.5, ge=0, le=1)
    """Share of the training over which the noise falls linearly to 0."""
    balance_weight: float = Field(0.01, ge=0)
    """Coefficient alpha of the balance loss."""
    confidence_weight: float = Field(0.01, ge=0)
    """Coefficient beta of the confidence loss."""
    lr_scale: float = Field(1.0, gt=0)
    """The gate's learning rate over the model's."""
    refresh_steps: int = Field(1, ge=1)
    """Steps between two routing tables."""


class ClusterConfig(Section):
    """Balanced clustering of the features."""

    num_clusters: int = Field(256, ge=1)
    """Number of clusters, K."""
    source: Literal["features", "random", "folder"] = "features"
    """Clusters of similar features; drawn at random; the domains (first folders of the keys)."""
    encoder: str = Field("mae", pattern=r"^(mae|pixels|timm:.+|.+[.](pth|pt|safetensors))$")
    """Whose features: `mae` (the run's), `pixels`, `timm:NAME`, a file of published MAE weights."""
    feature_block: int | None = Field(None, ge=0)
    """Block of the MAE's encoder whose patch tokens are the features; None: the last, normed."""
    balance: Literal["exact", "soft", "off"] = "exact"
    """Sizes differ by at most one; sizes within `soft_bound` of the mean; plain k-means."""
    spherical: bool = False
    """Centroids have length 1; rows of `--features` are scaled to it, zero rows are refused."""
    soft_bound: float = Field(1.1, gt=1)
    """Largest cluster over the mean size under `soft`."""
    iterations: int = Field(25, ge=1)
    """Upper bound on the iterations of k-means."""
    tolerance: float = Field(1e-4, ge=0)
    """Relative change of the objective below which k-means stops."""
    block_rows: int = Field(8192, ge=1)
    """Rows in the unit of work; results do not depend on who computes a block."""
    num_candidates: int = Field(16, ge=2)
    """Nearest clusters per image that the exact finish may move it to."""
    border_rows: int = Field(2**20, ge=1)
    """Images between two clusters that the driver holds under balance, at 0.5 KB each."""
    index_from: int = Field(16_384, ge=2)
    """Clusters from which on the search uses an index over them where that is faster."""
    index_recall: float = Field(0.98, gt=0, le=1)
    """Share of the best clusters that the index finds at least; more is slower."""
    batch_size: int = Field(256, ge=1)
    """Images per forward pass when features are computed."""
    with_prices: bool = True
    """With `base_run`: assign under the prices that balanced its clusters, where it has any."""


Beta = Annotated[float, Field(ge=0, lt=1)]


class StageConfig(Section):
    """Optimisation of one training stage."""

    epochs: float = Field(800, ge=0)
    """Passes over the data; `mae.epochs: 0` takes the weights of `model.init` as they are."""
    warmup_epochs: float = Field(40, ge=0)
    """Linear warm-up of the learning rate."""
    batch_size: int = Field(4096, ge=1)
    """Images per optimiser step over all workers, B."""
    base_lr: float = Field(1.5e-4, gt=0)
    """Learning rate per 256 images: lr = base_lr * batch_size / 256."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the cosine."""
    weight_decay: float = Field(0.05, ge=0)
    """AdamW's decay of matrices; biases, norms and tokens have none."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's moment coefficients."""
    clip_norm: float = Field(0.0, ge=0)
    """Global gradient norm to clip to; 0 does not clip."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """SGD is there for equality checks: its steps are linear in the gradient."""

    @property
    def lr(self) -> float:
        """Peak learning rate. Source: Goyal et al. 2017, linear scaling."""
        return self.base_lr * self.batch_size / 256


class ParallelConfig(Section):
    """Ranks, expert groups and numerics."""

    num_workers: int = Field(1, ge=1)
    """Training processes R, one per GPU; R is a multiple or a divisor of `num_groups`."""
    min_workers: int | None = Field(None, ge=1)
    """Fewest processes to start or go on with when nodes are missing; None: all `num_workers`."""
    num_groups: int = Field(1, ge=1)
    """Logical expert groups G, fixed for a run."""
    micro_batches: int = Field(1, ge=1)
    """Forward and backward passes per optimiser step on `num_workers` ranks; more on fewer."""
    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed's partitioning of optimiser state (1) and gradients (2)."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Matrix products of the model; weights, gradients and moments are float32, never TF32."""
    deterministic: bool = False
    """On GPUs take repeatable kernels only, so that a resumed run has the same bits; slower."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which gradients are summed over the ranks; bf16 halves what travels."""
    threads_per_worker: int = Field(1, ge=1)
    """CPU threads of a worker's tensor operations; 1 gives repeatable sums."""
    compile: bool = False
    """torch.compile of the blocks; of those with experts only the attention."""
    activation_checkpointing: bool = False
    """Keep no activations inside blocks and compute them again in the backward pass."""
    use_gpu: bool | Literal["auto"] = "auto"
    """Give every worker a GPU; auto: when there is one."""
    replan_steps: int = Field(100, ge=1)
    """Steps between two placements."""
    max_failures: int = Field(3, ge=0)
    """Restarts after the loss of a worker whose node lives on."""
    max_preemptions: int = Field(1000, ge=0)
    """Restarts after the loss, or the announced loss, of a worker's node."""
    start_timeout_s: float = Field(600, gt=0)
    """Time in which nodes with room for the fewest workers must be there, seconds."""
    step_timeout_s: float = Field(300, gt=0)
    """A rank in one step for so long, and for ten times the median, is restarted, seconds."""

    @property
    def fewest_workers(self) -> int:
        """Fewest ranks that a stage is trained on."""
        return self.num_workers if self.min_workers is None else self.min_workers

    def micro_batches_on(self, num_ranks: int, batch_size: int) -> int:
        """Micro-batches of a step on `num_ranks` ranks.

        The fewest under which no rank holds more images at a time than on `num_workers` ranks.
        """
        images = batch_size // num_ranks
        fewest = -(-self.num_workers * self.micro_batches // num_ranks)
        return next((m for m in range(fewest, images) if images % m == 0), images)

    def worker_counts(self, batch_size: int) -> list[int]:
        """Numbers of workers that a stage may start on, the most first.

        `num_workers` and what is legal from there down to `min_workers`; micro-batches adapt.
        """
        legal = legal_worker_counts(self.num_groups, batch_size, 1, self.num_workers - 1)
        fewer = [r for r in legal if r >= self.fewest_workers]
        return [self.num_workers, *reversed(fewer)]


class CheckpointConfig(Section):
    """When training state is saved."""

    every_steps: int = Field(500, ge=1)
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = Field(2, ge=1)
    """Complete checkpoints kept."""


class LoggingConfig(Section):
    """What is written while training."""

    every_steps: int = Field(20, ge=1)
    """Steps between two lines of metrics.jsonl."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""


class FinetuneConfig(Section):
    """Fine-tuning of a whole backbone. Source: arXiv 2111.06377, table 9."""

    epochs: int = Field(100, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(1024, ge=1)
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
    """Smallest share of the picture's area that a training crop takes."""
    hflip: bool = True
    """Mirror half of the training images."""
    max_train: int | None = Field(None, ge=1)
    """Cap on the training images of a fine-tuned classifier, beside `transfer.max_train`."""
    warmup_epochs: float = Field(5, ge=0)
    """Linear warm-up."""


class SuiteEntry(Section):
    """One task of a suite (`--task all`)."""

    task: str
    """Name of the task, as `--task` takes it."""
    data: str | None = None
    """Folder of its images; default that of `--data`."""
    name: str = ""
    """Name of its folder and row; default the task's. Two entries of one task need two names."""
    protocol: tuple[str, ...] = ()
    """Protocols; none: those of `--protocol`."""
    set: tuple[str, ...] = ()
    """Overrides `a.b=value` of the configuration for this task."""


Selection = Literal["vote", "largest_cluster", "merge", "average", "mismatched", "validate"]


class ContinuedConfig(Section):
    """Steps beside the stages (`--continue-images`): a task's own, and those that are fair to them.

    Whatever is not here is that of stage moce; the optimiser is a new one.
    """

    batch_size: int | None = Field(None, ge=1)
    """Images per optimiser step; None: those of stage moce."""
    base_lr: float | None = Field(None, gt=0)
    """Learning rate per 256 images; None: that of stage moce."""
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""

    def stage(self, moce: StageConfig, epochs: float) -> StageConfig:
        """Return the optimisation of steps that last `epochs`."""
        given = self.model_dump(include={"batch_size", "base_lr"}, exclude_none=True)
        warmup = {"warmup_epochs": self.warmup_fraction * epochs}
        return moce.model_copy(update={**given, **warmup, "epochs": epochs})


class TransferConfig(Section):
    """Downstream tasks: selection of experts, protocols, budgets."""

    task: str = ""
    """Task of a recipe; `--task` goes before it."""
    suite: tuple[SuiteEntry, ...] = ()
    """The tasks of `--task all`."""
    save_models: bool = True
    """Keep fine-tuned and linear models, for `python -m moce_dist predict` and `onnx`."""
    save_every_steps: int = Field(500, ge=1)
    """Steps between two saved states of a fit, from which it goes on after an interruption."""
    view_every_steps: int | None = Field(None, ge=1)
    """Steps between two early views of a fit's metric, whose best model is kept; None: no views."""
    select: Selection = "vote"
    """What a MoE layer becomes: an expert, a mean of all, or what does best (`select.py`)."""
    merge_temperature: float = Field(1.0, gt=0)
    """`merge` weights experts by mass^(1 / T): near 0 it is the vote, when large the average."""
    validate_by: Literal["knn", "linear"] = "knn"
    """The protocol by which `validate` tries candidates, on folds of the training images."""
    validate_folds: int = Field(5, ge=2)
    """Folds of the training images; each is judged by the others."""
    validate_images: int = Field(2000, ge=2)
    """Training images that `validate` looks at, at most; drawn with the seed."""
    evaluate: Literal["test", "val"] = "test"
    """Images that figures are of; `val`, for choices: the folder, or a fifth of the training's."""
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
    segment_crop: int = Field(512, ge=16)
    """Crop of segmentation, pixels; a multiple of the patch."""
    segment_steps: int = Field(160_000, ge=1)
    """Steps of segmentation training."""
    segment_batch_size: int = Field(16, ge=1)
    """Pictures per step of segmentation training."""
    segment_lr: float = Field(1e-4, gt=0)
    """Peak learning rate of segmentation training."""
    segment_channels: int = Field(512, ge=8)
    """Channels of the segmentation decoder."""
    detect_size: int = Field(1024, ge=32)
    """Side of the square that detection sees, pixels; a multiple of 32 and of two patches."""
    detect_steps: int = Field(184_375, ge=1)
    """Steps of detection training; the rate falls tenfold after 8/9 and 26/27 of them."""
    detect_batch_size: int = Field(64, ge=1)
    """Pictures per step of detection training."""
    detect_lr: float = Field(1e-4, gt=0)
    """Peak learning rate of detection training."""
    detect_layer_decay: float = Field(0.7, gt=0, le=1)
    """Factor of the rate from block to block towards the input, in detection training."""
    detect_drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth of the backbone in detection training."""
    detect_scale_min: float = Field(0.1, gt=0, le=1)
    """Least factor of large-scale jitter."""
    detect_scale_max: float = Field(2, ge=1)
    """Greatest factor of large-scale jitter; in the test pictures have factor 1."""
    detect_window: int = Field(14, ge=1)
    """Side of an attention window, patches; four blocks attend to the whole picture."""
    detect_anchor_strides: float = Field(8, gt=0)
    """Side of a level's anchors in its strides: 8 gives 32 pixels on the finest of the pyramid."""
    detect_channels: int = Field(256, ge=8)
    """Channels of the feature pyramid and of the heads' convolutions."""
    detect_rois: int = Field(512, ge=4)
    """Proposals per picture that the heads learn from."""
    segment_scales: tuple[Annotated[float, Field(gt=0, le=4)], ...] = Field((1.0,), min_length=1)
    """Scales at which a test picture is looked at; mmsegmentation takes 0.5 to 1.75."""
    segment_flip: bool = False
    """Look at every test picture mirrored too."""


class Config(Section):
    """The whole of a request."""

    seed: int = Field(0, ge=0)
    """Every random draw of a run is keyed by it."""
    base_run: str | None = None
    """A finished run whose encoder, clusters and experts this run goes on from, on data.source."""
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    moe: MoeConfig = MoeConfig()
    gate: GateConfig = GateConfig()
    cluster: ClusterConfig = ClusterConfig()
    mae: StageConfig = StageConfig()
    moce: StageConfig = StageConfig(epochs=200)
    control: bool = False
    """Also train the MAE on with the images and steps of stage moce, for a fair comparison."""
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    transfer: TransferConfig = TransferConfig()
    hardware: HardwareConfig = HardwareConfig()

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the encoder blocks that carry experts."""
        return self.moe.layer_indices(self.model.shape.depth)

    @property
    def shared_units(self) -> int:
        """Hidden units of an MoE block that its experts share, in eights, as GPUs want them."""
        return 8 * round(self.moe.shared_fraction * self.model.shape.width / 2)

    @property
    def without_experts(self) -> "Config":
        """The same request for a model without experts."""
        return self.model_copy(update={"moe": self.moe.model_copy(update={"kind": "dense"})})

    @property
    def with_absolute_init(self) -> "Config":
        """The same request from any folder: `model.init` is absolute where it is a file."""
        init = self.model.init
        if init is None or Path(init).suffix not in WEIGHT_FILES:
            return self
        model = self.model.model_copy(update={"init": str(Path(init).absolute())})
        return self.model_copy(update={"model": model})

    @property
    def num_patches(self) -> int:
        """Patches of an image, N."""
        return (self.data.image_size // self.model.patch_size) ** 2


def make_config(tree: dict[str, Any]) -> Config:
    """Build a checked `Config` from nested dicts.

    Raises:
        ConfigError: naming every unknown key, wrong type and broken rule.
    """
    return checked(validate(Config, tree))


ConfigT = TypeVar("ConfigT", bound=Config)


def checked(config: ConfigT) -> ConfigT:
    """Return a configuration that breaks no rule.

    Raises:
        ConfigError: naming every rule that it breaks.
    """
    if broken := cross_field_errors(config):
        raise ConfigError("; ".join(broken))
    return config


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file of differences, apply `a.b=value` overrides, check everything.

    Raises:
        ConfigError: the file is missing, is not a mapping, or holds a mistake.
    """
    return make_config(read_tree(path, overrides))


def identity(config: Config) -> dict[str, Any]:
    """Select the fields that decide what a run learns, as {dotted path: value}."""
    flat = flatten(config.model_dump(mode="json"))
    runtime = tuple(f"{field}." for field in RUNTIME_FIELDS)
    return {k: v for k, v in flat.items() if not f"{k}.".startswith(runtime)}


def to_yaml(config: Config) -> str:
    """Write the resolved configuration as YAML."""
    return dump_yaml(config.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """JSON schema of the configuration, for completion in editors."""
    return Config.model_json_schema()
