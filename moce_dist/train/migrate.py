"""Move experts: send weights and moments from the ranks that held them to their new ranks.

A new plan may give experts another group. Their tensors are then read and loaded like those of a
checkpoint, by `Engine.state` and `Engine.load_state`, but they travel from memory to memory inside
the expert-parallel group:

    place 0 holds experts [0 1] of a layer, place 1 holds [2 3]; afterwards [0 3] and [1 2]
    fc1.weight      place 0: [0 1] --keeps 0, sends 1, receives 3--> [0 3]      place 1: [1 2]
    then its moments, then the next parameter

Every expert-parallel group moves its own replicas, so nothing is sent between these groups. Experts
that stay in a place are not sent. Tensors are only copied, so every bit is preserved.

Letters: L MoE layers, E experts per layer, P places, S experts of a layer in one place.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moce_dist.arrays import Int64
from moce_dist.model.moce import is_stacked
from moce_dist.parallel.groups import ExpertMap
from moce_dist.train.checkpoint import Naming
from moce_dist.train.setup import TrainState


def replan(state: TrainState) -> None:
    """Plan anew; move experts where that pays. Collective over all ranks."""
    before, gate = state.router.experts, state.model.gate
    assert gate is not None, "only experts are placed"
    state.router.replan(gate, state.step)
    move_experts(state, before)


def move_experts(state: TrainState, before: ExpertMap) -> None:
    """Move every expert from its place in `before` to its place in the router's current map.

    Collective over all ranks; no collective is run when all experts stay in their slots.
    """
    after, layers, place = state.router.experts, state.job.config.moe_layers, state.naming.place
    stays = ((before.place == after.place) & (before.slot == after.slot)).all(axis=1)
    if stays.all():
        return
    moved: dict[tuple[str, str], Tensor] = {}
    for name, kind, tensor in state.engine.state():
        if not is_stacked(name) or stays[layer := layers.index(int(name.split(".")[1]))]:
            continue
        old, new = ((each.place[layer], each.slot[layer]) for each in (before, after))
        stack = exchange_slots(tensor, old, new, own=place, group=state.engine.expert_group)
        # kept on the host: the device may have room for one more stack, but not for all
        moved[name, kind] = stack.cpu()
    state.engine.load_state(lambda name, kind: moved.get((name, kind)), step=state.step)
    state.naming = Naming(layers, after, place)


def exchange_slots(
    tensor: Tensor,
    before: tuple[Int64, Int64],
    after: tuple[Int64, Int64],
    *,
    own: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Rearrange one layer's stack (S, ...) of this place `own`; collective over `group`.

    `before` and `after` are place (E,) and slot (E,) of the layer's experts; returns (S, ...).
    """
    (old_place, old_slot), (new_place, new_slot) = before, after
    places = int(old_place.max()) + 1
    kept = np.flatnonzero((old_place == own) & (new_place == own))
    leaving = np.flatnonzero((old_place == own) & (new_place != own))
    coming = np.flatnonzero((old_place != own) & (new_place == own))
    # both sides sort by (the other place, expert), so no order has to be sent
    leaving = leaving[np.argsort(new_place[leaving], kind="stable")]
    coming = coming[np.argsort(old_place[coming], kind="stable")]
    result = torch.empty_like(tensor)
    result[_rows(new_slot[kept], tensor)] = tensor[_rows(old_slot[kept], tensor)]
    if (old_place != new_place).any():  # the same on all places
        arrived = tensor.new_empty((len(coming), *tensor.shape[1:]))
        dist.all_to_all_single(
            arrived,
            tensor[_rows(old_slot[leaving], tensor)],
            np.bincount(old_place[coming], minlength=places).tolist(),
            np.bincount(new_place[leaving], minlength=places).tolist(),
            group=group,
        )
        result[_rows(new_slot[coming], tensor)] = arrived
    return result


def _rows(slots: Int64, like: Tensor) -> Tensor:
    return torch.from_numpy(slots).to(like.device)
