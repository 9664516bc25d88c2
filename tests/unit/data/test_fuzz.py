"""Mutated files of every format: an image or an image error, nothing else, within the limits."""

import time
from collections import Counter

import numpy as np
import pytest

from moce_dist.data import decoders
from moce_dist.data.decoders import ImageError
from moce_dist.data.images import Box, centre_sample, open_croppable, open_image

from .samples_of_formats import seeds

pytestmark = pytest.mark.filterwarnings("ignore")
MAX_PIXELS = MAX_BYTES = 2**16
HUGE = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\xff\xff", b"\0\x01\xff\xff")


def mutated(content, draws, other):
    """Change a file in one of the ways in which files are damaged, or made by an enemy."""
    content = bytearray(content)
    kind = draws.integers(7)
    if kind == 0:
        return bytes(content[: draws.integers(len(content))])
    if kind == 1:
        start = draws.integers(len(content))
        return bytes(content[:start] + content[start + draws.integers(1, 64) :])
    if kind == 2:
        start, cut = draws.integers(len(content)), draws.integers(len(other))
        return bytes(content[:start]) + other[cut:]
    if kind == 3:
        start = draws.integers(len(content))
        return bytes(
            content[:start] + content[start : start + draws.integers(1, 400)] * 2 + content[start:]
        )
    # most of what decoders stumble over stands in headers
    end = len(content) if kind == 4 else min(len(content), 200)
    for _ in range(draws.integers(1, 9)):
        place = draws.integers(end)
        if kind == 5:
            word = HUGE[draws.integers(len(HUGE))]
            content[place : place + len(word)] = word
        else:
            content[place] = draws.integers(256)
    return bytes(content)


def use(content):
    """Open a file in all ways that the package does; True: it is an image."""
    try:
        width, height = open_image(content).size
        assert 0 < width * height <= MAX_PIXELS
        some_image = open_croppable(content)
        assert (some_image.width, some_image.height) == (width, height)
        assert some_image.crop(Box(0, 0, width, height), 4).shape == (4, 4, 3)
        assert centre_sample(open_croppable(content), 8).shape == (3, 8, 8)
    except ImageError as error:
        assert str(error) and "\n" not in str(error)
        return False
    return True


def fuzz(count, seed):
    """Try `count` mutated files; return what was tried, how many were images, and escapes."""
    files = [(name, content) for name, some in seeds().items() for content in some]
    draws, tried, images, escapes = np.random.default_rng(seed), Counter(), 0, []
    for number in range(count):
        name, content = files[number % len(files)]
        other = files[draws.integers(len(files))][1]
        damaged = mutated(content, draws, other)
        tried[name] += 1
        try:
            images += use(damaged)
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            escapes.append((name, number, f"{type(error).__name__}: {error}"))
    return tried, images, escapes


@pytest.fixture(autouse=True)
def low_limits(monkeypatch):
    monkeypatch.setattr(decoders, "MAX_PIXELS", MAX_PIXELS)
    monkeypatch.setattr(decoders, "MAX_BYTES", MAX_BYTES)


def test_every_format_that_is_opened_has_a_file_that_is_an_image():
    assert {name for name, some in seeds().items() if not any(map(use, some))} <= {"PCD"}


def test_a_thousand_mutated_files():
    tried, images, escapes = fuzz(1000, 0)
    assert escapes == []
    assert set(tried) == set(decoders.image_formats())
    # some damage hits nothing that counts: else nothing would have been decoded here
    assert 100 < images < 900


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_mutated_files(record_property):
    begin = time.monotonic()
    tried, images, escapes = fuzz(100_000, 1)
    record_property("figures", (len(tried), images, time.monotonic() - begin))
    assert escapes == []


def test_fuzzing_notices_what_escapes(monkeypatch):
    """A planted mistake: a decoder outside of the door."""

    def outside(content, draft=None):
        with decoders.Image.open(decoders.io.BytesIO(content)) as image:
            image.load()
            return decoders.Stored(image, decoders.AS_STORED)

    monkeypatch.setattr("moce_dist.data.upright.open_stored", outside)
    assert fuzz(200, 0)[2]
