"""The benchmarks of the data plane measure what they say, at a tiny size."""

import json
import os

import pytest
import torch
from benches import decode, stream
from benches.photographs import photographs
from benches.settings import make_bench_config

from moce_dist.data.images import open_image


def config(**bench):
    return make_bench_config(
        {
            "data": {"image_size": 32, "loader_processes": 1},
            "model": {"patch_size": 8},
            "mae": {"batch_size": 8},
            "bench": {"rounds": 2, "warmup_rounds": 0, "images": 3, "crops": 1, **bench},
        }
    )


def test_photographs_are_real_ones_of_the_size_asked_and_seeded():
    first, again = (photographs(config(), 500, 375, 6) for _ in range(2))
    assert first == again and len(set(first)) == 6
    assert all(open_image(content).size == (500, 375) for content in first)


def test_decode_reports_every_figure():
    report = json.loads(decode.run(config()).to_json())
    kinds = ("pil_torchvision", "moce_dist", "entropy", "device")
    names = {f"{who}_{size}" for size in (500, 2000) for who in kinds}
    assert set(report["variants"]) | set(report["skipped"]) == names | {"stored_2000"}
    assert all(v["unit"] == "images/s" and v["min"] > 0 for v in report["variants"].values())
    ratios = {f"moce_dist_{s}/pil_torchvision_{s}" for s in (500, 2000)}
    stored = {"stored_2000/moce_dist_2000", "stored_2000/pil_torchvision_2000"}
    assert set(report["ratios"]) == ratios | stored
    assert report["figures"]["bytes_per_image_stored"] < report["figures"]["bytes_per_image_2000"]
    assert 0.9 < report["figures"]["ssim_p01"] <= report["figures"]["ssim_mean"] <= 1
    assert set(report["skipped"]) <= {"device_500", "device_2000"}


def test_stream_reports_every_figure_or_names_it_as_skipped():
    report = json.loads(stream.run(config(samples=256, batches=4, epoch_samples=4096)).to_json())
    assert set(report["variants"]) == {
        "webdataset", "litdata", "moce_dist", "planned_samples", "sequential_read", "planned_read",
        "random_read",
    }  # fmt: skip
    assert set(report["ratios"]) == {
        "moce_dist/webdataset", "moce_dist/litdata", "planned_samples/moce_dist",
        "planned_read/sequential_read", "random_read/sequential_read", "planned_read/random_read",
    }  # fmt: skip
    assert report["figures"]["resume_first_batch_s"] > 0
    found = {**report["figures"], **report["skipped"]}
    assert "s3_bytes_read_over_used" in found


@pytest.mark.parametrize("processes", [0, 2])
def test_planned_samples_pass_through_webdataset_in_whole_batches(tmp_path, monkeypatch, processes):
    shape, found = config(batches=5, samples=64), []
    data = shape.data.model_copy(update={"loader_processes": processes})
    index = stream.make_shards(tmp_path, photographs(shape, 500, 375, 3), 64 // 2 - 2)
    monkeypatch.setattr(stream, "normalise", lambda images: found.append(images) or images)
    take = stream.planned_variant(shape.model_copy(update={"data": data}), index)
    take()
    assert [tuple(images.shape) for images in found] == 5 * [(8, 3, 32, 32)]
    # an epoch has three whole steps, and the next one has other crops
    assert len({images.sum().item() for images in found}) == 5
    take()
    assert all(torch.equal(a, b) for a, b in zip(found[:5], found[5:], strict=True))


def test_reading_from_s3_takes_little_more_than_is_used(tmp_path, monkeypatch):
    pytest.importorskip("s3fs", reason="NOT TESTED: s3fs is not installed")
    pytest.importorskip("moto", reason="NOT TESTED: moto is not installed")
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "replaced")
    index = stream.make_shards(tmp_path, photographs(config(), 500, 375, 3), 2000)
    counted = stream.read_from_s3(config(), index)
    assert os.environ["AWS_ENDPOINT_URL"] == "replaced"
    assert 1 <= counted["s3_bytes_read_over_used"] <= 1.2
    assert 0 < counted["s3_requests_per_1000_samples"] <= 1000
