"""Make routing tables on the ranks' hosts while the device computes the step before.

The table of step s follows from the gate weights before step s - 1, which exist when that step is
launched. So neither the device nor the training thread of any rank waits for a table:

    training thread, all ranks    take 4, begin 5   launch step 4   take 5, begin 6   launch step 5
    threads of the layers' makers                  noise, logits, argmax of 5; send

The logits are computed in float32 on the host for every device, because routing must not depend on
a device's kernels. A layer is the unit of work, so its values do not depend on the number of ranks.
Of a large table, up to L ranks make a share of the layers each; rank 0 joins the shares and sends
the table to all. A small table is made by rank 0 alone. Tables travel from host to host in a
separate process group, so no other collective waits for them.

Letters: L MoE layers, K clusters, E experts per layer, D width.
"""

import atexit
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moce_dist.arrays import Int64
from moce_dist.config import Config
from moce_dist.model.gate import Gate, NoiseSchedule, layer_table, logits, noisy_layer
from moce_dist.parallel.rendezvous import new_host_group
from moce_dist.run.environment import usable_cores

_SCORES_OF_A_SMALL_TABLE = 2**18
_FAILED = -1


@dataclass(frozen=True)
class _Channel:
    """Threads and process group for making and sending tables; one per default process group."""

    group: dist.ProcessGroup | None
    """None with a single rank."""
    sender: ThreadPoolExecutor
    """One thread, so that tables are sent in the order in which they were begun."""
    layers: ThreadPoolExecutor


@functools.cache
def _channel(_: dist.ProcessGroup | None, timeout_s: float) -> _Channel:
    # cached, so that the stages of a process share groups and threads
    group: Any = None
    if dist.get_world_size() > 1:
        group = new_host_group(timedelta(seconds=timeout_s))
    return _Channel(group, ThreadPoolExecutor(1), ThreadPoolExecutor(usable_cores()))


atexit.register(_channel.cache_clear)  # see `new_host_group`


@dataclass(frozen=True)
class GateOnHost:
    """A gate's state before a step, while it is copied to the host."""

    weight: Tensor
    """(L, E, D) float32."""
    cluster_embedding: Tensor
    """(K, D)."""
    groups: Int64 | None
    """(K,) expert group of every cluster, with shared groups; else None."""
    arrival: Any = None

    def wait(self) -> None:
        """Wait until the weights have arrived."""
        if self.arrival is not None:
            self.arrival.synchronize()


class TableMaker:
    """Makes routing tables and sends them; `begin` and `take` are collective over all ranks."""

    def __init__(
        self, config: Config, noise: NoiseSchedule, num_clusters: int, num_groups: int
    ) -> None:
        self._config, self._noise, self._num_groups = config, noise, num_groups
        self._shape = len(config.moe_layers), num_clusters
        num_scores = len(config.moe_layers) * num_clusters * config.moe.num_experts
        self._is_small = num_scores < _SCORES_OF_A_SMALL_TABLE
        self._constant: dict[str, tuple[int, Tensor]] = {}
        self._coming: Callable[[], Int64] | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a table was begun and not taken yet."""
        return self._coming is not None

    def begin(self, gate: Gate, step: int) -> None:
        """Begin the table of `step` from the current gate weights, without waiting for it.

        A table that was begun before and not taken is waited for and dropped.
        """
        if self._coming is not None:
            self.take()
        channel = _channel(dist.group.WORLD, self._config.parallel.patience_s)
        share, making = self._shares().get(dist.get_rank()), None
        if share is not None:
            making = channel.sender.submit(self._make, self.on_host(gate), step, share, channel)
        if dist.get_rank() == 0:
            assert making is not None, "rank 0 always has a share"
            self._coming = making.result
            return
        # int32 is the smallest integer type that can be sent and holds any expert's number
        table = torch.empty(self._shape, dtype=torch.int32)
        work = dist.broadcast(table, 0, group=channel.group, async_op=True)
        self._coming = functools.partial(_arrived, making, work, table)

    def take(self) -> Int64:
        """Return the table (L, K) that was begun; waits only if it is not ready in time."""
        assert self._coming is not None, "a table was begun"
        table, self._coming = self._coming(), None
        return table

    def on_host(self, gate: Gate) -> GateOnHost:
        """Begin to copy the gate to the host; tensors that do not change are copied only once."""
        weight = gate.weight.detach()
        host = torch.empty(weight.shape, pin_memory=weight.is_cuda)
        host.copy_(weight, non_blocking=True)
        arrival = None
        if weight.is_cuda:
            arrival = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            arrival.record()
        is_shared = self._config.gate.groups == "shared"
        return GateOnHost(
            host,
            self._kept("embedding", gate.cluster_embedding),
            self._kept("groups", gate.cluster_group).numpy() if is_shared else None,
            arrival,
        )

    def _kept(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._constant or self._constant[name][0] != tensor._version:
            self._constant[name] = tensor._version, tensor.to("cpu", copy=True)
        return self._constant[name][1]

    def _shares(self) -> dict[int, slice]:
        # the layers of every rank that makes some; the ranks are spread over the hosts
        num_layers, num_ranks = self._shape[0], dist.get_world_size()
        makers = 1 if self._is_small else min(num_layers, num_ranks)
        bounds = [num_layers * i // makers for i in range(makers + 1)]
        return {num_ranks * i // makers: slice(*bounds[i : i + 2]) for i in range(makers)}

    def _make(self, gate: GateOnHost, step: int, share: slice, channel: _Channel) -> Int64:
        # returns the whole table on rank 0, the share on other ranks
        table, rank = torch.empty(self._shape, dtype=torch.int32), dist.get_rank()
        others = [
            dist.irecv(table[layers], maker, group=channel.group)
            for maker, layers in self._shares().items()
            if maker > rank == 0
        ]
        try:
            table[share] = torch.from_numpy(self._compute(gate, step, share, channel)).int()
        except BaseException:
            # sent all the same: ranks that waited for the share would keep each other alive
            table[share] = _FAILED
            raise
        finally:
            if rank > 0:
                dist.send(table[share], 0, group=channel.group)
            for work in others:
                assert work is not None, "rank 0 belongs to the group"
                work.wait()
            if rank == 0 and channel.group is not None:
                # the sender need not wait until the table has arrived
                dist.broadcast(table, 0, group=channel.group, async_op=True)
        return _checked(table) if rank == 0 else table[share].numpy()

    def _compute(self, gate: GateOnHost, step: int, share: slice, channel: _Channel) -> Int64:
        # (share, K); the layers of a large table in parallel
        gate.wait()
        work = functools.partial(self._layer, gate, step)
        mapped = map if self._is_small else channel.layers.map
        return np.stack(list(mapped(work, range(self._shape[0])[share])))

    def _layer(self, gate: GateOnHost, step: int, layer: int) -> Int64:
        scores = logits(gate.weight[layer], gate.cluster_embedding)
        noise = self._noise.layer(step, layer, (scores.shape[0], scores.shape[1]))
        return layer_table(
            noisy_layer(scores, noise), self._config.gate, gate.groups, self._num_groups
        )


def _arrived(making: Future[Int64] | None, work: Any, table: Tensor) -> Int64:
    if making is not None:
        making.result()  # raises what went wrong in this rank's own share
    work.wait()
    return _checked(table)


def _checked(table: Tensor) -> Int64:
    if bool((table == _FAILED).any()):
        raise RuntimeError("another rank could not make its share of the routing table")
    return table.numpy().astype(np.int64)
