"""The plan of a study: the runs that it needs, the stages that they share, the pieces in order.

Arms with equal identity fields, which learn the same, are backbones of one run. Runs share the
stages that they would make alike: the first run makes such a stage, the others link it, and find it
complete and made from equal inputs.

    control, moce     mae -> features -> cluster -> moce, control   run A makes all of it
    random clusters                      cluster -> moce            mae and features are A's
    fewer experts                                   moce            clusters are A's too

A piece is one stage or one task of a run, and names the pieces that must be finished before it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moce_dist.config import Config, StageConfig, identity
from moce_dist.cost.sizes import Cost, run_cost, training_flop
from moce_dist.run.artefacts import fingerprint
from moce_dist.run.directory import Run
from moce_dist.settings import ConfigError
from moce_dist.study.request import (
    Arm,
    Split,
    StudyConfig,
    StudyTask,
    arm_config,
    task_request,
    tasks_of,
)
from moce_dist.transfer.continuing import steps_name
from moce_dist.transfer.request import (
    Request,
    base_of,
    check_ranks,
    further_of,
    is_moce,
    stage_of,
)

Kind = Literal["mae", "features", "cluster", "moce", "control", "transfer"]
STAGES: tuple[Kind, ...] = ("mae", "features", "cluster", "moce", "control")
SHARED: dict[Kind, tuple[str, ...]] = {
    "mae": ("mae",),
    "features": ("features",),
    "cluster": ("clusters", "shards"),
    "control": ("control",),
}
"""Folders of the stages that runs share."""
_EXPERTS = ("moe", "gate", "moce")
_CLUSTERING = (
    *("num_clusters", "source", "balance", "spherical", "soft_bound", "iterations", "tolerance"),
    *("block_rows", "num_candidates", "index_from", "index_recall", "with_prices"),
)
_LEARNT_LATER: dict[Kind, tuple[str, ...]] = {
    "mae": (*_EXPERTS, "cluster"),
    "features": (*_EXPERTS, *(f"cluster.{name}" for name in _CLUSTERING)),
    "cluster": _EXPERTS,
    "control": ("moe", "gate"),
}
"""Sections and fields of the configuration that a shared stage does not depend on."""


class Source(NamedTuple):
    """A data set that runs train on: its name, the folder of its index, its training images."""

    name: str
    folder: Path
    num_images: int


@dataclass
class PlannedRun:
    """One run directory: what it learns, and which run makes each of the stages that it needs."""

    name: str
    root: Path
    config: Config
    source: Source
    makers: dict[Kind, str] = field(default_factory=dict)

    def images(self, stage: Kind) -> int:
        """Return the number of images that a stage sees, at most: with the padding of its steps."""
        if stage in ("features", "cluster"):
            return self.source.num_images
        budget = self.config.mae if stage == "mae" else self.config.moce
        if budget.epochs == 0:
            return 0
        epoch = -(-self.source.num_images // budget.batch_size)
        return max(1, round(budget.epochs * epoch)) * budget.batch_size

    def cost(self, stages: tuple[Kind, ...], iterations: int | None = None) -> Cost:
        """Return the cost of some stages, whichever run makes them, for `iterations` of k-means."""
        images = {stage: self.images(stage) for stage in stages if stage in self.makers}
        return run_cost(self.config, images, iterations)


@dataclass(frozen=True)
class Cell:
    """One value of the study: an arm on a task, pre-trained with a seed."""

    arm: str
    seed: int
    task: str
    run: str
    request: Request
    """The comparison on the task, of this backbone alone."""
    config: Config
    """Configuration of the comparison."""

    @property
    def backbone(self) -> str:
        """Name of the backbone of the run."""
        return self.request.backbones[0]


@dataclass(frozen=True)
class Piece:
    """A stage of a run or, with `request`, a task; `links` are stages that other runs make."""

    kind: Kind
    run: str
    root: Path
    config: Config
    needs: tuple[str, ...]
    links: tuple[tuple[Kind, Path], ...]
    request: Request | None = None

    @property
    def id(self) -> str:
        """Name of the piece in the study."""
        return piece_id(self.run, self.kind, self.request)

    @property
    def stages(self) -> list[str]:
        """The stages that it needs; pieces of tasks are needed for their order alone."""
        return [need for need in self.needs if need.count("/") == 1]

    @property
    def folder(self) -> Path:
        """Folder that is complete when the piece is done."""
        if self.request is not None:
            return Run(self.root).transfer(self.request.folder)
        return self.root / SHARED.get(self.kind, (self.kind,))[-1]


def piece_id(run: str, kind: Kind, request: Request | None = None) -> str:
    """Name a piece."""
    return f"{run}/{kind}" if request is None else f"{run}/{kind}/{request.folder}"


@dataclass(frozen=True)
class StudyPlan:
    """A planned study: the runs by name, the cells (values to fill in), the pieces in order."""

    study: StudyConfig
    runs: dict[str, PlannedRun]
    cells: list[Cell]
    pieces: list[Piece]

    def runs_of(self, arm: str) -> list[PlannedRun]:
        """List the runs whose backbones an arm evaluates."""
        return [self.runs[n] for n in dict.fromkeys(c.run for c in self.cells if c.arm == arm)]

    def stages_of(self, arm: str) -> tuple[Kind, ...]:
        """List the stages that an arm's cost counts."""
        given = self.study.arms[arm]
        return stages_of(given.backbone, arm_config(self.study, given), paid=True)

    def cost(self, arm: str, run: PlannedRun, iterations: int | None = None) -> Cost:
        """Return the cost of an arm's model of one task, as if nothing were shared."""
        cost, further = run.cost(self.stages_of(arm), iterations), self.study.arms[arm]
        images = further.continue_images or 0
        return replace(
            cost,
            moce_images=cost.moce_images + images,
            training=cost.training + images * training_flop(run.config),
        )


