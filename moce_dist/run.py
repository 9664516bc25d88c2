"""Run directories: identity, provenance, completion markers, the ledger of faults.

A run is one directory that belongs to one identity (`config.identity`). Every stage writes one
artefact folder inside it and marks it with `COMPLETE` last: the inputs that it was made from and
the sha256 of its files. A stage whose marker is there and whose inputs are the same is skipped;
anything else is made again or resumed.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from moce_dist import lease
from moce_dist.config import Config, identity, to_yaml
from moce_dist.environment import local_path
from moce_dist.settings import ConfigError, read_tree, validate

COMPLETE = "COMPLETE"
WRITER = "checkpoint"
"""Name of a thread that writes a checkpoint, which a process that leaves need not wait for."""
_PACKAGES = ("torch", "deepspeed", "ray", "webdataset", "faiss-gpu", "timm", "moce-dist")


class StoppedError(RuntimeError):
    """A run was asked to stop and has saved its state; the same command goes on from there."""


def fingerprint(value: Any) -> str:
    """Sha256 of a JSON-able value; dictionaries compare by content, not by order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an error that does not: writing says nothing but "No space left".

    Raises:
        OSError: for every error of writing, also those that numpy and safetensors call otherwise.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        if error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise OSError(f"{path}: {error}") from None
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise OSError(f"{path}: {error}") from None


def link_tree(source: Path, target: Path) -> None:
    """Have a folder in two places: hard links of its files, copies where these cannot be.

    Files of a run are replaced, never changed, so both places may hold them.
    """

    def link(file: str, to: str) -> None:
        try:
            os.link(file, to)
        except OSError:
            with naming(Path(to)):
                shutil.copyfile(file, to)

    shutil.copytree(source, target, copy_function=link, ignore=shutil.ignore_patterns(".*"))


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that readers see the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with (
            naming(path),
            temporary.open("w", encoding="utf-8", errors="backslashreplace") as file,
        ):
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        lease.check()
        temporary.replace(path)
    except OSError as error:
        # the folder is what a person can do something about
        if error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, str(path.parent)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Python and the packages that a result depends on, with their installed versions."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def mark_complete(
    folder: Path,
    inputs: Mapping[str, Any],
    files: Iterable[Path],
    known: Mapping[str, str] | None = None,
) -> None:
    """Write `folder/COMPLETE`: what the artefact was made from and the sha256 of its files.

    `known` holds the sha256 of files, by relative path, that need not be read again.
    """
    names = {str(file.relative_to(folder)): file for file in sorted(files)}
    marker = {
        "inputs": dict(inputs),
        "versions": versions(),
        "files": {n: (known or {}).get(n) or file_sha256(f) for n, f in names.items()},
    }
    write_atomic(folder / COMPLETE, json.dumps(marker, indent=1, sort_keys=True))


def read_marker(folder: Path) -> dict[str, Any] | None:
    """Read the completion marker of an artefact folder; None when it is not complete."""
    try:
        marker: dict[str, Any] = json.loads((folder / COMPLETE).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return marker


def is_complete(folder: Path, inputs: Mapping[str, Any]) -> bool:
    """Tell whether an artefact was finished from the same inputs and still has all its files."""
    marker = read_marker(folder)
    if marker is None or fingerprint(marker["inputs"]) != fingerprint(dict(inputs)):
        return False
    return all((folder / name).is_file() for name in marker["files"])


def artefact_id(folder: Path) -> str:
    """Fingerprint of a complete artefact, used as an input of the next stage.

    Raises:
        ConfigError: the folder is not a complete artefact.
    """
    marker = read_marker(folder)
    if marker is None:
        raise ConfigError(f"{folder}: is not complete; run the stage that makes it first")
    return fingerprint([marker["inputs"], marker["files"]])


def record_fault(ledger: Path, **fault: Any) -> None:
    """Append one line to a `faults.jsonl`; whole lines from several processes do not mix."""
    lease.check()
    ledger.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"time": round(time.time(), 3), **fault}) + "\n"
    descriptor = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        with naming(ledger):
            os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_faults(ledger: Path) -> list[dict[str, Any]]:
    """All lines of a `faults.jsonl`, oldest first; a missing ledger is an empty one."""
    return read_jsonl(ledger)


def forget_faults(ledger: Path, stage: str, step: int) -> None:
    """Drop a stage's faults from `step` on: those steps run again, and a line is a use."""
    faults = read_faults(ledger)
    kept = [f for f in faults if f["stage"] != stage or f["step"] < step]
    if len(kept) < len(faults):
        write_atomic(ledger, "".join(json.dumps(fault) + "\n" for fault in kept))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


