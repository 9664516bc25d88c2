"""The training loop of a fit, its files on disk, and how it resumes after an interruption.

    FOLDER/state.safetensors   model and optimiser after some step; deleted when the fit ends
    FOLDER/views.jsonl         early views of the metric: one line per `transfer.view_every_steps`
    FOLDER/best/               the model of the best view
    FOLDER/last/               the model after the last step, which is the one that is measured

Every step draws from generators seeded by (seed, step, rank), so a fit that resumes from a saved
state on the same number of ranks gives bitwise equal weights. The test images never choose the
model: a comparison reports `last/`. All ranks run the loop; rank 0 writes the files.

Letters: B images of a rank.

Source of the learning rate schedules: facebookresearch/mae util/lr_sched.py @efb2a80; for detection
ViTDet, Li et al. 2022, arXiv 2203.16527, appendix A.2.
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from moce_dist.config import TransferConfig
from moce_dist.data.progress import track
from moce_dist.run.directory import StoppedError
from moce_dist.run.files import read_jsonl, replacing, write_jsonl
from moce_dist.train.checkpoint import check_finite
from moce_dist.train.optim import warm_cosine
from moce_dist.train.pulse import Pulse
from moce_dist.transfer.backbone import Backbone
from moce_dist.transfer.loading import Machine
from moce_dist.transfer.ranks import from_first
from moce_dist.transfer.saved import Spec, save_model

if TYPE_CHECKING:
    from moce_dist.transfer.training import Trainer

logger = logging.getLogger(__name__)
_STATE = "state.safetensors"
_FORMAT = "moce_dist.fit.v2"
_VIEWS = "views.jsonl"
_MIN_LR = 1e-6
# 163889 and 177546 of 184375 steps, in ViTDet
_MILESTONES = (8 / 9, 26 / 27)

Measures = dict[str, float]
"""Metric values by name; the first one is the task's result."""


def learning_rate(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """Return the learning rate of a step (from 0): linear warm-up to `peak`, then half a cosine."""
    return warm_cosine(step, steps=steps, warmup=warmup, peak=peak, least=_MIN_LR)


def stepped_rate(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """Return the learning rate of a step (from 0): linear warm-up, then two drops to a tenth."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return float(peak * 0.1 ** sum(step >= share * steps for share in _MILESTONES))


def layered_adamw(
    vit: nn.Module, new: Sequence[nn.Parameter] = (), *, weight_decay: float, layer_decay: float
) -> torch.optim.AdamW:
    """Make AdamW with layer-wise learning rate decay: groups have `lr_scale`, 1 at the head.

    The last block has `layer_decay`, the embeddings `layer_decay` ** (depth + 1). `new` lists
    parameters outside the ViT; their `lr_scale` is 1. Norms and biases, and the ViT's
    class token and position embedding, have no weight decay.
    """
    groups = param_groups_layer_decay(
        vit,
        weight_decay=weight_decay,
        no_weight_decay_list=("pos_embed", "cls_token"),
        layer_decay=layer_decay,
    )
    if new:
        # timm takes the last block for the head where nothing of the ViT comes after it
        blocks: Any = vit.blocks
        last = {id(p) for p in blocks[-1].parameters()}
        found = next(g["lr_scale"] for g in groups if last & {id(p) for p in g["params"]})
        for group in groups:
            group["lr_scale"] *= layer_decay / found
    for is_matrix, decay in ((True, weight_decay), (False, 0.0)):
        if params := [p for p in new if (p.ndim > 1) == is_matrix]:
            groups.append({"params": params, "lr_scale": 1.0, "weight_decay": decay})
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


@dataclass(frozen=True)
class Kept:
    """Where and how often a fit saves; `identity` fingerprints what its result depends on.

    `pulse` is asked once per step whether to stop. If it says yes on one rank, all save and leave.
    """

    folder: Path
    identity: str
    save_every: int
    view_every: int | None
    models: bool = True
    pulse: Pulse = field(default_factory=Pulse)


@dataclass(frozen=True)
class Trial:
    """One fit to carry out: a backbone, a protocol, a seed and a machine.

    `out` is the folder for scores and drawings of the test images. `shared` is a cache for all
    fits of a comparison.
    """

    backbone: Backbone
    transfer: TransferConfig
    machine: Machine
    protocol: str
    seed: int
    out: Path
    kept: Kept | None = None
    shared: dict[str, Any] = field(default_factory=dict)


class Fitted(NamedTuple):
    """What a fit measures on its test images, and the images that it skipped.

    `figures` are further entries of its row in metrics.json.
    """

    measures: Measures
    skipped: list[dict[str, Any]]
    figures: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Fitting:
    """A model in training: how it is trained, measured and described.

    `batches(s)` yields this rank's (inputs, targets) from step s on. Inputs are (B, ...). Targets
    are (B, ...) or, if they differ in shape, a list of B, which `loss` moves to the device itself.
    `loss` is a mean over `weigh(targets)` items, by default the images. `prepare` changes a batch
    on the device. `schedule` returns the learning rate of a step. `view` measures the current model
    on all ranks together; its first value is the one that matters.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Callable[[int], Iterator[tuple[Tensor, Any]]]
    loss: Callable[[Tensor, Any], Tensor]
    view: Callable[[], Measures]
    spec: Spec
    steps: int
    warmup: int
    peak_lr: float
    seed: int
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    schedule: Callable[..., float] = learning_rate
    weigh: Callable[[Any], int] = len


def seed_step(seed: int, step: int) -> None:
    """Seed the generators of a step: torch's and, for timm's Mixup, numpy's global one."""
    words = np.random.SeedSequence([seed, step]).generate_state(2)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))


