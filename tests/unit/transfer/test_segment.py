"""Segmentation: reading, scores against their definition, sliding windows, one small training."""

import json
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

from moce_dist.config import SegmentationConfig, load_config
from moce_dist.data.decoders import ImageError
from moce_dist.data.images import sample_generator
from moce_dist.model.customize import customize
from moce_dist.settings import ConfigError
from moce_dist.transfer.backbone import run_backbone
from moce_dist.transfer.drawing import palette
from moce_dist.transfer.loading import machine_of
from moce_dist.transfer.segmentation.fit import (
    Window,
    class_probabilities,
    count_pixels,
    is_mixed,
    scores,
    slide,
    training_crop,
    windows,
)
from moce_dist.transfer.segmentation.task import (
    IGNORE,
    Segmentation,
    load_masked,
    read_mask,
)
from moce_dist.transfer.segmentation.upernet import Segmenter

from .conftest import segment


@pytest.fixture
def data(tmp_path: Path, scene_folder: Path) -> Path:
    return Path(shutil.copytree(scene_folder, tmp_path / "data"))


def test_a_micro_batch_of_one_crop_is_refused():
    given = ["transfer.segmentation.batch_size=4", "model.patch_size=16"]
    Segmentation.check(load_config(None, [*given, "parallel.micro_batches=2"]))
    for change in (
        ["parallel.micro_batches=4"],
        ["parallel.num_workers=4", "parallel.num_groups=4", "parallel.min_workers=1"],
    ):
        with pytest.raises(ConfigError, match="must be 8 or more, 2 crops in a micro-batch"):
            Segmentation.check(load_config(None, [*given, *change]))


def test_layout_is_read(scene_folder):
    scenes = Segmentation.read("ade20k", scene_folder)
    assert scenes.classes == ["dark", "bright", "absent"]
    assert [s.key for s in scenes.test] == ["validation/0", "validation/1", "validation/2"]
    assert len(scenes.train) == 6
    mask = read_mask(scenes.train[0].mask)
    assert mask[0, 0] == IGNORE and mask[10, 0] == 0 and mask[10, 30] == 1
    scenes.scan(threads=2)


def test_official_class_list_and_its_absence(data):
    (data / "classes.txt").unlink()
    assert len(Segmentation.read("ade20k", data).classes) == 150
    rows = [
        "Idx\tRatio\tTrain\tVal\tStuff\tName",
        "1\t0.1\t1\t1\t1\twall",
        "2\t0.1\t1\t1\t0\tsky, x",
    ]
    (data / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    assert Segmentation.read("ade20k", data).classes == ["wall", "sky, x"]


def test_a_class_that_stands_twice_is_refused(data):
    (data / "classes.txt").write_text("dark\nbright\ndark\n")
    with pytest.raises(ConfigError, match="lists the class dark more than once"):
        Segmentation.read("ade20k", data)


@pytest.mark.parametrize("folder", ["images/training", "annotations/validation"])
def test_missing_folder_is_named(data, folder):
    shutil.rmtree(data / folder)
    with pytest.raises(ConfigError, match=f"{folder}: is no folder"):
        Segmentation.read("ade20k", data)


def test_image_without_mask_and_mask_without_image_are_named(data):
    (data / "annotations" / "training" / "2.png").unlink()
    with pytest.raises(ConfigError, match=r"images/training/2\.jpg: has no mask"):
        Segmentation.read("ade20k", data)
    (data / "images" / "training" / "2.jpg").unlink()
    (data / "images" / "validation" / "1.jpg").unlink()
    with pytest.raises(ConfigError, match=r"validation/1\.png: mask without an image"):
        Segmentation.read("ade20k", data)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.full((40, 48), 4, np.uint8), "holds 4, must be at most 3"),
        (np.ones((40, 47), np.uint8), "its annotations are for 47 x 40"),
        (np.ones((40, 48, 3), np.uint8), "mode RGB"),
    ],
)
def test_wrong_masks_are_found_by_the_scan(data, mask, message):
    Image.fromarray(mask).save(data / "annotations" / "training" / "0.png")
    with pytest.raises(ConfigError, match=message):
        Segmentation.read("ade20k", data).scan(threads=2)


def test_unreadable_image_is_found_by_the_scan(data):
    (data / "images" / "validation" / "0.jpg").write_bytes(b"\xff\xd8 nothing")
    with pytest.raises(ConfigError, match=r"validation/0\.jpg: unreadable image"):
        Segmentation.read("ade20k", data).scan(threads=2)


def test_damage_inside_a_mask_is_named(tmp_path):
    path = tmp_path / "mask.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 3, (900, 900), np.uint8)).save(path)
    content = path.read_bytes()
    second = content.index(b"IDAT", content.index(b"IDAT") + 4)
    path.write_bytes(content[:second] + bytes(4) + content[second + 4 :])
    with pytest.raises(ImageError, match=r"mask\.png: unreadable mask: broken PNG"):
        read_mask(path)


