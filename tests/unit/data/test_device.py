"""Crops decoded on the device: the batches of the loader, images as the reference has them."""

import io
import sys

import numpy as np
import pytest
import torch
from benches.decode import reference_crop, similarity
from benches.photographs import photographs
from PIL import Image

from moce_dist.config import DataConfig, load_config
from moce_dist.data.batches import stream
from moce_dist.data.device import DeviceDecoder, Waiting
from moce_dist.data.images import draw_cut, open_croppable, sample_generator
from moce_dist.data.plan import Plan
from moce_dist.data.shards import write_index
from moce_dist.data.stream import StreamSpec
from moce_dist.data.table import sample_table
from moce_dist.data.writer import ShardWriter
from moce_dist.run.files import read_faults
from moce_dist.settings import ConfigError

SIZE, BATCH = 64, 6
ENDED = b"\xff\xd9"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def photos():
    return photographs(load_config(None, []), 500, 375, 6)


def turned(content):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(content)).save(file, "JPEG", quality=90, exif=exif)
    return file.getvalue()


def as_png(content):
    file = io.BytesIO()
    Image.open(io.BytesIO(content)).crop((0, 0, 200, 150)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def index(tmp_path, photos):
    """Plain photographs, one turned, one PNG, one cut off, one cut off behind an end mark."""
    half = photos[5][: len(photos[5]) // 2]
    some_images = {f"plain{i}": photos[i] for i in range(4)} | {
        "turned": turned(photos[4]),
        "png": as_png(photos[5]),
        "cut": half,
        "ended": half + ENDED,
    }
    writer = ShardWriter(tmp_path, "part.tar")
    for key, content in some_images.items():
        writer.add(key, {"jpg": content})
    return write_index(tmp_path, [writer.close()])


def batches(index, ledger, device="cpu", **data):
    plan = Plan(sample_table(index), BATCH, seed=0)
    config = DataConfig(**{"image_size": SIZE, "loader_processes": 0, **data})
    spec = StreamSpec(plan, config, 4, 1, 0, ledger, "mae")
    return list(stream(spec, np.zeros_like, start=0, stop=4, device=torch.device(device)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("processes", [0, 2])
def test_batches_are_those_of_the_loader(index, tmp_path, device, processes):
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    options = {"decode_on": "device", "loader_processes": processes}
    decoded = batches(index, ours, device, **options)
    seen = set()
    for a, b in zip(decoded, batches(index, theirs), strict=True):
        assert a.keys == b.keys and a.noise.equal(b.noise) and a.weights.equal(b.weights)
        assert a.images.shape == b.images.shape and a.images.dtype == torch.uint8
        assert a.images.device.type == device and a.waiting is None
        for key, here, there, weight in zip(
            a.keys, a.images.cpu(), b.images, a.weights, strict=True
        ):
            if key in ("turned", "png", "cut", ""):
                assert here.equal(there), key
            elif weight:
                seen.add(key)
                likeness = similarity(here.permute(1, 2, 0).numpy(), there.permute(1, 2, 0).numpy())
                assert likeness > 0.97, key
    assert seen >= {f"plain{i}" for i in range(4)}
    faults = [[(f["key"], f["reason"]) for f in read_faults(path)] for path in (ours, theirs)]
    assert sorted(faults[0]) == sorted(faults[1])
    # two epochs, each of which meets the bad image
    assert [key for key, _ in faults[0]].count("cut") == 2


@pytest.mark.parametrize("device", DEVICES)
def test_crops_look_as_the_reference_has_them(photos, device):
    decoder, waiting, boxes = DeviceDecoder(SIZE, torch.device(device)), Waiting(), []
    for number, content in enumerate(photos * 5):
        draws = sample_generator(0, 0, str(number))
        cut = draw_cut(open_croppable(content), scale_min=0.2, hflip=True, draws=draws)
        assert waiting.take(number, number, cut)
        boxes.append((content, cut))
    values = []
    for (content, cut), square in zip(boxes, decoder.decode(waiting.collect()), strict=True):
        there = reference_crop(content, cut.box, SIZE)[:, :: -1 if cut.is_mirrored else 1]
        values.append(similarity(square.cpu().permute(1, 2, 0).numpy(), there))
    assert {cut.is_mirrored for _, cut in boxes} == {False, True}
    assert np.mean(values) >= 0.99 and np.percentile(values, 1) >= 0.98


@pytest.mark.parametrize("stumbles", ["CodeStream", "decode", "resize"])
def test_what_the_device_stumbles_over_is_decoded_here(photos, stumbles):
    """One image ends nothing, whatever nvImageCodec raises of it."""
    decoder, waiting = DeviceDecoder(SIZE, torch.device("cpu")), Waiting()
    for number, content in enumerate(photos[:2]):
        draws = sample_generator(0, 0, str(number))
        cut = draw_cut(open_croppable(content), scale_min=1.0, hflip=False, draws=draws)
        assert waiting.take(number, number, cut)

    class Broken:
        def __getattr__(self, name):
            raise RuntimeError("odd")

    if stumbles == "resize":
        # what it answers where the kernel wants more shared memory than there is
        decoder._resize = lambda crop: None
    elif stumbles == "decode":
        decoder._decoder = Broken()
    else:
        decoder._codec = Broken()
    squares = decoder.decode(waiting.collect())
    assert [square.shape for square in squares] == [(3, SIZE, SIZE)] * 2
    assert all(square.float().std() > 10 for square in squares)


def test_only_plain_jpeg_waits(photos):
    draws = np.random.default_rng(0)
    for content, waits in [
        (photos[0], True),
        (turned(photos[0]), False),
        (as_png(photos[0]), False),
        (photos[0][:-2], False),
    ]:
        cut = draw_cut(open_croppable(content), scale_min=1.0, hflip=False, draws=draws)
        assert Waiting().take(0, 0, cut) == waits


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia", None)
    with pytest.raises(ConfigError, match=r"decode_on = 'device'.*pip install -e '\.\[device\]'"):
        DeviceDecoder(SIZE, torch.device("cpu"))
