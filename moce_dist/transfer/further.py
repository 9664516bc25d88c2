"""Further steps of dense models: a task's own, and those of the controls to compare with.

    moce+own                    the customised ViT, on N images of the task's clusters, by its mass
                                over them
    control+own, mae+own        the control or the MAE, on the same images: shows whether experts
                                are a better start
    moce+train, ..., mae+train  the same, on the task's training images alone, N in all: shows what
                                the images that its clusters add are worth
    control+all, mae+all        the same, on N more images of all the data; one for all tasks

    RUN/transfer/TASK/continued/moce+own-N/{start/, metrics.jsonl, checkpoints/}
    RUN/transfer/TASK/continued/train/{index.json, train-000000.tar ...}
    RUN/{control,mae}_more/N[-HOW]/{start/, metrics.jsonl, checkpoints/}

The images are streamed by plan from the run's cluster-sharded tars, or from tars of the task's
training images, through the same loop as in all stages. The optimiser is new, and the schedule is
that of `transfer.continued`. Steps that were finished from the same inputs are not repeated;
interrupted ones are resumed.

Source: Gururangan et al. 2020, arXiv 2004.10964: training on a task's own images, and on images
that are like them (there texts).

Letters: K clusters.
"""

import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from moce_dist.config import DataConfig
from moce_dist.data.decoders import ImageError, check_bytes, check_header
from moce_dist.data.ingest import pack_samples
from moce_dist.data.plan import Shares, quotas_of
from moce_dist.run.artefacts import artefact_id, fingerprint, is_complete, mark_complete
from moce_dist.run.files import read_jsonl
from moce_dist.run.lease import hold
from moce_dist.settings import ConfigError
from moce_dist.train.checkpoint import latest_checkpoint, load_weights, write_weights
from moce_dist.train.finished import begin_stage, has_last_checkpoint, known_digests
from moce_dist.train.job import MoreSteps, Train
from moce_dist.train.metrics import METRICS_NAME, training_seconds
from moce_dist.transfer.choosing import Dense, need_stage
from moce_dist.transfer.continuing import FurtherJob
from moce_dist.transfer.skips import record_skips
from moce_dist.transfer.tasks import Item, sizes_of

logger = logging.getLogger(__name__)


class ImageSource(NamedTuple):
    """Where the images of further steps lie."""

    folder: Path
    """Folder of tars with an index."""
    shares: Shares | None = None
    """(K,) fractions to take of every cluster; None takes all images alike."""


def take_further_steps(
    job: FurtherJob, images: int, start: Dense, source: ImageSource, train: Train
) -> None:
    """Train a model on about `images` images unless that is done already; called on rank 0.

    `train` runs a job on all ranks.

    Raises:
        ConfigError: there are no tars, or no image of the clusters with a share.
    """
    folder, config = job.folder, job.config
    steps = _plan_steps(job, images, source)
    inputs = {
        "start": dict(start.identity),
        "shards": artefact_id(source.folder),
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
    start = need_stage(job.place, stage).dense(stage)
    take_further_steps(job, images, start, ImageSource(job.place.shards), train)


def _plan_steps(job: FurtherJob, images: int, source: ImageSource) -> MoreSteps:
    config, index = job.config, str(source.folder)
    steps = MoreSteps(config, job.run_root, "control", index, out=job.out)
    plan = steps.plan()
    if source.shares is not None:
        try:
            quotas = quotas_of(source.shares, plan.table.cluster_sizes, job.batch_size)
        except ValueError:
            raise ConfigError(f"{index}: holds no image of the task's clusters") from None
        steps = replace(steps, quotas=tuple(quotas.tolist()))
        plan = replace(plan, quotas=quotas)
    if plan.epoch_samples < job.batch_size:
        text = "%s: each step has %d images, all that there are, instead of %d"
        logger.warning(text, job.out, plan.epoch_samples, job.batch_size)
    count = max(1, round(images / job.batch_size))
    return replace(steps, epochs=count / plan.steps_per_epoch)


def shares_of(clusters: Mapping[str, int], num_clusters: int) -> Shares:
    """Return a task's mass over clusters, (K,), from the number of its images in each."""
    counts = np.zeros(num_clusters)
    for cluster, count in clusters.items():
        counts[int(cluster)] = count
    return counts / counts.sum()


def pack_training_images(
    items: Sequence[Item], out: Path, config: DataConfig, ledger: Path, batch_size: int
) -> None:
    """Write a task's training images to tars with an index, unless that is done already.

    Fewer images than a batch are written several times, as samples of their own, so that they fill
    it. Damaged images are left out, and recorded in `ledger`.

    Raises:
        ConfigError: more of them are damaged than `data.max_fault_fraction` allows, or all.
        OSError: a file cannot be read.
    """
    times = -(-batch_size // len(items))
    listed = [[item.key, size] for item, size in zip(items, sizes_of(items), strict=True)]
    inputs = {"images": fingerprint(listed), "times": times}
    if is_complete(out, inputs):
        return
    damaged: dict[str, str] = {}

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for number, item in enumerate(chain.from_iterable(repeat(items, times))):
            content = item.read()
            try:
                check_bytes(content)
                ending = check_header(io.BytesIO(content))
            except ImageError as error:
                damaged[item.key] = str(error)
                continue
            # a key ends at the first dot; equal ones differ by their number
            yield f"{number:07d}/{item.key.replace('.', '_')}", {ending: content}
        _check_damaged(damaged, len(items), config.max_fault_fraction, ledger)

    pack_samples(samples, out, config.model_copy(update={"holdout_fraction": 0.0}), inputs)


def _check_damaged(damaged: dict[str, str], total: int, limit: float, ledger: Path) -> None:
    if not damaged:
        return
    record_skips(ledger, [{"key": key, "reason": reason} for key, reason in damaged.items()])
    said = f"{len(damaged)} of {total} training images cannot be read; each is named in {ledger}"
    # as in ingest, a single one is too many only if none is allowed, or if it is the only image
    if len(damaged) > limit * total and (len(damaged) > 1 or not limit or total == 1):
        raise ConfigError(f"{said}; data.max_fault_fraction is {limit}")
    logger.warning("%s; they are left out", said)


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
