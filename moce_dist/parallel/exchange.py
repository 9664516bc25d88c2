"""The exchange: images whose expert lives on another rank travel there and back.

All split sizes are known on the host before the forward pass, because routes follow from cluster
ids, which every rank knows from the plan. So there is no padding, no capacity, no dropped image and
no synchronisation inside a layer. A layer in which no image of the expert-parallel group has to
travel runs no collective. Images that stay are not part of the collective, and their experts
compute while the others travel, in the forward and in the backward pass.

    place 0 reads images a b c, place 1 reads d e f; a, b, d want an expert of place 0:
        dispatch   place 0: part [a b], then part [d]  place 1: part [e f], then part [c]
        combine    place 0: a b, and c came back       place 1: e f, and d came back

Letters: b images of a rank, N tokens, D width, L MoE layers, K clusters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moce_dist.model.moce import Part
from moce_dist.parallel.groups import ExpertMap

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class LayerRoutes:
    """One rank's part in the exchange of one layer; all index arrays are made on the host."""

    stay: Ints
    """Own images whose expert is here, sorted by local expert."""
    stay_counts: list[int]
    """Images of `stay` per local expert."""
    leave: Ints
    """Own images that travel, sorted by (destination, slot there, position)."""
    send_counts: list[int]
    """Images of `leave` per destination place."""
    receive_counts: list[int]
    """Images that arrive, per place of origin; those of a place are sorted by local expert."""
    by_expert: Ints
    """The order that sorts the arrived images by local expert."""
    arrived_counts: list[int]
    """Arrived images per local expert."""
    is_exchanging: bool
    """True if any image of the expert-parallel group travels: the same on all its ranks."""

    @property
    def outward(self) -> Ints:
        """The order [stay, leave] of the images."""
        return np.concatenate([self.stay, self.leave])

    @property
    def home(self) -> Ints:
        """The order that turns [stay, leave] back into that of the images."""
        return np.argsort(self.outward)


def layer_routes(place: Ints, slot: Ints, own_place: int, num_local_experts: int) -> LayerRoutes:
    """Plan one layer from the destination of every image of the expert-parallel group.

    `place` and `slot` (P, b) say where image j of the rank at place i must go; P places.
    """
    mine, my_slots = place[own_place], slot[own_place]
    stay, leave = np.flatnonzero(mine == own_place), np.flatnonzero(mine != own_place)
    stay = stay[np.argsort(my_slots[stay], kind="stable")]
    # the receiver derives the same order, so none has to be sent
    leave = leave[np.lexsort((leave, my_slots[leave], mine[leave]))]
    coming = place == own_place
    # images that stay do not pass through the collective
    coming[own_place] = False
    arriving = np.concatenate([np.sort(slot[i][coming[i]]) for i in range(len(place))])
    return LayerRoutes(
        stay=stay,
        stay_counts=np.bincount(my_slots[stay], minlength=num_local_experts).tolist(),
        leave=leave,
        send_counts=np.bincount(mine[leave], minlength=len(place)).tolist(),
        receive_counts=coming.sum(axis=1).tolist(),
        by_expert=np.argsort(arriving, kind="stable"),
        arrived_counts=np.bincount(arriving, minlength=num_local_experts).tolist(),
        is_exchanging=bool((place != np.arange(len(place))[:, None]).any()),
    )


class _Journey:
    """An asynchronous all-to-all of rows, and in the backward pass of their gradients back."""

    def __init__(self, send: list[int], receive: list[int], group: dist.ProcessGroup | None):
        self._splits, self._group = (send, receive), group
        self._work: Any = None
        self._buffers: tuple[Tensor, Tensor] | None = None

    def begin(self, x: Tensor, *, is_return: bool = False) -> None:
        """Start sending rows (n, N, D); with `is_return`, in the opposite direction."""
        send, receive = reversed(self._splits) if is_return else self._splits
        out = x.new_empty((sum(receive), *x.shape[1:]))
        # the send buffer must live until the collective has ended
        self._buffers = x.contiguous(), out
        self._work = dist.all_to_all_single(
            out, self._buffers[0], receive, send, group=self._group, async_op=True
        )

    @property
    def under_way(self) -> Tensor:
        """Placeholder (m, N, D), without memory, for the rows that have yet to arrive."""
        assert self._buffers is not None
        _, out = self._buffers
        return out.new_empty(()).expand(out.shape)

    def end(self) -> Tensor:
        """Wait for the arriving rows and return them, (m, N, D)."""
        assert self._buffers is not None
        self._work.wait()
        _, out = self._buffers
        self._work = self._buffers = None
        return out


