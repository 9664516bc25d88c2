"""The comparison of backbones on one task: choose, customise, fit, write the results, export.

    checkpoints --choose--> choice.json --customise--> weights --fits--> results.jsonl -->
    metrics.json, backbone/

Training may run on many ranks; one process does everything else. Every backbone gets the same
images, budgets and seeds. A fit that was finished under the same conditions is not repeated.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from moce_dist.config import Config
from moce_dist.run.artefacts import (
    COMPLETE,
    artefact_id,
    fingerprint,
    is_complete,
    mark_complete,
)
from moce_dist.run.directory import Run
from moce_dist.run.files import read_jsonl, write_atomic
from moce_dist.run.names import and_more
from moce_dist.run.rows import VALIDATION, steps_fewer
from moce_dist.train.checkpoint import trained_steps
from moce_dist.train.job import Train
from moce_dist.train.pulse import Pulse
from moce_dist.transfer.backbone import Backbone, run_backbone, timm_backbone
from moce_dist.transfer.choosing import Chooser, Dense, TrainedStage, dense_backbone
from moce_dist.transfer.continuing import further_folder, further_jobs
from moce_dist.transfer.export import export_backbone, model_card
from moce_dist.transfer.fit import Kept, Trial
from moce_dist.transfer.further import (
    ImageSource,
    cost_of,
    further_weights,
    pack_training_images,
    shares_of,
    take_further_steps,
)
from moce_dist.transfer.kinds import kind_named
from moce_dist.transfer.loading import Machine, machine_of
from moce_dist.transfer.ranks import from_first
from moce_dist.transfer.request import (
    Request,
    backbones_of,
    base_of,
    further_of,
    is_chosen,
    is_moce,
    own_backbone,
    stage_of,
)
from moce_dist.transfer.results import Fit, Ledger, Row, fingerprints, make_metrics
from moce_dist.transfer.saved import identity_of
from moce_dist.transfer.select import CONTROL, mix_of
from moce_dist.transfer.skips import record_skips
from moce_dist.transfer.tasks import Task

logger = logging.getLogger(__name__)


class Comparison:
    """One request on one run; its inputs are loaded once, and finished results are kept."""

    def __init__(
        self,
        request: Request,
        run: Run,
        config: Config,
        task: Task,
        machine: Machine | None = None,
        stages: dict[str, TrainedStage | None] | None = None,
    ) -> None:
        """Set up the comparison on a machine; None means this process alone.

        `stages` are the checkpoints that another process opened.
        """
        self.request, self.run, self.config, self.task = request, run, config, task
        self.folder = run.transfer(request.folder)
        self.machine = machine or machine_of(config)
        self.pulse = Pulse()
        self.chooser = Chooser(request, run, config, task, self.machine, stages)
        self._shared: dict[str, Any] = {}

    def backbone(self, name: str) -> Backbone:
        """Make one of the requested backbones.

        Raises:
            ConfigError: its checkpoint is missing, or timm does not know it.
        """
        if name.startswith("timm:"):
            return timm_backbone(name)
        if name == "random":
            return run_backbone(name, self.config, None, identity={"random": True})
        if further_of(name):
            return self._further(name)
        return dense_backbone(name, self.config, self.chooser.dense(name))

    def _further(self, name: str) -> Backbone:
        folder = further_folder(self.run, self.config, self.request, name)
        checkpoint, weights = further_weights(folder)
        mix = mix_of(self.chooser.choice(name)) if is_moce(name) else None
        identity = {"further": artefact_id(folder), "checkpoint": checkpoint}
        backbone = dense_backbone(name, self.config, Dense(identity, weights, mix))
        return replace(backbone, cost=cost_of(folder))

    def take_further_steps(self, train: Train) -> None:
        """Take the further steps that the request needs; `train` runs a job on all ranks.

        Raises:
            ConfigError: the run lacks what they need.
        """
        chooser, images = self.chooser, self.request.continue_images
        for name, job in further_jobs(self.run, self.config, self.request).items():
            assert images is not None
            source = self._images_of(name, job.batch_size)
            take_further_steps(job, images, chooser.dense(base_of(name)), source, train)

    def _images_of(self, name: str, batch_size: int) -> ImageSource:
        run, clusters = self.run, self.config.cluster.num_clusters
        if further_of(name) == "all":
            return ImageSource(run.shards)
        if further_of(name) == "own":
            return ImageSource(run.shards, shares_of(self.chooser.clusters(name), clusters))
        out, items = self.folder / "continued" / "train", self.chooser.training_images()
        pack_training_images(items, out, self.config.data, run.faults, batch_size)
        # images of tars without clusters are in cluster 0; with shares, an epoch is whole batches
        return ImageSource(out, shares_of({"0": 1}, clusters))

    def steps_fewer(self) -> dict[str, int]:
        """Return, per backbone of the run, how many fewer steps it took than the longest."""
        stages = {name: stage for name, stage in self.chooser.stages.items() if stage is not None}
        before = stages["mae"].manifest["step"] if "mae" in stages else 0
        fewer = steps_fewer(
            {
                name: trained_steps(stage.manifest, 0 if name == "mae" else before)
                for name, stage in stages.items()
            }
        )
        origins = {name: stage_of(name, self.config) for name in backbones_of(self.config)}
        return {name: fewer[stage] for name, stage in origins.items() if stage in fewer}

    def ledger(self, backbones: dict[str, Backbone]) -> Ledger:
        """Open the results that were made under the present conditions."""
        stages = {
            name: found.identity
            for name in backbones_of(self.config)
            if (found := self.chooser.stages.get(stage_of(name, self.config) or "")) is not None
        }
        path = self.folder / "results.jsonl"
        known = {line["row"]["protocol"] for line in read_jsonl(path)}
        protocols = {"finetune", "linear", "knn", *self.request.protocols, *known}
        transfer, of_task = self.config.transfer, self.chooser.task_fingerprint
        common = {name: [of_task, self.task.budget(transfer, name)] for name in protocols}
        own = {name: dict(backbone.identity) for name, backbone in backbones.items()}
        images, control = self.request.continue_images, self.chooser.control
        further = fingerprint([images, transfer.continued.model_dump(mode="json")])
        return Ledger(
            path,
            fingerprints(common),
            fingerprints(own),
            stages,
            choosing=fingerprint(self.chooser.settings),
            further=None if images is None else further,
            select=None if self.request.experts else transfer.select,
            control=None if control is None else control.identity,
        )

    def fits(self) -> Iterator[Fit]:
        """List what was requested, ordered so that features are computed once."""
        first = self.config.seed
        for name in self.request.backbones:
            for seed in range(first, first + self.request.num_seeds):
                for protocol in self.request.protocols:
                    yield Fit(name, protocol, seed)

    def is_drawn(self, fit: Fit, backbone: Backbone) -> bool:
        """Tell whether a fit's result depends on its seed."""
        if fit.protocol not in ("knn", "linear"):
            return True
        part = self.task.part_of(self.config.transfer, fit.protocol, fit.seed)
        return backbone.is_drawn or len(part.train) < len(self.task.train)

    @property
    def metric(self) -> str:
        """Name of the metric; it says where the figures are of validation images."""
        is_test = self.config.transfer.evaluate == "test"
        return self.task.metric if is_test else self.task.metric + VALIDATION

    def models_of(self, fit: Fit) -> Path:
        """Return the folder of a fit's models."""
        return self.folder / "models" / f"{_file_name(fit.backbone)}-{fit.protocol}-{fit.seed}"

    def run_fit(self, fit: Fit, backbone: Backbone, identity: str) -> Row:
        """Carry out one fit and describe it as a row of metrics.json.

        `identity` is the fingerprint of everything that the result depends on.
        """
        transfer = self.config.transfer
        task = self.task.part_of(transfer, fit.protocol, fit.seed)
        kept = Kept(
            self.models_of(fit),
            identity,
            transfer.save_every_steps,
            transfer.view_every_steps,
            transfer.save_models,
            self.pulse,
        )
        out = self.folder / "predictions" / f"{_file_name(fit.backbone)}-{fit.seed}"
        machine, protocol = self.machine, fit.protocol
        trial = Trial(backbone, transfer, machine, protocol, fit.seed, out, kept, self._shared)
        _, work = kind_named(task.kind)
        found, skipped, figures = work.fit(task, trial)
        if skipped and machine.rank == 0:
            figures = {**figures, "skipped_images": record_skips(self.run.faults, skipped)}
        return {
            "backbone": fit.backbone,
            "protocol": fit.protocol,
            "seed": fit.seed,
            "value": next(iter(found.values())),
            **({"measures": found} if len(found) > 1 else {}),
            "num_train": len(task.train),
            "num_test": len(task.test),
            "choice": backbone.choice,
            **({} if self.is_drawn(fit, backbone) else {"is_drawn": False}),
            **({} if backbone.cost is None else {"cost": dict(backbone.cost)}),
            **figures,
        }


