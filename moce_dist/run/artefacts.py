"""Artefacts: folders that the stages of a run make, complete when they hold `COMPLETE`.

This marker is written last. It lists the inputs of the artefact and the sha256 of its files. A
stage whose marker exists with the same inputs is skipped; any other is run again or resumed. A
folder that is filled in steps notes its inputs in `inputs.json` first, so that what was made from
other inputs is never continued.
"""

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from moce_dist.run.files import write_atomic
from moce_dist.settings import ConfigError

COMPLETE, INPUTS = "COMPLETE", "inputs.json"
# faiss-cpu takes the place of faiss-gpu where that has no builds
_PACKAGES = (
    "torch", "deepspeed", "ray", "webdataset", "faiss-gpu", "faiss-cpu", "timm", "moce-dist",
)  # fmt: skip


def fingerprint(value: Any) -> str:
    """Sha256 of a JSON-able value; dictionaries compare by content, not by order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Python and the installed packages that a result depends on, with their versions."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def is_begun(folder: Path, inputs: Mapping[str, Any]) -> bool:
    """Tell whether an artefact was begun from the same inputs, by `begin`."""
    note = folder / INPUTS
    return note.is_file() and note.read_text() == _text_of(inputs)


def begin(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Note the inputs of an artefact that is to be made or continued; it is no longer complete."""
    (folder / COMPLETE).unlink(missing_ok=True)
    write_atomic(folder / INPUTS, _text_of(inputs))


def _text_of(inputs: Mapping[str, Any]) -> str:
    return json.dumps(dict(inputs), sort_keys=True)


def mark_complete(
    folder: Path,
    inputs: Mapping[str, Any],
    files: Iterable[Path],
    known: Mapping[str, str] | None = None,
    **notes: Any,
) -> None:
    """Write `folder/COMPLETE`: what the artefact was made from and the sha256 of its files.

    `known` holds the sha256 of files, by relative path, that need not be read again; `notes` are
    further entries.
    """
    names = {str(file.relative_to(folder)): file for file in sorted(files)}
    marker = {
        "inputs": dict(inputs),
        "versions": versions(),
        "files": {n: (known or {}).get(n) or file_sha256(f) for n, f in names.items()},
        **notes,
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
