"""The stages of a run in order, each a named artefact that is made once.

    images -> ingested/ -> mae/ -> features/ -> clusters/ -> shards/ -> moce/ -> control/

A stage is skipped when its artefact is complete and was made from the same inputs. Otherwise it is
run, or resumed where it stopped. Features of an encoder other than the run's MAE are made first.
This module only connects the other packages to `launch`.

Stage control runs only with `control: true`. A run with `base_run` (run/directory.py) trains no
stage mae and computes no clusters: it takes both from its base run.
"""

import json
import logging
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from moce_dist.cluster.assign import read_summary, run_clustering
from moce_dist.cluster.assignments import read_labels
from moce_dist.cluster.existing import assign_folder, assign_table
from moce_dist.cluster.gallery import GALLERY, write_gallery
from moce_dist.config import WEIGHT_FILES, Config
from moce_dist.data.columns import open_index
from moce_dist.data.ingest import ingest
from moce_dist.data.progress import track
from moce_dist.data.ranges import RangeReader
from moce_dist.data.reshard import reshard
from moce_dist.data.shards import HOLDOUT, INDEX_NAME, ShardIndex
from moce_dist.features.decoding import ShardImages
from moce_dist.features.extract import (
    FEATURE_FILES,
    FeatureJob,
    begin_features,
    extract_shard,
    feature_names,
)
from moce_dist.launch.actors import hold_actors
from moce_dist.launch.job import PretrainJob
from moce_dist.launch.tasks import gets_gpu, map_tasks
from moce_dist.launch.training import hold_crew, train
from moce_dist.run.artefacts import (
    INPUTS,
    artefact_id,
    file_sha256,
    fingerprint,
    is_complete,
    mark_complete,
    read_marker,
)
from moce_dist.run.directory import Run, StageName, base_control, check_base
from moce_dist.run.environment import is_first_process
from moce_dist.run.tasks import HERE, MapTasks
from moce_dist.samples import sets
from moce_dist.settings import ConfigError
from moce_dist.train.checkpoint import latest_checkpoint, read_manifest, trained_steps
from moce_dist.train.encoder import OWN, encoder_pixels, encoder_spec, noted_id, same_encoder
from moce_dist.train.finished import (
    begin_stage,
    has_last_checkpoint,
    known_digests,
    link_stage,
    trained_id,
)
from moce_dist.train.job import Train
from moce_dist.train.metrics import METRICS_NAME

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pipeline:
    """The stages of one run."""

    run: Run
    config: Config

    def pretrain(self) -> None:
        """Run every unfinished stage; the training stages share one set of workers."""
        if self.config.cluster.encoder != OWN and self.base is None:
            # weights of another encoder that are missing are found before the MAE is trained
            self.features()
        with hold_crew() as crew:
            self.mae(crew.train)
            crew.make_room()
            self.cluster()
            self.moce(crew.train)
            if self.config.control:
                self.control(crew.train)

    @property
    def _map_tasks(self) -> MapTasks:
        return partial(map_tasks, self.config.parallel)

    @cached_property
    def data(self) -> Path:
        """Folder of the data's index; a source that is not an index is ingested first."""
        if self.config.index is not None:
            return self.config.index
        source = self.config.data.source
        if not source:
            raise ConfigError("data.source = '': must name images, e.g. folder:PATH")
        if "RANK" in os.environ and read_marker(self.run.ingested) is None:
            raise ConfigError(
                f"{self.run.ingested}: is not complete; under torchrun first make it with "
                f"jobs/ingest.py --run {self.run.root} and the same --config and --set"
            )
        out, data = self.run.ingested, self.config.data
        ingest(source, out, data, self.run.faults, self._map_tasks, mix=sets.pretrain)
        return out

    @cached_property
    def base(self) -> Run | None:
        """The run that this one continues from, if any."""
        base = check_base(self.config, self.run.root)
        if base is not None and self.config.cluster.encoder != OWN:
            same_encoder(base, self.config)
        return base

    def mae(self, train: Train = train) -> None:
        """Train the dense masked autoencoder, or take that of the base run."""
        if self.base is not None:
            link_stage(self.base.stage("mae"), self.run.stage("mae"))
            return
        self._train(train, "mae", self.data, {"data": data_id(self.data), **self._init_id()})

    def _init_id(self) -> dict[str, str]:
        # a file of first weights counts by its content, which earlier versions did not note
        init, begun = self.config.model.init, self.run.stage("mae") / INPUTS
        if init is None or Path(init).suffix not in WEIGHT_FILES:
            return {}
        noted = json.loads(begun.read_text()).get("init") if begun.is_file() else ""
        if noted is None:
            return {}
        # it is needed only until the first step
        return {"init": file_sha256(Path(init)) if Path(init).is_file() else noted}

    def cluster(self) -> dict[str, Any]:
        """Make features, clusters and cluster-sharded tars; return the clusters' summary."""
        self.features()
        summary = self.clusters()
        self.gallery()
        self.reshard()
        return summary

    def features(self) -> None:
        """Encode all images, held-out ones too, with the frozen encoder."""
        # features of another encoder do not depend on the MAE, nor do the clusters
        inputs = {"data": data_id(self.data)}
        if self.config.cluster.encoder != OWN:
            inputs["encoder"] = noted_id(self.run.features, self.config)
        else:
            inputs["mae"] = trained_id(self.run.stage("mae"))
            if (block := self.config.cluster.feature_block) is not None:
                inputs["block"] = str(block)
        if is_complete(self.run.features, inputs):
            log.info("features: complete")
            return
        folders = [(self.data, self.run.features)]
        if self._has_holdout:
            folders.append((self.data / HOLDOUT, self.run.features / HOLDOUT))
        for source, out in folders:
            begin_features(out, inputs)
            self._extract(open_index(source), out, fingerprint(inputs))
        files = [f for pattern in FEATURE_FILES for f in self.run.features.rglob(pattern)]
        mark_complete(self.run.features, inputs, files)

    def _extract(self, index: ShardIndex, out: Path, identity: str) -> None:
        named = zip(feature_names(index), index.shards, strict=True)
        left = [(name, shard) for name, shard in named if not (out / f"{name}.npy").is_file()]
        total, threads = sum(shard.num_samples for _, shard in left), self._decode_threads
        log.info(
            "features: encoding %d images in %d of %d shards of %s with %s, decoded on %d threads",
            *(total, len(left), len(index.shards), index.root),
            *(self.config.cluster.encoder, threads),
        )
        is_own, pixels = self.config.cluster.encoder == OWN, encoder_pixels(self.config)
        mae = latest_checkpoint(self.run.stage("mae") / "checkpoints") if is_own else None
        encoder = encoder_spec(self.config, mae, identity=identity)
        data = self.config.data
        open_reader = partial(RangeReader, data.read_timeout_s, data.read_deadline_s)
        jobs = [
            FeatureJob(
                ShardImages(
                    *(shard, index.url(shard), pixels.image_size, pixels.framing),
                    *(self.config.cluster.batch_size, threads, open_reader),
                ),
                *(name, out, self.run.faults, encoder),
            )
            for name, shard in left
        ]
        start = time.monotonic()
        # actors, because their encoders must leave the GPUs at the end
        with hold_actors(self.config.parallel) as workers:
            done = workers.map_tasks(extract_shard, None, jobs)
            sizes = (shard.num_samples for (_, shard), _ in zip(left, done, strict=True))
            for _ in track(sizes, "images encoded", total=total, size=int):
                pass
        if total:
            log.info("features: %.1f images/s", total / (time.monotonic() - start))

    @property
    def _has_holdout(self) -> bool:
        return (self.data / HOLDOUT / INDEX_NAME).is_file()

    @property
    def _decode_threads(self) -> int:
        # one thread cannot keep a GPU busy; on CPUs the encoding threads already use all cores
        parallel = self.config.parallel
        if gets_gpu(parallel):
            return max(1, self.config.data.loader_processes)
        return parallel.threads_per_worker

    def clusters(self) -> dict[str, Any]:
        """Cluster the features of the training images, or assign them to the base's clusters."""
        inputs = {"features": artefact_id(self.run.features)}
        if self.base is not None:
            inputs["base"] = artefact_id(self.base.clusters)
        if is_complete(self.run.clusters, inputs):
            log.info("clusters: complete")
            return read_summary(self.run.clusters)
        with hold_actors(self.config.parallel) as workers:
            if self.base is not None:
                base, config = self.base.clusters, self.config.cluster
                log.info("clusters: assigning the images to those of %s", base)
                return assign_folder(
                    self.run.features,
                    base,
                    self.run.clusters,
                    block_rows=config.block_rows,
                    with_prices=config.with_prices and (base / "prices.npy").is_file(),
                    workers=workers,
                    inputs=inputs,
                )
            return run_clustering(
                self.run.features,
                self.run.clusters,
                self.config.cluster,
                seed=self.config.seed,
                subtract_mean=True,
                workers=workers,
                inputs=inputs,
            )

    def gallery(self) -> None:
        """Write sheets that show what the clusters look like."""
        inputs = {"clusters": artefact_id(self.run.clusters), "data": data_id(self.data)}
        out = self.run.clusters / GALLERY
        if not is_complete(out, inputs):
            sheets = write_gallery(open_index(self.data), self.run.clusters, self.config.data)
            mark_complete(out, inputs, sheets)

    def reshard(self) -> None:
        """Rewrite the training tars so that each holds one cluster; assign the held-out images."""
        out = self.run.shards
        inputs = {"clusters": artefact_id(self.run.clusters), "data": data_id(self.data)}
        if is_complete(out, inputs):
            log.info("shards: complete")
            return
        self._assign_holdout()
        index = open_index(self.data)
        reshard(
            index,
            read_labels(self.run.clusters / "assignments.parquet", index),
            out,
            self.config.data,
            inputs=inputs,
            map_tasks=self._map_tasks,
        )

    def _assign_holdout(self) -> None:
        folder = self.run.features / HOLDOUT
        if not folder.is_dir():
            return
        parallel, block_rows = self.config.parallel, self.config.cluster.block_rows
        # workers take seconds to start, longer than one block
        is_small = open_index(self.data / HOLDOUT).num_samples <= block_rows
        with nullcontext(HERE) if is_small else hold_actors(parallel) as workers:
            assign_table(
                folder,
                self.run.clusters,
                self.run.holdout_clusters,
                block_rows=block_rows,
                workers=workers,
            )

    def moce(self, train: Train = train) -> None:
        """Train the experts on the cluster-sharded tars."""
        self._train_on(train, "moce", None if self.base is None else self.base.stage("moce"))

    def control(self, train: Train = train) -> None:
        """Continue training the MAE like the experts: the same images, steps and schedule."""
        if self.config.moe.kind == "dense":
            log.info("control: stage moce of a run without experts is the control itself")
            return
        self._train_on(train, "control", base_control(self.base))

    def _train_on(self, train: Train, stage: StageName, base: Path | None) -> None:
        # start from the same stage of the base run, else from the MAE
        inputs = {
            "shards": artefact_id(self.run.shards),
            "clusters": artefact_id(self.run.clusters),
            "mae": trained_id(self.run.stage("mae")),
        }
        if base is not None:
            inputs["base"] = trained_id(base)
        newest = latest_checkpoint((base or self.run.stage("mae")) / "checkpoints")
        assert newest is not None
        start = str(newest) if base is not None else None
        steps_before = trained_steps(read_manifest(newest))
        weights = {"start": start, "steps_before": steps_before}
        self._train(train, stage, self.run.shards, inputs, **weights)

    def _train(
        self, train: Train, stage: StageName, data: Path, inputs: dict[str, Any], **start: Any
    ) -> None:
        folder = self.run.stage(stage)
        if self._is_done(folder, inputs):
            log.info("%s: complete", stage)
            return
        begin_stage(folder, inputs)
        holdout = str(self.data / HOLDOUT) if self._has_holdout else None
        job = PretrainJob(self.config, self.run.root, stage, str(data), holdout, **start)
        if job.stage_config.epochs:
            log.info("%s: training on %d workers", stage, self.config.parallel.num_workers)
        else:
            log.info("%s: no step, the weights of %s are taken", stage, self.config.model.init)
        train(job)
        if not is_first_process():
            return
        checkpoint = latest_checkpoint(folder / "checkpoints")
        assert checkpoint is not None
        files = [*checkpoint.iterdir(), folder / METRICS_NAME, *folder.glob("holdout.json")]
        mark_complete(folder, inputs, files, known=known_digests(folder, checkpoint))

    def _is_done(self, folder: Path, inputs: dict[str, Any]) -> bool:
        def found() -> bool:
            return is_complete(folder, inputs) and has_last_checkpoint(folder)

        if "RANK" not in os.environ:
            return found()
        from moce_dist.train.setup import choose_together, join_ranks

        # a rank that found otherwise would wait alone for the others
        join_ranks(self.config.parallel)
        return choose_together(found)


def data_id(folder: Path) -> str:
    """Fingerprint of a data set: sha256 and number of samples of its shards, in order."""
    shards = open_index(folder).shards
    if "samples" not in (read_marker(folder) or {}):
        # runs on data that an earlier version ingested know them by the sha256 alone
        return fingerprint([shard.sha256 for shard in shards])
    return fingerprint([[shard.sha256, shard.num_samples] for shard in shards])
