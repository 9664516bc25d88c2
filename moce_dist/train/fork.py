"""Fork a run: continue from a checkpoint of another run with other settings of the optimiser.

    python jobs/pretrain.py --fork runs/base --at 12000 --run lower --set mae.base_lr=5e-5

    RUN/ingested; in stage moce also mae, features, clusters, shards   shared unchanged
    RUN/STAGE/checkpoints/step_STEP, and the metrics before it         training continues from there
    every later stage                                                  made anew

Shared means hard links: files of a run are replaced, never changed, so either run may be removed.
The origin of a fork is recorded in its `provenance.json`.
"""

import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from moce_dist.config import Config, checked, read_resolved, to_yaml
from moce_dist.run import lease
from moce_dist.run.artefacts import INPUTS
from moce_dist.run.directory import Run, differing_fields, load_run, read_provenance
from moce_dist.run.environment import is_first_process
from moce_dist.run.files import link_tree, read_jsonl, write_atomic, write_jsonl
from moce_dist.settings import ConfigError
from moce_dist.train.metrics import METRICS_NAME

SHARED = {"mae": ("ingested",), "moce": ("ingested", "mae", "features", "clusters", "shards")}
"""What is taken unchanged from the other run, by stage of the fork, in the order of stages."""
_OPTIMISATION = (
    *("epochs", "warmup_epochs", "base_lr", "min_lr"),
    *("weight_decay", "betas", "clip_norm"),
)
_OF_EXPERTS = ("lr_scale", "mean_decay")
_OF_GATE = ("noise", "noise_fraction", "balance_weight", "confidence_weight", "lr_scale")
_MAKING = ".fork"
_WAIT_S = 3600.0


def free_fields(stage: str) -> list[str]:
    """List the fields that a fork of a stage may change: the optimisation of what it trains."""
    stages = ("mae", "moce") if stage == "mae" else ("moce",)
    fields = [f"{name}.{field}" for name in stages for field in _OPTIMISATION]
    fields += [f"moe.{field}" for field in _OF_EXPERTS]
    return fields + [f"gate.{field}" for field in _OF_GATE]


