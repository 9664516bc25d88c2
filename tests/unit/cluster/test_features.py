"""Features of real tars: keys, slots of unreadable images, restarts, the same file from anyone."""

import hashlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from moce_dist.cluster.assign import assign_features
from moce_dist.cluster.blocks import open_features
from moce_dist.cluster.features import (
    EncoderSpec,
    FeatureJob,
    begin_features,
    extract_shard,
    feature_names,
    features_mean,
    transform,
)
from moce_dist.data.images import eval_image
from moce_dist.data.shards import Shard, ShardIndex
from moce_dist.data.writer import ShardWriter
from moce_dist.run import read_faults

SIZE = 16


def build_encoder(width):
    """A fixed linear encoder (B, 3, S, S) -> (B, width)."""
    weight = torch.randn(3 * SIZE * SIZE, int(width), generator=torch.Generator().manual_seed(0))
    return lambda images: images.flatten(1) @ weight


def broken_encoder(images):
    raise AssertionError("must not be called")


def build_broken(*arguments):
    return broken_encoder


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def shard_of(folder, contents, name="train-000000.tar"):
    writer = ShardWriter(folder, name)
    for number, content in enumerate(contents):
        writer.add(f"domain/{number}", {"png": content})
    return writer.close()


def job_of(folder, shard, **more):
    arguments = {
        "shard": shard,
        "url": str(folder / shard.path),
        "name": "train-000000",
        "out": folder / "features",
        "ledger": folder / "faults.jsonl",
        "encoder": EncoderSpec(build_encoder, ("8",)),
        "image_size": SIZE,
        "batch_size": 4,
    }
    return FeatureJob(**{**arguments, **more})


def test_rows_are_the_encoders_features_in_the_order_of_the_keys(tmp_path):
    contents = [png(seed) for seed in range(10)]
    shard = shard_of(tmp_path, contents)
    assert extract_shard(job_of(tmp_path, shard)) == 0
    rows = np.load(tmp_path / "features" / "train-000000.npy")
    assert rows.dtype == np.float16 and rows.shape == (10, 8)
    images = torch.from_numpy(np.stack([eval_image(content, SIZE) for content in contents]))
    np.testing.assert_allclose(rows, build_encoder("8")(images).numpy(), rtol=2e-3, atol=0.05)
    keys = json.loads((tmp_path / "features" / "train-000000.keys.json").read_text())
    assert keys == [f"domain/{number}" for number in range(10)]


def test_unreadable_image_keeps_its_slot_as_a_row_of_zeros_and_a_fault(tmp_path):
    contents = [png(0), b"no picture", png(1)[:60], png(2)]
    shard = shard_of(tmp_path, contents)
    assert extract_shard(job_of(tmp_path, shard)) == 2
    rows = np.load(tmp_path / "features" / "train-000000.npy")
    assert (rows == 0).all(axis=1).tolist() == [False, True, True, False]
    faults = read_faults(tmp_path / "faults.jsonl")
    assert [fault["key"] for fault in faults] == ["domain/1", "domain/2"]
    assert all(fault["reason"] and fault["shard"].endswith(".tar") for fault in faults)
    labels, _ = assign_features(rows, np.eye(2, 8), mean=rows.mean(axis=0))
    assert len(labels) == 4


def test_finished_shard_is_skipped_and_unfinished_one_is_not(tmp_path):
    shard = shard_of(tmp_path, [png(0), png(1)])
    extract_shard(job_of(tmp_path, shard))
    broken = job_of(tmp_path, shard, encoder=EncoderSpec(build_broken, ("other",)))
    assert extract_shard(broken) == 0
    (tmp_path / "features" / "train-000000.npy").unlink()
    with pytest.raises(AssertionError, match="must not be called"):
        extract_shard(broken)
    assert not list((tmp_path / "features").glob("*.npy"))


def test_neighbours_in_a_batch_and_writers_do_not_matter(tmp_path):
    contents = [png(seed) for seed in range(9)]
    digests = set()
    for writer in ("a", "b"):
        folder = tmp_path / writer
        extract_shard(job_of(folder, shard_of(folder, contents)))
        content = (folder / "features" / "train-000000.npy").read_bytes()
        digests.add(hashlib.sha256(content).hexdigest())
    assert len(digests) == 1


def test_empty_shard_gives_no_rows_of_the_right_width(tmp_path):
    extract_shard(job_of(tmp_path, shard_of(tmp_path, [])))
    assert np.load(tmp_path / "features" / "train-000000.npy").shape == (0, 8)
    assert open_features(tmp_path / "features").num_rows == 0


def test_features_of_other_inputs_are_removed(tmp_path):
    folder = tmp_path / "features"
    begin_features(folder, {"mae": "a"})
    (folder / "x.npy").touch()
    begin_features(folder, {"mae": "a"})
    assert (folder / "x.npy").exists()
    begin_features(folder, {"mae": "b"})
    assert not (folder / "x.npy").exists()


def test_equal_tar_names_get_different_features():
    shards = [Shard(path) for path in ("a/0.tar", "b/0.tar", "b/1.tar")]
    names = feature_names(ShardIndex("", shards))
    assert len(set(names)) == 3 and names[2] == "1"
    assert names[0].startswith("0-") and names[1].startswith("0-")


def test_transform_subtracts_the_mean_and_scales_to_length_one(tmp_path):
    rows = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float16) + 3
    for number, part in enumerate(np.array_split(rows, 3)):
        np.save(tmp_path / f"{number}.npy", part)
    mean = features_mean(tmp_path)
    np.testing.assert_allclose(mean, rows.astype(np.float64).mean(axis=0), rtol=1e-12)
    centred = rows.astype(np.float64) - mean
    expected = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(transform(rows, mean), expected, atol=1e-5)
    assert transform(mean[None], mean).tolist() == [[0] * 6]
