"""A small finished run on disk, made without training: real files in the formats that jobs read."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from in_process import load_script
from PIL import Image
from safetensors.torch import save_file

from moce_dist.config import Config, TransferConfig, make_config
from moce_dist.data.images import normalise
from moce_dist.data.shards import write_index
from moce_dist.data.writer import ShardWriter
from moce_dist.features.decoding import framed_image
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.model.moce import global_names, is_stacked
from moce_dist.run.artefacts import file_sha256, fingerprint, mark_complete
from moce_dist.run.directory import Run, open_run
from moce_dist.transfer.fit import Trial
from moce_dist.transfer.kinds import kind_named

ROOT = Path(__file__).parents[3]
NUM_EXPERTS, NUM_CLUSTERS, SIZE = 3, 6, 16


def transfer(
    run: Run, *flags: str, launcher: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run the job as a user does, or have a launcher's module run it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    job = [str(ROOT / "jobs" / "transfer.py"), "--run", str(run.root)]
    command = [sys.executable, *launcher, *job, *flags]
    return subprocess.run(
        command, cwd=run.root, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="session")
def job() -> ModuleType:
    """The job as a module, for the tests that are about what it does, not how it ends."""
    return load_script(ROOT / "jobs" / "transfer.py")


@pytest.fixture(scope="session")
def config() -> Config:
    return make_config(
        {
            "data": {"image_size": SIZE, "loader_processes": 0},
            "model": {
                **{"width": 24, "depth": 4, "num_heads": 2, "patch_size": 4},
                **{"decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2},
            },
            "moe": {"num_experts": NUM_EXPERTS, "layers": [1, 3]},
            "parallel": {"precision": "fp32"},
            "cluster": {"num_clusters": NUM_CLUSTERS, "batch_size": 32},
            "transfer": {
                "linear_epochs": 20,
                "knn_k": 3,
                "finetune": {"epochs": 2, "warmup_epochs": 1, "batch_size": 16},
                "segmentation": {"crop": 32, "steps": 4, "batch_size": 2, "channels": 8},
                "detection": {
                    **{"size": 64, "steps": 3, "batch_size": 2},
                    **{"channels": 8, "rois": 8, "window": 5},
                },
            },
        }
    )


def shifted(model: MaskedAutoencoder) -> MaskedAutoencoder:
    """Biases and norms start at 0 and 1; a mistake there would not show."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def by_global_name(model: MaskedAutoencoder, config: Config) -> dict[str, torch.Tensor]:
    weights = {}
    for name, tensor in model.state_dict().items():
        if is_stacked(name):
            residents = [range(config.moe.num_experts)] * len(config.moe_layers)
            names = global_names(name, config.moe_layers, residents)
            weights |= {g: t.clone() for g, t in zip(names, tensor, strict=True)}
        else:
            weights[name] = tensor
    return weights


def write_checkpoint(
    folder: Path, weights: dict[str, torch.Tensor], steps_before: int | None = None
) -> None:
    folder.mkdir(parents=True)
    shared = {f"weight/{n}": t for n, t in weights.items() if ".experts." not in n}
    experts = {f"weight/{n}": t for n, t in weights.items() if ".experts." in n}
    files = {}
    for name, tensors in (("shared", shared), ("experts-00000", experts)):
        if tensors:
            path = folder / f"{name}.safetensors"
            save_file({n: t.contiguous() for n, t in tensors.items()}, path)
            files[path.name] = file_sha256(path)
    manifest = {"format": "moce_dist.checkpoint.v2", "step": 5, "files": files}
    if steps_before is not None:
        manifest["steps_before"] = steps_before
    manifest["sha256"] = fingerprint(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def texture(label: int, draws: np.random.Generator, size: int = 20) -> np.ndarray:
    """Stripes whose direction is the class, with noise."""
    axis = np.arange(size)[:, None] if label == 0 else np.arange(size)[None, :]
    waves = 127 + 100 * np.sin(axis * 1.3 + draws.uniform(0, 6))
    pixels = np.broadcast_to(waves, (size, size))[:, :, None] + draws.normal(0, 25, (size, size, 3))
    return pixels.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, draws = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 12)):
        for label, name in enumerate(("rows", "columns")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i:03d}.png").write_bytes(png(texture(label, draws)))
    return root


@pytest.fixture(scope="session")
def models(config: Config) -> dict[str, MaskedAutoencoder]:
    torch.manual_seed(0)
    mae = shifted(MaskedAutoencoder(config))
    centroids = torch.randn(NUM_CLUSTERS, 24)
    moce = MaskedAutoencoder(config, centroids=centroids, num_local_experts=NUM_EXPERTS)
    return {"mae": mae, "moce": shifted(moce)}


