"""Checkpoints that do not know how many ranks wrote them.

Tensors are keyed by kind and global name (`weight/blocks.3.mlp.experts.5.fc1.weight`), experts by
their id, so any legal number of ranks can load what any other wrote:

    step_00000500/shared.safetensors           everything but experts, written by rank 0
                  experts-00000.safetensors    the experts of place 0, written by its first rank
                  manifest.json                position, routing, placement, files' sha256; last

The folder is written under a temporary name and renamed when it is whole. Loading verifies the
sha256 of every file; a damaged checkpoint is reported and the newest undamaged one is used.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moce_dist.model.moce import global_names, is_expert, is_stacked
from moce_dist.parallel.groups import ExpertMap
from moce_dist.run import file_sha256, write_atomic

if TYPE_CHECKING:  # who only reads checkpoints need not wait for deepspeed
    from moce_dist.parallel.engine import Engine

_FORMAT = "moce_dist.checkpoint.v1"
_MANIFEST = "manifest.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Naming:
    """How this rank's parameters are called everywhere."""

    layers: Sequence[int]
    experts: ExpertMap | None
    place: int

    def global_names(self, name: str) -> list[str]:
        """Global names of a parameter's experts; of a shared one just its own."""
        if not is_expert(name):
            return [name]
        assert self.experts is not None
        return global_names(name, self.layers, self.experts.residents(self.place))


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return folder / f"step_{step:08d}"


def save_checkpoint(
    folder: Path, engine: "Engine", naming: Naming, position: dict[str, Any], *, keep: int
) -> Path:
    """Save training state at `position["step"]`; collective over all ranks.

    Raises:
        OSError: a rank could not write; the same error on all ranks, nothing half-written stays.
    """
    target = step_folder(folder, position["step"])
    temporary = target.with_name(f".{target.name}.tmp")
    rank, topology = dist.get_rank(), engine.spec.topology
    _together(lambda: _renew(temporary) if rank == 0 else None, temporary)
    shared, experts = _own_tensors(engine, naming)
    files = {"shared.safetensors": shared} if rank == 0 else {}
    if experts and topology.replica_ranks(rank)[0] == rank:
        files[f"experts-{naming.place:05d}.safetensors"] = experts
    digests = _together(lambda: _write_files(temporary, files), temporary)
    manifest = {"format": _FORMAT, **position}
    manifest["files"] = {name: digest for part in digests for name, digest in part.items()}
    _together(lambda: _publish(temporary, target, manifest) if rank == 0 else None, temporary)
    if rank == 0:
        _prune(folder, keep)
    return target


def _together(action: Callable[[], Any], temporary: Path) -> list[Any]:
    # what one rank cannot do no rank goes on from; this is a barrier too
    result: tuple[Any, str | None]
    try:
        result = action(), None
    except Exception as error:  # noqa: BLE001 - safetensors has its own for a full disk
        result = None, f"{error}"
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, result)
    # one rank's full disk is everybody's failure: else the others would wait at the barrier
    if failed := next((error for _, error in gathered if error is not None), None):
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{temporary.parent}: checkpoint not written: {failed}")
    return [value for value, _ in gathered]


def _renew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(temporary: Path, target: Path, manifest: dict[str, Any]) -> None:
    write_atomic(temporary / _MANIFEST, json.dumps(manifest))
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def _own_tensors(engine: "Engine", naming: Naming) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    shared = {f"weight/{name}": buffer.cpu() for name, buffer in engine.module.named_buffers()}
    experts: dict[str, Tensor] = {}
    for name, kind, tensor in engine.state():
        slices = zip(
            naming.global_names(name), tensor if is_stacked(name) else [tensor], strict=True
        )
        target = experts if is_expert(name) else shared
        target |= {f"{kind}/{g}": s.cpu().contiguous() for g, s in slices}
    return shared, experts


def _write_files(folder: Path, files: dict[str, dict[str, Tensor]]) -> dict[str, str]:
    digests = {}
    for name, tensors in files.items():
        # cloned: slices of one stacked parameter share its storage
        save_file({n: t.clone() for n, t in tensors.items()}, folder / name)
        digests[name] = file_sha256(folder / name)
    return digests


def _prune(folder: Path, keep: int) -> None:
    for old in _complete(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def _complete(folder: Path) -> list[Path]:
    # newest first; a folder without a manifest was never published
    return sorted((m.parent for m in folder.glob(f"step_*/{_MANIFEST}")), reverse=True)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read position, routing, placement and file digests of a checkpoint."""
    manifest: dict[str, Any] = json.loads((checkpoint / _MANIFEST).read_text())
    return manifest


def damage(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint's files; None when every sha256 is right."""
    try:
        manifest = read_manifest(checkpoint)
        if manifest.get("format") != _FORMAT:
            return f"format is {manifest.get('format')!r}, must be {_FORMAT!r}"
        for name, digest in manifest["files"].items():
            if file_sha256(checkpoint / name) != digest:
                return f"{name} is damaged (sha256 differs)"
    except (OSError, KeyError, json.JSONDecodeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def latest_checkpoint(folder: Path) -> Path | None:
    """Find the newest undamaged checkpoint; damaged ones are reported and passed over."""
    for checkpoint in _complete(folder):
        reason = damage(checkpoint)
        if reason is None:
            return checkpoint
        log.warning("%s: %s; passed over", checkpoint, reason)
    return None


def _tensors(checkpoint: Path) -> Iterator[tuple[str, Path]]:
    for name in read_manifest(checkpoint)["files"]:
        with safe_open(checkpoint / name, "pt") as file:
            yield from ((key, checkpoint / name) for key in file.keys())  # noqa: SIM118


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Read all weights by global name, float32 on the CPU."""
    weights = {}
    for key, path in _tensors(checkpoint):
        kind, _, name = key.partition("/")
        if kind == "weight":
            with safe_open(path, "pt") as file:
                weights[name] = file.get_tensor(key)
    return weights


def load_checkpoint(checkpoint: Path, engine: "Engine", naming: Naming) -> dict[str, Any]:
    """Load this rank's part of a checkpoint and return its manifest.

    Weights and moments are bit-equal to what was saved, whatever the number of ranks then and now.
    """
    manifest = read_manifest(checkpoint)
    where = dict(_tensors(checkpoint))

    def read(key: str) -> Tensor | None:
        if key not in where:
            return None
        with safe_open(where[key], "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def lookup(name: str, kind: str) -> Tensor | None:
        parts = [read(f"{kind}/{g}") for g in naming.global_names(name)]
        if any(part is None for part in parts):
            return None
        found = [part for part in parts if part is not None]
        return torch.stack(found) if is_stacked(name) else found[0]

    for name, buffer in engine.module.named_buffers():
        if (saved := read(f"weight/{name}")) is not None:
            buffer.copy_(saved)
    engine.load_state(lookup, step=manifest["step"])
    return manifest
