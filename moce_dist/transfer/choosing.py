"""How a task's own ViT is made: the clusters of its images, the choice, the customised weights.

    checkpoints --choose--> choice.json --customise--> a backbone

A choice that was made under the same conditions is read, not made again. The candidates of
`transfer.select: validate` are scored in select.py.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from moce_dist.arrays import Int64
from moce_dist.config import Config, TransferConfig
from moce_dist.features.encoder import EncoderInput
from moce_dist.model.customize import customize
from moce_dist.run.artefacts import COMPLETE, artefact_id, fingerprint
from moce_dist.run.directory import STAGES, Run
from moce_dist.run.files import write_atomic
from moce_dist.settings import ConfigError
from moce_dist.train.checkpoint import latest_checkpoint, load_weights, read_manifest
from moce_dist.train.encoder import OWN, build_encoder, same_encoder
from moce_dist.transfer.backbone import Backbone, run_backbone
from moce_dist.transfer.classification.frozen import encode
from moce_dist.transfer.loading import Machine
from moce_dist.transfer.request import BY_USE, Request, base_of, is_chosen, is_moce, stage_of
from moce_dist.transfer.select import (
    CONTROL,
    candidate_configs,
    choose_experts,
    count_clusters,
    mix_of,
    task_clusters,
    try_candidates,
    validated,
    with_selection,
)
from moce_dist.transfer.skips import Skips, record_skips
from moce_dist.transfer.tasks import Item, Task
from moce_dist.transfer.token import choose_by_use, usage_counter, without_gates

logger = logging.getLogger(__name__)

_VALIDATION = {"validate_by", "validate_folds", "validate_images", "knn_k", "linear_epochs"}
"""Fields of `transfer` that a choice by validation depends on."""


@dataclass(frozen=True)
class TrainedStage:
    """The newest undamaged checkpoint of a stage: its folder and its manifest."""

    checkpoint: Path
    manifest: Mapping[str, Any]

    @cached_property
    def identity(self) -> str:
        """Fingerprint of the files."""
        return fingerprint(self.manifest["files"])

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """All weights by global name, read when first needed.

        Raises:
            ConfigError: training has deleted the checkpoint meanwhile.
        """
        try:
            return load_weights(self.checkpoint)
        except FileNotFoundError:
            raise ConfigError(
                f"{self.checkpoint}: was deleted by its stage, which still trains; repeat the "
                "command, or raise checkpoint.keep"
            ) from None

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the weights out of a pickle: other processes read them."""
        return TrainedStage, (self.checkpoint, self.manifest)

    def dense(self, name: str) -> "Dense":
        """Return the dense model of this stage, which is called `name`, with its decoder."""
        return Dense({name: self.identity}, customize(self.weights, (), with_decoder=True))


def open_stage(run: Run, name: str) -> TrainedStage | None:
    """Find a stage's newest undamaged checkpoint; None when there is none."""
    checkpoint = latest_checkpoint(run.stage(name) / "checkpoints")
    if checkpoint is None:
        return None
    return TrainedStage(checkpoint, read_manifest(checkpoint))


def need_stage(run: Run, name: str) -> TrainedStage:
    """Return a stage's newest undamaged checkpoint.

    Raises:
        ConfigError: there is none.
    """
    found = open_stage(run, name)
    if found is None:
        folder = run.stage(name) / "checkpoints"
        raise ConfigError(f"{folder}: holds no whole checkpoint; run jobs/pretrain.py first")
    return found


class Dense(NamedTuple):
    """A dense MAE: what it depends on, its weights with the decoder, and the mix of its experts."""

    identity: dict[str, Any]
    weights: dict[str, Tensor]
    mix: list[int | list[float]] | None = None


def dense_backbone(name: str, config: Config, dense: Dense) -> Backbone:
    """Make a backbone called `name` from the encoder of a dense model."""
    weights = customize(dense.weights, ())
    return run_backbone(name, config, weights, choice=dense.mix, identity=dense.identity)


