"""Further steps of dense models: a task's own, and those of the controls to compare with.

    moce+own                the customised ViT, on N images of the task's clusters, by its mass
                            over them
    control+own, mae+own    the control or the MAE, on the same images: shows whether experts are a
                            better start
    control+all, mae+all    the same, on N more images of all the data; one for all tasks of a run

    RUN/transfer/TASK/continued/moce+own-N/{start/, metrics.jsonl, checkpoints/}
    RUN/{control,mae}_more/N[-HOW]/{start/, metrics.jsonl, checkpoints/}

The images are streamed by plan from the run's cluster-sharded tars, through the same loop as in all
stages. The optimiser is new, and the schedule is that of `transfer.continued`. Steps that were
finished from the same inputs are not repeated; interrupted ones are resumed.

Letters: K clusters.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from moce_dist.data.plan import Shares, quotas_of
from moce_dist.run.artefacts import artefact_id, is_complete, mark_complete
from moce_dist.run.files import read_jsonl
from moce_dist.run.lease import hold
from moce_dist.settings import ConfigError
from moce_dist.train.checkpoint import latest_checkpoint, load_weights, write_weights
from moce_dist.train.finished import begin_stage, has_last_checkpoint, known_digests
from moce_dist.train.job import MoreSteps, Train
from moce_dist.train.metrics import METRICS_NAME, training_seconds
from moce_dist.transfer.choosing import Dense, need_stage
from moce_dist.transfer.continuing import FurtherJob

logger = logging.getLogger(__name__)


def take_further_steps(
    job: FurtherJob, images: int, start: Dense, shares: Shares | None, train: Train
) -> None:
    """Train a model on about `images` images unless that is done already; called on rank 0.

    `shares` (K,) are the fractions of the images to take from every cluster; None takes all images
    alike. `train` runs a job on all ranks.

    Raises:
        ConfigError: the run has no tars of clusters, or no image of the clusters with a share.
    """
    run, folder, config = job.place, job.folder, job.config
    steps = _plan_steps(job, images, shares)
    inputs = {
        "start": dict(start.identity),
        "shards": artefact_id(run.shards),
        "quotas": None if steps.quotas is None else list(steps.quotas),
        "images": images,
        "optimisation": steps.stage_config.model_dump(mode="json"),
        "seed": config.seed,
    }
    if is_complete(folder, inputs) and has_last_checkpoint(folder):
        logger.info("%s: complete", job.out)
        if "RANK" in os.environ:
            train(job)
        return
    with hold(folder.parent):
        begin_stage(folder, inputs)
        write_weights(folder / "start", start.weights)
        train(replace(job, steps=replace(steps, start=str(folder / "start"))))
        checkpoint = latest_checkpoint(folder / "checkpoints")
        assert checkpoint is not None
        files = [*checkpoint.iterdir(), folder / METRICS_NAME]
        mark_complete(folder, inputs, files, known=known_digests(folder, checkpoint))


def take_shared_steps(job: FurtherJob, stage: str, images: int, train: Train) -> None:
    """Continue a stage's dense model on all images, once for all tasks; see `take_further_steps`.

    Raises:
        ConfigError: the run lacks that stage.
    """
    take_further_steps(job, images, need_stage(job.place, stage).dense(stage), None, train)


def _plan_steps(job: FurtherJob, images: int, shares: Shares | None) -> MoreSteps:
    config, index = job.config, str(job.place.shards)
    steps = MoreSteps(config, job.run_root, "control", index, out=job.out)
    plan = steps.plan()
    if shares is not None:
        try:
            quotas = quotas_of(shares, plan.table.cluster_sizes, job.batch_size)
        except ValueError:
            raise ConfigError(f"{index}: holds no image of the task's clusters") from None
        steps = replace(steps, quotas=tuple(quotas.tolist()))
        plan = replace(plan, quotas=quotas)
    count = max(1, round(images / job.batch_size))
    return replace(steps, epochs=count / plan.steps_per_epoch)


def shares_of(clusters: Mapping[str, int], num_clusters: int) -> Shares:
    """Return a task's mass over clusters, (K,), from the number of its images in each."""
    counts = np.zeros(num_clusters)
    for cluster, count in clusters.items():
        counts[int(cluster)] = count
    return counts / counts.sum()


def further_weights(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """Read the result of further steps: the name of the last checkpoint, and all weights.

    Raises:
        ConfigError: there is none.
    """
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise ConfigError(f"{folder / 'checkpoints'}: holds no whole checkpoint")
    return checkpoint.name, load_weights(checkpoint)


def cost_of(folder: Path) -> dict[str, float]:
    """Return the cost of further steps: images that they saw, and seconds that they took."""
    lines = read_jsonl(folder / METRICS_NAME)
    images = lines[-1]["images_seen"] if lines else 0
    return {"images": images, "seconds": round(training_seconds(lines), 2)}
