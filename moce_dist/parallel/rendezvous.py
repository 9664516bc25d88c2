"""Rendezvous of the ranks of one start, unaffected by earlier starts.

torchrun keeps one store for all its restarts, so entries of lost ranks are still there, and gloo
then connects to dead processes. torchrun's restart count does not help, because every node counts
for itself. So the ranks agree on a name that only this start knows:

    rank r > 0   hello/r = a random number; ack once the offer shows that number
    rank 0       offer = {name, the numbers that it sees}, again when one changes, until all acked
"""

import atexit
import json
import socket
import time
import uuid
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from moce_dist.settings import ConfigError

_LOOK_EVERY_S = 0.05


def fresh_store(timeout: timedelta | None) -> tuple[Store, int, int]:
    """Return a store that holds nothing of an earlier start, this rank, and the number of ranks.

    Collective over the ranks that a launcher's environment describes.

    Raises:
        TimeoutError: not all ranks joined in time.
    """
    timeout = timeout or default_pg_timeout
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    name = agree(store, rank, world_size, timeout)
    return PrefixStore(f"start-{name}", store), rank, world_size


def agree(store: Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Agree with all ranks of this start on a name for it.

    Raises:
        TimeoutError: not all ranks joined in time.
    """
    end, mine = time.monotonic() + timeout.total_seconds(), uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", mine)
        while (offer := _read(store, "offer")) is None or offer["seen"].get(str(rank)) != mine:
            _wait(end, "rank 0")
        store.set(f"ack/{offer['name']}/{rank}", "")
        return str(offer["name"])
    others, seen = range(1, world_size), None
    while not all(store.check([f"ack/{mine}/{other}"]) for other in others):
        there = [other for other in others if store.check([f"hello/{other}"])]
        hellos = {str(other): store.get(f"hello/{other}").decode() for other in there}
        if hellos != seen:
            seen = hellos
            store.set("offer", json.dumps({"name": mine, "seen": seen}))
        _wait(end, "the other ranks")
    return mine


def agree_on_device(store: Store, world_size: int, kind: str) -> None:
    """Compare the kind of device of all ranks, `cpu` or `cuda`; collective over them.

    With different kinds, ranks would wait for each other in different backends.

    Raises:
        ConfigError: some have a GPU, others do not.
    """
    if store.add(f"device/{kind}", 1) == 1:
        store.set(f"device/{kind}/first", socket.gethostname())
    if store.add("device/all", 1) == world_size:
        counts = {name: store.add(f"device/{name}", 0) for name in ("cpu", "cuda")}
        store.set("device/counts", json.dumps(counts))
    counts = json.loads(store.get("device/counts"))
    if counts["cpu"] and counts["cuda"]:
        host = store.get("device/cpu/first").decode()
        raise ConfigError(
            f"parallel.use_gpu: {counts['cpu']} of {world_size} ranks have no GPU that torch can "
            f"use, the first of them on {host}; set it to false, or repair the node"
        )


def _read(store: Store, key: str) -> dict[str, dict[str, str]] | None:
    return json.loads(store.get(key)) if store.check([key]) else None


def _wait(end: float, who: str) -> None:
    if time.monotonic() > end:
        raise TimeoutError(f"waited in vain for {who} to join")
    time.sleep(_LOOK_EVERY_S)


def new_host_group(timeout: timedelta) -> dist.ProcessGroup:
    """Make a gloo group of all ranks; collective over them. It ends before the interpreter.

    A thread of gloo that released a tensor's memory after the interpreter's end would abort the
    process. Threads are joined once nobody refers to the group, so whoever keeps it in a cache must
    clear that at exit.
    """
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    atexit.register(_leave, group)
    return group


def _leave(group: dist.ProcessGroup) -> None:
    # torch refers to it, too, unless all groups were destroyed before
    with suppress(ValueError):
        if dist.is_initialized():
            dist.destroy_process_group(group)
