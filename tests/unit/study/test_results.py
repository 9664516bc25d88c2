"""Tables, costs and the page, from values made by hand."""

import json
import os
import re

import numpy as np
import pytest

from moce_dist.run.artefacts import COMPLETE, mark_complete
from moce_dist.study.page import render
from moce_dist.study.results import tables, why_no_mean
from moce_dist.study.work import link_artefact
from moce_dist.train.metrics import training_seconds

PARTNERS = {"control": None, "moce": "control", "own": "control"}


def value(arm, seed, task, protocol, share):
    of = {"arm": arm, "seed": seed, "task": task, "protocol": protocol}
    return {**of, "metric": "accuracy", "value": share}


@pytest.fixture
def values():
    """Two seeds of two tasks and protocols; of one arm a task is missing."""
    made = [
        *(("control", 0, "a", "knn", 0.50), ("control", 0, "b", "knn", 0.70)),
        *(("control", 1, "a", "knn", 0.54), ("control", 1, "b", "knn", 0.72)),
        *(("moce", 0, "a", "knn", 0.53), ("moce", 0, "b", "knn", 0.71)),
        *(("moce", 1, "a", "knn", 0.59), ("moce", 1, "b", "knn", 0.75)),
        *(("own", 0, "a", "knn", 0.60), ("own", 1, "a", "knn", 0.62)),
    ]
    few = [(arm, seed, task, "logistic10", share - 0.1) for arm, seed, task, _, share in made]
    return [value(*row) for row in [*made, *few]]


def made(values):
    return {table["protocol"]: table["arms"] for table in tables(values, PARTNERS, 2000)}


def test_table_by_hand(values):
    knn = made(values)["knn"]
    assert knn["control"]["mean"]["mean"] == pytest.approx(0.615)
    # the means of the seeds are .60 and .63
    assert knn["control"]["mean"]["std"] == pytest.approx(0.03 / 2**0.5)
    assert knn["moce"]["tasks"]["a"]["mean"] == pytest.approx(0.56)
    gain = knn["moce"]["difference"]
    assert gain["mean"]["mean"] == pytest.approx((0.03 + 0.01 + 0.05 + 0.03) / 4)
    assert gain["tasks"]["a"]["mean"] == pytest.approx(0.04)
    # paired: .02 and .04; the deviation of the unpaired means would be greater
    assert gain["mean"]["std"] == pytest.approx(0.02 / 2**0.5)
    assert 0.01 <= gain["mean"]["low"] < gain["mean"]["high"] <= 0.05
    assert "difference" not in knn["control"]


def test_an_arm_with_some_tasks_is_compared_on_those(values):
    own = made(values)["knn"]["own"]
    assert (own["mean"]["num_tasks"], own["mean"]["mean"]) == (1, pytest.approx(0.61))
    assert own["difference"]["mean"]["mean"] == pytest.approx((0.10 + 0.08) / 2)
    assert "b" not in own["tasks"]


def test_an_arm_is_compared_with_the_partner_that_it_names(values, content):
    found = tables(values, {**PARTNERS, "own": "moce"}, 2000)
    own = found[0]["arms"]["own"]["difference"]
    assert own["to"] == "moce" and own["mean"]["mean"] == pytest.approx((0.07 + 0.03) / 2)
    page = render({**content, "tables": found})
    assert "to moce" in page and "to moce" not in render(content)


def test_a_difference_of_fewer_seeds_than_its_arm_says_so(values, content):
    more = [value("own", 2, "a", protocol, 0.7) for protocol in ("knn", "logistic10")]
    page = render({**content, "tables": tables([*values, *more], PARTNERS, 2000)})
    assert "of 2 of the seeds" in page and "of 2 of the seeds" not in render(content)


def grid(missing, num_seeds=5, tasks="abcdefghij"):
    """Make values of two arms, without the missing cells (arm, seed, task), and arrays (S, T)."""
    draws = np.random.default_rng(11)
    arrays = {arm: draws.random((num_seeds, len(tasks))) for arm in ("control", "moce")}
    cells = [
        value(arm, seed, task, "knn", share)
        for arm, array in arrays.items()
        for (seed, i), share in np.ndenumerate(array)
        if (arm, seed, task := tasks[i]) not in missing
    ]
    return cells, arrays


