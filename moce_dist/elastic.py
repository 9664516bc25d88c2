"""Where workers go and what a loss costs: the driver's decisions, without Ray.

A job wants `parallel.num_workers` ranks and goes on with `parallel.min_workers` when nodes are
missing. At the start and after every loss the driver looks at the nodes that are alive, takes the
largest legal number of ranks that they have room for, and starts all workers again from the newest
checkpoint. Batches and routing do not change with that number, micro-batches do.

    G = 4, 8 workers, at least 1; a node of 2 slots for each of the labels g0 .. g3
    all alive     ranks  0 1 | 2 3 | 4 5 | 6 7      one place a label, two ranks a place
    g2 is gone    ranks  0   | 1   | 2   | 3        places on g0 g0 g1 g3

Letters: R ranks, G expert groups.
"""

import logging
import re
import signal
import socket
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from moce_dist.config import ParallelConfig
from moce_dist.follow import Failure
from moce_dist.parallel.groups import Topology, natural_key
from moce_dist.pulse import Beat, Sign, standing_still
from moce_dist.run import StoppedError
from moce_dist.settings import ConfigError

log = logging.getLogger(__name__)
GROUP_LABEL = "moce.dist/expert-group"
"""Ray node label that names the expert group of a node."""
_SETTLE_S = 5.0
_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
_STOP_WAIT_S = 60
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class Host:
    """A live node: address, expert-group label ("" without), workers that it has room for."""

    node: str
    address: str
    group: str
    slots: int


@dataclass(frozen=True)
class Wanted:
    """What a job needs of the nodes."""

    name: str
    parallel: ParallelConfig
    batch_size: int
    resource: str
    """What a worker takes one of: `CPU` or `GPU`."""

    def topology(self, num_workers: int) -> Topology:
        """Arrange that many ranks among the groups."""
        return Topology(num_workers, self.parallel.num_groups)

    def best_seats(self, hosts: Sequence[Host]) -> list[str] | None:
        """Seat the largest legal number of workers; the label of every rank, or None.

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
        """Say what is needed at least, and what the nodes have."""
        fewest, labels = self.parallel.fewest_workers, labels_of(hosts)
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
    """Choose a node label for every rank, neighbours on one place; "" when no node has a label.

    The ranks of a place share a label. None when the nodes have no room for all.
    """
    labels, slots = labels_of(hosts), Counter[str]()
    for host in hosts:
        slots[host.group] += host.slots
    if not labels:
        return [""] * topology.num_ranks if slots[""] >= topology.num_ranks else None
    room = [slots[label] // topology.num_replicas for label in labels]
    if one_place_a_label:
        room = [min(1, places) for places in room]
    # the first place of every label before the second of any: work is spread over the nodes
    offers = sorted((turn, i) for i, places in enumerate(room) for turn in range(places))
    taken = sorted(i for _, i in offers[: topology.ep_size])
    if len(taken) < topology.ep_size:
        return None
    return [labels[i] for i in taken for _ in range(topology.num_replicas)]


def wait_for_seats(
    wanted: Wanted, look: Callable[[], list[Host]], should_stop: Callable[[], bool]
) -> list[str]:
    """Look at the nodes until there is room; the label of every rank of the largest legal number.

    Less than the full number is taken only after some seconds: nodes report with a delay what a
    worker that ended gave back.

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
        # when all labelled nodes are away, the others must not take their place
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


@dataclass
class Budgets:
    """Losses so far, counted by their kind."""

    name: str
    parallel: ParallelConfig
    failures: int = 0
    preemptions: int = 0
    _reached: dict[str, int] = field(default_factory=dict)
    _last: str = ""

    def charge(self, *, is_preemption: bool, cause: str, reached: Mapping[str, int]) -> str:
        """Count a loss and say so in a line; `reached` are the last steps of the loops.

        Raises:
            RuntimeError: naming the budget that this loss exceeds; or the cause is that of the loss
                before, and no step was gained since.
        """
        has_gained = any(step > self._reached.get(loop, -1) for loop, step in reached.items())
        self._reached |= {k: max(step, self._reached.get(k, -1)) for k, step in reached.items()}
        # numbers of ranks, processes and ports differ from time to time
        last, self._last = self._last, "" if is_preemption else re.sub(r"\d+", "#", cause)
        if self._last and self._last == last and not has_gained:
            raise RuntimeError(f"{self.name}: twice, without a step gained in between: {cause}")
        name = "preemptions" if is_preemption else "failures"
        count, limit = getattr(self, name) + 1, getattr(self.parallel, f"max_{name}")
        setattr(self, name, count)
        if count > limit:
            raise RuntimeError(
                f"{self.name}: {count} {name}, more than parallel.max_{name} ({limit}) allows; "
                f"the last one: {cause}"
            )
        return f"{self.name}: {name.removesuffix('s')} {count} of at most {limit}: {cause}"