@dataclass(frozen=True)
class Fork:
    """Origin of a forked run: the other run, its stage and step, and the changed fields."""

    run: str
    stage: Literal["mae", "moce"]
    step: int
    changed: list[str]

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that the fork continues from."""
        return Path(self.run) / self.stage / "checkpoints" / f"step_{self.step:08d}"


def fork_config(root: Path, overrides: Iterable[str]) -> Config:
    """Read the settings of the run to fork in `root`, changed by `a.b=value` overrides.

    Raises:
        ConfigError: there is no such run, or an override is wrong.
    """
    load_run(root, "--fork")
    return checked(read_resolved(root / "config.yaml", overrides))


def known_fork(source: Path, step: int, root: Path) -> Fork | None:
    """Return the fork of this run and step that is in `root`, None if there is no run.

    The run that it was forked from may be gone.

    Raises:
        ConfigError: it is another run.
    """
    if not (root / "config.yaml").is_file():
        return None
    found = read_provenance(root).get("forked_from", {})
    if (found.get("run"), found.get("step")) != (str(source), step):
        raise ConfigError(f"--run {root}: is another run; choose another --run, or --fresh")
    return Fork(found["run"], found["stage"], step, found["changed"])


def plan_fork(source: Path, step: int, stage: str, config: Config, root: Path) -> Fork:
    """Check that the run in `root` can be forked from a checkpoint of `source`.

    `stage` is `mae`, `moce`, or `all` for the last one that has a checkpoint of that step.

    Raises:
        ConfigError: naming what is missing, or the fields that may not differ.
    """
    run, made_with = load_run(source, "--fork")
    if run.root == root:
        raise ConfigError(f"--fork {source}: is the run itself; a fork needs a --run of its own")
    stages = [name for name in reversed(SHARED) if stage in (name, "all")]
    if not stages:
        raise ConfigError(f"--stage {stage}: a fork goes on from stage {' or '.join(SHARED)}")
    for name in stages:
        fork = Fork(str(run.root), name, step, differing_fields(config, made_with))  # type: ignore[arg-type]
        if (fork.checkpoint / "manifest.json").is_file():
            break
    else:
        there = {n: sorted(run.stage(n).glob("checkpoints/step_*/manifest.json")) for n in stages}
        steps = "; ".join(
            f"{n}: {', '.join(str(int(p.parent.name[5:])) for p in paths) or 'none'}"
            for n, paths in there.items()
        )
        raise ConfigError(f"--at {step}: {run.root} has no checkpoint of that step ({steps})")
    free = free_fields(fork.stage)
    refused = [line for line in fork.changed if line.split(":")[0] not in free]
    if refused:
        raise ConfigError(
            f"--fork {source}: a fork of stage {fork.stage} may not change {'; '.join(refused)}; "
            f"it may change {', '.join(free)}"
        )
    return fork


def make_fork(fork: Fork, config: Config, root: Path) -> None:
    """Make the forked run in a folder whose lease this process holds.

    An interrupted fork is begun anew. Under torchrun the other processes wait for the first one.

    Raises:
        ConfigError: the folder holds something else, the checkpoint is damaged or not finite, or
            the stage would end before its step.
        TimeoutError: the first process did not make the fork in time.
    """
    if not is_first_process():
        made, end = root / "config.yaml", time.monotonic() + _WAIT_S
        while not made.exists():
            if time.monotonic() > end:
                raise TimeoutError(f"{made}: waited in vain for the first process to make the fork")
            time.sleep(0.2)
        return
    making = root / _MAKING
    # again, now that nobody else may write: another process may have made a run since
    if known_fork(Path(fork.run), fork.step, root) is None:
        others = [path for path in root.iterdir() if not lease.is_own(path)]
        if others and not making.exists():
            raise ConfigError(f"--run {root}: is not empty; a fork needs a folder of its own")
        seal = _check_checkpoint(fork, config)
        for path in others:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        making.mkdir()
        _share(fork, root)
        about = {"forked_from": {**asdict(fork), "checkpoint": seal}}
        write_atomic(root / "provenance.json", json.dumps(about, indent=1))
        write_atomic(root / "config.yaml", to_yaml(config))
    if making.exists():
        making.rmdir()


def _check_checkpoint(fork: Fork, config: Config) -> str:
    # torch takes seconds to import, and most wrong requests are refused before this point
    from moce_dist.train.checkpoint import check_finite, damage, read_manifest, stored
    from moce_dist.train.job import StageJob

    if reason := damage(fork.checkpoint):
        raise ConfigError(f"--at {fork.step}: {fork.checkpoint}: {reason}")
    try:
        check_finite(stored(fork.checkpoint))
    except FloatingPointError as error:
        raise ConfigError(f"--at {fork.step}: {fork.checkpoint}: {error}") from None
    run = Run(Path(fork.run))
    index = run.data(config) if fork.stage == "mae" else run.shards
    total = StageJob(config, run.root, fork.stage, str(index)).total_steps
    if fork.step >= total:
        raise ConfigError(
            f"--at {fork.step}: stage {fork.stage} is over after {total} steps "
            f"({fork.stage}.epochs = {getattr(config, fork.stage).epochs:g})"
        )
    return str(read_manifest(fork.checkpoint)["sha256"])


def _share(fork: Fork, root: Path) -> None:
    source = Path(fork.run)
    for name in SHARED[fork.stage]:
        if (source / name).is_dir():
            link_tree(source / name, root / name)
    old, new = source / fork.stage, root / fork.stage
    link_tree(fork.checkpoint, new / "checkpoints" / fork.checkpoint.name)
    lines = [line for line in read_jsonl(old / METRICS_NAME) if line["step"] < fork.step]
    write_jsonl(new / METRICS_NAME, lines)
    kept = (
        path for name in ("routing", "placement", "gate") for path in old.glob(f"{name}/step_*")
    )
    for path in [old / INPUTS, *kept]:
        if path.name == INPUTS or int(path.stem[5:]) <= fork.step:
            (new / path.relative_to(old)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, new / path.relative_to(old))
    newest = max((new / "placement").glob("step_*"), key=lambda p: int(p.stem[5:]), default=None)
    if newest is not None and int(newest.stem[5:]) < fork.step:
        # its interval went on in the other run
        interval = json.loads(newest.read_text())
        write_atomic(newest, json.dumps({**interval, "measured_in_interval": None}))
    if (source / "faults.jsonl").exists():
        shutil.copyfile(source / "faults.jsonl", root / "faults.jsonl")
