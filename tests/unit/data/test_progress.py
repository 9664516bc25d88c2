"""Progress lines."""

import logging
import re
import time
from types import SimpleNamespace

import pytest

from moce_dist.data.progress import track


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Lines after 10 ms."""
    monkeypatch.setattr("moce_dist.data.progress._EVERY_S", 0.01)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    made = SimpleNamespace(now=0.0, monotonic=lambda: made.now)
    monkeypatch.setattr("moce_dist.data.progress.time", made)
    return made


def test_long_loops_say_rate_and_time_left(caplog, clock):
    caplog.set_level(logging.INFO)
    done = []
    for item in track(range(4), "images", total=4):
        clock.now += 0.06
        done.append(item)
    assert done == [0, 1, 2, 3]
    assert re.fullmatch(r"1 of 4 images, \d+\.\d images/s, 0 s left", caplog.messages[0])


def test_items_of_different_sizes_count_by_their_size(caplog, clock):
    caplog.set_level(logging.INFO)
    sizes = [3000, 1000, 0]
    for _ in track(sizes, "images encoded", total=4000, size=int):
        clock.now += 0.02
    done = [
        re.match(r"(\d+) of 4000 images encoded, ([\d.]+) images/s", m) for m in caplog.messages
    ]
    assert [int(match[1]) for match in done] == [3000, 4000, 4000]
    # 3000 in at least 0.02 s, and the rest as fast
    assert 10_000 < float(done[0][2]) <= 150_000
    assert caplog.messages[-1].endswith(" 0 s left")


def test_unknown_length_has_no_time_left(caplog):
    caplog.set_level(logging.INFO)
    for _ in track(iter("ab"), "images"):
        time.sleep(0.02)
    assert caplog.messages[0].startswith("1 images, ")
    assert "left" not in caplog.messages[0]


def test_short_loops_are_silent(caplog, monkeypatch):
    monkeypatch.setattr("moce_dist.data.progress._EVERY_S", 10)
    caplog.set_level(logging.INFO)
    assert list(track(range(1000), "images")) == list(range(1000))
    assert caplog.messages == []