class Desk:
    """Where driver and workers leave word: where they are, how far, what failed, when to stop."""

    def __init__(self) -> None:
        """Begin with nobody there."""
        self._nodes: list[str] = []
        self._signs: dict[int, Sign] = {}
        self._reached: dict[str, int] = {}
        self._failures: list[Failure] = []
        self._seats: Any = None
        self._is_stopping = False

    def arrive(self, node: str, seats: Any) -> None:
        """Note that a worker runs on a node, in a placement group that all share."""
        self._nodes.append(node)
        self._seats = seats

    def seats(self) -> Any:
        """Return the placement group of the workers, None before the first has arrived."""
        return self._seats

    def nodes(self) -> list[str]:
        """List the nodes of the workers, one entry a worker."""
        return self._nodes

    def join(self, rank: int, sign: Sign) -> None:
        """Note that a rank is about to begin."""
        self._signs[rank] = replace(sign, at=time.monotonic())

    def beat(self, rank: int, beat: Beat) -> bool:
        """Note that a rank is alive, and how far it is; tell whether the workers are to stop."""
        if rank in self._signs:
            self._signs[rank] = replace(self._signs[rank], at=time.monotonic(), beat=beat)
        if beat.step >= 0:
            self._reached[beat.loop] = max(beat.step, self._reached.get(beat.loop, -1))
        return self._is_stopping

    def leave(self, rank: int, failure: Failure | None = None) -> None:
        """Note that a rank has ended, and by what."""
        self._signs.pop(rank, None)
        if failure is not None:
            self._failures.append(failure)

    def failure(self) -> Failure | None:
        """Return a failure that another try would not cure, the first of them."""
        return next((failure for failure in self._failures if failure.is_final), None)

    def reached(self) -> dict[str, int]:
        """Return the last step of every loop."""
        return self._reached

    def standing_still(self, timeout_s: float) -> list[tuple[Sign, str]]:
        """List the ranks that stand still, each with a line that says so."""
        found = standing_still(self._signs, timeout_s, time.monotonic())
        return [(self._signs[rank], line) for rank, line in sorted(found.items())]

    def stop(self) -> None:
        """Ask the workers to stop."""
        self._is_stopping = True


@dataclass(frozen=True)
class Ending:
    """How a start of the workers ended: at the end of the job, or before, and why."""

    is_finished: bool = False
    is_saved: bool = False
    """They left when they were asked to, with their state saved."""
    cause: str = ""


def cause_of(error: Exception) -> str:
    """Say in a line what ended a start: which worker died, else what the first of them met."""
    failures = getattr(error, "worker_failures", {})
    if died := next((item for item in failures.items() if _is_death(item[1])), None):
        rank, met = died
        # the last line tells the exit status, or that the machine was out of memory
        detail = textwrap.shorten(str(met).strip().splitlines()[-1], 300, placeholder=" ...")
        return f"worker {rank} died: {detail}"
    for rank, met in failures.items():
        return f"worker {rank}: {_shorten(met)}"
    return _shorten(error)


def _is_death(error: Exception) -> bool:
    # Ray's words for a worker that does not answer any more; what it wraps differs
    return type(error).__name__.startswith("WorkerHealthCheck")


def _shorten(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")


def answers(node: Mapping[str, Any]) -> bool:
    """Tell whether a node, as Ray lists it, can be reached; the head is slow to find out."""
    address = node["NodeManagerAddress"], node["NodeManagerPort"]
    try:
        socket.create_connection(address, timeout=2).close()
    except OSError:
        return False
    return True


def short_stop(environment: Mapping[str, str]) -> str:
    """Say that `ray job stop` would kill this job before its state is saved; "" where it would not.

    Ray's default is 3 s between SIGTERM and SIGKILL.
    """
    wait = environment.get(_STOP_WAIT, "3")
    is_long = wait.isdecimal() and int(wait) >= _STOP_WAIT_S
    if is_long or "RAY_JOB_CONFIG_JSON_ENV_VAR" not in environment:
        return ""
    return (
        f"{_STOP_WAIT} ({wait}) is less than {_STOP_WAIT_S} s: `ray job stop` kills this job "
        "before a large checkpoint is written; set it to 120 in the head's environment, or in "
        "the env_vars of the job's runtime environment"
    )


@contextmanager
def heed_sigterm() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM into a question that can be asked."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        # None when it was not Python that had set the handler
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
