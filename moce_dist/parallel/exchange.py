"""The exchange: images whose expert lives elsewhere travel there and back.

All split sizes are known on the host before the forward pass, because routes follow from cluster
ids that every rank knows from the plan. So there is no padding, no capacity, no dropped image, no
synchronisation inside a layer, and no collective at all in a layer in which no image of the
expert-parallel group has to travel. Images that stay are not part of the collective.

    place 0 reads images a b c, place 1 reads d e f; a, b, d want an expert of place 0:
        dispatch   place 0: [a b] + received [d]       place 1: [e f] + received [c]
        combine    place 0: a b, and c came back       place 1: e f, and d came back

Letters: b images of a rank, N tokens, D width, L MoE layers, K clusters.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moce_dist.parallel.groups import ExpertMap

Ints = NDArray[np.int64]
TRANSFERS = 4
"""An image's tokens travel there and back, forward and backward."""


@dataclass(frozen=True)
class LayerRoutes:
    """What one rank does in one layer; all index arrays are small and made on the host."""

    stay: Ints
    """Own images whose expert is here."""
    leave: Ints
    """Own images that travel, by (destination, slot there, position)."""
    send_counts: list[int]
    receive_counts: list[int]
    order: Ints
    """Sorts [stay, received] rows by local expert."""
    counts: list[int]
    """Rows per local expert."""
    is_exchanging: bool
    """True when any image of the expert-parallel group travels: the same on all its ranks."""


def layer_routes(place: Ints, slot: Ints, own_place: int, num_local_experts: int) -> LayerRoutes:
    """Plan one layer from the destination of every image of the expert-parallel group.

    `place` and `slot` (P, b): where image j of the rank at place i must go, P places.
    """
    mine, my_slots = place[own_place], slot[own_place]
    stay = np.flatnonzero(mine == own_place)
    leave = np.flatnonzero(mine != own_place)
    # the receiver sorts by the same keys, so no order has to be sent
    leave = leave[np.lexsort((leave, my_slots[leave], mine[leave]))]
    arriving = [
        np.sort(slot[i][place[i] == own_place]) for i in range(len(place)) if i != own_place
    ]
    row_slots = np.concatenate([my_slots[stay], *arriving])
    incoming = (place == own_place).sum(axis=1)
    # what stays does not pass through the collective
    incoming[own_place] = 0
    return LayerRoutes(
        stay=stay,
        leave=leave,
        send_counts=np.bincount(mine[leave], minlength=len(place)).tolist(),
        receive_counts=incoming.tolist(),
        order=np.argsort(row_slots, kind="stable"),
        counts=np.bincount(row_slots, minlength=num_local_experts).tolist(),
        is_exchanging=bool((place != np.arange(len(place))[:, None]).any()),
    )


class _AllToAll(torch.autograd.Function):
    """Rows to their destinations; backward sends the gradients the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradient, ctx.receive, ctx.send, ctx.group), None, None, None


def _all_to_all(x: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    out = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out


class ExpertExchange:
    """The distributed dispatcher of one micro-batch; collective over the expert-parallel group."""

    def __init__(
        self,
        clusters: Tensor,
        routing: Ints,
        experts: ExpertMap,
        *,
        own_place: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Plan all layers.

        `clusters` (P, b) int64: cluster of every image of every rank of the expert-parallel group,
        by place. `routing` (L, K): the step's routing table.
        """
        self._group = group
        self.layers = [
            layer_routes(*destinations, own_place, experts.num_local_experts)
            for destinations in _destinations(clusters.numpy(), routing, experts)
        ]

    def dispatch(self, x: Tensor, layer: int) -> tuple[Tensor, list[int]]:
        """Send images (b, N, D) to their experts: rows (M, N, D) by local expert, and counts."""
        routes = self.layers[layer]
        if torch.is_autocast_enabled(x.device.type):
            # the experts compute in this type anyway; casting first halves what travels
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = _take(x, routes.stay)
        if routes.is_exchanging:
            away = _take(x, routes.leave)
            arrived = _AllToAll.apply(away, routes.send_counts, routes.receive_counts, self._group)
            rows = torch.cat([rows, arrived])
        return _take(rows, routes.order), routes.counts

    def combine(self, y: Tensor, layer: int) -> Tensor:
        """Bring expert outputs (M, N, D) home, (b, N, D) in the order of `dispatch`'s images."""
        routes = self.layers[layer]
        rows = _take(y, np.argsort(routes.order))
        if not routes.is_exchanging:
            return _take(rows, np.argsort(routes.stay))
        stayed, visitors = torch.split(rows, [len(routes.stay), len(rows) - len(routes.stay)])
        returned = _AllToAll.apply(visitors, routes.receive_counts, routes.send_counts, self._group)
        # joined even when nothing came back: a rank that left its share of the graph out would not
        # take part in the backward collective, and its peers would wait for ever
        home = np.argsort(np.concatenate([routes.stay, routes.leave]))
        return _take(torch.cat([stayed, returned]), home)


def _destinations(clusters: Ints, routing: Ints, experts: ExpertMap) -> Iterator[tuple[Ints, Ints]]:
    # per layer place and slot of every image (P, b); padding goes to the first expert at home
    home = np.arange(len(clusters))[:, None]
    for layer, table in enumerate(routing):
        expert = table[clusters]
        place = np.where(clusters < 0, home, experts.place[layer][expert])
        yield place, np.where(clusters < 0, 0, experts.slot[layer][expert])


def _take(x: Tensor, rows: Ints) -> Tensor:
    return x.index_select(0, torch.from_numpy(rows).to(x.device, non_blocking=True))


def images_exchanged(clusters: Tensor, routing: Ints, experts: ExpertMap, replicas: int) -> int:
    """Count the images of a step that travel, summed over layers and ranks.

    `clusters` (R, b) of all ranks, `replicas` ranks per place.
    """
    by_replica = [clusters.numpy()[first::replicas] for first in range(replicas)]
    return sum(
        int((place != np.arange(len(place))[:, None]).sum())
        for ids in by_replica
        for place, _ in _destinations(ids, routing, experts)
    )
