"""Run directories: paths, identity, provenance.

A run is one directory that belongs to one identity (`config.identity`); every stage writes one
artefact folder inside it (`artefacts.py`).

With `base_run` a run continues from a finished one, on other images, and reuses what that one
learnt:

    BASE/mae       its last checkpoint is linked to RUN/mae: the encoder of all features
    BASE/clusters  the images of data.source are assigned to them: RUN/clusters
    BASE/moce      the experts and the gate that stage moce starts from
    BASE/control   the weights that stage control starts from; without it, those of the MAE

Optimiser, learning rate, routing and the gate's noise start as in any stage. Weights and clusters
are valid only under the settings that they were made with, so those must be the same.
"""

import json
import sys
import time
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from moce_dist.config import Config, Role, identity, read_resolved, roles, to_yaml
from moce_dist.run import lease
from moce_dist.run.artefacts import read_marker, versions
from moce_dist.run.environment import is_first_process, local_path
from moce_dist.run.files import write_atomic
from moce_dist.settings import ConfigError

StageName = Literal["mae", "moce", "control"]
"""Stage control is stage moce without experts: the same images, batches, steps and schedule."""
STAGES: tuple[StageName, ...] = get_args(StageName)

_MAX_RESTARTS = 100
"""Starts of a run that provenance.json lists besides the first."""


class StoppedError(RuntimeError):
    """A run was asked to stop and has saved its state; the same command continues from there."""


@dataclass(frozen=True)
class Run:
    """One run directory and the paths inside it."""

    root: Path
    out: Path | None = None
    """Where transfers write instead of the run, which may be read-only."""

    @property
    def output(self) -> Path:
        """Folder that transfers write to, besides those of tasks."""
        return self.out or self.root

    @property
    def faults(self) -> Path:
        """Ledger of unreadable shards and samples."""
        return self.output / "faults.jsonl"

    @property
    def ingested(self) -> Path:
        """Shards that the run ingested itself."""
        return self.root / "ingested"

    def data(self, config: Config) -> Path:
        """Folder of the index of the run's images."""
        return config.index or self.ingested

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

    @property
    def holdout_clusters(self) -> Path:
        """Table of the clusters of the held-out images."""
        return self.shards / "holdout.parquet"

    def stage(self, name: str) -> Path:
        """Folder of a training stage; see `StageName`."""
        return self.root / name

    @property
    def has_control(self) -> bool:
        """Whether stage control is finished."""
        return read_marker(self.stage("control")) is not None

    def transfer(self, task: str) -> Path:
        """Folder of a downstream task."""
        return (self.out or self.root / "transfer") / task


def resolve_run(path: str, config: Config, named: str = "--run") -> Path:
    """Return the absolute path of a run directory; a relative one lies in `run.root`.

    `named` is what an error calls it.

    Raises:
        ConfigError: in a submitted job, if `path` and `run.root` are relative: the run would lie
            in a temporary copy.
    """
    run = Path(path)
    if not run.is_absolute() and run.parts[:1] != Path(config.run.root).parts[:1]:
        run = Path(config.run.root) / run
    return local_path(run, named, " or run.root").resolve()


def find_run(path: str, config: Config, named: str = "--run") -> Path:
    """Return the absolute path of a run: one that is here, as after shell completion, comes first.

    Any other path is that of `resolve_run`.
    """
    is_here = (Path(path) / "config.yaml").is_file()
    return Path(path).resolve() if is_here else resolve_run(path, config, named)


def open_run(root: Path, config: Config, *, fresh: bool = False) -> Run:
    """Create a run directory, or reopen one of the same identity; `lease.hold` it before.

    Under torchrun only the first process checks and writes; others could find half-made files.

    Raises:
        ConfigError: the directory belongs to another identity or to another version's settings, or
            holds files but no run.
    """
    if not is_first_process():
        return Run(root)
    if fresh and (root / "config.yaml").exists():
        set_aside(root)
    check_identity(root, config)
    write_atomic(root / "config.yaml", to_yaml(config))
    known = read_provenance(root)
    start = {
        "versions": versions(),
        "command": sys.argv,
        "time": time.strftime("%FT%TZ", time.gmtime()),
    }
    starts = starts_of(known)
    if not starts or any(starts[-1].get(name) != start[name] for name in ("versions", "command")):
        starts = [*starts, start]
    # the first start, which made the run, stays
    kept = starts[:1] + starts[1:][-_MAX_RESTARTS:]
    write_atomic(root / "provenance.json", json.dumps({**known, **start, "starts": kept}, indent=1))
    return Run(root)


