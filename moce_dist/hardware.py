"""The machines that a budget is reckoned for: a section of the configuration, read by no stage."""

from pydantic import Field

from moce_dist.settings import Section


class HardwareConfig(Section):
    """What `--dry-run` reckons a step's time with; the defaults are nodes of eight H100 SXM."""

    gpus_per_node: int = Field(8, ge=1)
    """Ranks of a node, which share its cards and cores."""
    bf16_tflops: float = Field(989, gt=0)
    """Peak of a GPU's dense bfloat16 products, TFLOP/s; float32 is reckoned at a sixteenth."""
    utilisation: float = Field(0.4, gt=0, le=1)
    """Share of the peak that forward and backward pass reach."""
    memory_gb_s: float = Field(3350, gt=0)
    """Bandwidth of a GPU's memory, GB/s."""
    memory_gib: float = Field(80, gt=0)
    """Memory of a GPU, GiB."""
    node_gbit_s: float = Field(400, gt=0)
    """A node's network, all its cards together, Gbit/s each way."""
    nvlink_gb_s: float = Field(450, gt=0)
    """What a GPU sends to those of its own node, GB/s each way."""
    host_ms: float = Field(5, ge=0)
    """Time of a step in which the host keeps the GPU waiting, ms."""
    decode_images_s: float = Field(400, gt=0)
    """Training samples that one loader process makes a second."""
    sample_kb: float = Field(110, gt=0)
    """Size of an encoded image, KB (1,000 bytes)."""
    num_images: int | None = Field(None, ge=1)
    """Images of the data set; None: of the run's index, where it is made."""
    images_leaving: float | None = Field(None, ge=0, le=1)
    """Share of images times layers whose expert is elsewhere; None: 0 with shared groups, else
    that of images placed at random."""
    terms: str | None = None
    """File of measured terms, which go before these fields: `{"host_ms": 3.1, ...}`."""
