"""Estimate the time of a step, and of a run, on hardware that is not at hand.

    step = compute + host + exposed gradients + exchange + optimiser, or the loader if it is slower

The estimate is for stage moce on `hardware`. Communication follows the usual bounds: an all-reduce
of S bytes over r members passes 2 (r - 1) / r S through each of them, and all GPUs of a node share
its network cards. At ZeRO-0 all gradients but the last bucket hide behind the backward pass of the
last micro-batch, two thirds of its compute. Every term states its source: `computed` from shapes
and peak rates, `set` by the configuration, or `measured` if a file of measurements has it.

What can be measured on one machine, and by what:

    bf16_tflops, utilisation   tests/gpu/prove.py, jobs/bench.py step (on a GPU)
    memory_gb_s, host_ms       tests/gpu/prove.py (on a GPU)
    decode_images_s            jobs/bench.py decode

Letters: R ranks, G groups, B images of a step, L MoE layers.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moce_dist.config import Config, HardwareConfig
from moce_dist.cost import sizes
from moce_dist.settings import ConfigError, validate

MEASURED_TERMS = ("bf16_tflops", "utilisation", "memory_gb_s", "host_ms", "decode_images_s")
"""Fields of `hardware` that a file of measured terms may hold."""
_BACKWARD = 2 / 3
_RECOMPUTING = 4 / 3
"""With activation checkpointing the backward pass repeats the forward pass, a third of a step."""
_FLOAT32_SLOWER = 16
_ADAM_PASSES = 7
"""AdamW reads weight, gradient and moments, and writes all but the gradient."""
_ACTIVATIONS = 34
"""Bytes of bfloat16 activations per token, block and unit of width. Source: Korthikanti et al.
2022, arXiv 2205.05198, equation 1, without the attention matrix, which flash attention never
stores."""
_CHECKPOINTED, _BESIDE_EXPERTS = 5.4, 12.2
"""The same with activation checkpointing, which keeps the float32 inputs of blocks, and what a
block with experts keeps besides. Counted by autograd, as in tests/unit/cost/test_activations.py."""


@dataclass(frozen=True)
class Term:
    """One figure of a budget and its source."""

    name: str
    value: float
    unit: str
    source: str

    def __str__(self) -> str:
        """Return `name value unit (source)`."""
        return f"{self.name} {self.value:,.4g} {self.unit} ({self.source})"


@dataclass(frozen=True)
class Budget:
    """A step of stage moce on R ranks; every time is in milliseconds."""

    config: Config
    hardware: HardwareConfig
    measured: frozenset[str]

    def _source(self, field: str, otherwise: str = "computed") -> str:
        return "measured" if field in self.measured else otherwise

    @property
    def num_nodes(self) -> int:
        """Number of nodes that the ranks need."""
        return -(-self.config.parallel.num_workers // self.hardware.gpus_per_node)

    @property
    def images(self) -> float:
        """Images per rank and step."""
        return self.config.moce.batch_size / self.config.parallel.num_workers

    def compute(self) -> Term:
        """Return the time of the forward and backward pass."""
        peak = self.hardware.bf16_tflops * 1e12
        if self.config.parallel.precision == "fp32":
            peak /= _FLOAT32_SLOWER
        flop = _passes_flop(self.config, self.images)
        # a utilisation is measured together with the peak that it is a share of
        source = self._source("utilisation")
        return Term("compute", 1e3 * flop / (peak * self.hardware.utilisation), "ms", source)

    def host(self) -> Term:
        """Return the time in which the GPU waits for the host."""
        return Term("host", self.hardware.host_ms, "ms", self._source("host_ms", "set"))

    def gradient_bytes(self) -> int:
        """Return the bytes of a step's all-reduce of shared parameters' gradients, per rank."""
        return sizes.shared_parameters(self.config) * self._gradient_size

    @property
    def _gradient_size(self) -> int:
        return 2 if self.config.parallel.reduce_dtype == "bf16" else 4

    def _all_reduce_ms(self, num_bytes: float, ranks: int) -> float:
        hardware = self.hardware
        here = min(ranks, hardware.gpus_per_node)
        nodes = -(-ranks // hardware.gpus_per_node)
        inside = 2 * (here - 1) / here * num_bytes / (hardware.nvlink_gb_s * 1e9)
        between = 2 * (nodes - 1) / nodes * num_bytes / (hardware.node_gbit_s / 8 * 1e9)
        return 1e3 * max(inside, between)

    def gradients(self) -> Term:
        """Return the time of all gradients' all-reduces, shared and experts', without overlap.

        At ZeRO-1 and 2 it includes the gather of the float32 weights.
        """
        # a gather passes half as much as an all-reduce of the same bytes
        size = self._gradient_size + (2 if self.config.parallel.zero_stage else 0)
        shared = sizes.shared_parameters(self.config) * size
        experts = sizes.local_expert_parameters(self.config) * size
        both = self._all_reduce_ms(shared, self.config.parallel.num_workers)
        both += self._all_reduce_ms(experts, self._replicas)
        return Term("gradients", both, "ms", "computed")

    def gradients_exposed(self) -> Term:
        """Return the part of `gradients` that the backward pass does not hide; all at ZeRO-1, 2."""
        whole = self.gradients()
        if self.config.parallel.zero_stage:
            return Term("gradients exposed", whole.value, "ms", whole.source)
        last = self._all_reduce_ms(sizes.BUCKET_BYTES, self.config.parallel.num_workers)
        # only the last micro-batch's gradients are complete
        backward = _BACKWARD * self.compute().value / self.config.parallel.micro_batches
        left = max(whole.value - backward, 0.0)
        return Term("gradients exposed", min(whole.value, left + last), "ms", whole.source)

    def images_leaving(self) -> Term:
        """Return the share of (image, layer) pairs whose expert is in another place."""
        given = self.hardware.images_leaving
        if given is not None:
            return Term("images leaving", given, "", "set")
        parallel = self.config.parallel
        places = min(parallel.num_workers, parallel.num_groups)
        # tokens choose experts wherever they are
        shared = self.config.gate.groups == "shared" and self.config.moe.kind != "token"
        return Term("images leaving", 0.0 if shared else 1 - 1 / places, "", "computed")

    def exchange(self) -> Term:
        """Return the time of the all-to-alls of images whose expert is in another place."""
        layers = len(self.config.moe_layers)
        moved = self.images * layers * self.images_leaving().value
        moved *= sizes.exchange_bytes(self.config)
        if self.config.moe.kind == "token":
            moved *= self.config.moe.capacity_factor  # buffers are sent up to their capacity
        here = min(self.config.parallel.num_workers, self.hardware.gpus_per_node)
        rate = (
            self.hardware.node_gbit_s / 8 / here
            if self.num_nodes > 1
            else (self.hardware.nvlink_gb_s)
        )
        return Term("exchange", 1e3 * moved / (rate * 1e9), "ms", "computed")

    @property
    def _replicas(self) -> int:
        parallel = self.config.parallel
        return max(1, parallel.num_workers // parallel.num_groups)

    @property
    def _updated(self) -> float:
        """Parameters that a rank updates: its share of the shared ones and of its experts."""
        shared = sizes.shared_parameters(self.config)
        experts = sizes.local_expert_parameters(self.config)
        if not self.config.parallel.zero_stage:
            return shared + experts
        return shared / self.config.parallel.num_workers + experts / self._replicas

    def optimiser(self) -> Term:
        """Return the time of AdamW's update, which memory bandwidth bounds."""
        seconds = self._updated * 4 * _ADAM_PASSES / (self.hardware.memory_gb_s * 1e9)
        return Term("optimiser", 1e3 * seconds, "ms", self._source("memory_gb_s"))

    def loader(self) -> Term:
        """Return the time in which a rank's loader processes prepare its images."""
        processes = max(1, self.config.data.loader_processes)
        seconds = self.images / (processes * self.hardware.decode_images_s)
        return Term("loader", 1e3 * seconds, "ms", self._source("decode_images_s"))

    def step(self) -> Term:
        """Return the sum of the parts, or the time of the loader if that is slower."""
        parts = [self.compute(), self.host(), self.gradients_exposed()]
        parts += [self.exchange(), self.optimiser()]
        value = max(sum(part.value for part in parts), self.loader().value)
        return Term("step", value, "ms", "computed")

    def rate(self) -> Term:
        """Return the images per second and GPU."""
        rate = 1e3 * self.images / self.step().value
        return Term("rate", rate, "images/s a GPU", "computed")

    def state(self) -> Term:
        """Return what a rank keeps of the model: weights, gradients in their buckets, moments."""
        config, parallel = self.config, self.config.parallel
        own = sizes.shared_parameters(config) + sizes.local_expert_parameters(config)
        total = 8 * own + 8 * self._updated
        if parallel.zero_stage:
            # DeepSpeed's own copy of the weights that a rank updates, and its bucket
            total += 4 * self._updated + sizes.BUCKET_BYTES
        elif parallel.num_workers > 1 and (
            parallel.micro_batches > 1 or parallel.reduce_dtype == "bf16"
        ):
            # beside buckets lie accumulated gradients, and those that are sent in bfloat16
            total += 4 * own
        return Term("state", total / 2**30, "GiB a GPU", "computed")

    def memory(self) -> Term:
        """Return a rank's memory: its state of the model, and activations."""
        config = self.config
        model, scale = config.model, sizes.element_size(config) / 2
        per_image = sizes.num_visible(config) * model.shape.width * model.shape.depth
        per_image += (config.num_patches + 1) * model.decoder_width * model.decoder_depth
        images = self.images / config.parallel.micro_batches
        if config.parallel.activation_checkpointing:
            in_experts = sizes.num_visible(config) * model.shape.width * len(config.moe_layers)
            activations = images * (per_image * _CHECKPOINTED + in_experts * _BESIDE_EXPERTS)
        else:
            activations = images * per_image * _ACTIVATIONS * scale
            if config.parallel.precision == "bf16":
                # the bfloat16 copies of the weights
                own = sizes.shared_parameters(config) + sizes.local_expert_parameters(config)
                activations += 2 * own
        total = self.state().value + activations / 2**30
        return Term("memory", total, "GiB a GPU", "computed")

    def storage(self) -> Term:
        """Return the read rate of all nodes together."""
        images = self.rate().value * self.config.parallel.num_workers
        return Term("storage", images * self.hardware.sample_kb * 1e3 / 1e9, "GB/s", "computed")

    def days(self, num_images: int) -> Term:
        """Return the time of both stages, and of any control, all at the rate of stage moce."""
        config = self.config
        has_control = config.control and config.moe.kind != "dense"  # else stage moce is one
        epochs = 0.0 if config.base_run else config.mae.epochs
        epochs += config.moce.epochs * (1 + has_control)
        seconds = epochs * num_images / (self.rate().value * config.parallel.num_workers)
        return Term("run", seconds / 86400, "days", "computed")


