"""The exchange: images whose expert lives on another rank travel there and back.

All split sizes are known on the host before the forward pass, because routes follow from cluster
ids, which every rank knows from the plan. So there is no padding, no capacity, no dropped image and
no synchronisation inside a layer. A layer in which no image of the expert-parallel group has to
travel runs no collective. Images that stay are not part of the collective, and their experts
compute while the others travel, in the forward and in the backward pass.

    place 0 reads images a b c, place 1 reads d e f; a, b, d want an expert of place 0:
        dispatch   place 0: part [a b], then part [d]  place 1: part [e f], then part [c]
        combine    place 0: a b, and c came back       place 1: e f, and d came back

Letters: b images of a rank, N tokens, D width, L MoE layers, K clusters, P places, S experts of a
layer in one place.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moce_dist.arrays import Int64
from moce_dist.model.moce import Part
from moce_dist.model.vit import autocast_dtype
from moce_dist.parallel.groups import ExpertMap


class LayerRoutes(NamedTuple):
    """One rank's part in the exchange of one layer; all arrays and lists are made on the host."""

    outward: Int64
    """The order (b,) of own images: those that stay, sorted by local expert, then those that
    travel, sorted by (destination, slot there, position)."""
    home: Int64
    """The order that undoes `outward`."""
    stay_counts: list[int]
    """Images that stay, per local expert."""
    send_counts: list[int]
    """Images that travel, per destination place."""
    receive_counts: list[int]
    """Images that arrive, per place of origin; those of a place are sorted by local expert."""
    by_expert: Int64
    """The order that sorts the arrived images by local expert."""
    by_arrival: Int64
    """The order that undoes `by_expert`."""
    arrived_counts: list[int]
    """Arrived images per local expert."""
    is_exchanging: bool
    """True if any image of the expert-parallel group travels: the same on all its ranks."""