def _file_name(backbone: str) -> str:
    return backbone.replace("/", "_")


def train_fits(comparison: Comparison, ledger: Ledger) -> None:
    """Carry out the trained fits that the ledger lacks; collective over the machine's ranks.

    Raises:
        ValueError: no image can be read.
        FloatingPointError: a loss, a gradient norm or a weight is not finite.
        StoppedError: a rank was asked to stop, and the state is saved.
    """
    machine = comparison.machine
    known = from_first(list(ledger.rows()), machine)
    left = [fit for fit in comparison.fits() if fit.is_trained and fit not in known]
    backbones = {fit.backbone: comparison.backbone(fit.backbone) for fit in left}
    for fit in left:
        row = comparison.run_fit(fit, backbones[fit.backbone], ledger.identity(fit))
        if machine.rank == 0:
            _enter(comparison, ledger, fit, row)


def _enter(comparison: Comparison, ledger: Ledger, fit: Fit, row: Row) -> None:
    skipped, limit = row.get("skipped_images", 0), comparison.config.data.max_fault_fraction
    # as in `further.pack_training_images`: a single image may always be damaged, unless none may
    if skipped > limit * (row["num_train"] + row["num_test"]) and (skipped > 1 or not limit):
        # storage that did not answer for a while must not leave a figure that is never made again
        logger.error("%s %s seed %d: not entered, %d images were skipped", *fit, skipped)
        return
    ledger.add(row)
    logger.info("%s %s seed %d: %.4f", *fit, row["value"])