def test_a_task_of_one_seed_costs_no_seed(content):
    cells, arrays = grid({("moce", seed, "j") for seed in range(1, 5)})
    found = tables(cells, PARTNERS, 1000)
    moce = found[0]["arms"]["moce"]
    assert moce["over"] == {"seeds": [0, 1, 2, 3, 4], "tasks": list("abcdefghi")}
    assert moce["mean"]["mean"] == pytest.approx(arrays["moce"][:, :9].mean())
    assert moce["tasks"]["j"]["mean"] == pytest.approx(arrays["moce"][0, 9])
    gains = (arrays["moce"] - arrays["control"])[:, :9].mean(axis=1)
    gain = moce["difference"]["mean"]
    assert (gain["mean"], gain["std"]) == pytest.approx((gains.mean(), gains.std(ddof=1)))
    assert (gain["num_seeds"], gain["num_tasks"]) == (5, 9) and gain["low"] < gain["high"]
    page = render({**content, "seeds": [0, 1, 2, 3, 4], "tables": found})
    assert page.count("(9 of the tasks)") == 1 and "of the seeds)" not in page
    assert "of 9 of the tasks" not in page, "a difference over the same says nothing more"


def test_two_missing_cells_in_a_cross_keep_an_arm(content):
    found = tables(grid({("moce", 0, "b"), ("moce", 1, "a")}, 2, "ab")[0], PARTNERS, 1000)
    moce = found[0]["arms"]["moce"]
    assert moce["over"] == moce["difference"]["over"] == {"seeds": [0], "tasks": ["a"]}
    assert set(moce["tasks"]) == set(moce["difference"]["tasks"]) == {"a", "b"}
    page = render({**content, "tables": found})
    assert "moce <small>(1 of the tasks)</small> <small>(1 of the seeds)</small>" in page
    assert page.count('"first">moce') == 3, "over tasks, task by task, and the cost"


def test_a_difference_is_over_cells_that_both_arms_have(content):
    missing = {("moce", 4, "a"), *(("control", 0, task) for task in "bcdefghij")}
    cells, arrays = grid(missing)
    found = tables(cells, PARTNERS, 1000)
    control, moce = (found[0]["arms"][arm] for arm in ("control", "moce"))
    assert control["over"] == {"seeds": [1, 2, 3, 4], "tasks": list("abcdefghij")}
    assert moce["over"] == {"seeds": [0, 1, 2, 3, 4], "tasks": list("bcdefghij")}
    # seeds 1 to 4 with 9 tasks; seeds 1 to 3 with 10 are fewer
    assert moce["difference"]["over"] == {"seeds": [1, 2, 3, 4], "tasks": list("bcdefghij")}
    gain = (arrays["moce"] - arrays["control"])[1:, 1:].mean()
    assert moce["difference"]["mean"]["mean"] == pytest.approx(gain)
    page = render({**content, "seeds": [0, 1, 2, 3, 4], "tables": found})
    assert "of 4 of the seeds<" in page


def test_a_difference_over_more_seeds_than_its_arm_says_so(content):
    """Fewer cells can make a rectangle of more seeds: both of its sides are then named."""
    missing = {("moce", seed, task) for seed in (3, 4) for task in "defghij"}
    missing |= {("control", seed, task) for seed in range(5) for task in "efghij"}
    found = tables(grid(missing)[0], PARTNERS, 1000)
    moce = found[0]["arms"]["moce"]
    assert (moce["mean"]["num_seeds"], moce["mean"]["num_tasks"]) == (3, 10)
    gain = moce["difference"]["mean"]
    assert (gain["num_seeds"], gain["num_tasks"]) == (5, 3)
    page = render({**content, "seeds": [0, 1, 2, 3, 4], "tables": found})
    assert "of 5 of the seeds and 3 of the tasks<" in page


def test_arms_with_nothing_in_common_have_no_difference(content):
    missing = {("moce", seed, "a") for seed in (0, 1)} | {("control", seed, "b") for seed in (0, 1)}
    cells, arrays = grid(missing, 2, "ab")
    found = tables(cells, PARTNERS, 1000)
    moce, own = (found[0]["arms"][arm] for arm in ("moce", "own"))
    assert moce["mean"]["mean"] == pytest.approx(arrays["moce"][:, 1].mean())
    nothing = {"mean": None, "over": {"seeds": [], "tasks": []}, "tasks": {}}
    assert moce["difference"] == {"to": "control", **nothing}
    assert own == {**nothing, "difference": {"to": "control", **nothing}}
    page = render({**content, "tables": found})
    assert page.count('"first">moce') == 3 and page.count('"first">own') == 1
    assert 'class="bar"' not in page


