"""All configuration sections except transfers: fields, defaults, bounds and roles.

Defaults are defined in `config/` and nowhere else. Derived values are properties and are never
written back. The type of a field declares its role:

    int               decides what a run learns (identity); must equal the value of a `base_run`
    Continued[int]    decides what a run learns; may differ from the value of a `base_run`
    Runtime[int]      may change between two starts of a run

The role of a section applies to all its fields that declare none.
"""

from enum import Enum
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import Field

from moce_dist.settings import Section

T = TypeVar("T")


class Role(Enum):
    """Whether a field belongs to a run's identity, and whether a run with `base_run` may set it."""

    IDENTITY = "identity"
    CONTINUED = "continued"
    RUNTIME = "runtime"


Continued = Annotated[T, Role.CONTINUED]
Runtime = Annotated[T, Role.RUNTIME]


class RunConfig(Section):
    """Where run directories live."""

    root: str = "runs"
    """Folder in which a relative `--run` is resolved."""


class DataConfig(Section):
    """What is read, and how one image becomes a training sample."""

    source: Continued[str] = ""
    """`folder:PATH`, `shards:PATTERN`, `sample:NAME`, or `index:DIR` (ingested, has index.json)."""
    image_size: int = Field(224, ge=8, le=2048)
    """Side of the square crop, pixels."""
    crop_scale_min: Continued[float] = Field(0.2, gt=0, le=1)
    """Smallest share of the image's area that RandomResizedCrop takes."""
    hflip: Continued[bool] = True
    """Mirror half of the images."""
    holdout_fraction: Continued[float] = Field(0.01, ge=0, lt=0.5)
    """Share of the images kept out of training, for the held-out loss."""
    store_side: int | None = Field(None, ge=64)
    """Longer side to which ingest scales larger images of a folder (JPEG); None: unchanged."""
    shard_bytes: Runtime[int] = Field(256 * 2**20, ge=2**16)
    """Size at which a tar is closed, bytes."""
    decode_on: Continued[Literal["loader", "device"]] = "loader"
    """`device`: the GPU decodes JPEG training crops (nvImageCodec), instead of the loaders."""
    loader_processes: Runtime[int] = Field(4, ge=0)
    """Decoding processes per worker (threads for features on a GPU); 0: the worker decodes."""
    prefetch_batches: Runtime[int] = Field(2, ge=1)
    """Batches that every loader process keeps ready."""
    stall_timeout_s: Runtime[float] = Field(300, gt=0)
    """Seconds without a batch from a loader after which the run ends."""
    read_ahead_bytes: Runtime[int] = Field(32 * 2**20, ge=1)
    """Bytes of coming steps that a loader process reads at once; it holds twice as many."""
    read_timeout_s: Runtime[float] = Field(60, gt=0)
    """Seconds after which a request to remote storage is repeated."""
    read_deadline_s: Runtime[float] = Field(240, gt=0)
    """Seconds of repeated requests after which samples are faults; below `stall_timeout_s`."""
    keep: Runtime[Literal["none", "memory"]] = "none"
    """`memory`: workers keep samples after first use, small ones decoded; so do transfers."""
    keep_bytes: Runtime[int] = Field(2**30, ge=1)
    """Most bytes that a worker keeps; samples that do not fit are read at every use."""
    cache: Runtime[str | None] = None
    """Folder on a node's own disk for samples of remote shards; all ranks of the node share it."""
    cache_bytes: Runtime[int] = Field(100 * 2**30, ge=1)
    """Bytes of `cache` for a data set; as many samples as fit are kept, always the same ones."""
    allow_pipes: Runtime[bool] = False
    """Let ingest run the shell commands of `shards:pipe:COMMAND`; each writes one tar."""
    max_fault_fraction: Runtime[float] = Field(0.01, ge=0, le=1)
    """Share of unreadable images above which a job stops, and a fit of a task is not entered."""


