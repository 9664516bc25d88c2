"""The folder of a training stage: how it begins, and when it counts as finished.

A stage is finished when it is `COMPLETE` and its newest undamaged checkpoint is the one that the
marker lists. Its inputs are recorded before the first step, so that checkpoints made from other
inputs are never resumed.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moce_dist.run.artefacts import (
    artefact_id,
    begin,
    is_begun,
    is_complete,
    mark_complete,
    read_marker,
)
from moce_dist.run.directory import set_aside
from moce_dist.run.environment import is_first_process
from moce_dist.run.files import link_tree
from moce_dist.settings import ConfigError
from moce_dist.train.checkpoint import latest_checkpoint, read_manifest

log = logging.getLogger(__name__)


def trained_id(folder: Path) -> str:
    """Fingerprint of a finished training stage.

    Raises:
        ConfigError: it is not finished, or its last checkpoint is damaged.
    """
    identity = artefact_id(folder)
    if not has_last_checkpoint(folder):
        raise ConfigError(f"{folder}: the last checkpoint is damaged; run --stage {folder.name}")
    return identity


def has_last_checkpoint(folder: Path) -> bool:
    """Tell whether the newest undamaged checkpoint of a complete stage is its last one."""
    marker = read_marker(folder)
    assert marker is not None
    last = {Path(name).parent for name in marker["files"] if name.endswith(".safetensors")}
    return {latest_checkpoint(folder / "checkpoints")} == {folder / path for path in last}


def begin_stage(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Prepare the folder of a stage made from `inputs`; set it aside if it has other inputs."""
    if not is_first_process():
        return
    if folder.exists() and not is_begun(folder, inputs):
        # its checkpoints must not be resumed
        log.warning("%s: was made from other inputs; it is set aside", folder)
        set_aside(folder)
    begin(folder, inputs)


def link_stage(source: Path, folder: Path) -> None:
    """Make a stage from the last checkpoint of another run's finished stage, without training.

    Raises:
        ConfigError: that stage is not finished, or its last checkpoint is damaged.
    """
    inputs = {"base": trained_id(source)}
    if is_complete(folder, inputs) and has_last_checkpoint(folder):
        log.info("%s: complete", folder.name)
        return
    begin_stage(folder, inputs)
    if not is_first_process():
        return
    checkpoint = latest_checkpoint(source / "checkpoints")
    assert checkpoint is not None
    log.info("%s: taken from %s", folder.name, checkpoint)
    linked = folder / "checkpoints" / checkpoint.name
    link_tree(checkpoint, linked)
    mark_complete(folder, inputs, linked.iterdir(), known=known_digests(folder, linked))


def known_digests(folder: Path, checkpoint: Path) -> dict[str, str]:
    """Return the sha256 of a checkpoint's files by path in `folder`, as its manifest has them.

    The checkpoint was verified just now, so its files need not be read again.
    """
    files = read_manifest(checkpoint)["files"]
    return {str((checkpoint / name).relative_to(folder)): sha for name, sha in files.items()}