def test_crop_keeps_image_and_mask_together(scene_folder):
    scene = Segmentation.read("ade20k", scene_folder).train[0]
    recipe = SegmentationConfig(crop=32)
    for epoch in range(20):
        draws = sample_generator(0, epoch, scene.key)
        shown, mask = load_masked(scene, 3)
        pixels, mask = training_crop(shown.image, mask, recipe, draws)
        assert pixels.shape == (3, 32, 32) and mask.shape == (32, 32)
        bright = pixels.mean(axis=0) > 116
        kept = mask != IGNORE
        # bilinear pixels at the border of the two areas may be of either side
        assert ((mask == 1) == bright)[kept].mean() > 0.9


def shares(mask):
    """Each class's share of the pixels that are not ignored."""
    seen = [label for label in mask.ravel().tolist() if label != IGNORE]
    return {label: seen.count(label) / len(seen) for label in set(seen)}


def test_a_crop_is_drawn_again_while_one_class_fills_it():
    # a strip of class 1 in class 0: most crops hold class 0 alone
    mask = np.zeros((64, 400), np.int64)
    mask[:, 180:220] = 1
    mask[:4] = IGNORE
    image = Image.fromarray((np.maximum(mask, 0) * 200).astype(np.uint8)).convert("RGB")
    found = {}
    for ratio in (1.0, 0.75):
        recipe = SegmentationConfig(crop=32, cat_max_ratio=ratio)
        crops = [
            training_crop(image, mask, recipe, np.random.default_rng(seed))[1] for seed in range(60)
        ]
        found[ratio] = [max(shares(crop).values()) < 0.75 for crop in crops]
    free, again = (np.mean(found[ratio]) for ratio in (1.0, 0.75))
    # one draw is seldom mixed; one of up to eleven much more often
    assert 0.02 < free < 0.35 and again > 2 * free
    # what the first draw has found stays
    assert all(after for before, after in zip(*found.values(), strict=True) if before)


@pytest.mark.parametrize(
    ("mask", "ratio", "expected"),
    [
        ([0, 0, 0, 1], 0.75, False),
        ([0, 0, 0, 1], 0.76, True),
        ([0, 0, 1, IGNORE], 0.67, True),
        ([0, 0, 1, IGNORE], 0.66, False),
        ([2, 2], 0.99, False),
        ([IGNORE, IGNORE], 0.75, False),
        ([IGNORE, IGNORE], 1.0, True),
        ([2, 2], 1.0, True),
    ],
)
def test_ignored_pixels_do_not_count_for_the_share_of_a_class(mask, ratio, expected):
    assert is_mixed(np.array([mask]), ratio) == expected


def test_scores_follow_from_their_definition():
    truth = torch.tensor([[0, 0, 1], [1, 2, IGNORE]])
    predicted = torch.tensor([[0, 1, 1], [1, 0, 3]])
    found = scores(count_pixels(truth, predicted, 5))
    # class 0: 1 of {2 true, 2 predicted}; class 1: 2 of {2, 3}; class 2: 0; 3 and 4 are absent
    assert found.iou[:3] == pytest.approx([1 / 3, 2 / 3, 0])
    assert np.isnan(found.iou[3]) and np.isnan(found.iou[4])
    assert found.miou == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
    assert found.aacc == pytest.approx(3 / 5)
    assert found.macc == pytest.approx((1 / 2 + 1 + 0) / 3)


def test_scores_equal_torchmetrics_and_a_direct_count():
    draws = torch.Generator().manual_seed(0)
    truth = torch.randint(-1, 4, (3, 20, 30), generator=draws)
    predicted = torch.randint(0, 4, (3, 20, 30), generator=draws)
    found = scores(sum(count_pixels(t, p, 4) for t, p in zip(truth, predicted, strict=True)))
    metric = MulticlassJaccardIndex(4, average=None, ignore_index=IGNORE)
    assert found.iou == pytest.approx(metric(predicted, truth).tolist(), abs=1e-6)
    kept = truth != IGNORE
    direct = [
        ((truth == c) & (predicted == c)).sum() / (((truth == c) | (predicted == c)) & kept).sum()
        for c in range(4)
    ]
    assert found.iou == pytest.approx([float(x) for x in direct], abs=1e-6)


@pytest.mark.parametrize(("length", "size"), [(32, 32), (33, 32), (47, 32), (100, 32), (7, 1)])
def test_windows_cover_every_pixel_and_stay_inside(length, size):
    starts = windows(length, size)
    covered = {i for start in starts for i in range(start, start + size)}
    assert covered == set(range(length)) and starts[0] == 0