def run_fit(fitting: Fitting, machine: Machine, kept: Kept | None) -> Measures:
    """Train to the last step, from a saved state if there is one, and measure.

    Collective over the ranks of the machine; the measures are the same on all.

    Raises:
        FloatingPointError: on all ranks; the loss, the gradient norm, or a tensor to be saved or
            measured is not finite.
        StoppedError: a rank was asked to stop, and the state is saved.
    """
    # DeepSpeed takes seconds to import, which protocols without training need not wait for
    from moce_dist.transfer.training import Trainer

    trainer = Trainer(fitting.name, fitting.model, fitting.loss, fitting.optimizer, machine)
    try:
        _train(fitting, trainer, machine, kept)
        return finish(fitting, machine, kept)
    finally:
        trainer.close()


def _train(fitting: Fitting, trainer: "Trainer", machine: Machine, kept: Kept | None) -> None:
    start = _resume(fitting, trainer, machine, kept) if kept else 0
    if kept and start == 0 and machine.rank == 0:
        # models of a fit under other conditions
        for name in ("best", "last"):
            shutil.rmtree(kept.folder / name, ignore_errors=True)
    batches = track(fitting.batches(start), f"steps of {fitting.name}", total=fitting.steps - start)
    pulse = kept.pulse if kept else Pulse()
    fitting.model.train()
    pulse.resume()
    for step, batch in enumerate(batches, start):
        seed_step(fitting.seed, step)
        # Mixup draws from numpy, alike on all ranks; the model draws from torch, per rank
        torch.manual_seed(torch.initial_seed() + machine.rank)
        rate = fitting.schedule(
            step, steps=fitting.steps, warmup=fitting.warmup, peak=fitting.peak_lr
        )
        inputs, targets = batch[0].to(machine.device), batch[1]
        if isinstance(targets, Tensor):
            targets = targets.to(machine.device)
        if fitting.prepare is not None:
            inputs, targets = fitting.prepare(inputs, targets)
        is_stopping = trainer.step(step, (inputs, targets), fitting.weigh, rate, pulse)
        if kept and step + 1 < fitting.steps:
            _keep(fitting, trainer, machine, kept, step + 1, is_stopping=is_stopping)


def _measured(fitting: Fitting, step: int) -> Measures:
    _check_state(fitting.name, step, fitting.model.state_dict().items())
    fitting.model.eval()
    found = fitting.view()
    fitting.model.train()
    return found


