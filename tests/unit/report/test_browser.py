"""The page in a real browser: nothing in the console, no request, no sideways scrolling."""

import pytest

from moce_dist.report.page import write_report

from .browser import Browser, find_chromium
from .conftest import build_finished, build_seen, write_control
from .large import write_large

WIDTHS = {1400: 0, 390: 12}
"""Pixels, and how often Tab is pressed there."""

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="needs Chromium (apt install chromium, or MOCE_TEST_CHROMIUM)"
)


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def controlled(folder):
    """A finished run with control, compared with one that has none."""
    (folder / "other").mkdir()
    mine, other = build_finished(folder), build_finished(folder / "other")
    write_control(mine)
    return write_report(mine, folder / "compared.html", other)


PAGES = {
    "finished": lambda folder, _: write_report(build_finished(folder)),
    "seen": lambda folder, _: write_report(build_seen(folder)[0]),
    "compared": lambda folder, _: controlled(folder),
    "large": write_large,
}


@pytest.fixture(scope="module", params=PAGES)
def page(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield PAGES[request.param](tmp_path_factory.mktemp("page"), patch)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_page_is_quiet_fits_and_follows_the_scheme(browser, page, width, scheme):
    seen = browser.look(page, width=width, scheme=scheme, tabs=WIDTHS[width])
    assert seen.messages == []
    assert seen.requests == [page.as_uri()]
    assert seen.found["scroll"] <= seen.found["width"] and seen.found["beyond"] == []
    assert seen.found["mute"] == [] and seen.found["unreachable"] == 0
    assert seen.found["small"] == []
    # the tiles of up to seven models
    tiles = seen.found["tiles"]
    assert bool(tiles) == ('class="seen"' in page.read_text()) and min(tiles, default=99) > 80
    assert (seen.found["background"] == "rgb(255, 255, 255)") == (scheme == "light")
    if WIDTHS[width]:
        first = ["#comparison"] if page.name == "compared.html" else []
        stops = ["#content", *first, "#seen", "#map"]
        assert seen.tab_stops[: len(stops)] == stops
        assert len(set(seen.tab_stops)) > 10


def test_planted_mistakes_are_seen(browser, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(
        "<!doctype html><html><head><meta name='viewport' content='width=device-width'></head>"
        "<body style='background: red'><p style='width: 900px'>wide</p>"
        "<p style='font-size: 10px'>tiny</p><img src='http://127.0.0.1:9/none.png'><script>undefined_function()</script></body></html>"
    )
    seen = browser.look(path, width=390, scheme="dark")
    assert seen.messages and "http://127.0.0.1:9/none.png" in seen.requests
    assert seen.found["beyond"] == ["P."] and len(seen.found["mute"]) == 1
    assert seen.found["small"] == ["10.0 tiny"]
