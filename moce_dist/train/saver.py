"""Save while training continues: copy to the host, then write, hash and publish in the background.

    main thread     save: copy | step  step  poll: all wrote | step  step  poll: published
    background             write rank-R.safetensors, fsync, sha256 | rank 0: manifest, rename, prune

Training waits only for the copy. Later steps do not change the copy, and the copy is what is
written. The host buffers (page-locked on CUDA) are kept for the next save. A save waits for the one
before it, so at most one is in flight.

Every tensor is written once. Among the ranks that hold it (all ranks for a shared tensor, the
replicas for a stack of experts), the one with the least to write so far writes it. All ranks know
all sizes, so they choose the same writer without communication. At ZeRO-1 and 2 reading a tensor is
collective over the replicas, and each rank keeps only what it will write.

How the ranks agree: a background thread runs no collective, because it could interleave with the
training's collectives in different orders and hang. It looks at no other rank's files, which may
appear late on a shared file system. Instead every step sums with its losses how many ranks still
write (`look`), and hands the sum to `poll` when it is read, one step late (outcome.py). At zero the
ranks exchange digests and errors, from host to host. So a save in flight adds no wait for the
device. All ranks read the same sums, so all run the same collectives. A failure on one rank is an
error on all.

A kill at any moment leaves the newest published checkpoint: data is on disk before the manifest
names it, and one rename publishes both. A half-written save lies in a hidden folder whose name is
unique to this process group. The next start removes it, and a lost process that still writes into
its own folder cannot damage another save.

State that is not finite is not published: the background thread checks what it writes.

The newest `keep` checkpoints stay, to resume from, and the oldest one of the stage, which the
report shows as the early model. All others are removed.

Memory on the host: 12 bytes per parameter, divided among the ranks.
"""

import contextlib
import json
import logging
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from moce_dist.model.moce import is_expert, is_stacked
from moce_dist.parallel.groups import Topology
from moce_dist.run.artefacts import file_sha256, fingerprint
from moce_dist.run.files import WRITER, naming, write_atomic
from moce_dist.train.checkpoint import (
    FORMAT,
    MANIFEST,
    Naming,
    check_finite,
    complete_checkpoints,
    step_folder,
)

if TYPE_CHECKING:
    from moce_dist.parallel.engine import Engine

_LOWEST_PRIORITY = 19
log = logging.getLogger(__name__)


