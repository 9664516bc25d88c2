"""The page in a real browser: nothing in the console, no request, no sideways scrolling."""

import pytest

from moce_dist.report.page import write_report

from .browser import Browser, find_chromium
from .conftest import build_finished, build_seen

WIDTHS = {1400: 0, 390: 12}
"""Pixels, and how often Tab is pressed there."""

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="needs Chromium (apt install chromium, or MOCE_TEST_CHROMIUM)"
)


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module", params=["finished", "seen"])
def page(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    root = build_finished(folder) if request.param == "finished" else build_seen(folder)[0]
    return write_report(root)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_page_is_quiet_fits_and_follows_the_scheme(browser, page, width, scheme):
    seen = browser.look(page, width=width, scheme=scheme, tabs=WIDTHS[width])
    assert seen.messages == []
    assert seen.requests == [page.as_uri()]
    assert seen.found["scroll"] <= seen.found["width"] and seen.found["beyond"] == []
    assert seen.found["mute"] == [] and seen.found["unreachable"] == 0
    assert (seen.found["background"] == "rgb(255, 255, 255)") == (scheme == "light")
    if WIDTHS[width]:
        assert seen.tab_stops[:3] == ["#content", "#seen", "#map"]
        assert len(set(seen.tab_stops)) > 10


def test_planted_mistakes_are_seen(browser, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(
        "<!doctype html><html><head><meta name='viewport' content='width=device-width'></head>"
        "<body style='background: red'><p style='width: 900px'>wide</p>"
        "<img src='http://127.0.0.1:9/none.png'><script>undefined_function()</script></body></html>"
    )
    seen = browser.look(path, width=390, scheme="dark")
    assert seen.messages and "http://127.0.0.1:9/none.png" in seen.requests
    assert seen.found["beyond"] == ["P."] and len(seen.found["mute"]) == 1
