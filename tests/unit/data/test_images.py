"""Decoding and cropping against PIL and torchvision."""

import io
import math
import struct
from hashlib import blake2b

import numpy as np
import pytest
import torch
from benches import decode
from benches.photographs import photographs
from benches.settings import make_bench_config
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import v2

from moce_dist.data import decoders, images
from moce_dist.data.decoders import ImageError
from moce_dist.data.images import MEAN, STD, SampleDraws, decode_image, open_image, sample_generator


def encode(some_image, kind="PNG", **options):
    file = io.BytesIO()
    some_image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def photo():
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg"))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats(photo, kind):
    small = photo.resize((40, 30))
    pixels = decode_image(encode(small, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert pixels.shape == (30, 40, 3) and pixels.dtype == np.uint8
    if kind not in ("GIF",):
        np.testing.assert_array_equal(pixels, np.asarray(small))


def test_gray_cmyk_and_progressive_jpeg(photo):
    small = photo.resize((64, 48))
    gray = decode_image(encode(small.convert("L"), "JPEG", quality=95))
    assert (gray[..., 0] == gray[..., 1]).all()
    for content in (
        encode(small.convert("CMYK"), "JPEG", quality=95),
        encode(small, "JPEG", quality=95, progressive=True),
    ):
        difference = decode_image(content).astype(int) - np.asarray(small)
        assert np.abs(difference).mean() < 8


def test_exif_orientation_is_upright(photo):
    small = photo.resize((64, 48))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    content = encode(small.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(content), np.asarray(small))


def test_transparency_lies_on_black_and_16_bit_keeps_its_range():
    some_image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    some_image.putpixel((1, 0), (0, 255, 0, 0))
    assert decode_image(encode(some_image)).tolist() == [[[255, 0, 0], [0, 0, 0]]]
    deep = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert decode_image(encode(deep))[0, :, 0].tolist() == [0, 128, 255]
    partly = encode(deep, "PNG", transparency=32768)
    assert decode_image(partly)[0, :, 0].tolist() == [0, 0, 255]


GREY = np.random.default_rng(5).integers(0, 256, (24, 24))


@pytest.mark.parametrize(
    "values",
    [
        (GREY / 255).astype(np.float32),
        (GREY * 1e30 - 1e30).astype(np.float32),
        GREY.astype(np.int32),
        (GREY * 1000).astype(np.int32),
        ((GREY - 128) * 2**23).astype(np.int32),
    ],
    ids=["0 to 1", "large", "as 8 bits", "to 255000", "negative"],
)
def test_32_bits_are_stretched_from_their_least_to_their_largest_value(values):
    expected = np.rint((GREY - GREY.min()) * (255 / np.ptp(GREY)))
    pixels = decode_image(encode(Image.fromarray(values), "TIFF"))
    assert np.abs(pixels[..., 0] - expected).max() <= 1


def test_unsigned_32_bits_do_not_wrap():
    content = encode(Image.fromarray((GREY.astype(np.uint32) << 24).view(np.int32)), "TIFF")
    signed = struct.pack("<HHLL", 339, 3, 1, 2)
    assert signed in content
    pixels = decode_image(content.replace(signed, struct.pack("<HHLL", 339, 3, 1, 1)))
    assert np.corrcoef(pixels[..., 0].ravel(), GREY.ravel())[0, 1] > 0.999


def tiff(values, tags):
    """Write grey values (H, W) as a TIFF by hand: with tags as no writer here makes them."""
    height, width = values.shape
    data, bits = values.tobytes(), 8 * values.itemsize
    usual = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 277: 1, 278: height, 339: 1}
    known = usual | {273: 8, 279: len(data)} | tags
    entries = (struct.pack("<HHII", tag, 4, 1, known[tag]) for tag in sorted(known))
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(known)) + b"".join(entries) + bytes(4)


def grey_of(content):
    return decode_image(content)[..., 0].astype(int)


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32])
def test_greys_with_a_sign_do_not_wrap(kind):
    values = (GREY.astype(np.int16) - 128).astype(kind)
    assert np.abs(grey_of(tiff(values, {339: 2})) - GREY).max() <= 1


@pytest.mark.parametrize(("kind", "form"), [(np.uint8, 1), (np.uint16, 1), (np.float32, 3)])
def test_greys_whose_white_is_zero_are_turned_round(kind, form):
    values = GREY.astype(kind) * kind(257 if kind is np.uint16 else 1)
    assert np.abs(grey_of(tiff(values, {262: 0, 339: form})) - (255 - GREY)).max() <= 1