def compare(comparison: Comparison, train: Callable[[Ledger], None]) -> dict[str, Any]:
    """Carry out or resume a comparison; return the content of metrics.json.

    `train` runs `train_fits` on all ranks. The other ranks that torchrun started wait in it, so
    under torchrun it is called even when nothing is left to train.

    Raises:
        ConfigError: a backbone cannot be made.
        ValueError: no image can be read.
        RuntimeError: fits are not entered, because too many images could not be read.
    """
    request, folder = comparison.request, comparison.folder
    backbones = {name: comparison.backbone(name) for name in request.backbones}
    ledger = comparison.ledger(backbones)
    # what does not depend on the seed is carried out once, and has no deviation
    wanted = [
        fit
        for fit in comparison.fits()
        if fit.seed == comparison.config.seed or comparison.is_drawn(fit, backbones[fit.backbone])
    ]
    metric = comparison.metric
    inputs = {
        # earlier versions did not mark figures of validation images
        **({} if metric == comparison.task.metric else {"metric": metric}),
        "fits": [list(fit) for fit in wanted],
        "common": dict(ledger.common),
        "own": dict(ledger.own),
        "stages": dict(ledger.stages),
        "ways": [ledger.choosing, ledger.further],
    }
    is_done, known = is_complete(folder, inputs), ledger.rows()
    left = [] if is_done else [fit for fit in wanted if fit not in known]
    if "RANK" in os.environ or any(fit.is_trained for fit in left):
        train(ledger)
    _carry_out(comparison, ledger, backbones, left)
    for fit, identity in ledger.identities().items():
        _drop_other_models(comparison.models_of(fit), identity)
    if is_done:
        logger.info("%s: complete, nothing to do", folder)
        return dict(json.loads((folder / "metrics.json").read_text()))
    fewer = comparison.steps_fewer()
    metrics = make_metrics(request.folder, metric, ledger.rows().values(), fewer)
    # an earlier request that was done must not find the figures of this one
    (folder / COMPLETE).unlink(missing_ok=True)
    write_atomic(folder / "metrics.json", json.dumps(metrics, indent=1))
    files = [folder / "metrics.json"]
    for name, backbone in backbones.items():
        # what this task alone has; `routes` exports the others
        is_own = name == own_backbone(comparison.config) or further_of(name) in ("own", "train")
        if is_chosen(name) or is_own:
            files += _export(comparison, backbone, metrics)
    mark_complete(folder, inputs, files)
    return metrics


