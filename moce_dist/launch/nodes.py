"""Which nodes the workers take: the driver's decision, without Ray.

A job wants `parallel.num_workers` ranks and continues with as few as `parallel.min_workers` when
nodes are missing. At the start and after every loss, the driver looks at the live nodes, takes the
largest legal number of ranks that they have room for, and starts all workers from the newest
checkpoint. That number changes micro-batches, but not batches or routing.

    G = 4, 8 workers, at least 1; a node of 2 slots for each of the labels g0 .. g3
    all alive     ranks  0 1 | 2 3 | 4 5 | 6 7      one place per label, two ranks per place
    g2 is gone    ranks  0   | 1   | 2   | 3        places on g0 g0 g1 g3

Letters: R ranks, G expert groups.
"""

import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moce_dist.config import ParallelConfig
from moce_dist.parallel.groups import Topology, natural_key
from moce_dist.run.directory import StoppedError
from moce_dist.settings import ConfigError

log = logging.getLogger(__name__)
GROUP_LABEL = "moce.dist/expert-group"
"""Ray node label that names the expert group of a node."""
_SETTLE_S = 5.0
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class Host:
    """A live node: address, expert-group label ("" without), workers that it has room for."""

    node: str
    address: str
    group: str
    slots: int


@dataclass(frozen=True)
class Requirements:
    """What a job needs from the nodes."""

    name: str
    parallel: ParallelConfig
    batch_size: int
    resource: str
    """What a worker takes one of: `CPU` or `GPU`."""

    def topology(self, num_workers: int) -> Topology:
        """Return the layout of `num_workers` ranks among the groups."""
        return Topology(num_workers, self.parallel.num_groups)

    def best_seats(self, hosts: Sequence[Host]) -> list[str] | None:
        """Seat the largest legal number of workers; return the label of every rank, or None.

        Raises:
            ConfigError: there are more labels than a full start has places for.
        """
        self._refuse_too_many_labels(hosts)
        for count in self.parallel.worker_counts(self.batch_size):
            is_full = count == self.parallel.num_workers
            found = seats(hosts, self.topology(count), one_place_a_label=is_full)
            if found is not None:
                return found
        return None

    def _refuse_too_many_labels(self, hosts: Sequence[Host]) -> None:
        labels, places = labels_of(hosts), self.topology(self.parallel.num_workers).ep_size
        if len(labels) > places:
            raise ConfigError(
                f"parallel.num_groups ({self.parallel.num_groups}) on {self.parallel.num_workers} "
                f"workers needs {places} values of the node label {GROUP_LABEL}; "
                f"the cluster has {labels}"
            )

    def missing(self, hosts: Sequence[Host]) -> str:
        """Describe the least that is needed, and what the nodes have."""
        fewest, labels = self.parallel.worker_counts(self.batch_size)[-1], labels_of(hosts)
        need = f"{fewest} workers need a free {self.resource} each"
        if labels and fewest == self.parallel.num_workers:
            topology = self.topology(fewest)
            need = (
                f"{topology.ep_size} values of the node label {GROUP_LABEL} are needed, each with "
                f"{topology.num_replicas} free {self.resource}"
            )
        there = "; ".join(
            f"{f'{GROUP_LABEL}={host.group} ' if host.group else ''}on {host.address} has "
            f"{host.slots} free {self.resource}"
            for host in sorted(hosts, key=lambda host: (natural_key(host.group), host.address))
        )
        return f"{need}; {there or 'no node is alive'}"


def labels_of(hosts: Sequence[Host]) -> list[str]:
    """Values of the group label, in order of groups."""
    return sorted({host.group for host in hosts} - {""}, key=natural_key)


def seats(
    hosts: Sequence[Host], topology: Topology, *, one_place_a_label: bool
) -> list[str] | None:
    """Choose a node label for every rank; "" when no node has a label.

    The neighbouring ranks of a place share a label. None when the nodes have no room for all ranks.
    """
    labels, slots = labels_of(hosts), Counter[str]()
    for host in hosts:
        slots[host.group] += host.slots
    if not labels:
        return [""] * topology.num_ranks if slots[""] >= topology.num_ranks else None
    room = [slots[label] // topology.num_replicas for label in labels]
    if one_place_a_label:
        room = [min(1, places) for places in room]
    # every label gets its first place before any gets a second, which spreads the work
    offers = sorted((turn, i) for i, places in enumerate(room) for turn in range(places))
    taken = sorted(i for _, i in offers[: topology.ep_size])
    if len(taken) < topology.ep_size:
        return None
    return [labels[i] for i in taken for _ in range(topology.num_replicas)]


def wait_for_seats(
    wanted: Requirements, look: Callable[[], list[Host]], should_stop: Callable[[], bool]
) -> list[str]:
    """Look at the nodes until they have room; return the label of every rank, see `best_seats`.

    Fewer workers than the full number are accepted only after some seconds, because nodes report
    with a delay the resources that an ended worker gave back.

    Raises:
        ConfigError: there are more labels than places.
        RuntimeError: no room for the fewest workers within `parallel.start_timeout_s`.
        StoppedError: `should_stop` said so.
    """
    begin, settle_s = time.monotonic(), min(_SETTLE_S, wanted.parallel.start_timeout_s / 2)
    has_labels, last_said = False, ""
    while True:
        hosts = look()
        has_labels |= bool(labels_of(hosts))
        # nodes without a label must not replace labelled ones, even when all of these are gone
        usable = [host for host in hosts if host.group or not has_labels]
        found, waited_s = wanted.best_seats(usable), time.monotonic() - begin
        if found and (len(found) == wanted.parallel.num_workers or waited_s >= settle_s):
            return found
        if waited_s >= wanted.parallel.start_timeout_s:
            limit = f"parallel.start_timeout_s ({wanted.parallel.start_timeout_s:g} s)"
            raise RuntimeError(f"{wanted.name}: no room within {limit}: {wanted.missing(hosts)}")
        if should_stop():
            raise StoppedError(f"{wanted.name}: SIGTERM while waiting for nodes")
        if (missing := wanted.missing(hosts)) != last_said and waited_s >= settle_s:
            log.info("%s: waiting for nodes: %s", wanted.name, missing)
            last_said = missing
        time.sleep(_LOOK_EVERY_S)


def answers(node: Mapping[str, Any]) -> bool:
    """Tell whether a node that Ray lists can be reached; Ray's head notices a loss late."""
    address = node["NodeManagerAddress"], node["NodeManagerPort"]
    try:
        socket.create_connection(address, timeout=2).close()
    except OSError:
        return False
    return True
