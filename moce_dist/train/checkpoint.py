"""Checkpoints that do not depend on the number of ranks that wrote them.

Tensors are keyed by kind and global name (`weight/blocks.3.mlp.experts.5.fc1.weight`), experts by
their id, so any legal number of ranks can load what any other wrote:

    step_00000500/rank-00000.safetensors    what rank 0 wrote: a share of all tensors, by bytes
                  rank-00001.safetensors    no tensor is in two files (saver.py)
                  manifest.json             position, routing, placement, sha256 of all and itself

The sha256 of every file is verified; a damaged checkpoint is reported and the newest undamaged one
is used.

There are no separate master weights to save: weights are float32 at every precision and ZeRO stage,
and bf16 is only the type of matrix products. There are no random generators to save either: draws
of an image are keyed by (seed, epoch, sample key) and the gate's noise by (seed, step), so the step
is the complete random state. The position of the stream, one cursor per cluster, follows from the
step too; it is stored only to be compared when a stage resumes.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moce_dist.model.moce import global_names, is_expert, is_stacked
from moce_dist.parallel.groups import ExpertMap
from moce_dist.run.artefacts import file_sha256, fingerprint
from moce_dist.run.files import write_atomic
from moce_dist.settings import ConfigError

if TYPE_CHECKING:  # reading a checkpoint must not import deepspeed
    from moce_dist.parallel.engine import Engine

_FORMATS = "moce_dist.checkpoint."
FORMAT = f"{_FORMATS}v2"
MANIFEST = "manifest.json"
_HASH_THREADS = 8
_SETTLED_S = 2.0
"""Age of a file's last change, in seconds, from which a further change surely has another time."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Naming:
    """Maps names of this rank's parameters to global names."""

    layers: Sequence[int]
    experts: ExpertMap
    place: int

    def global_names(self, name: str) -> list[str]:
        """Return the global names of a parameter's experts; for a shared one, its own name."""
        if not is_expert(name):
            return [name]
        return global_names(name, self.layers, self.experts.residents(self.place))


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return folder / f"step_{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """List the published checkpoints of a folder, damaged ones too, newest first."""
    return sorted((m.parent for m in folder.glob(f"step_*/{MANIFEST}")), reverse=True)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read position, routing, placement and file digests of a checkpoint."""
    manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())
    return manifest


def trained_steps(manifest: Mapping[str, Any], before: int = 0) -> int:
    """Count the optimiser steps behind a checkpoint's weights, including earlier stages.

    `before` is the number in earlier stages, used if the manifest does not record it.
    """
    return int(manifest["step"]) + int(manifest.get("steps_before", before))