def layer_routes(place: Int64, slot: Int64, own_place: int, num_slots: int) -> list[LayerRoutes]:
    """Plan all layers from the destination of every image of the expert-parallel group.

    `place` and `slot` (L, P, b) say where image j of the rank at place i must go; there are P
    places of `num_slots` local experts. The layers are planned together: the device waits for it.
    """
    (num_layers, num_places, num_images), mine = place.shape, place[:, own_place]
    # the receiver derives the same order, so none has to be sent
    target = np.where(mine == own_place, 0, mine + 1) * num_slots + slot[:, own_place]
    outward = np.argsort(target, axis=1, kind="stable")
    shape = num_layers, num_places + 1, num_slots
    leaving = _count(target + np.arange(num_layers)[:, None] * shape[1] * num_slots, shape)
    coming = place == own_place
    # images that stay do not pass through the collective
    coming[:, own_place] = False
    found, shape = np.flatnonzero(coming), (num_layers, num_places, num_slots)
    arriving = _count(found // num_images * num_slots + slot.take(found), shape)
    # those of a place are sorted by local expert, so their counts determine the order of arrival
    layer, _, arrived = np.unravel_index(np.repeat(np.arange(arriving.size), arriving.flat), shape)
    by_expert = np.argsort(layer * num_slots + arrived, kind="stable")
    ends = arriving.sum(axis=(1, 2)).cumsum()
    first = np.concatenate([[0], ends])[layer]
    columns = (
        outward,
        np.argsort(outward, axis=1),
        leaving[:, 0].tolist(),
        leaving[:, 1:].sum(axis=2).tolist(),
        arriving.sum(axis=2).tolist(),
        np.split(by_expert - first, ends[:-1]),
        np.split(np.argsort(by_expert) - first, ends[:-1]),
        arriving.sum(axis=1).tolist(),
        (place != np.arange(num_places)[:, None]).any(axis=(1, 2)).tolist(),
    )
    return [LayerRoutes(*row) for row in zip(*columns, strict=True)]


def _count(positions: Int64, shape: tuple[int, int, int]) -> Int64:
    # how often each flat position of an array of this shape occurs
    return np.bincount(positions.ravel(), minlength=math.prod(shape)).reshape(shape)


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
        routing: Int64,
        experts: ExpertMap,
        *,
        tokens: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
        along: Sequence[Int64] = (),
    ) -> None:
        """Plan all layers.

        Args:
            clusters: (P, b) int64, the clusters of the images of all ranks of the expert-parallel
                group, by place; negative for padding.
            routing: (L, K), the expert of every cluster.
            experts: where the experts live.
            tokens: N.
            group: the expert-parallel group, ranks by place; None: all ranks.
            device: where the images are.
            along: further arrays of the micro-batch, brought to the device in the same copy.
        """
        place, slot = _destinations(clusters.numpy(), routing, experts)
        self.layers = layer_routes(place, slot, dist.get_rank(group), experts.num_local_experts)
        self._tokens, self._group = tokens, group
        wanted = [(r.outward, r.home, r.by_expert, r.by_arrival) for r in self.layers]
        counts = np.array([(r.stay_counts, r.arrived_counts) for r in self.layers])
        further = (counts.cumsum(axis=2) * tokens, *along)
        *self._indices, (ends, *self.along) = _to_device([*wanted, further], device)
        # two per layer, in the type that the grouped product takes
        self._ends = ends.int().flatten(0, 1).unbind()

    def dispatch(self, x: Tensor, layer: int) -> Iterator[Part]:
        """Send images (b, N, D) to their experts; yield those that stay, then those that arrive."""
        routes = self.layers[layer]
        outward, home, by_expert, by_arrival = self._indices[layer]
        stay_ends, arrived_ends = self._ends[2 * layer : 2 * layer + 2]
        assert x.shape[1] == self._tokens
        # the experts compute in this dtype anyway; casting first halves the bytes that travel
        x = x.to(autocast_dtype(x))
        x = _Reorder.apply(x, outward, home)
        if not routes.is_exchanging:
            yield Part(x, routes.stay_counts, stay_ends)
            return
        staying, leaving = torch.split(x, [sum(routes.stay_counts), sum(routes.send_counts)])
        journey = _Journey(routes.send_counts, routes.receive_counts, self._group)
        travelling = _Depart.apply(leaving, journey)
        yield Part(staying, routes.stay_counts, stay_ends)
        arrived = _Reorder.apply(_Arrive.apply(travelling, journey), by_expert, by_arrival)
        yield Part(arrived, routes.arrived_counts, arrived_ends)

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


def _to_device(layers: Sequence[Sequence[Int64]], device: torch.device) -> list[tuple[Tensor, ...]]:
    # one copy for all layers, because every separate copy costs a launch, whatever its size
    arrays = [array for layer in layers for array in layer]
    packed = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    parts = packed.split_with_sizes([array.size for array in arrays])
    shaped = (
        part if array.ndim == 1 else part.view(array.shape)
        for part, array in zip(parts, arrays, strict=True)
    )
    return [tuple(itertools.islice(shaped, len(layer))) for layer in layers]


def _destinations(clusters: Int64, routing: Int64, experts: ExpertMap) -> tuple[Int64, Int64]:
    # place and slot (L, P, b) of every image in every layer; padding goes to slot 0 at home
    num_layers, num_experts = experts.place.shape
    expert = routing.take(clusters, axis=1) + np.arange(num_layers)[:, None, None] * num_experts
    place, slot = experts.place.take(expert), experts.slot.take(expert)
    is_padding = clusters < 0
    if is_padding.any():
        place = np.where(is_padding, np.arange(len(clusters))[:, None], place)
        slot = np.where(is_padding, 0, slot)
    return place, slot


def images_exchanged(clusters: Tensor, routing: Int64, experts: ExpertMap, replicas: int) -> int:
    """Count the images of a step that travel, summed over layers and ranks.

    `clusters` (R, b) are those of all R ranks; a place has `replicas` ranks.
    """
    by_replica = [clusters.numpy()[first::replicas] for first in range(replicas)]
    return sum(
        int((_destinations(ids, routing, experts)[0] != np.arange(len(ids))[:, None]).sum())
        for ids in by_replica
    )
