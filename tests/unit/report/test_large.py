"""The page of a run at its real size stays small, and says what it leaves out."""

import re

import pytest

from moce_dist.report.figures import shown_layers
from moce_dist.report.gate import prefer

from .large import write_large
from .parsed import Page


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield write_large(tmp_path_factory.mktemp("large"), patch)


def test_page_of_24_layers_256_experts_and_4096_clusters_is_under_10_mb(large):
    assert large.stat().st_size < 10 * 10**6


def test_page_says_what_it_does_not_show(large):
    text = " ".join(Page(large).text.split())
    assert "24 layers, 6 shown: 0, 4, 9, 13, 18, 23." in text
    assert "4,048 more clusters are not shown" in text
    assert "MoE layer 23 (block 23): 16 of 256 experts, those of the most images" in text
    assert "(24 layers, 6 shown)" in text and "and 240 more" in text
    assert text.count("MoE layer 4 (block 4)") == 1 and "MoE layer 5 " not in text


def test_clusters_on_the_map_have_pictures(large):
    text = large.read_text()
    pictured = set(re.findall(r"\.c(\d+) { background-image", text))
    of_map = text[text.index('<table class="map"') : text.index("What every expert gets to see")]
    rows = re.findall(r'class="thumbs c(\d+)"', of_map)
    assert len(rows) == 48 and set(rows) <= pictured
    # what has no place on the page has no bytes either
    assert pictured <= set(re.findall(r'class="thumbs c(\d+)"', text))
    cards = re.findall(r'<div class="card".*?</ul>', text, re.S)
    assert sum("thumbs" in card for card in cards) > len(cards) / 2
    assert text.count("24 layers, 6 shown") == 2 + 6


def test_layers_that_are_shown_are_spread_from_the_first_to_the_last():
    assert shown_layers(24) == [0, 4, 9, 13, 18, 23] and shown_layers(7) == [0, 1, 2, 3, 4, 6]
    assert shown_layers(6) == [0, 1, 2, 3, 4, 5] and shown_layers(1) == [0]


def test_clusters_with_pictures_come_first_and_the_order_stays():
    order = [9, 4, 7, 1, 0, 8]
    assert prefer(order, {7, 8}, 2) == [7, 8] and prefer(order, {4, 7, 8}, 1) == [4]
    assert prefer(order, {7}, 3) == [9, 7, 1] and prefer(order, set(), 9) == order