def stages_of(backbone: str, config: Config, *, paid: bool = False) -> tuple[Kind, ...]:
    """List the stages that a backbone needs; with `paid`, those that its cost counts.

    The control sees the images in the clusters' order, but does not need clusters, so its cost
    leaves them out. A choice by validation tries the control too.
    """
    last, further = stage_of(backbone, config), further_of(backbone)
    if last is None:
        return ()
    needed = {"mae", last}
    is_apart = further in ("all", "train") and not is_moce(backbone)
    ignores_clusters = is_apart or backbone == "control"
    if (last != "mae" or further in ("own", "all")) and not (paid and ignores_clusters):
        needed |= {"features", "cluster"}
    select = base_of(backbone).partition(":")[2] or config.transfer.select
    if is_moce(backbone) and select == "validate":
        needed.add("control")
    return tuple(stage for stage in STAGES if stage in needed)


def wanted_sources(study: StudyConfig) -> dict[str, Config]:
    """Return the data sets of a study by name, each as a configuration with that data.source."""
    found: dict[str, Config] = {}
    for arm in study.arms.values():
        domains = [task.domain for task in tasks_of(study, arm)] if arm.domains != "all" else []
        for domain in ("", *domains):
            config = arm_config(study, arm)
            source = f"{config.data.source.rstrip('/')}/{domain}" if domain else config.data.source
            data = config.data.model_copy(update={"source": source})
            found.setdefault(source_name(config, domain), config.model_copy(update={"data": data}))
    return found


def source_name(config: Config, domain: str) -> str:
    """Name a data set, or one domain of it, in the study's folder."""
    parts: list[Any] = [config.data.source, config.data.holdout_fraction]
    if config.data.store_side is not None:
        parts.append(config.data.store_side)
    key = fingerprint(parts)
    return f"{domain or 'all'}-{key[:8]}"