def _carry_out(
    comparison: Comparison, ledger: Ledger, backbones: dict[str, Backbone], left: list[Fit]
) -> None:
    """Carry out those of the `left` fits that are not trained, and check that all are entered."""
    for fit in left:
        if not fit.is_trained:
            row = comparison.run_fit(fit, backbones[fit.backbone], ledger.identity(fit))
            _enter(comparison, ledger, fit, row)
    known = ledger.rows()
    if lacking := [fit for fit in left if fit not in known]:
        name = "{} {} seed {}".format(*lacking[0])
        raise RuntimeError(
            f"{name}{and_more(lacking)}: more images could not be read than "
            f"data.max_fault_fraction ({comparison.config.data.max_fault_fraction}) allows; see "
            f"{comparison.run.faults}"
        )


def _drop_other_models(folder: Path, identity: str) -> None:
    """Remove the models of a fit that was made under other conditions than the row that stands."""
    for name in ("best", "last"):
        if identity_of(folder / name) not in (None, identity):
            logger.warning("%s: is of other conditions than its row; it is removed", folder / name)
            shutil.rmtree(folder / name)


def _export(comparison: Comparison, own: Backbone, metrics: dict[str, Any]) -> list[Path]:
    chooser, request, name = comparison.chooser, comparison.request, own.name
    choice = chooser.choice(name) if is_chosen(name) else None
    stage = stage_of(name, comparison.config) or "moce"
    if choice and choice.get("chosen") == CONTROL:
        stage = CONTROL
    about = {
        "run": comparison.run.root.name,
        "data": comparison.config.data.source,
        "checkpoint": f"{stage}/{chooser.stage(stage).checkpoint.name}",
        **({} if choice is None else {"selection": choice["select"]}),
    }
    if own.cost is not None:
        folder = further_folder(comparison.run, comparison.config, request, name).name
        of = {"own": "own clusters", "train": "training images alone"}[further_of(name)]
        where = f"{own.cost['images']} images of the task's {of}"
        about["trained on"] = (
            f"{where}, continued/{folder}/checkpoints/{own.identity['checkpoint']}"
        )
    suffix = name.removeprefix(own_backbone(comparison.config)).replace(":", "-")
    how = f"-{suffix}" if suffix[:1].isalpha() else suffix
    card = model_card(metrics["task"], choice, metrics, about)
    written = export_backbone(own, comparison.folder / f"backbone{how}", card)
    return written if choice is None else [*written, chooser.file(name)]
