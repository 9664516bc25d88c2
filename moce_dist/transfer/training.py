"""Training of a fitted model in DeepSpeed's engine: steps on R ranks, and its state by name.

The ranks' parts of a batch differ in size, and so do the micro-batches of a part. Every loss is
therefore weighted, so that for any R and M gradients are those of the mean over the whole batch.

Letters: R ranks, B images of a step, n images of a rank, M micro-batches.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from moce_dist.parallel.engine import Engine, EngineSpec, init_distributed
from moce_dist.parallel.groups import Topology
from moce_dist.settings import ConfigError
from moce_dist.train.optim import set_learning_rate, stop_unless_finite
from moce_dist.train.pulse import Pulse
from moce_dist.train.setup import prepare_blocks
from moce_dist.transfer.loading import Machine
from moce_dist.transfer.ranks import add_up, share_batch_norm

_PREFIX, _BUFFER = "model.", "buffer"
Loss = Callable[[Tensor, Any], Tensor]


class Objective(nn.Module):
    """Model and loss as one module, which is what the engine runs."""

    def __init__(self, model: nn.Module, loss: Loss, machine: Machine) -> None:
        super().__init__()
        self.model, self._loss, self._machine = model, loss, machine

    def forward(self, inputs: Tensor, targets: Any) -> Tensor:
        """Return the mean loss of inputs (n, ...)."""
        with self._machine.autocast():
            return self._loss(inputs, targets)


class Trainer:
    """Steps of one fit on this rank; every method is collective over all ranks."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        machine: Machine,
    ) -> None:
        """Put a model and its optimiser into an engine; `loss` runs the model.

        Raises:
            ConfigError: checkpointing or compilation of blocks is on, and the model has none.
        """
        self._name, self._machine = name, machine
        init_distributed(machine.device)
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        for field in ("activation_checkpointing", "compile"):
            if getattr(machine.parallel, field) and not blocks:
                raise ConfigError(f"parallel.{field} (True): the model of {name} has no ViT blocks")
        prepare_blocks(blocks, machine.parallel)
        if machine.num_ranks > 1:
            share_batch_norm(model)
        size = machine.num_ranks * machine.micro_batches
        topology = Topology(machine.num_ranks, 1)
        self._engine = Engine(
            Objective(model, loss, machine),
            optimizer.param_groups,
            lambda _: optimizer,
            # micro-batches differ in size, so the engine counts each one as a single item
            EngineSpec(machine.parallel, topology, num_experts=1, batch_size=size, clip_norm=0.0),
        )

    def step(
        self,
        step: int,
        batch: tuple[Tensor, Any],
        weigh: Callable[[Any], int],
        rate: float,
        pulse: Pulse,
    ) -> bool:
        """Take a step on this rank's inputs (n, ...) and targets (n, ...) or a list of n.

        The loss is a mean over `weigh(targets)` items. Returns whether a rank was asked to stop.

        Raises:
            FloatingPointError: the loss or the gradient norm is not finite; on all ranks, before
                the weights change.
        """
        machine = self._machine
        set_learning_rate(self._engine.optimizer, rate)
        parts = list(cut_batch(batch, machine.micro_batches, weigh))
        weight = sum(weight for *_, weight in parts)
        divisor = max(1, int(add_up(torch.tensor(weight), machine)))
        # the engine averages over ranks and micro-batches
        scale = machine.num_ranks * machine.micro_batches
        sums = torch.zeros(2, dtype=torch.float64, device=machine.device)
        for number, (inputs, targets, weight) in enumerate(parts, 1):
            loss = self._engine.forward(inputs, targets) * (weight / divisor)
            self._engine.backward(loss * scale)
            sums[0] += loss.detach()
            if number == len(parts):
                sums[1] = pulse(self._name, step)
                sums = add_up(sums, machine)
                stop_unless_finite(self._name, "loss", float(sums[0]), step)
            norm = self._engine.step()
        stop_unless_finite(self._name, "gradient norm", float(norm), step)
        return bool(sums[1] > 0)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (KIND/NAME, tensor) of weights, optimiser moments and buffers."""
        for name, kind, tensor in self._engine.state():
            yield f"{kind}/{name.removeprefix(_PREFIX)}", tensor.detach()
        for name, tensor in self._engine.module.named_buffers():
            yield f"{_BUFFER}/{name.removeprefix(_PREFIX)}", tensor

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Resume from a state that was saved after `step` steps."""
        self._engine.load_state(
            lambda name, kind: tensors.get(f"{kind}/{name.removeprefix(_PREFIX)}"), step=step
        )
        for name, buffer in self._engine.module.named_buffers():
            buffer.copy_(tensors[f"{_BUFFER}/{name.removeprefix(_PREFIX)}"])

    def close(self) -> None:
        """Release the engine; the model stays as it is."""
        self._engine.destroy()


def cut_batch(
    batch: tuple[Tensor, Any], count: int, weigh: Callable[[Any], int]
) -> Iterator[tuple[Tensor, Any, int]]:
    """Split a rank's batch into `count` micro-batches; yield each with the weight of its loss."""
    inputs, targets = batch
    for i in range(count):
        start, stop = (len(inputs) * edge // count for edge in (i, i + 1))
        if start < stop:
            yield inputs[start:stop], targets[start:stop], weigh(targets[start:stop])
        else:
            # all ranks run the same number of micro-batches, so an empty one repeats an image
            yield inputs[:1], targets[:1], 0