WEIGHT_FILES = (".pth", ".pt", ".safetensors")
"""File name endings of weight files; any other name is looked up in timm's hub."""


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
    """Named encoder shape; `width`, `depth` and `num_heads` override its numbers."""
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
    mask_ratio: Continued[float] = Field(0.75, gt=0, lt=1)
    """Share of patches hidden from the encoder."""
    norm_pix_loss: bool = True
    """Predict patches normalised by their own mean and variance."""
    init: Continued[str | None] = None
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
    """`cluster`: MoCE; `token`: tokens choose experts, DeepSpeed's layer; `dense`: no experts."""
    capacity_factor: Continued[float] = Field(1.25, gt=0)
    """Capacity of an expert relative to its even share of tokens (kind token); more are dropped."""
    num_experts: int = Field(8, ge=1)
    """Experts per MoE layer, E."""
    layers: tuple[int, ...] | None = None
    """Indices of blocks whose MLP becomes experts; default: every second one up to the last."""

    shared_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of an MoE block's hidden units that process all images and belong to no expert."""
    shared_base: bool = True
    """Add each expert's weights to one MLP per layer that all images train; they start at 0."""
    lr_scale: Continued[float] = Field(1.0, gt=0)
    """Learning rate of the experts relative to the model's."""
    mean_decay: Continued[float | None] = Field(None, ge=0)
    """Weight decay of experts towards their mean; None: the stage's decay, towards 0."""


class GateConfig(Section):
    """Cluster-conditional gate. Source: Liu et al. 2023, arXiv 2402.05382, section 3."""

    combine: Literal["prob", "straight_through"] = "straight_through"
    """Weight of an expert's output: its probability p, or p / stop_gradient(p)."""
    assign: Continued[Literal["argmax", "balanced", "fixed"]] = "argmax"
    """`argmax`: best expert; `balanced`: best at equal load; `fixed`: by similarity, not learnt."""
    groups: Literal["free", "shared"] = "free"
    """`free`: choose among all experts; `shared`: one expert group per cluster in all layers."""
    noise: Continued[float] = Field(1.0, ge=0)
    """Initial training noise: standard deviation relative to the spread of the logits."""
    noise_fraction: Continued[float] = Field(0.5, ge=0, le=1)
    """Share of the training over which the noise falls linearly to 0."""
    balance_weight: Continued[float] = Field(0.01, ge=0)
    """Coefficient alpha of the balance loss."""
    confidence_weight: Continued[float] = Field(0.01, ge=0)
    """Coefficient beta of the confidence loss."""
    lr_scale: Continued[float] = Field(1.0, gt=0)
    """Learning rate of the gate relative to the model's."""
    refresh_steps: Continued[int] = Field(1, ge=1)
    """Steps between two routing tables."""


class ClusterConfig(Section):
    """Balanced clustering of the features."""

    num_clusters: int = Field(256, ge=1)
    """Number of clusters, K."""
    source: Continued[Literal["features", "random", "folder"]] = "features"
    """Cluster similar features, draw at random, or take the domains (first folders of the keys)."""
    encoder: str = Field("mae", pattern=r"^(mae|pixels|timm:.+|.+[.](pth|pt|safetensors))$")
    """Encoder of features: the run's `mae`, `pixels`, `timm:NAME`, a file of published weights."""
    feature_block: int | None = Field(None, ge=0)
    """Block of the MAE encoder whose patch tokens give the features; None: the last, normalised."""
    balance: Continued[Literal["exact", "soft", "off"]] = "exact"
    """`exact`: sizes differ by at most 1; `soft`: limit on the largest; `off`: plain k-means."""
    spherical: Continued[bool] = False
    """Unit-length centroids; rows of `--features` are scaled to unit length, zero rows refused."""
    soft_bound: Continued[float] = Field(1.1, gt=1)
    """Largest cluster size relative to the mean, under `soft`."""
    iterations: Continued[int] = Field(25, ge=1)
    """Upper bound on the iterations of k-means."""
    tolerance: Continued[float] = Field(1e-4, ge=0)
    """Relative change of the objective below which k-means stops."""
    block_rows: Continued[int] = Field(8192, ge=1)
    """Rows per block of work; results do not depend on which worker computes a block."""
    num_candidates: Continued[int] = Field(16, ge=2)
    """Nearest clusters that the exact finish may move an image to."""
    border_rows: Runtime[int] = Field(2**20, ge=1)
    """Images on a border between clusters that the driver holds to balance, 0.5 KB each."""
    index_from: Continued[int] = Field(16_384, ge=2)
    """Number of clusters from which the search uses an index over them, if that is faster."""
    index_recall: Continued[float] = Field(0.98, gt=0, le=1)
    """Least share of the best clusters that the index must find; higher is slower."""
    batch_size: Continued[int] = Field(256, ge=1)
    """Images per forward pass when features are computed."""
    with_prices: Continued[bool] = True
    """With `base_run`: assign with the prices that balanced its clusters, if it has any."""