def test_sliding_a_model_of_single_pixels_changes_nothing(config):
    model = torch.nn.Conv2d(3, 4, 1)
    pixels = torch.randn(3, 40, 57)
    with torch.no_grad():
        found = slide(model, pixels, 32, machine_of(config))
        torch.testing.assert_close(found, model(pixels[None])[0], rtol=1e-5, atol=1e-5)


def test_image_smaller_than_a_window_is_filled_up_and_cut_back(config):
    model = torch.nn.Conv2d(3, 4, 1)
    pixels = torch.randn(3, 20, 57)
    with torch.no_grad():
        found = slide(model, pixels, 32, machine_of(config))
        torch.testing.assert_close(found, model(pixels[None])[0], rtol=1e-5, atol=1e-5)


def test_scales_and_mirroring_average_probabilities(config):
    some_image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    backbone, machine = run_backbone("random", config, None), machine_of(config)
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 4, 3, padding=1)

    def look(*scales: float, flip: bool = False) -> torch.Tensor:
        return class_probabilities(model, some_image, backbone, Window(32, scales, flip), machine)

    whole = look(0.5, 1.0, 1.5)
    assert whole.shape == (4, 40, 60)
    expected = (look(0.5) + look(1.0) + look(1.5)) / 3
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(whole.sum(dim=0), torch.ones(40, 60))
    upright, both = look(1.0), look(1.0, flip=True)
    some_image = some_image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    torch.testing.assert_close(both, (upright + look(1.0).flip(2)) / 2, rtol=1e-4, atol=1e-5)


def test_probabilities_are_summed_where_the_model_is(config):
    # whatever copies a tensor from this device to the CPU fails
    machine = replace(machine_of(config), device=torch.device("meta"))
    model = torch.nn.Conv2d(3, 4, 3, padding=1).to("meta")
    backbone, window = run_backbone("random", config, None), Window(32, (0.5, 1.0), flip=True)
    found = class_probabilities(model, Image.new("RGB", (60, 40)), backbone, window, machine)
    assert found.device.type == "meta" and found.shape == (4, 40, 60)


def test_palette_has_distinct_colours_and_black_for_ignored():
    colours = palette(150)
    assert colours.shape == (151, 3) and colours[-1].tolist() == [0, 0, 0]
    assert len({tuple(c) for c in colours.tolist()}) > 140


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_any_number_of_blocks_makes_a_pyramid(depth):
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=depth, embed_dim=16, num_heads=2
    )
    assert Segmenter(vit, 3, 8)(torch.randn(2, 3, 32, 32)).shape == (2, 3, 32, 32)


def test_segmenter_starts_from_the_backbone_and_trains_all_of_it(config, models):
    backbone = run_backbone("mae", config, customize(models["mae"].state_dict(), ()))
    model = Segmenter(backbone.dense_model(32, seed=0, drop_path=0.0), 3, 8)
    assert torch.equal(model.vit.blocks[1].mlp.fc1.weight, models["mae"].blocks[1].mlp.fc1.weight)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 3, 32, 32)
    logits.square().mean().backward()
    groups = model.optimizer().param_groups
    held = {id(p) for g in groups for p in g["params"]}
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    blocks = [scale[id(b.mlp.fc1.weight)] for b in model.vit.blocks]
    # the head learns at the full rate, the last block at 0.65 of it
    assert blocks == pytest.approx([0.65**n for n in (4, 3, 2, 1)])
    assert scale[id(model.vit.pos_embed)] == pytest.approx(0.65**5)
    # what lies behind the last tap does not take part
    idle = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert idle <= {"vit.norm.weight", "vit.norm.bias"}
    assert all(id(p) in held for p in model.parameters() if p.requires_grad)


def test_training_separates_two_plain_areas(config, models, scene_folder, tmp_path):
    scenes = Segmentation.read("ade20k", scene_folder)
    backbone = run_backbone("mae", config, customize(models["mae"].state_dict(), ()))
    changes = {"steps": 60, "lr": 3e-3, "batch_size": 4}
    recipe = config.transfer.segmentation.model_copy(update=changes)
    machine = machine_of(config)
    found = segment(backbone, scenes, recipe, machine, seed=0, out=tmp_path).measures
    assert found["mIoU"] > 0.7
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["mIoU"] == found["mIoU"] and written["IoU"].keys() == {
        "dark",
        "bright",
        "absent",
    }
    preview = np.asarray(Image.open(tmp_path / "1.png"))
    assert preview.shape == (43, 3 * 48, 3)


def recount(data, change):
    """Rewrite all masks of a set."""
    for path in (data / "annotations").rglob("*.png"):
        with Image.open(path) as image:
            mask = np.asarray(image)
        Image.fromarray(change(mask).astype(np.uint8)).save(path)