def test_protocols_without_a_common_cell_have_no_mean(content):
    cells = [value("control", 0, "a", "knn", 0.5), value("moce", 0, "a", "linear", 0.6)]
    found = tables(cells, PARTNERS, 1000)
    assert [table["protocol"] for table in found] == ["knn", "linear"]
    page = render({**content, "tables": found})
    assert "mean of the protocols" not in page
    assert "knn, linear (accuracy) have no mean: no arm has a value by all." in page


def test_a_task_without_a_protocol_leaves_no_mean_and_the_page_says_so(values, content):
    assert "have no mean" not in render(content)
    short = [v for v in values if (v["task"], v["protocol"]) != ("b", "logistic10")]
    found = tables(short, PARTNERS, 1000)
    assert [table["protocol"] for table in found] == ["knn", "logistic10"]
    said = "knn, logistic10 (accuracy) have no mean: no value of b by logistic10."
    assert why_no_mean(found) == [said] and said in render({**content, "tables": found})


def test_metrics_of_classification_have_one_table_and_one_mean(values, content):
    metrics = {"a": "mean_class_accuracy", "b": "accuracy", "c": "mAP"}
    third = [{**v, "task": "c"} for v in values if v["task"] == "a"]
    cells = [{**v, "metric": metrics[v["task"]]} for v in [*values, *third]]
    scene = {**value("control", 0, "d", "finetune", 0.3), "metric": "mIoU"}
    found = tables([*cells, scene], PARTNERS, 1000)
    assert [(t["protocol"], t["metric"], t["tasks"]) for t in found] == [
        ("knn", "classification", ["a", "b", "c"]),
        ("logistic10", "classification", ["a", "b", "c"]),
        ("finetune", "mIoU", ["d"]),
        ("mean", "classification", ["a", "b", "c"]),
    ]
    assert found[0]["metrics"] == metrics and "metrics" not in found[2]
    # of c the values of a: .5, .7, .5 and .54, .72, .54
    assert found[0]["arms"]["control"]["mean"]["mean"] == pytest.approx((1.7 + 1.8) / 6)
    page = render({**content, "tables": found})
    assert "(classification, mean of 3 tasks)" in page
    assert '<th class="number">c<br><small>mAP</small></th>' in page
    alone = tables([{**v, "metric": "mAP"} for v in third], PARTNERS, 1000)
    assert {table["metric"] for table in alone} == {"mAP"} and "metrics" not in alone[0]


def test_a_table_of_accuracy_alone_has_no_more_than_before(values, content):
    found = tables(values, PARTNERS, 1000)
    assert all(list(table) == ["protocol", "metric", "tasks", "arms"] for table in found)
    assert '<th class="number">a</th>' in render({**content, "tables": found})


def test_mean_over_protocols(values):
    assert made(values)["mean"]["moce"]["mean"]["mean"] == pytest.approx(0.645 - 0.05)
    alone = [v for v in values if v["protocol"] == "knn"]
    assert set(made(alone)) == {"knn"}


def test_metrics_of_other_kinds_have_tables_of_their_own(values):
    scene = {**value("control", 0, "c", "finetune", 0.3), "metric": "mIoU"}
    found = tables([*values, scene], {"control": None}, 1000)
    assert [(t["protocol"], t["metric"], t["tasks"]) for t in found][2:] == [
        ("finetune", "mIoU", ["c"]),
        ("mean", "accuracy", ["a", "b"]),
    ]


def test_seconds_of_training_are_those_of_the_lines():
    lines = [
        {"images_seen": 100, "images_per_s": 50.0, "seconds": 2.0},
        # the first line after an interruption: one slow step, and images that were not logged
        {"images_seen": 900, "images_per_s": 5.0, "seconds": 1.0},
    ]
    assert training_seconds(lines) == 3


def test_seconds_of_training_are_images_over_rates():
    lines = [(100, 50), (300, 100), (400, 25)]
    metrics = [{"images_seen": seen, "images_per_s": rate} for seen, rate in lines]
    assert training_seconds(metrics) == 2 + 2 + 4
    assert training_seconds([]) == 0