def damage(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint's files; None when every sha256 is right.

    A process hashes a file once, and again if its size, times or inode changed since.
    """
    try:
        manifest = read_manifest(checkpoint)
        seal = manifest.pop("sha256", None)
        if manifest.get("format") != FORMAT:
            return f"format is {manifest.get('format')!r}, must be {FORMAT!r}"
        if fingerprint(manifest) != seal:
            return f"{MANIFEST} is damaged (sha256 differs)"
        names = list(manifest["files"])
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            # hashing and reading release the lock of the interpreter
            digests = list(pool.map(lambda name: _sha256(checkpoint / name), names))
        for name, digest in zip(names, digests, strict=True):
            if digest != manifest["files"][name]:
                return f"{name} is damaged (sha256 differs)"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _sha256(path: Path) -> str:
    state = path.stat()
    if time.time() - max(state.st_mtime, state.st_ctime) < _SETTLED_S:
        return file_sha256(path)
    times = state.st_mtime_ns, state.st_ctime_ns
    return _sha256_of(path.absolute(), state.st_ino, state.st_size, *times)


@lru_cache(maxsize=4096)
def _sha256_of(path: Path, *_: int) -> str:
    return file_sha256(path)


def _format(checkpoint: Path) -> str:
    """Return the format that a manifest names; "" if it is damaged."""
    try:
        return str(read_manifest(checkpoint).get("format"))
    except (OSError, ValueError, AttributeError):
        return ""


def latest_checkpoint(folder: Path) -> Path | None:
    """Find the newest undamaged checkpoint; damaged ones are reported and passed over.

    Raises:
        ConfigError: a checkpoint is of another version's format, so a stage would begin anew.
    """
    for checkpoint in complete_checkpoints(folder):
        if (found := _format(checkpoint)) != FORMAT and found.startswith(_FORMATS):
            raise ConfigError(
                f"{checkpoint}: has the format {found} of another version of moce_dist, this one "
                f"reads {FORMAT}: finish the run with the version of its earlier starts "
                "(provenance.json), or begin anew (--fresh)"
            )
        reason = damage(checkpoint)
        if reason is None:
            return checkpoint
        log.warning("%s: %s; passed over", checkpoint, reason)
    return None


def write_weights(checkpoint: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights by global name as a checkpoint that a stage can start from, without moments."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    path = checkpoint / "rank-00000.safetensors"
    save_file({f"weight/{name}": t.contiguous() for name, t in weights.items()}, path)
    manifest = {"format": FORMAT, "step": 0, "files": {path.name: file_sha256(path)}}
    # the manifest is written last: without it there is no checkpoint
    write_atomic(checkpoint / MANIFEST, json.dumps({**manifest, "sha256": fingerprint(manifest)}))


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse state that is not finite.

    The sum of a tensor's magnitudes must be finite in float32. A second moment that began as the
    square of a finite norm passes; weights of about 1e37 fail, though each of them is finite.

    Raises:
        FloatingPointError: naming the first tensor that fails.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(torch.linalg.vector_norm(tensor, 1)):
            raise FloatingPointError(f"{name} is not finite")


def _files(checkpoint: Path) -> dict[str, Any]:
    # KIND/NAME of every tensor and the open file that holds it; to open one is to parse all names
    names = read_manifest(checkpoint)["files"]
    opened: list[Any] = [safe_open(checkpoint / name, "pt") for name in names]
    return {key: file for file in opened for key in file.keys()}  # noqa: SIM118


def stored(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (KIND/NAME, tensor) for every tensor of a checkpoint."""
    return ((key, file.get_tensor(key)) for key, file in _files(checkpoint).items())


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Read all weights by global name, float32 on the CPU."""
    weights = ((key, file) for key, file in _files(checkpoint).items() if key.startswith("weight/"))
    return {key.removeprefix("weight/"): file.get_tensor(key) for key, file in weights}


def tensor_reader(checkpoint: Path) -> Callable[[str], Tensor | None]:
    """Return a function that reads one tensor by kind and global name; None where there is none.

    Tensors are views of the file, so they must not be changed in place.
    """
    files = _files(checkpoint)
    return lambda key: files[key].get_tensor(key) if key in files else None


def part_reader(
    read: Callable[[str], Tensor | None], naming: Naming
) -> Callable[[str, str], Tensor | None]:
    """Return a function that reads this rank's part of a parameter's tensor by name and kind.

    `read` returns a tensor by kind and global name, as `tensor_reader` does.
    """

    def lookup(name: str, kind: str) -> Tensor | None:
        parts = [read(f"{kind}/{g}") for g in naming.global_names(name)]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return None
        return torch.stack(found) if is_stacked(name) else found[0]

    return lookup


def load_checkpoint(checkpoint: Path, engine: "Engine", naming: Naming) -> dict[str, Any]:
    """Load this rank's part of a checkpoint and return its manifest.

    Weights and moments are bit-equal to what was saved, for any numbers of ranks then and now.
    """
    manifest, read = read_manifest(checkpoint), tensor_reader(checkpoint)
    for name, buffer in engine.module.named_buffers():
        if (saved := read(f"weight/{name}")) is not None:
            buffer.copy_(saved)
    engine.load_state(part_reader(read, naming), step=manifest["step"])
    return manifest


def start_from(checkpoint: Path, engine: "Engine", naming: Naming) -> None:
    """Load this rank's part of another run's weights; moments and position are not taken.

    Raises:
        ConfigError: the checkpoint lacks a weight of the model.
    """
    read = part_reader(tensor_reader(checkpoint), naming)

    def lookup(name: str, kind: str) -> Tensor | None:
        if kind != "weight":
            return None
        weight = read(name, kind)
        if weight is None:
            raise ConfigError(f"{checkpoint}: has no weight {naming.global_names(name)[0]}")
        return weight

    engine.load_state(lookup, step=0)