def budget(config: Config) -> Budget:
    """Make a budget from the configuration's hardware and the file of measured terms it names.

    Raises:
        ConfigError: the file is missing, or holds anything but numbers of `MEASURED_TERMS`.
    """
    hardware = config.hardware
    if hardware.terms is None:
        return Budget(config, hardware, frozenset())
    terms = read_terms(Path(hardware.terms))
    merged = validate(HardwareConfig, {**hardware.model_dump(mode="json"), **terms})
    return Budget(config, merged, frozenset(terms))


def read_terms(path: Path) -> dict[str, Any]:
    """Read a file of measured terms.

    Raises:
        ConfigError: it is missing, not a mapping, or has other names than `MEASURED_TERMS`.
    """
    try:
        terms = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"hardware.terms = {str(path)!r}: {error}") from None
    if not isinstance(terms, dict):
        raise ConfigError(f"hardware.terms = {str(path)!r}: must be a mapping of terms to numbers")
    if others := terms.keys() - set(MEASURED_TERMS):
        raise ConfigError(
            f"hardware.terms = {str(path)!r}: {min(others)} is not one of the measured terms "
            f"{', '.join(MEASURED_TERMS)}; set it in the configuration"
        )
    return terms


def utilisation(config: Config, images: int, seconds: float, tflops: float) -> float:
    """Return the share of a peak of `tflops` that the passes of `images` in `seconds` reach.

    `seconds` are those of forward and backward pass alone: a budget has the other parts of a step
    as terms of their own.
    """
    return _passes_flop(config, images) / (seconds * tflops * 1e12)