def test_greys_of_12_bits_keep_the_upper_8():
    pairs = (GREY.astype(np.uint32) << 4).reshape(-1, 2)
    packed = pairs[:, 0] << 12 | pairs[:, 1]
    content = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], 1).astype(np.uint8)
    rows = content.reshape(GREY.shape[0], -1)
    np.testing.assert_array_equal(grey_of(tiff(rows, {258: 12, 256: GREY.shape[1]})), GREY)


def test_one_value_is_black_and_what_is_not_finite_is_no_image():
    flat = np.full((4, 4), 0.5, np.float32)
    assert not decode_image(encode(Image.fromarray(flat), "TIFF")).any()
    flat[1, 1] = np.nan
    with pytest.raises(ImageError, match="not finite"):
        decode_image(encode(Image.fromarray(flat), "TIFF"))


@pytest.mark.parametrize("cut", [0, 10, 200])
def test_truncated_or_empty_is_refused(photo, cut):
    content = encode(photo.resize((64, 48)), "JPEG")
    with pytest.raises(ImageError):
        decode_image(content[:cut])
    with pytest.raises(ImageError):
        decode_image(content[: len(content) // 2])


def test_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(decoders, "MAX_PIXELS", 99)
    with pytest.raises(ImageError, match="10 x 10"):
        decode_image(encode(Image.new("L", (10, 10))))


def test_bytes_are_limited_too(monkeypatch):
    monkeypatch.setattr(decoders, "MAX_BYTES", 99)
    with pytest.raises(ImageError, match="100 bytes"):
        images.open_croppable(bytes(100))


def test_jpeg_bomb_is_refused_before_it_is_decoded(photo):
    content = bytearray(encode(photo.resize((64, 48)), "JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"  # 65,500 x 65,500 pixels
    with pytest.raises(ImageError, match="65500 x 65500"):
        images.open_croppable(bytes(content))


@pytest.mark.parametrize("size", [(500, 375), (2000, 1500)])
def test_crops_of_photographs_look_as_the_reference_has_them(size):
    config = make_bench_config({"seed": 0})
    contents = photographs(config, *size, 6)
    likeness = decode.similarities(config, contents)
    assert len(likeness) == 48
    assert likeness.mean() >= 0.99
    assert np.percentile(likeness, 1) >= 0.98


def test_likeness_notices_a_shift_of_one_pixel(photo):
    here, beside = (photo.resize((200, 200), box=(x, 0, x + 400, 400)) for x in (0, 2))
    assert decode.similarity(np.asarray(here), np.asarray(here)) == pytest.approx(1)
    assert decode.similarity(np.asarray(here), np.asarray(beside)) < 0.95


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_crop_of_a_turned_jpeg_is_the_crop_of_the_upright_one(photo, reduction, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(photo, "JPEG", quality=95, exif=exif)
    some_image, upright = images.open_croppable(content), open_image(content)
    assert (some_image.width, some_image.height) == upright.size
    side, size = 320, 240 // reduction
    box = images.Box(33, 22, 33 + side, 22 + side)
    crop = some_image.crop(box, size).astype(int)
    expected = np.asarray(upright.resize((size, size), Image.Resampling.BICUBIC, box=box))
    assert np.abs(crop - expected).mean() < 5


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_every_kind_of_jpeg_crops_as_pillow_has_it(photo, mode, progressive):
    content = encode(photo.convert(mode), "JPEG", quality=95, progressive=progressive)
    box, size = images.Box(100, 50, 500, 400), 100
    crop = images.open_croppable(content).crop(box, size).astype(int)
    expected = open_image(content).resize((size, size), Image.Resampling.BICUBIC, box=box)
    assert np.abs(crop - np.asarray(expected)).mean() < 3


def test_what_only_pillow_accepts_is_decoded(photo):
    content = encode(photo.resize((64, 48)), "JPEG")
    # bytes without meaning between two segments: a warning of the one, nothing to the other
    tables = content.index(b"\xff\xdb")
    odd = content[:tables] + b"\0\0\0" + content[tables:]
    crop = images.open_croppable(odd).crop(images.Box(0, 0, 48, 48), 48)
    np.testing.assert_array_equal(crop, np.asarray(open_image(content))[:, :48])


def test_animation_is_its_first_frame(photo):
    first, second = photo.resize((40, 30)), photo.resize((40, 30)).rotate(180)
    content = encode(first, "GIF", save_all=True, append_images=[second])
    alone = decode_image(encode(first, "GIF"))
    np.testing.assert_array_equal(decode_image(content), alone)


def test_crop_and_resize_equal_torchvision(photo):
    content = encode(photo)
    for seed in range(5):
        box = images.random_box(*photo.size, 0.2, sample_generator(seed, 0, "k"))
        draws = sample_generator(seed, 0, "k")
        cut = images.draw_cut(
            images.open_croppable(content), scale_min=0.2, hflip=False, draws=draws
        )
        sample = torch.from_numpy(images.to_planes(cut.pixels(64)))
        tensor = v2.functional.pil_to_tensor(photo)
        crop = v2.functional.resized_crop(
            tensor, box.upper, box.left, box.lower - box.upper, box.right - box.left, [64, 64],
            interpolation=v2.InterpolationMode.BICUBIC, antialias=True,
        )  # fmt: skip
        expected = v2.functional.normalize(crop.float() / 255, MEAN, STD)
        # resizing from a box sees the pixels just outside of it, cropping first does not
        error = (images.normalise(sample) - expected).abs()[:, 2:-2, 2:-2]
        assert error.mean() < 0.02


def test_boxes_follow_the_recipe():
    boxes = [images.random_box(500, 375, 0.2, sample_generator(0, 0, str(i))) for i in range(400)]
    areas = np.array([(b.right - b.left) * (b.lower - b.upper) / (500 * 375) for b in boxes])
    ratios = np.array([(b.right - b.left) / (b.lower - b.upper) for b in boxes])
    assert areas.min() > 0.19 and areas.max() <= 1
    torch.manual_seed(0)
    some_image = torch.zeros(3, 375, 500)
    theirs = [
        v1.RandomResizedCrop.get_params(some_image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(400)
    ]
    their_areas = np.array([h * w / (500 * 375) for _, _, h, w in theirs])
    assert areas.mean() == pytest.approx(their_areas.mean(), abs=0.05)
    assert areas.std() == pytest.approx(their_areas.std(), abs=0.05)
    assert ratios.min() > 0.74 and ratios.max() < 1.35
    assert all(0 <= b.left < b.right <= 500 and 0 <= b.upper < b.lower <= 375 for b in boxes)


def test_draws_are_keyed_by_sample():
    first = sample_generator(1, 2, "a").random(3)
    assert (first == sample_generator(1, 2, "a").random(3)).all()
    for other in (
        sample_generator(0, 2, "a"),
        sample_generator(1, 3, "a"),
        sample_generator(1, 2, "b"),
    ):
        assert (first != other.random(3)).all()


@pytest.mark.parametrize("size", [8, 28, 32, 224])
def test_a_crop_of_the_samples_size_is_what_the_filter_makes_of_it(size):
    pixels = np.random.default_rng(size).integers(0, 256, (size + 9, size + 5, 3), np.uint8)
    crop = pixels[4 : 4 + size, 3 : 3 + size]
    planes = torch.from_numpy(crop.copy()).permute(2, 0, 1)[None]
    filtered = torch.ops.aten._upsample_bicubic2d_aa(planes, [size, size], False, 1.0, 1.0)
    box = images.Box(3, 4, 3 + size, 4 + size)
    found = images.Decoded(pixels).crop(box, size)
    assert (found == crop).all() and (found == filtered[0].permute(1, 2, 0).numpy()).all()


def test_a_generator_set_anew_is_a_new_one():
    draws = SampleDraws()
    for number in range(3):
        key = int.from_bytes(blake2b(f"7/{number}/a".encode(), digest_size=16).digest(), "little")
        fresh = np.random.Generator(np.random.Philox(key=key))
        # an odd number of half words leaves one of them over for the next draw
        for generator in (again := draws.of(7, number, "a"), fresh):
            generator.random(5, np.float32)
        box = images.random_box(500, 375, 0.2, again)
        area, ratio = 500 * 375 * fresh.uniform(0.2, 1), math.exp(fresh.uniform(*images.LOG_ASPECT))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        assert (box.right - box.left, box.lower - box.upper) == (width, height)
        assert (box.left, box.upper) == (
            fresh.integers(500 - width + 1),
            fresh.integers(375 - height + 1),
        )


def test_evaluation_sample_is_the_centre(photo):
    sample = images.centre_sample(images.open_croppable(encode(photo)), 32)
    side = min(photo.size)
    left = (photo.width - side) // 2
    crop = photo.crop((left, 0, left + side, side)).resize((32, 32), Image.Resampling.BICUBIC)
    expected = np.asarray(crop).transpose(2, 0, 1).astype(int)
    # torch's bicubic rounds to one gray level more or less than Pillow's
    assert np.abs(sample - expected).max() <= 1
