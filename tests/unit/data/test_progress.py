"""Progress lines."""

import logging
import time

from moce_dist.data.progress import track


def test_long_loops_say_rate_and_time_left(caplog):
    caplog.set_level(logging.INFO)
    done = []
    for item in track(range(4), "images", total=4, every_s=0.05):
        time.sleep(0.06)
        done.append(item)
    assert done == [0, 1, 2, 3]
    assert "1 of 4 images, " in caplog.messages[0]
    assert caplog.messages[0].endswith(" s left")


def test_unknown_length_has_no_time_left(caplog):
    caplog.set_level(logging.INFO)
    for _ in track(iter("ab"), "images", every_s=0.01):
        time.sleep(0.02)
    assert caplog.messages[0].startswith("1 images, ")
    assert "left" not in caplog.messages[0]


def test_short_loops_are_silent(caplog):
    caplog.set_level(logging.INFO)
    assert list(track(range(1000), "images")) == list(range(1000))
    assert caplog.messages == []
