"""What the models see in masked images: reconstructions, and what an expert knows.

A MoCE holds a dense model per route (one expert per MoE layer), extracted as for a downstream task.
The same masked image is given to an early and a late MAE, to the control, to the experts of its own
cluster and to those of another one. The higher loss of the other experts measures what the own
experts know.

    image --keyed mask--> visible patches --model of a route--> masked patches, loss

Held-out images are used if there are any. With `model.norm_pix_loss` a prediction is of patches
normalised by their own mean and variance, which are restored for display.

Letters: B images, N patches, S image side (pixels), L MoE layers, K clusters, R shown clusters.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from moce_dist.config import Config
from moce_dist.data.columns import is_mapped, open_table
from moce_dist.data.decoders import ImageError
from moce_dist.data.images import MEAN, STD, centre_sample, normalise, open_croppable
from moce_dist.data.ranges import is_remote
from moce_dist.data.shards import HOLDOUT, INDEX_NAME, read_range
from moce_dist.data.table import SampleTable
from moce_dist.model.customize import customize
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.model.vit import patchify, unpatchify
from moce_dist.report.gate import GateView
from moce_dist.report.record import Record
from moce_dist.settings import ConfigError
from moce_dist.train.checkpoint import complete_checkpoints, damage, load_weights, read_manifest

_MAX_SHOWN = 6
_PER_CLUSTER = 4
_SIDE = 112
_MAX_INDEX_BYTES = 256 * 2**20
_MAX_CHECKPOINT_BYTES = 4 * 2**30
_GREY = 0.5


class Tile(NamedTuple):
    """An image on the page: `src` is a data URI, `loss` is shown beneath it."""

    src: str
    loss: float | None = None


@dataclass(frozen=True)
class Row:
    """One image: the original, the masked one, and the reconstruction of every model."""

    cluster: int | None
    other: int | None
    """The cluster whose experts fill the last column."""
    tiles: list[Tile]


@dataclass(frozen=True)
class Reconstructions:
    """Rows of tiles under `columns`, and losses of images under the experts of other clusters."""

    columns: list[str]
    rows: list[Row]
    is_held_out: bool
    clusters: list[int] = field(default_factory=list)
    losses: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    """(R, R): mean loss of a cluster's images (row) under a cluster's experts (column)."""


class _Samples(NamedTuple):
    images: Tensor
    """(B, 3, S, S) normalised."""
    clusters: NDArray[np.int64]
    is_held_out: bool


class _Seen(NamedTuple):
    images: Tensor
    """(B, 3, S, S) normalised, with the masked patches predicted."""
    losses: Tensor
    """(B,)"""


def reconstruct(record: Record, gate: GateView | None) -> Reconstructions | str:
    """Make the reconstructions of a run, or say in a line why there are none.

    Raises:
        ConfigError, OSError, ValueError: a file cannot be read.
    """
    config = record.config
    if config is None:
        return "the configuration could not be read"
    if not complete_checkpoints(record.run.stage("mae") / "checkpoints"):
        return "no checkpoint of stage mae was kept"
    if not _checkpoints(record, "mae"):
        limit = _MAX_CHECKPOINT_BYTES >> 30
        return f"checkpoints of stage mae are damaged, or above the {limit} GiB that a page loads"
    samples = read_samples(record, config, gate)
    if samples is None:
        return "the run's images are not on this machine's disks, or too many"
    return _Viewer(record, config, gate, samples).view()


class _Viewer:
    """Gives the same masked images to one model after the other."""

    def __init__(
        self, record: Record, config: Config, gate: GateView | None, samples: _Samples
    ) -> None:
        self.record, self.gate, self.samples = record, gate, samples
        parallel = config.parallel.model_copy(update={"precision": "fp32"})
        self.config = config.without_experts.model_copy(update={"parallel": parallel})
        self.cluster_config = config
        draws = torch.Generator().manual_seed(config.seed)
        self.noise = torch.rand(len(samples.images), config.num_patches, generator=draws)

    def view(self) -> Reconstructions:
        """Compute rows and losses."""
        seen: dict[str, _Seen] = {}
        kept = _checkpoints(self.record, "mae")
        titles = self.record.titles
        for checkpoint in dict.fromkeys([kept[-1], kept[0]]):
            step = read_manifest(checkpoint)["step"]
            seen[f"MAE, step {step}"] = self._see(load_weights(checkpoint), ())
        for stage in ("control", "moce"):
            is_dense = stage == "control" or self.record.without_routes.startswith("no experts")
            for checkpoint in _checkpoints(self.record, stage)[:1] if is_dense else []:
                seen[titles[stage]] = self._see(load_weights(checkpoint), ())
        clusters = list(dict.fromkeys(self.samples.clusters.tolist()))
        by_route = self._by_route(clusters)
        first = [self.samples.clusters.tolist().index(c) for c in clusters]
        columns = ["original", "masked", *seen, *(_OWN_AND_OTHER if by_route else ())]
        rows = [self._row(i, seen, by_route, clusters) for i in first]
        losses = np.array(
            [
                [float(by_route[j].losses[self.samples.clusters == i].mean()) for j in clusters]
                for i in clusters
            ]
            if by_route
            else np.zeros((0, 0))
        )
        held_out = self.samples.is_held_out
        return Reconstructions(columns, rows, held_out, clusters if by_route else [], losses)

    def _by_route(self, clusters: Sequence[int]) -> dict[int, _Seen]:
        """Give all images to the experts of every shown cluster."""
        kept = _checkpoints(self.record, "moce")[:1]
        if self.gate is None or not kept:
            return {}
        weights = load_weights(kept[0])
        found: dict[tuple[int, ...], _Seen] = {}
        by_cluster = {}
        for cluster in clusters:
            route = tuple(self.gate.table[:, cluster].tolist())
            is_scaled = self.cluster_config.gate.combine == "prob"
            scale = self.gate.chosen[:, cluster].tolist() if is_scaled else None
            if route not in found or is_scaled:
                found[route] = self._see(weights, route, scale)
            by_cluster[cluster] = found[route]
        return by_cluster

    def _see(
        self, weights: Mapping[str, Tensor], route: Sequence[int], scale: list[float] | None = None
    ) -> _Seen:
        model = MaskedAutoencoder(self.config).eval()
        dense = customize(weights, list(route), scale=scale, with_decoder=True)
        model.load_state_dict(dense)
        images, patch = self.samples.images, self.config.model.patch_size
        with torch.inference_mode():
            prediction, is_masked = model.predict(images, self.noise)
            errors = ((prediction - model.target(images)) ** 2).mean(dim=2) * is_masked
        losses = errors.sum(dim=1) / is_masked.sum(dim=1)
        patches = patchify(images, patch)
        if self.config.model.norm_pix_loss:
            mean, variance = patches.mean(dim=2, keepdim=True), patches.var(dim=2, keepdim=True)
            prediction = prediction * (variance + 1e-6) ** 0.5 + mean
        whole = torch.where(is_masked[:, :, None], prediction, patches)
        return _Seen(unpatchify(whole, patch), losses)

    def _row(
        self,
        i: int,
        seen: Mapping[str, _Seen],
        by_route: Mapping[int, _Seen],
        clusters: Sequence[int],
    ) -> Row:
        cluster = int(self.samples.clusters[i])
        patches = patchify(self.samples.images, self.config.model.patch_size)
        keep = int(patches.shape[1] * (1 - self.config.model.mask_ratio))
        order = self.noise.argsort(dim=1, stable=True).argsort(dim=1)
        grey = (_GREY - torch.tensor(MEAN)) / torch.tensor(STD)
        grey = grey.repeat(patches.shape[2] // 3)
        hidden = torch.where((order >= keep)[:, :, None], grey, patches)
        tiles = [
            _tile(self.samples.images[i]),
            _tile(unpatchify(hidden, self.config.model.patch_size)[i]),
        ]
        tiles += [_tile(s.images[i], s.losses[i]) for s in seen.values()]
        other = None
        if by_route and self.gate is not None:
            # the one whose experts differ in most layers
            apart = [
                (int((self.gate.table[:, c] != self.gate.table[:, cluster]).sum()), -c)
                for c in clusters
            ]
            other = -max(apart)[1]
            for c in (cluster, other):
                tiles.append(_tile(by_route[c].images[i], by_route[c].losses[i]))
        return Row(cluster if self.gate is not None else None, other, tiles)


_OWN_AND_OTHER = ("MoCE, own experts", "MoCE, other experts")


def _checkpoints(record: Record, stage: str) -> list[Path]:
    """List undamaged small checkpoints, newest first; only the first and last are verified."""
    every = complete_checkpoints(record.run.stage(stage) / "checkpoints")
    found = [path for path in every if _bytes(path) <= _MAX_CHECKPOINT_BYTES]
    newest = next((i for i, path in enumerate(found) if damage(path) is None), len(found))
    found = found[newest:]
    while len(found) > 1 and damage(found[-1]) is not None:
        found.pop()
    return found


def _bytes(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.iterdir())


def _readable(folder: Path) -> Path:
    """Return the folder of an index.

    Raises:
        ConfigError: the index is too large to be read for some images.
    """
    path = folder / INDEX_NAME
    too_large = path.is_file() and path.stat().st_size > _MAX_INDEX_BYTES
    if too_large and not is_mapped(folder):
        raise ConfigError(f"{path}: is too large to be read for some images")
    return folder


def _table(record: Record, config: Config, gate: GateView | None) -> tuple[SampleTable, bool]:
    """Return the held-out images with their clusters, else the images of training."""
    # imported late, because it needs pyarrow and faiss
    from moce_dist.cluster.assignments import open_assigned

    run, data = record.run, record.run.data(config)
    has_holdout = (data / HOLDOUT / INDEX_NAME).is_file()
    if gate is None:
        return open_table(_readable(data / HOLDOUT if has_holdout else data)), has_holdout
    num_clusters = gate.table.shape[1]
    if has_holdout and run.holdout_clusters.is_file():
        folder = _readable(data / HOLDOUT)
        return open_assigned(folder, run.holdout_clusters, num_clusters), True
    return open_table(_readable(run.shards), num_clusters), False


def read_samples(record: Record, config: Config, gate: GateView | None) -> _Samples | None:
    """Read the images to reconstruct, with their clusters; None if the data is not at hand."""
    try:
        table, is_held_out = _table(record, config, gate)
    except ConfigError:
        return None
    if any(is_remote(url) for url in table.urls):
        return None
    images: list[Tensor] = []
    clusters: list[int] = []
    for cluster in _shown(table, gate):
        count = _PER_CLUSTER if gate is not None else _MAX_SHOWN
        # the middle image of each of `count` parts, because images of one folder are neighbours
        size = int(table.cluster_sizes[cluster])
        places = np.unique((2 * np.arange(count) + 1) * size // (2 * count))
        for row in table.members(np.full(len(places), cluster), places):
            url = table.urls[int(table.shard[row])]
            content = read_range(url, int(table.offset[row]), int(table.size[row]))
            try:
                sample = centre_sample(open_croppable(content), config.data.image_size)
            except ImageError:
                continue
            images.append(normalise(torch.from_numpy(sample)))
            clusters.append(cluster if gate is not None else len(clusters))
    if not images:
        return None
    return _Samples(torch.stack(images), np.array(clusters, np.int64), is_held_out)


def _shown(table: SampleTable, gate: GateView | None) -> list[int]:
    """Choose clusters whose experts differ most from each other, beginning with the largest."""
    sizes = table.cluster_sizes
    chosen = [int(sizes.argmax())]
    if gate is None:
        return chosen
    routes = gate.table.T
    apart = (routes != routes[chosen[0]]).sum(axis=1)
    while len(chosen) < min(_MAX_SHOWN, int((sizes > 0).sum())):
        left = np.where((sizes > 0) & ~np.isin(np.arange(len(sizes)), chosen), apart, -1)
        chosen.append(int(left.argmax()))
        apart = np.minimum(apart, (routes != routes[chosen[-1]]).sum(axis=1))
    return chosen


def _tile(image: Tensor, loss: Tensor | None = None) -> Tile:
    levels = image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    pixels = (levels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    drawn, buffer = Image.fromarray(pixels), io.BytesIO()
    if drawn.width > _SIDE:
        drawn.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    else:
        drawn.save(buffer, "PNG")
        kind = "png"
    src = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Tile(src, None if loss is None else float(loss))
