"""A run that goes on from a finished one, on other images: where that is, whether the two fit.

With `base_run` nothing is learnt anew that is there already:

    BASE/mae       its last checkpoint is linked to RUN/mae: the encoder of all features
    BASE/clusters  the images of data.source are assigned to them: RUN/clusters
    BASE/moce      the experts and the gate that stage moce starts from
    BASE/control   the weights that stage control starts from; without it, those of the MAE

Optimiser, learning rate, routing and the gate's noise begin as for any stage. Weights and clusters
mean something only under the settings that they were made with, so those must be the same.
"""

from pathlib import Path

from moce_dist.config import Config, Role, identity, roles
from moce_dist.run.artefacts import read_marker
from moce_dist.run.directory import Run, load_run, resolve_run
from moce_dist.settings import ConfigError

_SHARED = "parallel.num_groups"
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
    """Check that the run in `root` can go on from its base run; return that, None without one.

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
    """Folder of the base run's control; None where it has none that is finished."""
    if base is None or read_marker(base.stage("control")) is None:
        return None
    return base.stage("control")


def unlike(config: Config, base: Config) -> list[str]:
    """List what must be the base run's and is not, as `path: base -> config`."""
    mine, theirs, role = identity(config), identity(base), roles()
    kept = {path for path in mine if role[path] is Role.IDENTITY}
    if config.gate.groups == "shared":
        # the groups that experts learnt in matter to the weights where the gate keeps to them
        kept.add(_SHARED)
    return [
        f"{path}: {theirs.get(path)!r} -> {mine[path]!r}"
        for path in mine
        if path in kept and mine[path] != theirs.get(path)
    ]