class Background(threading.Thread):
    """One call on a thread of the lowest priority; ends with `result` or `error`."""

    def __init__(self, action: Callable[[], Any]) -> None:
        # no daemon: one that is inside a library when the interpreter exits aborts the process
        super().__init__(name=WRITER)
        self._action = action
        self.result: Any = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        """Call `action` and keep what it returns or raises; `start` has been called."""
        # applies to one thread on Linux, but to the whole process elsewhere
        if sys.platform == "linux":
            with contextlib.suppress(PermissionError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        try:
            self.result = self._action()
        except FloatingPointError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001 - whatever it is, all ranks must hear of it
            self.error = OSError(f"{error}")
            # tells storage that may recover from a full disk
            self.error.errno = getattr(error, "errno", None)


@dataclass
class _Save:
    """A save in flight: in its first turn all ranks write, in its second rank 0 publishes."""

    target: Path
    temporary: Path
    position: dict[str, Any]
    task: Background
    is_written: bool = False
    begun: float = field(default_factory=time.monotonic)


class Saver:
    """Writes a stage's checkpoints; its public methods are collective over all ranks.

    A save in flight is lost when training ends with an error, unless `wait` is called before.
    """

    def __init__(self, folder: Path, topology: Topology, *, keep: int) -> None:
        """Write into `folder`, where the newest `keep` checkpoints stay, and the oldest.

        Half-written ones are removed.
        """
        self._folder, self._topology, self._keep = folder, topology, keep
        self._rank = dist.get_rank()
        self._host: dict[tuple[str, str], Tensor] = {}
        self._save: _Save | None = None
        if self._rank == 0:
            for leftover in folder.glob(".step_*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
        token = [uuid.uuid4().hex[:8]]
        dist.broadcast_object_list(token, 0)
        self._token = token[0]
        self._turn = 0
        self._hosts: dist.ProcessGroup | None = None
        self.seconds: float | None = None
        """Seconds from the start of the last save to its publication; None before the first."""

    def save(self, engine: "Engine", naming: Naming, position: dict[str, Any]) -> None:
        """Copy the training state at `position["step"]` and begin to write it.

        Raises:
            FloatingPointError, OSError: the previous save failed; see `poll`.
        """
        if self._save is not None:
            log.info("%s: is still being written; training waits", self._save.target)
            self.wait()
        self._hosts, begun = engine.host_group(), time.monotonic()
        target = step_folder(self._folder, position["step"])
        temporary = target.with_name(f".{target.name}.{self._token}.tmp")
        tensors = self._copy(engine, naming)
        path = temporary / f"rank-{self._rank:05d}.safetensors"
        task = Background(partial(write_tensors, path, tensors))
        self._save = _Save(target, temporary, position, task, begun=begun)
        self._turn += 1

    def look(self) -> tuple[int, bool]:
        """Return the number of the newest turn, equal on all ranks, and whether this rank is at it.

        It is neither collective nor does it wait.
        """
        return self._turn, self._save is not None and self._save.task.is_alive()

    def poll(self, turn: int, writing: float) -> None:
        """Advance the save in flight if `writing`, the ranks that were at `turn`, is 0.

        Both are of an earlier `look`, made on all ranks at the same step; `writing` is the sum over
        the ranks. If another turn has begun since, they say nothing about it.

        Raises:
            FloatingPointError: on all ranks, when the state of one is not finite.
            OSError: on all ranks, when one could not write. The half-written files are removed.
        """
        if self._save is not None and turn == self._turn and writing == 0:
            self._go_on(self._save)

    def wait(self) -> None:
        """Wait until no save is in flight.

        Raises:
            FloatingPointError, OSError: see `poll`.
        """
        while self._save is not None:
            self._save.task.join()
            self._go_on(self._save)

    def _go_on(self, save: _Save) -> None:
        results: list[Any] = [None] * self._topology.num_ranks
        mine = save.task.result, save.task.error, getattr(save.task.error, "errno", None)
        dist.all_gather_object(results, mine, group=self._hosts)
        # an error is sent without its errno
        for _, failed, errno in results:
            if failed is None:
                continue
            self._save = None
            if self._rank == 0:
                shutil.rmtree(save.temporary, ignore_errors=True)
            error = type(failed)(f"{self._folder}: checkpoint not written: {failed}")
            if isinstance(error, OSError):
                error.errno = errno
            raise error
        if save.is_written:
            self._save = None
            self.seconds = round(time.monotonic() - save.begun, 3)
            return
        files = {name: digest for part, *_ in results for name, digest in part.items()}
        manifest = {"format": FORMAT, **save.position, "files": files}
        seal = partial(publish, save.temporary, save.target, manifest, keep=self._keep)
        save.task = Background(seal if self._rank == 0 else lambda: None)
        save.is_written, self._turn = True, self._turn + 1

    def _copy(self, engine: "Engine", naming: Naming) -> dict[str, Tensor]:
        shares = Shares(self._topology, self._rank)
        tensors = {}
        buffers = ((name, "weight", buffer) for name, buffer in engine.module.named_buffers())
        for name, kind, tensor in chain(buffers, engine.state()):
            if not shares.is_mine(name, tensor):
                continue
            host = self._host.get((name, kind))
            if host is None or host.shape != tensor.shape:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._host[name, kind] = host
            host.copy_(tensor, non_blocking=True)
            slices = host if is_stacked(name) else [host]
            for key, part in zip(naming.global_names(name), slices, strict=True):
                tensors[f"{kind}/{key}"] = part
        if engine.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return tensors


class Shares:
    """Chooses the writer of every tensor from sizes alone, equally on every rank."""

    def __init__(self, topology: Topology, rank: int) -> None:
        self._rank = rank
        self._bytes = [0] * topology.num_ranks
        everyone = list(range(topology.num_ranks))
        self._places = [topology.replica_ranks(r) for r in everyone[:: topology.num_replicas]]
        self._all = [everyone]

    def is_mine(self, name: str, tensor: Tensor) -> bool:
        """Choose a tensor's writer, for experts one per place; tell whether it is this rank.

        Must be called with the same tensors in the same order on all ranks.
        """
        writers = [
            min(ranks, key=self._bytes.__getitem__)
            for ranks in (self._places if is_expert(name) else self._all)
        ]
        for writer in writers:
            self._bytes[writer] += tensor.nbytes
        return self._rank in writers


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write tensors to a file and sync it; return the sha256 of the file by its name.

    Raises:
        FloatingPointError: a tensor is not finite.
    """
    if not tensors:
        return {}
    check_finite(tensors.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        save_file(tensors, path)
    with path.open("rb") as file:
        # on disk, and on a shared file system visible to other hosts, before a manifest names it
        os.fsync(file.fileno())
    return {path.name: file_sha256(path)}


def publish(temporary: Path, target: Path, manifest: dict[str, Any], *, keep: int) -> None:
    """Seal a checkpoint's folder and give it its name.

    Up to this one, the newest `keep` checkpoints and the oldest stay; all later ones are removed.

    Raises:
        FileNotFoundError: a later start has removed the folder meanwhile.
    """
    for name in manifest.get("files", ()):
        (temporary / name).stat()
    seal = {"sha256": fingerprint(manifest)}
    write_atomic(temporary / MANIFEST, json.dumps(manifest | seal))
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    # a later checkpoint can only be a damaged one that was passed over
    found = complete_checkpoints(target.parent)
    later = [path for path in found if path.name > target.name]
    for old in (*later, *found[len(later) + keep : -1]):
        shutil.rmtree(old, ignore_errors=True)