Beta = Annotated[float, Field(ge=0, lt=1)]


class StageConfig(Section):
    """Optimisation of one training stage."""

    epochs: float = Field(800, ge=0, le=1e6)
    """Passes over the data; `mae.epochs: 0` takes the weights of `model.init` as they are."""
    warmup_epochs: float = Field(40, ge=0, le=1e6)
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


def legal_worker_counts(
    num_groups: int, batch_size: int, micro_batches: int, most: int
) -> list[int]:
    """List the worker counts R <= `most` that host G groups evenly and divide the batch."""
    return [
        r
        for r in range(1, most + 1)
        if (r % num_groups == 0 or num_groups % r == 0)
        and batch_size % (max(r, num_groups) * micro_batches) == 0
    ]


class ParallelConfig(Section):
    """Ranks, expert groups and numerics."""

    num_workers: Runtime[int] = Field(1, ge=1)
    """Training processes R, one per GPU; R is a multiple or a divisor of `num_groups`."""
    min_workers: Runtime[int | None] = Field(None, ge=1)
    """Fewest processes to start or continue with when nodes are missing; None: `num_workers`."""
    num_groups: Continued[int] = Field(1, ge=1)
    """Logical expert groups G, fixed for a run."""
    micro_batches: Runtime[int] = Field(1, ge=1)
    """Forward and backward passes per step on `num_workers` ranks; fewer ranks run more."""
    zero_stage: Runtime[Literal[0, 1, 2]] = 0
    """DeepSpeed's partitioning of optimiser state (1) and gradients (2)."""
    precision: Continued[Literal["fp32", "bf16"]] = "bf16"
    """Type of the model's matrix products; weights, gradients and moments are float32, no TF32."""
    deterministic: Runtime[bool] = False
    """Use only repeatable kernels on GPUs, so that a resumed run is bit-identical; slower.

    In fits of a task, operations that have no repeatable kernel warn.
    """
    reduce_dtype: Continued[Literal["fp32", "bf16"]] = "fp32"
    """Type in which gradients are summed over the ranks; bf16 halves the traffic."""
    threads_per_worker: Runtime[int] = Field(1, ge=1)
    """CPU threads of a worker's tensor operations; 1 gives repeatable sums."""
    compile: Runtime[bool] = False
    """Compile the blocks with torch.compile; in blocks with experts, only the attention."""
    activation_checkpointing: Runtime[bool] = False
    """Recompute the activations inside blocks in the backward pass instead of keeping them."""
    use_gpu: Continued[bool | Literal["auto"]] = "auto"
    """Give every worker a GPU; auto: when there is one."""
    replan_steps: Continued[int] = Field(100, ge=1)
    """Steps between two placements."""
    max_failures: Runtime[int] = Field(3, ge=0)
    """Most restarts after losses of workers whose node stays alive."""
    max_preemptions: Runtime[int] = Field(1000, ge=0)
    """Most restarts after the loss, or the announced loss, of a worker's node."""
    start_timeout_s: Runtime[float] = Field(600, gt=0)
    """Seconds within which nodes with room for the fewest workers must appear."""
    step_timeout_s: Runtime[float] = Field(300, gt=0)
    """Seconds in one step, and at least ten median steps, after which a rank is restarted."""

    @property
    def patience_s(self) -> float:
        """Seconds that ranks wait for each other; long, since one rank verifies checkpoints."""
        return max(3600.0, self.start_timeout_s)

    @property
    def fewest_workers(self) -> int:
        """Fewest ranks that a stage is trained on."""
        return self.num_workers if self.min_workers is None else self.min_workers

    def micro_batches_on(self, num_ranks: int, batch_size: int) -> int:
        """Micro-batches of a step on `num_ranks` ranks.

        The fewest for which no rank holds more images at once than on `num_workers` ranks.
        """
        images = batch_size // num_ranks
        fewest = -(-self.num_workers * self.micro_batches // num_ranks)
        return next((m for m in range(fewest, images) if images % m == 0), images)

    def legal_worker_counts(self, batch_size: int) -> list[int]:
        """List the legal counts up to twice `num_workers`, or to 4 G if that is more."""
        most = max(2 * self.num_workers, 4 * self.num_groups)
        return legal_worker_counts(self.num_groups, batch_size, self.micro_batches, most)

    def worker_counts(self, batch_size: int) -> list[int]:
        """List the worker counts that a stage may start on, largest first.

        `num_workers`, then the legal counts below it down to `min_workers`; micro-batches adapt.
        """
        legal = legal_worker_counts(self.num_groups, batch_size, 1, self.num_workers - 1)
        fewer = [r for r in legal if r >= self.fewest_workers]
        return [self.num_workers, *reversed(fewer)]


class CheckpointConfig(Section):
    """When training state is saved."""

    every_steps: int = Field(500, ge=1)
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = Field(2, ge=1)
    """Newest complete checkpoints of a stage that are kept; its oldest one is kept besides."""


class LoggingConfig(Section):
    """What is written while training."""

    every_steps: int = Field(20, ge=1)
    """Steps between two lines of metrics.jsonl."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Also write for Weights & Biases (offline) or MLflow, into the stage's folder."""
    profile_steps: tuple[int, int] | None = None
    """Profile rank 0 from the first of these steps until before the second."""


class HardwareConfig(Section):
    """Hardware that `--dry-run` estimates a step's time for; default: nodes of eight H100 SXM."""

    gpus_per_node: int = Field(8, ge=1)
    """Ranks per node, which share its network cards and CPU cores."""
    bf16_tflops: float = Field(989, gt=0)
    """Peak of a GPU's dense bfloat16 products, TFLOP/s; float32 is taken as a sixteenth of it."""
    utilisation: float = Field(0.4, gt=0, le=1)
    """Share of the peak that the forward and backward passes reach."""
    memory_gb_s: float = Field(3350, gt=0)
    """Bandwidth of a GPU's memory, GB/s."""
    memory_gib: float = Field(80, gt=0)
    """Memory of a GPU, GiB."""
    node_gbit_s: float = Field(400, gt=0)
    """Network bandwidth of a node, all its cards together, Gbit/s in each direction."""
    nvlink_gb_s: float = Field(450, gt=0)
    """Bandwidth from a GPU to the others of its node, GB/s in each direction."""
    host_ms: float = Field(5, ge=0)
    """Time per step in which the GPU waits for the host, ms."""
    decode_images_s: float = Field(400, gt=0)
    """Training samples per second of one loader process."""
    sample_kb: float = Field(110, gt=0)
    """Size of an encoded image, KB (1,000 bytes)."""
    num_images: int | None = Field(None, ge=1)
    """Images of the data set; None: read from the run's index, if it exists."""
    images_leaving: float | None = Field(None, ge=0, le=1)
    """Share of (image, layer) pairs whose expert is in another place; None: 0 with shared groups,
    else the share for random placement."""
    terms: str | None = None
    """JSON file of measured terms that override these fields: `{"host_ms": 3.1, ...}`."""
