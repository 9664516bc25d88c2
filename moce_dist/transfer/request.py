"""One comparison on one task, checked before torch is imported.

A request names the task, the backbones, the protocols and the seeds. Mistakes in it, or in the run
directory that it refers to, are found here, from names, folders and headers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from moce_dist.config import Config, Selection, SuiteEntry, checked, load_config, read_resolved
from moce_dist.run.directory import STAGES, Run, differing_fields, load_run
from moce_dist.settings import ConfigError
from moce_dist.transfer.kinds import kind_of

BY_USE = "token"
_OWN = {"cluster": "moce", "token": BY_USE, "dense": "control"}
SELECTIONS: tuple[str, ...] = get_args(Selection)


@dataclass(frozen=True)
class Request:
    """What `jobs/transfer.py` was asked for."""

    task: str
    data: Path | None
    backbones: tuple[str, ...]
    protocols: tuple[str, ...]
    num_seeds: int
    experts: tuple[int, ...] | None
    name: str = ""
    continue_images: int | None = None

    @property
    def folder(self) -> str:
        """Name of the task's folder in the run: `name` if given (in a suite), else the task."""
        return self.name or self.task


def base_of(backbone: str) -> str:
    """Return the name of a backbone before further steps: `moce:merge` for `moce:merge+own`."""
    return backbone if backbone.startswith("timm:") else backbone.partition("+")[0]


def further_of(backbone: str) -> str:
    """Return what a backbone's further steps train on; "" if it has none.

    own: images of the task's clusters; train: its training images alone; all: those of all data.
    """
    return backbone.removeprefix(base_of(backbone)).removeprefix("+")


def is_moce(backbone: str) -> bool:
    """Tell whether a backbone is made of a run's experts: `moce`, `moce:SELECT`, `moce+own`."""
    return base_of(backbone).partition(":")[0] == "moce"


def is_chosen(backbone: str) -> bool:
    """Tell whether a backbone is made from experts for the task: from a MoCE's, or `token`."""
    return is_moce(backbone) or backbone == BY_USE


def own_backbone(config: Config) -> str:
    """Name the backbone that stage moce trains; without experts it is the control itself."""
    return _OWN[config.moe.kind]


def backbones_of(config: Config) -> tuple[str, ...]:
    """Name the backbones that a run can have, besides those of timm."""
    return tuple(dict.fromkeys((own_backbone(config), "control", "mae", "random")))


def stage_of(name: str, config: Config) -> str | None:
    """Name the training stage that a backbone's weights come from; None for timm and `random`.

    Of a name like `moce:HOW` or `control+own` only the part before the sign counts.
    """
    kind = base_of(name).partition(":")[0]
    if kind == own_backbone(config):
        return "moce"
    return kind if kind in STAGES else None


def experts_of(config: Config) -> str:
    """Say what kind of experts a run has."""
    what = {"dense": "no experts", "token": "experts that tokens choose, not clusters"}
    kind = config.moe.kind
    return f"the run has {what.get(kind, 'experts that clusters choose')} (moe.kind {kind})"


def default_backbones(
    run: Run | None, config: Config, *, continues: bool = False
) -> tuple[str, ...]:
    """Choose the default backbones of a comparison: the run's own, and its baseline.

    The baseline is the control if it is finished (without a run: if it is to be made) and not the
    run's own; else the MAE, which was trained for fewer steps. `continues` adds further steps to
    both.
    """
    own = own_backbone(config)
    has_control = config.control if run is None else run.has_control
    baseline = "control" if has_control and own != "control" else "mae"
    further = (f"{own}+own", f"{baseline}+own", f"{baseline}+all") if continues else ()
    return (own, baseline, *further)


