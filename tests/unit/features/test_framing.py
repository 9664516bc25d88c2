"""Images framed as timm's own evaluation transform frames them."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps
from timm.data import create_transform

from moce_dist.data.decoders import ImageError
from moce_dist.data.images import MEAN, centre_sample, open_croppable
from moce_dist.features.decoding import Framing, framed_image

FRAMINGS = [
    Framing(0.875),
    Framing(0.9, method="bilinear"),
    Framing(1.0),
    Framing(1.0, "squash"),
    Framing(0.95, "squash", "bilinear"),
    Framing(1.0, "border", fill=(124, 116, 104)),
    Framing(0.9, "border", fill=(124, 116, 104)),
    Framing(1.15),
    Framing(0.95, method="lanczos"),
]


def image_of(width, height, seed=0):
    """A image with coarse and fine structure; no colour is the same at both ends."""
    draws = np.random.default_rng(seed)
    noise = Image.fromarray(draws.integers(0, 256, (height, width, 3), dtype=np.uint8))
    slope = np.linspace(0, 255, width)[None, :, None] + np.linspace(0, 255, height)[:, None, None]
    coarse = np.repeat(slope / 2, 3, axis=2)
    fine = np.asarray(noise.filter(ImageFilter.GaussianBlur(2)), float) - 128
    return Image.fromarray((coarse + 2 * fine).clip(0, 255).astype(np.uint8))


def encode(some_image, kind="PNG", **options):
    file = io.BytesIO()
    some_image.save(file, kind, **options)
    return file.getvalue()


def timm_sample(content, side, framing):
    """Return the planes (3, S, S) uint8 that timm's transform makes, before it normalises."""
    with Image.open(io.BytesIO(content)) as image:
        return create_transform(
            (3, side, side),
            interpolation=framing.method,
            crop_pct=framing.crop_pct,
            crop_mode=framing.mode,
            mean=MEAN,
            normalize=False,
        )(image.convert("RGB")).numpy()


def levels(found, expected):
    """Return by how many gray levels two samples differ."""
    return np.abs(found.astype(int) - expected)


@pytest.mark.parametrize("framing", FRAMINGS, ids=str)
@pytest.mark.parametrize("size", [(640, 480), (211, 397), (40, 60), (64, 64)])
def test_sample_is_that_of_timm_to_a_gray_level_or_two(framing, size):
    content = encode(image_of(*size))
    found, expected = (f(content, 64, framing) for f in (framed_image, timm_sample))
    assert found.shape == (3, 64, 64) and found.dtype == np.uint8
    # vectorised sums round to one level more or less than Pillow's, down and across
    difference = levels(found, expected)
    assert difference.max() <= 2 and difference.mean() < 0.2


@pytest.mark.parametrize("framing", [f for f in FRAMINGS if f.mode == "center"], ids=str)
def test_very_long_images_are_framed_alike(framing):
    for size in ((2000, 60), (50, 1999)):
        content = encode(image_of(*size))
        found, expected = (f(content, 64, framing) for f in (framed_image, timm_sample))
        assert levels(found, expected).max() <= 2


def test_image_of_a_row_is_no_image_of_millions():
    # timm would make 64 x 8 million pixels of it
    content = encode(Image.new("RGB", (120_000, 1), (200, 30, 90)))
    sample = framed_image(content, 64, Framing(0.9))
    np.testing.assert_array_equal(sample, centre_sample(open_croppable(content), 64))


@pytest.mark.parametrize("framing", FRAMINGS[:6], ids=str)
def test_jpeg_is_that_of_timm_and_near_where_it_is_decoded_at_a_part_of_its_size(framing):
    for size, mean in (((180, 130), 0.2), ((900, 600), 1.0), ((1801, 1303), 1.0)):
        content = encode(image_of(*size), "JPEG", quality=92)
        expected = timm_sample(content, 64, framing)
        near = levels(framed_image(content, 64, framing), expected).mean()
        assert near < mean
        if framing.crop_pct < 1:
            assert levels(centre_sample(open_croppable(content), 64), expected).mean() > 5 * near


@pytest.mark.parametrize("size", [(300, 200), (1801, 1303)])
@pytest.mark.parametrize("tag", range(1, 9))
def test_stored_orientation_is_undone_before(tag, size):
    # of the large one an eighth is decoded, whose last column and row stand for less than others
    some_image = image_of(*size).filter(ImageFilter.GaussianBlur(3))
    exif = Image.Exif()
    exif[0x0112] = tag
    content = encode(some_image, "JPEG", quality=95, exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        upright = encode(ImageOps.exif_transpose(image))
    framing = Framing(0.875)
    found, expected = framed_image(content, 64, framing), timm_sample(upright, 64, framing)
    assert levels(found, expected).mean() < 1


def test_without_a_framing_it_is_the_sample_of_the_runs_own_encoder():
    content = encode(image_of(300, 211), "JPEG", quality=90)
    assert (framed_image(content, 64, None) == centre_sample(open_croppable(content), 64)).all()


def test_damage_is_an_image_error():
    for content in (b"", b"no image", encode(image_of(80, 80))[:200]):
        with pytest.raises(ImageError):
            framed_image(content, 64, Framing(0.9))