@dataclass(frozen=True)
class Run:
    """One run directory and the paths inside it."""

    root: Path
    out: Path | None = None
    """Where transfers write, if not into the run, which may be read-only."""

    @property
    def faults(self) -> Path:
        """Ledger of unreadable shards and samples."""
        return (self.out or self.root) / "faults.jsonl"

    @property
    def ingested(self) -> Path:
        """Shards that the run ingested itself."""
        return self.root / "ingested"

    @property
    def features(self) -> Path:
        """One feature file per shard."""
        return self.root / "features"

    @property
    def clusters(self) -> Path:
        """Centroids, mean, assignments."""
        return self.root / "clusters"

    @property
    def shards(self) -> Path:
        """Cluster-sharded tars."""
        return self.root / "shards"

    def stage(self, name: str) -> Path:
        """Folder of a training stage, `mae`, `moce` or `control`."""
        return self.root / name

    def transfer(self, task: str) -> Path:
        """Folder of a downstream task."""
        return (self.out or self.root / "transfer") / task


def resolve_run(path: str, config: Config, named: str = "--run") -> Path:
    """Absolute path of a run directory; a relative one lies in `run.root`.

    `named` is what an error calls it.

    Raises:
        ConfigError: inside a submitted job both are relative: the run would be in a temporary copy.
    """
    run = Path(path)
    if not run.is_absolute() and run.parts[:1] != Path(config.run.root).parts[:1]:
        run = Path(config.run.root) / run
    return local_path(run, named, " or run.root").resolve()


def open_run(root: Path, config: Config, *, fresh: bool = False) -> Run:
    """Create a run directory, or take up an existing one of the same identity; `lease.hold` it.

    Raises:
        ConfigError: the directory belongs to another identity or to another version's settings, or
            holds files but no run.
    """
    resolved = root / "config.yaml"
    if fresh and resolved.exists():
        set_aside(root)
    if resolved.exists():
        differing = differing_fields(config, read_resolved(resolved))
        if differing:
            raise ConfigError(
                f"{root}: belongs to another run: {'; '.join(differing)}; "
                "choose another --run, or --fresh"
            )
    elif root.exists() and any(path.name not in lease.FILES for path in root.iterdir()):
        raise ConfigError(f"{root}: is not a run directory (no config.yaml) and not empty")
    write_atomic(resolved, to_yaml(config))
    origin = {k: v for k, v in read_provenance(root).items() if k == "forked_from"}
    provenance = {
        **origin,
        "versions": versions(),
        "command": sys.argv,
        "time": time.strftime("%FT%TZ", time.gmtime()),
    }
    write_atomic(root / "provenance.json", json.dumps(provenance, indent=1))
    return Run(root)


def read_provenance(root: Path) -> dict[str, Any]:
    """Read what a run directory says of its making; {} where there is nothing to read."""
    try:
        found: dict[str, Any] = json.loads((root / "provenance.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return found


def differing_fields(config: Config, other: Config) -> list[str]:
    """Identity fields in which two configurations differ, as `path: other -> config`."""
    mine, theirs = identity(config), identity(other)
    return [f"{k}: {theirs.get(k)!r} -> {mine[k]!r}" for k in mine if mine[k] != theirs.get(k)]


def load_run(root: Path, named: str = "--run") -> tuple[Run, Config]:
    """Read an existing run directory and the configuration that it was made with.

    `named` is what an error calls it.

    Raises:
        ConfigError: there is no run, or one with settings that this version does not know.
    """
    resolved = root / "config.yaml"
    if not resolved.is_file():
        raise ConfigError(f"{named} {root}: is not a run directory (no config.yaml)")
    return Run(root), read_resolved(resolved)


def read_resolved(path: Path, overrides: Iterable[str] = (), over: str | None = None) -> Config:
    """Read the configuration that a run was made with, and lay a file and overrides over it.

    Raises:
        ConfigError: an override is wrong, or this version does not know a setting of the run.
    """
    tree = read_tree(path, overrides, over)
    tree.pop("bench", None)  # runs of version 0.1 list the settings of benchmarks too
    try:
        return validate(Config, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: does not fit this version of moce_dist: {error}") from None


def set_aside(root: Path) -> None:
    """Rename a folder: a fresh start must not destroy days of training on a typing error.

    One that is held stays, and all that lies in it is moved.
    """
    stamp = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{time.time_ns() % 10**9:09d}"
    aside = root.with_name(f"{root.name}.before-{stamp}")
    if not (root / lease.LOCK).exists():
        root.rename(aside)
        return
    aside.mkdir()
    for path in root.iterdir():
        if path.name not in lease.FILES:
            path.rename(aside / path.name)