def parse_names(text: str, flag: str) -> tuple[str, ...]:
    """Split a comma list of distinct names.

    Raises:
        ConfigError: a name is empty or repeated.
    """
    names = tuple(part.strip() for part in text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise ConfigError(f"{flag} {text}: must be a comma list of distinct names")
    return names


def parse_experts(text: str | None) -> tuple[int, ...] | None:
    """Read `--experts 3,1`.

    Raises:
        ConfigError: it is no comma list of whole numbers.
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--experts {text}: must be whole numbers, one per MoE layer") from None


def check_request(request: Request, config: Config) -> None:
    """Check names and numbers of a request against what exists.

    Raises:
        ConfigError: naming the flag, the value and the rule.
    """
    kind = kind_of(request.task)
    for name in request.backbones:
        _check_backbone(name, request, config)
    _check_further(request, config)
    for name in request.protocols:
        if not kind.takes(name, request.task):
            known = f"{', '.join(kind.protocols)}{kind.more_protocols(request.task)}"
            raise ConfigError(f"--protocol {name}: must be one of {known} for {request.task}")
    if request.num_seeds < 1:
        raise ConfigError(f"--seeds {request.num_seeds}: must be at least 1")
    transfer = config.transfer
    named = [base_of(name).partition(":")[2] for name in request.backbones if is_moce(name)]
    is_validated = "validate" in [name or transfer.select for name in named]
    is_limited = transfer.max_train is not None and request.experts is None
    if request.num_seeds > 1 and is_limited and is_validated:
        raise ConfigError(
            f"--seeds {request.num_seeds}: with transfer.max_train, validate would choose by "
            "labels that the fits of other seeds must not see; take one seed a run"
        )
    if request.experts is not None and config.moe.kind != "cluster":
        raise ConfigError(f"--experts: {experts_of(config)}")
    if request.experts is not None:
        check_experts(request.experts, len(config.moe_layers), config.moe.num_experts)
    kind.check(config)


def check_ranks(request: Request, config: Config) -> None:
    """Check that every worker gets images of a step, for a request that all workers carry out.

    Raises:
        ConfigError: a fit's batch is too small for them.
    """
    kind, workers = kind_of(request.task), config.parallel.num_workers
    batch_size = kind.batch_size(config.transfer)
    most = batch_size // kind.images_per_worker
    if "finetune" in request.protocols and workers > most:
        raise ConfigError(
            f"parallel.num_workers ({workers}): must be at most {most} to fit {request.folder} in "
            f"steps of {batch_size} images"
        )


def _check_further(request: Request, config: Config) -> None:
    images, parallel = request.continue_images, config.parallel
    names = [name for name in request.backbones if further_of(name)]
    for name in names:
        is_dense = base_of(name) in ("control", "mae")
        if not is_dense and (not is_moce(name) or further_of(name) == "all"):
            known = "moce, moce:SELECT, control or mae with +own or +train"
            raise ConfigError(f"--backbone {name}: must be {known}, or control or mae with +all")
        if config.moe.kind != "cluster" and further_of(name) != "train":
            raise ConfigError(f"--backbone {name}: {experts_of(config)}")
    if images is None:
        if names:
            raise ConfigError(f"--backbone {names[0]}: needs --continue-images")
        return
    if not names:
        raise ConfigError(
            f"--continue-images {images}: --backbone names nothing +own, +train or +all"
        )
    if images < (batch := config.transfer.continued.stage(config.moce, 1.0).batch_size):
        raise ConfigError(f"--continue-images {images}: must be at least a batch ({batch})")
    unit = max(parallel.num_workers, parallel.num_groups) * parallel.micro_batches
    if batch % unit:
        raise ConfigError(
            f"transfer.continued.batch_size ({batch}) must be a multiple of {unit}: "
            "max(parallel.num_workers, parallel.num_groups) * parallel.micro_batches"
        )


def _check_backbone(given: str, request: Request, config: Config) -> None:
    name, known, kind = base_of(given), backbones_of(config), config.moe.kind
    if further_of(given) not in ("", "own", "train", "all") or given.endswith("+"):
        raise ConfigError(f"--backbone {given}: after + must stand own, train or all")
    if name.startswith("timm:") and name.endswith(("+own", "+train", "+all")):
        raise ConfigError(f"--backbone {given}: further steps are for models of the run")
    if name in known or name.startswith("timm:"):
        pass
    elif not (is_moce(name) and kind == "cluster"):
        more = ", moce:SELECT" if kind == "cluster" else ""
        rule = f"must be one of {', '.join(known)}{more} or timm:NAME"
        if name.partition(":")[0] not in _OWN.values():
            raise ConfigError(f"--backbone {given}: {rule}")
        raise ConfigError(f"--backbone {given}: {experts_of(config)}; {rule}")
    if not is_moce(name):
        return
    named = name.partition(":")[2]
    select = named or config.transfer.select
    if select not in SELECTIONS:
        raise ConfigError(f"--backbone {given}: must be moce:{' or moce:'.join(SELECTIONS)}")
    if named and request.experts is not None:
        raise ConfigError(f"--backbone {given}: not with --experts, which names them for moce")
    can_validate = kind_of(request.task).can_validate
    if select == "validate" and request.experts is None and not can_validate:
        raise ConfigError(
            f"--backbone {given}: {request.task} has no classes, by which transfer.select validate "
            "tries candidates; choose another selection"
        )


def check_experts(given: Sequence[int], num_layers: int, num_experts: int) -> None:
    """Check `--experts` against a model's layers.

    Raises:
        ConfigError: it does not name one existing expert per MoE layer.
    """
    if len(given) != num_layers or any(not 0 <= e < num_experts for e in given):
        raise ConfigError(
            f"--experts {','.join(map(str, given))}: must name {num_layers} experts, one per MoE "
            f"layer, from 0 to {num_experts - 1}"
        )


def check_suite(suite: Sequence[SuiteEntry]) -> None:
    """Check the list of a suite's tasks; the request of each task is checked separately.

    Raises:
        ConfigError: there are none, two share a folder, or a name cannot be a folder's.
    """
    if not suite:
        raise ConfigError("--task all: the configuration lists no tasks in transfer.suite")
    for number, entry in enumerate(suite):
        name = entry.name or entry.task
        if name in {other.name or other.task for other in suite[:number]} or name == "all":
            raise ConfigError(f"transfer.suite.{number}.name = {name!r}: is taken; give it another")
        if Path(name).name != name:
            raise ConfigError(f"transfer.suite.{number}.name = {name!r}: must be a folder's name")


def check_stages(request: Request, run: Run, config: Config) -> None:
    """Check that a run has finished the stages that the backbones come from.

    Raises:
        ConfigError: naming the missing folder and the command that makes it.
    """
    stages = dict.fromkeys(stage_of(name, config) for name in request.backbones)
    needed = [run.stage(stage) / "checkpoints" for stage in stages if stage is not None]
    if any(is_moce(name) or further_of(name) == "own" for name in request.backbones):
        needed.append(run.clusters)
        if config.cluster.encoder == "mae":
            needed.append(run.stage("mae") / "checkpoints")
    if any(further_of(name) in ("own", "all") for name in request.backbones):
        needed.append(run.shards)
    for folder in needed:
        if not folder.is_dir():
            stage = " --stage control" if folder.parent == run.stage("control") else ""
            raise ConfigError(
                f"{folder}: is missing; jobs/pretrain.py --run {run.root}{stage} makes it"
            )


def open_request_run(root: Path, recipe: str | None, overrides: list[str]) -> tuple[Run, Config]:
    """Open a run; a recipe and `--set` overrides change the configuration it was made with.

    Raises:
        ConfigError: there is no such run, the recipe is wrong, or a change affects what the run
            has learnt.
    """
    run, made_with = load_run(root)
    if recipe is not None:
        load_config(recipe)
    config = checked(read_resolved(root / "config.yaml", overrides, recipe))
    if differing := differing_fields(config, made_with):
        raise ConfigError(
            f"{root}: was made with another configuration: {'; '.join(differing)}; here only "
            "transfer and runtime fields may change"
        )
    return run, config