class Chooser:
    """The choices for one request on one run; `choices` are those known so far, by backbone.

    `stages` are those that another process opened; they may have newer checkpoints by now.
    """

    def __init__(
        self,
        request: Request,
        run: Run,
        config: Config,
        task: Task,
        machine: Machine,
        stages: dict[str, TrainedStage | None] | None = None,
    ) -> None:
        self.request, self.run, self.config, self.task = request, run, config, task
        self.machine, self.folder = machine, run.transfer(request.folder)
        self.stages = stages or {name: open_stage(run, name) for name in STAGES}
        self.choices: dict[str, dict[str, Any]] = {}
        needed = {stage_of(backbone, config) for backbone in request.backbones}
        for name, stage in self.stages.items():
            # a stage that is still training deletes its older checkpoints
            if stage and name in needed and not (run.stage(name) / COMPLETE).exists():
                _ = stage.weights

    def stage(self, name: str) -> TrainedStage:
        """Return a stage that the request needs.

        Raises:
            ConfigError: it has no undamaged checkpoint.
        """
        return self.stages[name] or need_stage(self.run, name)

    @property
    def control(self) -> TrainedStage | None:
        """The finished control, a candidate of `validate`; None where there is none."""
        return self.stages[CONTROL] if self.run.has_control else None

    @cached_property
    def task_fingerprint(self) -> str:
        """Fingerprint of the task's images and labels."""
        return self.task.fingerprint()

    def choice(self, name: str = "moce") -> dict[str, Any]:
        """Return the content of a backbone's choice file; choose now unless that was done before.

        `moce` chooses by `transfer.select`, `moce:SELECT` by its name. A backbone with further
        steps has the choice of its base.
        """
        name = base_of(name)
        if name not in self.choices:
            self.choices[name] = self._choose(name)
        return self.choices[name]

    def _choose(self, name: str) -> dict[str, Any]:
        if name == BY_USE:
            return self._choose_by_use(name)
        select = name.partition(":")[2]
        config = with_selection(self.config, select) if select else self.config
        transfer, moce = config.transfer, self.stage("moce")
        is_validated = transfer.select == "validate" and self.request.experts is None
        control = self.control if is_validated else None
        inputs = {
            **self._counted_by,
            "moce": moce.identity,
            "experts": self.request.experts,
            "select": self._selection(config),
            "validated": {**self._validated_by, "candidates": [*candidate_configs(config)]}
            if is_validated
            else None,
            "control": control.identity if control else None,
        }
        return self._known_or(
            self.file(name),
            inputs,
            lambda: self._validate(control) if is_validated else self._chosen(config),
        )

    @property
    def _counted_by(self) -> dict[str, Any]:
        """What the clusters of the task's images depend on."""
        is_own = self.config.cluster.encoder == OWN
        return {
            "task": self.task_fingerprint,
            "encoder": self.stage("mae").identity
            if is_own
            else same_encoder(self.run, self.config),
            "clusters": artefact_id(self.run.clusters),
            "max_train": self.config.transfer.max_train,
        }

    @property
    def settings(self) -> list[Any]:
        """What a choice depends on besides the run, the task and a backbone's name."""
        transfer = self.config.transfer
        return [
            self.request.experts,
            *self._selection(self.config),
            transfer.max_train,
            self._validated_by,
        ]

    def _selection(self, config: Config) -> list[Any]:
        transfer = config.transfer
        usual = TransferConfig().extrapolation
        # a version without the field made the choices where it has its default
        more = [transfer.extrapolation] if transfer.extrapolation != usual else []
        return [transfer.select, transfer.merge_temperature, *more]

    def clusters(self, name: str) -> dict[str, int]:
        """Return the number of the task's images per cluster, for the further steps of a backbone.

        The control and the MAE have no experts, so their clusters are counted without a choice.
        """
        if is_moce(name):
            return dict(self.choice(name)["clusters"])
        counted = self._known_or(
            self.folder / "clusters.json",
            self._counted_by,
            lambda: {"clusters": count_clusters(self._cluster_ids)},
        )
        return dict(counted["clusters"])

    @property
    def _validated_by(self) -> dict[str, Any]:
        fields = self.config.transfer.model_dump(include=_VALIDATION)
        # choices of earlier versions did not heed the limit
        limit = self.config.transfer.max_train
        return fields if limit is None else {**fields, "within": limit}

    def _known_or(
        self, path: Path, inputs: dict[str, Any], choose: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        # the fingerprint is of JSON, where tuples are lists
        of = fingerprint(inputs)
        if path.exists() and (known := json.loads(path.read_text())).get("of") == of:
            return dict(known)
        choice = choose()
        if choice.get("warning"):
            logger.warning("%s: %s", self.request.folder, choice["warning"])
        write_atomic(path, json.dumps({**choice, "of": of}, indent=1))
        return {**choice, "of": of}

    def file(self, name: str) -> Path:
        """Return the path of the choice file of `moce`, `moce:SELECT` or `token`."""
        _, colon, how = base_of(name).partition(":")
        return self.folder / f"choice{colon and '-'}{how}.json"

    def training_images(self) -> list[Item]:
        """Return the task's training images within `transfer.max_train`."""
        return self.task.subset(self.config.transfer.max_train, self.config.seed).images()

    @cached_property
    def _cluster_ids(self) -> Int64:
        """Clusters of the task's training images, (n,)."""
        mae = self.stage("mae") if self.config.cluster.encoder == OWN else None
        encoder = build_encoder(self.config, mae.checkpoint if mae else None, self.machine.device)
        return task_clusters(self._encoded(encoder, encoder.takes), self.run.clusters)

    def _encoded(self, encoder: Callable[[Tensor], Tensor], takes: EncoderInput) -> Tensor:
        """Encode the task's training images, (n, ...); unreadable ones are skipped."""
        images = self.training_images()
        features, _, faults = encode(encoder, takes, images, self.machine, name="encoder")
        skips = Skips(self.machine)
        skips.test = faults
        record_skips(self.run.faults, skips.close())
        return features

    def _choose_by_use(self, name: str) -> dict[str, Any]:
        moce, config = self.stage("moce"), self.config

        def choose() -> dict[str, Any]:
            count = usage_counter(moce.weights, config, self.machine.device)
            used = self._encoded(count, EncoderInput(config.data.image_size))
            return choose_by_use(used, moce.weights, task=self.request.folder)

        inputs = {"task": self.task_fingerprint, "max_train": config.transfer.max_train}
        return self._known_or(self.file(name), {**inputs, "token": moce.identity}, choose)

    def _chosen(self, config: Config) -> dict[str, Any]:
        return choose_experts(
            self._cluster_ids,
            self.stage("moce").weights,
            config,
            task=self.request.folder,
            given=self.request.experts,
        )

    def _validate(self, control: TrainedStage | None) -> dict[str, Any]:
        choices = {
            name: self._chosen(config) for name, config in candidate_configs(self.config).items()
        }
        models = {name: self._dense_of(choice) for name, choice in choices.items()}
        if control is not None:
            models[CONTROL] = self.dense(CONTROL)
        candidates = [dense_backbone(name, self.config, dense) for name, dense in models.items()]
        tried = try_candidates(candidates, self.task, self.config, self.machine)
        return validated(choices, tried, self.config.transfer)

    def dense(self, name: str) -> Dense:
        """Return the dense model of `moce`, `moce:SELECT`, `control` or `mae`, with its decoder.

        Raises:
            ConfigError: the checkpoint of its stage is missing.
        """
        if is_chosen(name):
            return self._dense_of(self.choice(name))
        origin = stage_of(name, self.config)
        assert origin is not None, name
        return self.stage(origin).dense(origin)

    def _dense_of(self, choice: dict[str, Any]) -> Dense:
        if choice.get("chosen") == CONTROL:
            return self.dense(CONTROL)
        mix, scale, moce = mix_of(choice), choice["scale"], self.stage("moce")
        return Dense(
            {"moce": moce.identity, "experts": mix, "scale": scale},
            customize(without_gates(moce.weights), mix, scale=scale, with_decoder=True),
            mix,
        )