def _passes_flop(config: Config, images: float) -> float:
    recomputing = config.parallel.activation_checkpointing
    return images * sizes.training_flop(config) * (_RECOMPUTING if recomputing else 1)


def budget_lines(config: Config, num_images: int | None) -> list[str]:
    """Describe the budget of a step of stage moce, and of the run, for `--dry-run`."""
    reckoned = budget(config)
    parts = (
        reckoned.compute(),
        reckoned.host(),
        reckoned.gradients_exposed(),
        reckoned.exchange(),
        reckoned.optimiser(),
        reckoned.loader(),
    )
    hardware = reckoned.hardware
    processes = max(1, config.data.loader_processes) * config.parallel.num_workers
    files = processes * sizes.MAX_OPEN_FILES
    lines = [
        f"budget     of a step of stage moce on {reckoned.num_nodes} nodes of "
        f"{hardware.gpus_per_node} GPUs, {hardware.node_gbit_s:g} Gbit/s a node",
        *(f"  {part}" for part in parts),
        f"  {reckoned.gradients()} before overlap, "
        f"{reckoned.gradient_bytes() / 1e6:,.0f} MB of shared gradients a rank",
        f"  {reckoned.step()}; {reckoned.rate()}",
        f"  {reckoned.memory()} of {hardware.memory_gib:g}",
        f"  {reckoned.storage()}, up to {files:,} tars open",
    ]
    count = hardware.num_images or num_images
    if count is not None:
        lines.append(f"  {reckoned.days(count)} for {count:,} images, clustering left out")
    return lines
