"""The loop of a fit, what it keeps on disk, and how it goes on after an interruption.

    FOLDER/state.safetensors   model and optimiser after some step, while the fit is under way
    FOLDER/views.jsonl         early views of the metric: one line per `transfer.view_every_steps`
    FOLDER/best/               the model of the best view
    FOLDER/last/               the model after the last step, which is the one that is measured

Every step draws from generators seeded by (seed, step), so a fit that is taken up at a saved state
gives the same weights bit for bit. The test images never choose the model: what a comparison
reports is `last/`.

Letters: B images.
"""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moce_dist.run import read_jsonl, write_atomic
from moce_dist.transfer.loading import Machine, Progress, backward_in_parts
from moce_dist.transfer.measure import Measures
from moce_dist.transfer.saved import Spec, save_model
from moce_dist.transfer.schedule import check_loss, learning_rate, set_learning_rate

logger = logging.getLogger(__name__)
_STATE = "state.safetensors"
_VIEWS = "views.jsonl"


@dataclass(frozen=True)
class Kept:
    """Where a fit keeps what, and how often; `identity` is what its result depends on."""

    folder: Path
    identity: str
    save_every: int
    view_every: int | None
    models: bool = True


@dataclass(frozen=True)
class Fitting:
    """A model on its way: how it is trained, viewed and described.

    `batches(s)` yields (inputs, targets) from step s on: inputs (B, ...), and targets (B, ...) or,
    where they differ in shape, a list of B that the loss takes to the device itself. `prepare`
    changes a batch on the device; `schedule` gives the rate of a step; `view` measures the model as
    it is, the first figure is the one that matters.
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


def seed_step(seed: int, step: int) -> None:
    """Seed what a step draws from: torch's generators and, for timm's Mixup, numpy's global one."""
    words = np.random.SeedSequence([seed, step]).generate_state(2)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))


def run_fit(fitting: Fitting, machine: Machine, kept: Kept | None) -> Measures:
    """Train to the last step, from a saved state if there is one, and measure.

    Raises:
        FloatingPointError: the loss is no number.
    """
    start = resume(fitting, kept) if kept else 0
    progress = Progress(fitting.name, fitting.steps - start, "steps")
    fitting.model.train()
    for step, (inputs, targets) in enumerate(fitting.batches(start), start):
        _step(fitting, machine, step, inputs.to(machine.device), targets)
        progress.advance()
        if kept and step + 1 < fitting.steps:
            _keep(fitting, kept, step + 1)
    return _finish(fitting, kept)


def _step(fitting: Fitting, machine: Machine, step: int, inputs: Tensor, targets: Any) -> None:
    seed_step(fitting.seed, step)
    rate = fitting.schedule(step, steps=fitting.steps, warmup=fitting.warmup, peak=fitting.peak_lr)
    set_learning_rate(fitting.optimizer, rate)
    if isinstance(targets, Tensor):
        targets = targets.to(machine.device)
    if fitting.prepare is not None:
        inputs, targets = fitting.prepare(inputs, targets)
    fitting.optimizer.zero_grad()
    check_loss(backward_in_parts(inputs, targets, machine, fitting.loss), fitting.name, step)
    fitting.optimizer.step()


def _measured(fitting: Fitting) -> Measures:
    fitting.model.eval()
    found = fitting.view()
    fitting.model.train()
    return found


def _keep(fitting: Fitting, kept: Kept, step: int) -> None:
    if kept.view_every and step % kept.view_every == 0:
        _view(fitting, kept, step, _measured(fitting))
    if step % kept.save_every == 0:
        _save_state(fitting, kept, step)


def _view(fitting: Fitting, kept: Kept, step: int, found: Measures) -> None:
    views = [line for line in read_jsonl(kept.folder / _VIEWS) if line["step"] < step]
    value = next(iter(found.values()))
    is_best = all(value > line["value"] for line in views)
    views.append({"step": step, "value": value, "measures": found})
    logger.info("%s: %.4f after %d of %d steps", fitting.name, value, step, fitting.steps)
    if is_best and kept.models:
        save_model(kept.folder / "best", fitting.model, fitting.spec, {"step": step, **found})
    write_atomic(kept.folder / _VIEWS, "".join(json.dumps(line) + "\n" for line in views))


def _finish(fitting: Fitting, kept: Kept | None) -> Measures:
    found = _measured(fitting)
    if kept is None:
        return found
    if kept.view_every:
        _view(fitting, kept, fitting.steps, found)
    if kept.models:
        about = {"step": fitting.steps, **found}
        save_model(kept.folder / "last", fitting.model, fitting.spec, about)
    (kept.folder / _STATE).unlink(missing_ok=True)
    return found


def _save_state(fitting: Fitting, kept: Kept, step: int) -> None:
    tensors = {f"model/{k}": v for k, v in fitting.model.state_dict().items()}
    for number, moments in fitting.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{k}": v for k, v in moments.items()}
    kept.folder.mkdir(parents=True, exist_ok=True)
    temporary = kept.folder / f".{_STATE}.tmp"
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(copies, temporary, metadata={"of": kept.identity, "step": str(step)})
    temporary.replace(kept.folder / _STATE)


def resume(fitting: Fitting, kept: Kept) -> int:
    """Put the saved state of the same fit into model and optimiser; return its step, or 0.

    A state of a fit under other conditions, or a damaged one, is passed over.
    """
    path = kept.folder / _STATE
    found = _read_state(path, kept.identity) if path.exists() else None
    if found is None:
        (kept.folder / _VIEWS).unlink(missing_ok=True)
        return 0
    step, tensors = found
    model = {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, number, key = name.split("/")
            moments.setdefault(int(number), {})[key] = tensor
    fitting.model.load_state_dict(model)
    state: dict[str, Any] = fitting.optimizer.state_dict()
    fitting.optimizer.load_state_dict({**state, "state": moments})
    logger.info("%s: goes on after step %d of %d", fitting.name, step, fitting.steps)
    return step


def _read_state(path: Path, identity: str) -> tuple[int, dict[str, Tensor]] | None:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("of") != identity:
                logger.warning("%s: is of a fit under other conditions; starting anew", path)
                return None
            return int(metadata["step"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        logger.warning("%s: is damaged (%s); starting anew", path, error)
        return None