def _keep(
    fitting: Fitting,
    trainer: "Trainer",
    machine: Machine,
    kept: Kept,
    step: int,
    *,
    is_stopping: bool,
) -> None:
    is_viewed = kept.view_every and step % kept.view_every == 0
    is_saved = is_stopping or step % kept.save_every == 0
    if not (is_viewed or is_saved):
        return
    kept.pulse.rest()
    if is_viewed:
        found = _measured(fitting, step)
        if machine.rank == 0:
            _view(fitting, kept, step, found)
    if is_saved:
        _save_state(fitting, trainer, machine, kept, step)
    kept.pulse.resume()
    if is_stopping:
        raise StoppedError(f"{fitting.name}: state saved at step {step} of {fitting.steps}")


def _view(fitting: Fitting, kept: Kept, step: int, found: Measures) -> None:
    views = [line for line in read_jsonl(kept.folder / _VIEWS) if line["step"] < step]
    value = next(iter(found.values()))
    is_best = all(value > line["value"] for line in views) or not (kept.folder / "best").exists()
    views.append({"step": step, "value": value, "measures": found})
    logger.info("%s: %.4f after %d of %d steps", fitting.name, value, step, fitting.steps)
    if is_best and kept.models:
        about = {"step": step, **found, "of": kept.identity}
        save_model(kept.folder / "best", fitting.model, fitting.spec, about)
    write_jsonl(kept.folder / _VIEWS, views)


def finish(fitting: Fitting, machine: Machine, kept: Kept | None) -> Measures:
    """Measure a fit after its last step and save its model; return its measures."""
    if kept is not None:
        kept.pulse.rest()
    found = _measured(fitting, fitting.steps)
    if kept is None or machine.rank > 0:
        return found
    if kept.view_every:
        _view(fitting, kept, fitting.steps, found)
    if kept.models:
        about = {"step": fitting.steps, **found, "of": kept.identity}
        save_model(kept.folder / "last", fitting.model, fitting.spec, about)
    (kept.folder / _STATE).unlink(missing_ok=True)
    return found


def _check_state(fit: str, step: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
    try:
        check_finite(tensors)
    except FloatingPointError as error:
        raise FloatingPointError(f"{fit}: after step {step}: {error}") from None


def _save_state(
    fitting: Fitting, trainer: "Trainer", machine: Machine, kept: Kept, step: int
) -> None:
    copies = {}
    for name, tensor in trainer.state():
        _check_state(fitting.name, step, [(name, tensor)])
        if machine.rank == 0:
            copies[name] = tensor.cpu().contiguous()
    if machine.rank > 0:
        return
    kept.folder.mkdir(parents=True, exist_ok=True)
    about = {"format": _FORMAT, "of": kept.identity, "step": str(step)}
    with replacing(kept.folder / _STATE) as temporary:
        save_file(copies, temporary, metadata=about)


def _resume(fitting: Fitting, trainer: "Trainer", machine: Machine, kept: Kept) -> int:
    """Load the saved state of the same fit into model and optimiser; return its step, or 0.

    A damaged state, or one of a fit under other conditions, is ignored.
    """
    path = kept.folder / _STATE
    found = _read_state(path, kept.identity) if machine.rank == 0 and path.exists() else None
    # only rank 0 checks the state, so that all ranks start at the same step
    step = from_first(found[0] if found else 0, machine)
    if step == 0:
        if machine.rank == 0:
            (kept.folder / _VIEWS).unlink(missing_ok=True)
        return 0
    found = found or _read_state(path, kept.identity)
    assert found is not None, path
    trainer.load(found[1], step)
    logger.info("%s: goes on after step %d of %d", fitting.name, step, fitting.steps)
    return step


def _read_state(path: Path, identity: str) -> tuple[int, dict[str, Tensor]] | None:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if (metadata.get("format"), metadata.get("of")) != (_FORMAT, identity):
                logger.warning("%s: is of a fit under other conditions; starting anew", path)
                return None
            return int(metadata["step"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        logger.warning("%s: is damaged (%s); starting anew", path, error)
        return None