@pytest.fixture
def content(values):
    cost = {"mae_images": 10, "moce_images": 20, "training_flop": 3e12, "clustering_flop": 1e12}
    arm = {"about": "<b>", "backbone": "moce", "runs": ["r"], "cost": {**cost, "seconds": None}}
    run = {"data": "all", "num_images": 9, "stages": {"mae": {"made_by": "other"}}}
    return {
        **{"title": "T & T", "split": "val", "reference": "control", "seeds": [0, 1], "left": 3},
        **{"arms": {"control": arm, "moce": arm, "own": arm}, "failed": {"r/mae": "<oops>"}},
        "tables": tables(values, PARTNERS, 2000),
        "runs": {"r": run},
        "study": {"tasks": ["a", "b"]},
        "machine": {"name": "m", "cores": 2, "memory_gib": 1, "system": "s", "gpu": None},
        **{"versions": {"python": "3"}, "time": "now"},
    }


def test_page_shows_points_and_escapes_what_it_shows(content):
    page = render(content)
    assert "+3.00" in page and "61.50 ± 2.12" in page
    # differences of the two seeds .02 and .04: .03 ± 12.706 * .01
    assert "-9.71 to +15.71" in page
    assert "T &amp; T" in page and "&lt;oops&gt;" in page and "&lt;b&gt;" in page
    assert "(1 of the tasks)" in page and "3 pieces of work are not finished" in page
    assert not re.search(r"<script|https?://|url\(", page)
    assert page.index("mean of the protocols") < page.index(">knn")


def test_too_few_seeds_are_those_of_a_row_and_spoil_the_bootstrap_alone(content):
    cells, _ = grid({("moce", seed, task) for seed in (2, 3, 4) for task in "abcdefghij"})
    page = render({**content, "seeds": [0, 1, 2, 3, 4], "tables": tables(cells, PARTNERS, 1000)})
    assert "a row has 2) the bootstrap's interval is too narrow; Student's allows for" in page
    page = render({**content, "seeds": list(range(5)), "tables": tables(grid({})[0], PARTNERS, 99)})
    assert "too narrow" not in page, "five seeds"
    cells = grid(set(), 2, "a")[0]
    page = render({**content, "seeds": [0, 1], "tables": tables(cells, PARTNERS, 1000)})
    assert "too narrow" not in page, "the interval on one task is Student's"


def test_interval_is_drawn_where_it_is(content):
    page = render(content)
    # the greatest end of a table lies at 92 of 100 on its side
    assert 'x2="192.0"' in page
    assert json.loads(json.dumps(content)) == content, "study.json holds all of it"


def test_page_before_anything_is_finished(content):
    page = render({**content, "tables": [], "failed": {}, "seeds": [0]})
    assert "No task is finished yet" in page and "One seed has no deviation" in page


@pytest.fixture
def artefact(tmp_path):
    folder = tmp_path / "a" / "mae"
    (folder / "checkpoints").mkdir(parents=True)
    weights, log = folder / "checkpoints" / "w.safetensors", folder / "metrics.jsonl"
    weights.write_text("weights")
    log.write_text("line\n")
    mark_complete(folder, {"data": 1}, [weights, log])
    return folder


def test_link_shares_files_but_no_logs(artefact, tmp_path):
    target = tmp_path / "b" / "mae"
    target.parent.mkdir()
    link_artefact(artefact, target)
    for name, is_shared in (("checkpoints/w.safetensors", True), ("metrics.jsonl", False)):
        assert (target / name).read_text() == (artefact / name).read_text()
        assert os.path.samefile(artefact / name, target / name) == is_shared
    assert [p.name for p in target.parent.iterdir()] == ["mae"]


def test_link_is_made_anew_when_the_artefact_was(artefact, tmp_path):
    target = tmp_path / "mae"
    link_artefact(artefact, target)
    (target / "mine").touch()
    link_artefact(artefact, target)
    assert (target / "mine").exists(), "what is there is left alone"
    mark_complete(artefact, {"data": 2}, [artefact / "metrics.jsonl"])
    link_artefact(artefact, target)
    assert not (target / "mine").exists()
    assert (target / COMPLETE).read_text() == (artefact / COMPLETE).read_text()
    with pytest.raises(FileNotFoundError):
        link_artefact(tmp_path / "nowhere", target)