class _Reorder(torch.autograd.Function):
    """Put rows (n, N, D) in another order; the backward pass applies the inverse order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, opposite: Tensor) -> Tensor:
        ctx.opposite = opposite
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.opposite), None, None


class _Depart(torch.autograd.Function):
    """Begin the journey of rows; in the backward pass, end that of their gradients.

    The result is a placeholder for the rows under way: only its shape and its place in the autograd
    graph have a meaning.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        journey.begin(x)
        return journey.under_way

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.end(), None


class _Arrive(torch.autograd.Function):
    """End the journey of rows; in the backward pass, begin that of their gradients."""

    @staticmethod
    def forward(ctx: Any, under_way: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        return journey.end()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.journey.begin(gradient, is_return=True)
        # a placeholder of the shape that autograd expects; `_Depart` returns the true gradients
        return gradient, None


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
        device: torch.device,
        along: Sequence[Ints] = (),
    ) -> None:
        """Plan all layers.

        Args:
            clusters: (P, b) int64, the clusters of the images of all ranks of the expert-parallel
                group, by place; negative for padding.
            routing: (L, K), the expert of every cluster.
            experts: where the experts live.
            own_place: this rank's place.
            group: the expert-parallel group; None in a single process, where nothing travels.
            device: where the images are.
            along: further arrays of the micro-batch, brought to the device in the same copy.
        """
        num_local = experts.num_local_experts
        self.layers = [
            layer_routes(place, slot, own_place, num_local)
            for place, slot in _destinations(clusters.numpy(), routing, experts)
        ]
        self._group = group
        wanted = [(r.outward, r.home, r.by_expert, np.argsort(r.by_expert)) for r in self.layers]
        *self._indices, self.along = _to_device([*wanted, along], device)

    def dispatch(self, x: Tensor, layer: int) -> Iterator[Part]:
        """Send images (b, N, D) to their experts; yield those that stay, then those that arrive."""
        routes = self.layers[layer]
        outward, home, by_expert, by_arrival = self._indices[layer]
        if torch.is_autocast_enabled(x.device.type):
            # the experts compute in this dtype anyway; casting first halves the bytes that travel
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = _Reorder.apply(x, outward, home)
        if not routes.is_exchanging:
            yield x, routes.stay_counts
            return
        staying, leaving = torch.split(x, [len(routes.stay), len(routes.leave)])
        journey = _Journey(routes.send_counts, routes.receive_counts, self._group)
        travelling = _Depart.apply(leaving, journey)
        yield staying, routes.stay_counts
        arrived = _Arrive.apply(travelling, journey)
        yield _Reorder.apply(arrived, by_expert, by_arrival), routes.arrived_counts

    def combine(self, outputs: Sequence[Tensor], layer: int) -> Tensor:
        """Bring the parts' outputs home, (b, N, D) in the order of `dispatch`'s images."""
        routes = self.layers[layer]
        outward, home, by_expert, by_arrival = self._indices[layer]
        if not routes.is_exchanging:
            return _Reorder.apply(outputs[0], home, outward)
        stayed, visitors = outputs
        journey = _Journey(routes.receive_counts, routes.send_counts, self._group)
        travelling = _Depart.apply(_Reorder.apply(visitors, by_arrival, by_expert), journey)
        # part of the graph even if nothing came back: otherwise this rank would skip the backward
        # collective, and its peers would wait for ever
        returned = _Arrive.apply(travelling, journey)
        together = torch.cat([stayed, returned])
        return _Reorder.apply(together, home, outward)


def _to_device(layers: Sequence[Sequence[Ints]], device: torch.device) -> list[tuple[Tensor, ...]]:
    # one copy for all layers, because every separate copy costs a launch, whatever its size
    arrays = [array for layer in layers for array in layer]
    packed = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *map(np.ravel, arrays)]))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    parts = iter(torch.split(packed, [array.size for array in arrays]))
    return [tuple(next(parts).view(array.shape) for array in layer) for layer in layers]


def _destinations(clusters: Ints, routing: Ints, experts: ExpertMap) -> Iterator[tuple[Ints, Ints]]:
    # yields per layer the place and slot of every image, (P, b); padding goes to slot 0 at home
    home = np.arange(len(clusters))[:, None]
    for layer, table in enumerate(routing):
        expert = table[clusters]
        place = np.where(clusters < 0, home, experts.place[layer][expert])
        yield place, np.where(clusters < 0, 0, experts.slot[layer][expert])


def images_exchanged(clusters: Tensor, routing: Ints, experts: ExpertMap, replicas: int) -> int:
    """Count the images of a step that travel, summed over layers and ranks.

    `clusters` (R, b) are those of all R ranks; a place has `replicas` ranks.
    """
    by_replica = [clusters.numpy()[first::replicas] for first in range(replicas)]
    return sum(
        int((place != np.arange(len(place))[:, None]).sum())
        for ids in by_replica
        for place, _ in _destinations(ids, routing, experts)
    )
