"""Extract the features of a shard's images: decode, encode in fixed batches, one file per shard.

    RUN/features/train-000003.npy          (n, D) float16, raw encoder output, one row per sample
    RUN/features/train-000003.keys.json    the n keys, in the same order
    RUN/features/train-000003.labels.json  the n classes (members `cls`), null where a sample has
                                           none; no file if no sample has one

A file gets its name only when it is complete, so a restart skips finished files. Batches depend on
the shard alone and the last one is padded, so a file does not depend on which process wrote it. An
unreadable image keeps its row, of zeros, and gets a line in the ledger of faults.

Letters: B images of a batch, S side in pixels, D width.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moce_dist.arrays import Float32
from moce_dist.data.shards import ShardIndex
from moce_dist.features.decoding import ImageBatch, ShardImages
from moce_dist.run.artefacts import begin, is_begun
from moce_dist.run.files import read_faults, record_fault, replacing, write_atomic
from moce_dist.run.names import as_text

FEATURE_FILES = ("*.npy", "*.keys.json", "*.labels.json")
"""Name patterns of the files of a shard's features."""
Encode = Callable[[torch.Tensor], torch.Tensor]
"""(B, 3, S, S) normalised images -> (B, D) features."""


@dataclass(frozen=True)
class EncoderSpec:
    """How a process builds its encoder: `factory(*arguments)`, a module-level function.

    A process caches the last encoder. `identity` differs where equal arguments mean other weights.
    """

    factory: Callable[..., Encode]
    arguments: tuple[str, ...] = ()
    identity: str = ""


@dataclass(frozen=True)
class FeatureJob:
    """All that a worker needs to write the features of one shard."""

    images: ShardImages
    name: str
    out: Path
    ledger: Path
    encoder: EncoderSpec

    @property
    def target(self) -> Path:
        """The file of the features, which exists only when it is complete."""
        return self.out / f"{self.name}.npy"


@lru_cache(maxsize=1)
def cached_encoder(encoder: EncoderSpec) -> Encode:
    """Build an encoder, or return the one that this process built last, if it is the same."""
    return encoder.factory(*encoder.arguments)


def feature_names(index: ShardIndex) -> list[str]:
    """Return the file stems of the shards' features.

    Shards with equal tar names get the first 8 digits of their path's sha256 appended.
    """
    stems = [Path(shard.path).name.removesuffix(".tar") for shard in index.shards]
    counts = Counter(stems)
    return [
        stem
        if counts[stem] == 1
        else f"{stem}-{hashlib.sha256(as_text(shard.path).encode()).hexdigest()[:8]}"
        for stem, shard in zip(stems, index.shards, strict=True)
    ]


def begin_features(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Prepare a folder for features made from `inputs`; remove files made from other inputs."""
    for torn in folder.glob(".*.tmp"):
        torn.unlink(missing_ok=True)
    if is_begun(folder, inputs):
        return
    for stale in [path for pattern in FEATURE_FILES for path in folder.glob(pattern)]:
        stale.unlink(missing_ok=True)
    begin(folder, inputs)


def extract_shard(_: None, job: FeatureJob) -> int:
    """Write the features, keys and labels of a shard unless they exist; count unreadable images.

    The count is 0 where they exist. The first argument is what `MapTasks` shares: nothing.

    Raises:
        FileNotFoundError: the shard is gone.
    """
    if job.target.is_file():
        return 0
    faults: dict[int, str] = {}
    labels: list[str | None] = []
    parts = []
    for batch in job.images.batches():
        parts.append(_encode(job, batch))
        faults |= batch.faults
        labels += batch.labels
    features = np.concatenate(parts)
    features[list(faults)] = 0
    write_atomic(job.out / f"{job.name}.keys.json", json.dumps(list(job.images.shard.keys)))
    if any(label is not None for label in labels):
        write_atomic(job.out / f"{job.name}.labels.json", json.dumps(labels))
    _record(job, faults)
    with replacing(job.target) as temporary, temporary.open("wb") as file:
        np.save(file, features.astype(np.float16), allow_pickle=False)
    return len(faults)


def _record(job: FeatureJob, faults: Mapping[int, str]) -> None:
    if not faults:
        return
    # a worker that died after writing these lines, but before the features, has left them
    lines = read_faults(job.ledger)
    known = {(line.get("stage"), line.get("shard"), line.get("key")) for line in lines}
    for row, reason in faults.items():
        place = {"stage": "features", "shard": job.images.url, "key": job.images.shard.keys[row]}
        if tuple(place.values()) not in known:
            record_fault(job.ledger, **place, reason=reason)


def _encode(job: FeatureJob, batch: ImageBatch) -> Float32:
    with torch.inference_mode():
        features = cached_encoder(job.encoder)(torch.from_numpy(batch.images))
    return features[: batch.num_images].float().cpu().numpy()