def test_masks_that_count_from_0_are_noticed(data, caplog):
    recount(data, lambda mask: np.arange(mask.size).reshape(mask.shape) % 4)
    scenes = Segmentation.read("ade20k", data)
    (held,) = scenes.scan(threads=1)
    assert held.startswith("masks hold ") and "is in no mask" not in caplog.text
    recount(data, lambda mask: mask - 1.0 * (mask > 0))
    scenes.scan(threads=1)
    assert "class 3 (absent) is in no mask (1 such classes of 3)" in caplog.text
    assert "to masks that count from 0 add 1" in caplog.text


def test_masks_of_one_class_are_refused(data):
    """They count two classes from 0: any model would have an mIoU of 1."""
    (data / "classes.txt").write_text("dark\nbright\n")
    Segmentation.read("ade20k", data).scan(threads=1)
    recount(data, lambda mask: mask - 1.0 * (mask > 0))
    with pytest.raises(ConfigError, match=r"class 2 \(bright\) is in no mask .* nothing to learn"):
        Segmentation.read("ade20k", data).scan(threads=1)


def _png_of_few_bits(numbers, bits):
    rows = np.packbits(
        np.unpackbits(numbers[..., None], 2)[..., -bits:].reshape(len(numbers), -1), 1
    )
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", *numbers.shape[::-1], bits, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))),
        (b"IEND", b""),
    )
    written = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


@pytest.mark.parametrize("form", ["png 2", "png 4", "pgm 3", "pgm 150", "pgm 1000", "pgm 255"])
def test_numbers_of_masks_stay_what_they_are(tmp_path, form):
    """Pillow spreads greys of few bits, and those of a lower white, over all 256 or 65536."""
    numbers, (kind, word) = np.arange(64, dtype=np.uint8).reshape(8, 8) % 4, form.split()
    if kind == "png":
        content = _png_of_few_bits(numbers, int(word))
    else:
        pixels = numbers.astype(">u2" if int(word) > 255 else np.uint8).tobytes()
        content = f"P5\n# a note\n8 8\n{word}\n".encode() + pixels
    path = tmp_path / f"mask.{kind}"
    path.write_bytes(content)
    np.testing.assert_array_equal(read_mask(path) + 1, numbers)


def test_numbers_below_0_are_refused(data):
    scene = Segmentation.read("ade20k", data).train[0]
    shape = read_mask(scene.mask).shape
    Image.fromarray(np.full(shape, -5, np.int32)).save(scene.mask, "TIFF")
    with pytest.raises(ImageError, match=r"0\.png: holds -5, must be at most 3"):
        load_masked(scene, 3)


def test_ids_of_masks_are_counted(data):
    recount(data, lambda mask: np.arange(mask.size).reshape(mask.shape) % 4)
    (held,) = Segmentation.read("ade20k", data).scan(threads=1)
    assert held.startswith("masks hold 0 (ignored) 25.0%, 1 (")


def test_an_image_that_exif_turns_is_as_its_mask_has_it(data, caplog):
    scenes = Segmentation.read("ade20k", data)
    scene, exif = scenes.train[0], Image.Exif()
    exif[0x0112] = 6
    shape = read_mask(scene.mask).shape
    for height, width in (shape, shape[::-1]):
        pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(scene.image, "PNG", exif=exif)
        expected = pixels if (height, width) == shape else np.rot90(pixels, -1)
        np.testing.assert_array_equal(np.asarray(load_masked(scene, 3)[0].image), expected)


def test_fingerprint_sees_a_corrected_mask_of_the_same_size(scene_folder, tmp_path):
    data = Path(shutil.copytree(scene_folder, tmp_path / "data"))
    mask = data / "annotations" / "training" / "0.png"
    pixels = np.asarray(Image.open(mask)).copy()
    mask.unlink()
    Image.fromarray(pixels).save(mask.with_suffix(".bmp"))
    before = Segmentation.open("ade20k", data).fingerprint()
    assert Segmentation.open("ade20k", data).fingerprint() == before
    Image.fromarray(3 - pixels).save(mask.with_suffix(".bmp"))
    assert Segmentation.open("ade20k", data).fingerprint() != before


def test_too_few_images_for_micro_batches_are_refused(scene_folder, config, tmp_path):
    scenes = Segmentation.read("ade20k", scene_folder)
    recipe = config.transfer.segmentation.model_copy(update={"steps": 1, "batch_size": 8})
    machine = replace(machine_of(config), micro_batches=4)
    few = replace(scenes, train=scenes.train[:6])
    with pytest.raises(ConfigError, match="6 training images are too few: batch normalisation"):
        backbone = run_backbone("random", config, None)
        segment(backbone, few, recipe, machine, seed=0, out=tmp_path)