def check_identity(root: Path, config: Config) -> None:
    """Refuse a folder that a run of this configuration cannot be in; writes nothing.

    Raises:
        ConfigError: the directory belongs to another identity or to another version's settings, or
            holds files but no run.
    """
    resolved = root / "config.yaml"
    if resolved.exists():
        differing = differing_fields(config, read_resolved(resolved))
        if differing:
            raise ConfigError(
                f"{root}: belongs to another run: {'; '.join(differing)}; "
                "choose another --run, or --fresh"
            )
    elif root.exists() and any(not lease.is_own(path) for path in root.iterdir()):
        raise ConfigError(f"{root}: is not a run directory (no config.yaml) and not empty")


def read_provenance(root: Path) -> dict[str, Any]:
    """Read a run's provenance.json; {} if it is missing or damaged."""
    try:
        found: dict[str, Any] = json.loads((root / "provenance.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return found


def starts_of(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """List the starts of a run, the oldest first: versions, command and time of each.

    Of consecutive starts with equal versions and command, it has the first.
    """
    only = {k: provenance[k] for k in ("versions", "command", "time") if k in provenance}
    starts: list[dict[str, Any]] = provenance.get("starts", [only] if only else [])
    return starts


def differing_fields(
    config: Config, other: Config, among: Container[str] | None = None
) -> list[str]:
    """List the identity fields that differ between two configurations, `path: other -> config`.

    `among` has the paths that count; None: all.
    """
    mine, theirs = identity(config), identity(other)
    counted = [path for path in mine if among is None or path in among]
    return [f"{k}: {theirs.get(k)!r} -> {mine[k]!r}" for k in counted if mine[k] != theirs.get(k)]


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


_ASIDE = ".before-"


def is_set_aside(folder: Path) -> bool:
    """Tell whether a folder is one that `set_aside` renamed."""
    return _ASIDE in folder.name


def set_aside(root: Path) -> None:
    """Rename a folder, so that a fresh start by mistake does not destroy days of training.

    A folder that has a lock stays, and its content is moved.
    """
    stamp = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{time.time_ns() % 10**9:09d}"
    aside = root.with_name(f"{root.name}{_ASIDE}{stamp}")
    if not (root / lease.LOCK).exists():
        root.rename(aside)
        return
    aside.mkdir()
    for path in root.iterdir():
        if not lease.is_own(path):
            path.rename(aside / path.name)


_ARTEFACTS = ("mae", "clusters", "moce")


def base_of(config: Config) -> Run | None:
    """Return the run that `base_run` names; None without one.

    Raises:
        ConfigError: in a submitted job it must be an absolute path.
    """
    if config.base_run is None:
        return None
    return Run(resolve_run(config.base_run, config, "base_run"))


def check_base(config: Config, root: Path) -> Run | None:
    """Check that the run in `root` can continue from its base run; return that, None without one.

    Raises:
        ConfigError: there is no such run, it is not finished, or it was made with other settings.
    """
    base = base_of(config)
    if base is None:
        return None
    if base.root == root:
        raise ConfigError(f"base_run = {config.base_run!r}: is this run itself")
    if config.model.init is not None:
        raise ConfigError(
            f"model.init ({config.model.init}) must be null with base_run, which has the weights"
        )
    if config.moe.kind != "cluster":
        raise ConfigError(f"moe.kind ({config.moe.kind}) must be cluster with base_run")
    _, made_with = load_run(base.root, "base_run")
    if differing := unlike(config, made_with):
        raise ConfigError(
            f"base_run {base.root}: its weights and clusters need its settings: "
            f"{'; '.join(differing)}"
        )
    for name in _ARTEFACTS:
        if read_marker(base.root / name) is None:
            raise ConfigError(f"base_run {base.root}: is not finished, {name} is not complete")
    return base


def base_control(base: Run | None) -> Path | None:
    """Return the folder of the base run's stage control; None if there is no finished one."""
    return base.stage("control") if base is not None and base.has_control else None


def unlike(config: Config, base: Config) -> list[str]:
    """List the fields that must equal the base run's and differ, as `path: base -> config`."""
    kept = {path for path, role in roles().items() if role is Role.IDENTITY}
    if config.gate.groups == "shared":
        # with shared groups, the weights depend on the groups that they were trained in
        kept.add("parallel.num_groups")
    if "fixed" in (config.gate.assign, base.gate.assign):
        # the weights of a fixed gate are made from the clusters, not learnt
        kept.add("gate.assign")
    return differing_fields(config, base, kept)