def budget(stage: StageConfig, images: float | None, num_all: int, num_own: int) -> dict[str, Any]:
    """Return the epochs on `num_own` images that have as many steps as a stage on `num_all` images.

    `images`, if given, determine the steps instead of the stage's epochs. Warm-up keeps its share.
    """
    steps = stage.epochs * -(-num_all // stage.batch_size)
    if images is not None:
        steps = images / stage.batch_size
    epochs = max(1, round(steps)) / -(-num_own // stage.batch_size)
    return {"epochs": epochs, "warmup_epochs": stage.warmup_epochs / stage.epochs * epochs}


@dataclass(frozen=True)
class Planner:
    """Resolve a study over its data sets into a plan whose folders are below `out`."""

    study: StudyConfig
    sources: Mapping[str, Source]
    out: Path
    split: Split = "test"

    @cached_property
    def runs(self) -> dict[str, PlannedRun]:
        """The runs by name; each is added when the first cell needs it."""
        return {}

    def plan(self) -> StudyPlan:
        """List runs, cells and pieces, one seed after the other.

        Raises:
            ConfigError: a task changes what its run learns.
        """
        cells = [
            self._cell(name, seed, task)
            for seed in self.study.seeds
            for name, arm in self.study.arms.items()
            if arm.seeds is None or seed in arm.seeds
            for task in tasks_of(self.study, arm)
        ]
        self._share()
        return StudyPlan(self.study, self.runs, cells, list(self._pieces(cells)))

    def _source(self, arm: Arm, domain: str) -> Source:
        return self.sources[source_name(arm_config(self.study, arm), domain)]

    def _budgets(self, arm: Arm, source: Source) -> dict[str, Any]:
        plain, num_all = arm_config(self.study, arm), self._source(arm, "").num_images
        share = source.num_images / num_all if arm.domains == "own_equal_images" else 1.0
        fields: dict[str, Any] = {}
        for name, stage in (("mae", plain.mae), ("moce", plain.moce)):
            given = getattr(self.study.images, name)
            if stage.epochs == 0:
                if given is not None:
                    raise ConfigError(
                        f"images.{name} ({given}): {name}.epochs is 0, so the stage has no step"
                    )
                continue
            images = given or stage.epochs * num_all
            images = None if share == 1 and not given else images * share
            found = budget(stage, images, num_all, source.num_images)
            if arm.domains == "own_equal_images" and images is not None:
                # not by steps: the last step of a small domain's epoch is mostly padding
                epochs = images / source.num_images
                warmup = stage.warmup_epochs / stage.epochs * epochs
                found = {"epochs": epochs, "warmup_epochs": warmup}
            fields |= {f"{name}.{key}": value for key, value in found.items()}
        return fields

    def _cell(self, name: str, seed: int, task: StudyTask) -> Cell:
        study, arm = self.study, self.study.arms[name]
        source = self._source(arm, task.domain if arm.domains != "all" else "")
        learnt = {"seed": seed, **self._budgets(arm, source)}
        run = self._run(arm, learnt, source)
        fields = {**learnt, "data.source": run.config.data.source, "transfer.evaluate": self.split}
        config = arm_config(study, arm, fields, task.set)
        of_run = identity(run.config)
        if changed := [path for path, v in identity(config).items() if v != of_run[path]]:
            raise ConfigError(f"tasks, {task.folder}.set: {', '.join(changed)} is of a run")
        if config.transfer.evaluate != self.split:
            raise ConfigError(f"tasks, {task.folder}.set: --final decides transfer.evaluate")
        request = task_request(study, task, arm, self.split)
        check_ranks(request, config)
        evaluated = {"transfer.evaluate": self.split}
        if config.transfer != arm_config(study, Arm(), evaluated, task.set).transfer:
            own = fingerprint(config.transfer.flat())[:6]
            request = replace(request, name=f"{request.name}-{own}")
        return Cell(name, seed, task.folder, run.name, request, config)

    def _run(self, arm: Arm, learnt: dict[str, Any], source: Source) -> PlannedRun:
        found, usual = identity(arm_config(self.study, arm, learnt)), identity(Config())
        # fields at their defaults are left out, so that a new field does not rename runs
        changes = {path: value for path, value in found.items() if value != usual[path]}
        kind = source.name.rpartition("-")[0]
        name = f"{kind}-seed{learnt['seed']}-{fingerprint([source.name, changes])[:8]}"
        if name not in self.runs:
            fields = {**learnt, "data.source": f"index:{source.folder}"}
            config = arm_config(self.study, arm, fields)
            self.runs[name] = PlannedRun(name, self.out / "runs" / name, config, source)
        run = self.runs[name]
        run.makers |= dict.fromkeys(stages_of(arm.backbone, arm_config(self.study, arm)), name)
        return run

    def _share(self) -> None:
        made: dict[str, str] = {}
        for run in self.runs.values():
            for stage, sections in _LEARNT_LATER.items():
                later = tuple(f"{section}." for section in sections)
                if stage in run.makers:
                    learnt = identity(run.config).items()
                    key = [(k, v) for k, v in learnt if not f"{k}.".startswith(later)]
                    maker = made.setdefault(fingerprint([stage, key]), run.name)
                    run.makers[stage] = maker
            # a backbone needs the control or not; the run's identity does not depend on it
            run.config = run.config.model_copy(update={"control": "control" in run.makers})

    def _pieces(self, cells: list[Cell]) -> Iterator[Piece]:
        for run in self.runs.values():
            makers = run.makers
            before: tuple[str, ...] = ()
            for stage in (stage for stage in STAGES if stage in makers):
                if makers[stage] == run.name:
                    links = self._links(run, before)
                    yield Piece(stage, run.name, run.root, run.config, before, links)
                if stage in SHARED:
                    before = (*before, piece_id(makers[stage], stage))
            yield from self._transfers(run, [c for c in cells if c.run == run.name])

    def _links(self, run: PlannedRun, needs: tuple[str, ...]) -> tuple[tuple[Kind, Path], ...]:
        """List the stages of other runs that are finished when a piece with such needs starts."""
        makers = [(stage, maker) for stage, maker in run.makers.items() if maker != run.name]
        return tuple((s, self.runs[m].root) for s, m in makers if piece_id(m, s) in needs)

    def _transfers(self, run: PlannedRun, cells: list[Cell]) -> Iterator[Piece]:
        needs = tuple(piece_id(maker, stage) for stage, maker in run.makers.items())
        links = self._links(run, needs)
        by_folder: dict[str, list[Cell]] = {}
        for cell in cells:
            by_folder.setdefault(cell.request.folder, []).append(cell)
        first: dict[str, str] = {}
        for group in by_folder.values():
            backbones = tuple(dict.fromkeys(cell.backbone for cell in group))
            request = replace(group[0].request, backbones=backbones)
            config = group[0].config.model_copy(update={"control": "control" in run.makers})
            before = needs
            # all tasks share one continued model per start, number of images and schedule: the
            # first task trains it, and different ones are trained one after the other
            how = steps_name(config, request.continue_images)
            shared = [f"{name}-{how}" for name in backbones if further_of(name) == "all"]
            if shared:
                mine, others = piece_id(run.name, "transfer", request), list(first.values())
                earlier = [first.setdefault(steps, mine) for steps in shared]
                waits = [*earlier, *others[-1:]] if mine in earlier else earlier
                before = (*needs, *(p for p in dict.fromkeys(waits) if p != mine))
            yield Piece("transfer", run.name, run.root, config, before, links, request)