@pytest.fixture
def run(
    tmp_path: Path, config: Config, models: dict[str, MaskedAutoencoder], image_folder: Path
) -> Run:
    made = open_run(tmp_path / "run", config)
    for name, model in models.items():
        weights = by_global_name(model, config)
        write_checkpoint(made.stage(name) / "checkpoints" / "step_00000005", weights)
    files = sorted((image_folder / "train").rglob("*.png"))
    images = np.stack([framed_image(p.read_bytes(), SIZE, None) for p in files])
    with torch.no_grad():
        features = models["mae"].features(normalise(torch.from_numpy(images))).numpy()
    mean = features.mean(axis=0)
    unit = features - mean
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    made.clusters.mkdir()
    chosen = [0, 1, 2, -1, -2, -3]
    np.save(made.clusters / "centroids.npy", unit[chosen].astype(np.float32))
    np.save(made.clusters / "mean.npy", mean.astype(np.float32))
    mark_complete(made.clusters, {}, sorted(made.clusters.glob("*.npy")))
    return made


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, draws = tmp_path_factory.mktemp("scenes"), np.random.default_rng(1)
    for split, count in (("training", 6), ("validation", 3)):
        some_images, masks = root / "images" / split, root / "annotations" / split
        some_images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for i in range(count):
            height, width = 40 + 3 * i, 48
            pixels = draws.integers(0, 80, (height, width, 3), np.uint8)
            mask = np.ones((height, width), np.uint8)
            pixels[:, 20:] += 150
            mask[:, 20:] = 2
            mask[:4] = 0
            Image.fromarray(pixels).save(some_images / f"{i}.jpg")
            Image.fromarray(mask).save(masks / f"{i}.png")
    (root / "classes.txt").write_text("dark\nbright\nabsent\n")
    return root


def coco_annotation(number: int, image: int, category: int, box: list[float]) -> dict[str, Any]:
    """An object with its outline: a rectangle, or a triangle where the category is even."""
    x, y, width, height = box
    outline = [x, y, x + width, y, x + width, y + height, x, y + height]
    polygon = outline if category % 2 else outline[:6]
    area = width * height / (1 if category % 2 else 2)
    return {
        **{"id": number, "image_id": image, "category_id": category, "bbox": box},
        **{"area": area, "iscrowd": 0, "segmentation": [polygon]},
    }


def write_coco(root: Path, *, categories: dict[int, str], counts: dict[str, int]) -> Path:
    """Dark images with one bright object a category at a time, in COCO's layout."""
    draws, number = np.random.default_rng(2), 0
    (root / "annotations").mkdir(parents=True)
    for split, count in counts.items():
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(count):
            height, width = 40 + 2 * (i % 5), 56
            pixels = draws.integers(0, 60, (height, width, 3), np.uint8)
            # ids are not in the order of the files
            image = {"id": 1000 - 7 * i, "file_name": f"{i:012d}.jpg"}
            images.append({**image, "width": width, "height": height})
            for which in range(2):
                category = list(categories)[number % len(categories)]
                left, upper = int(draws.integers(2, 8)) + 26 * which, int(draws.integers(2, 8))
                box = [left, upper, 18, 22 + 2 * which]
                colour = [220, 40 + 170 * (category % 2), 40]
                pixels[upper : upper + box[3], left : left + 18] = colour
                number += 1
                annotations.append(coco_annotation(number, image["id"], category, box))
            Image.fromarray(pixels).save(
                root / split / image["file_name"], quality=95, subsampling=0
            )
        tree = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": k, "name": name} for k, name in categories.items()],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(tree))
    return root


@pytest.fixture(scope="session")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    return write_coco(
        root, categories={3: "yellow", 8: "red"}, counts={"train2017": 6, "val2017": 3}
    )


def finetune(backbone, task, recipe, machine, *, seed, kept=None):
    """Fine-tune a classifier."""
    transfer = TransferConfig(finetune=recipe)
    trial = Trial(backbone, transfer, machine, "finetune", seed, Path("unused"), kept)
    return kind_named("classify")[1].fit(task, trial)


def segment(backbone, task, recipe, machine, *, seed, out, kept=None):
    """Train a segmenter."""
    transfer = TransferConfig(segmentation=recipe)
    trial = Trial(backbone, transfer, machine, "finetune", seed, out, kept)
    return kind_named("segment")[1].fit(task, trial)


@pytest.fixture
def clustered(run: Run, config, models) -> Run:
    """The run with a control and tars of 12 images a cluster; the last one is empty."""
    control = {n: t * 1.1 for n, t in by_global_name(models["mae"], config).items()}
    write_checkpoint(run.stage("control") / "checkpoints" / "step_00000005", control)
    mark_complete(run.stage("control"), {}, [])
    draws, shards = np.random.default_rng(0), []
    for cluster in range(NUM_CLUSTERS - 1):
        writer = ShardWriter(run.shards, f"cluster-{cluster:05d}-000000.tar", cluster=cluster)
        for number in range(12):
            writer.add(f"c{cluster}/{number}", {"png": png(texture(cluster % 2, draws))})
        shards.append(writer.close())
    write_index(run.shards, shards)
    mark_complete(run.shards, {}, [])
    return run
