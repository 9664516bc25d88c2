"""The dashboard shows the series that k8s/README.md names, and no other."""

import json
import re

import pytest
from manifests import K8S

README = (K8S / "README.md").read_text()
DASHBOARD = json.loads((K8S / "setup" / "monitoring" / "dashboard.json").read_text())
SERIES = re.compile(r"ray_moce_\w+")
ROWS = re.findall(r"^\| `(ray_moce_\w+)` \| (\w+) \| ([^|]+) \|", README, re.M)


def expressions():
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_panels_show_exactly_the_named_series():
    assert set(SERIES.findall(" ".join(expressions()))) == {name for name, _, _ in ROWS}
    assert len(ROWS) == 8


def test_counters_are_named_as_ray_exports_them():
    for name, kind, _ in ROWS:
        assert (kind == "counter") == name.endswith("_total"), name
        assert kind in ("gauge", "counter")


def test_panels_filter_by_run_and_show_only_labels_that_the_series_have():
    labels = {name: set(re.findall(r"`(\w+)`", named)) for name, _, named in ROWS}
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            (name, *_) = SERIES.findall(target["expr"])
            assert '{run=~"$run"}' in target["expr"]
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert shown <= labels[name], panel["title"]


def test_unit_and_title_of_a_panel_are_those_of_its_series():
    units = {"_seconds": "s", "_ratio": "percentunit"}
    words = {"s": "Seconds", "percentunit": "share"}
    for panel in DASHBOARD["panels"]:
        unit = panel["fieldConfig"]["defaults"]["unit"]
        for name in SERIES.findall(" ".join(target["expr"] for target in panel["targets"])):
            expected = next((u for end, u in units.items() if name.endswith(end)), "short")
            assert unit == expected, panel["title"]
        assert words.get(unit, "") in panel["title"]


@pytest.mark.parametrize(
    "word",
    ["Images a second", "Waiting", "Loss", "exchanged", "expert", "save", "Unreadable", "Restarts"],
)
def test_there_is_a_panel_for_each_question(word):
    assert any(word in panel["title"] for panel in DASHBOARD["panels"])


def test_panels_do_not_overlap_and_are_numbered():
    seen = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & seen and max(x for x, _ in cells) < 24
        seen |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_dashboard_is_collected_by_its_label(rendered):
    (found,) = [d for d in rendered["setup/monitoring"] if d["kind"] == "ConfigMap"]
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(found["data"]["dashboard.json"]) == DASHBOARD
