"""The ledger of results and their summary."""

import json

import pytest

from moce_dist.config import SegmentationConfig, TransferConfig
from moce_dist.run.artefacts import fingerprint
from moce_dist.run.files import read_jsonl, write_jsonl
from moce_dist.run.rows import backbone_texts, difference_text, value_text
from moce_dist.transfer.classification.task import Classification
from moce_dist.transfer.detection.task import Detection
from moce_dist.transfer.results import (
    Fit,
    Ledger,
    differences,
    make_metrics,
    references_of,
    suite_metrics,
    summarise,
)
from moce_dist.transfer.segmentation.task import Segmentation


def row(backbone: str, protocol: str, seed: int, value: float) -> dict[str, object]:
    return {"backbone": backbone, "protocol": protocol, "seed": seed, "value": value}


def test_summary_has_mean_and_sample_deviation():
    rows = [row("mae", "knn", s, v) for s, v in enumerate((0.5, 0.6, 0.7))]
    rows.append(row("moce", "knn", 0, 0.8))
    assert summarise(rows) == [
        {
            **{"backbone": "mae", "protocol": "knn"},
            **{"mean": pytest.approx(0.6), "std": pytest.approx(0.1)},
        },
        {"backbone": "moce", "protocol": "knn", "mean": 0.8, "std": None},
    ]
    assert make_metrics("t", "mIoU", rows)["results"] == rows


def test_differences_are_taken_seed_by_seed():
    rows = [row("moce", "knn", s, v) for s, v in enumerate((0.52, 0.63, 0.74))]
    rows += [row("mae", "knn", s, v) for s, v in enumerate((0.5, 0.6, 0.7))]
    rows += [row("random", "knn", 0, 0.1), row("moce", "linear", 0, 0.9)]
    moce, random = differences(rows)
    assert (moce["reference"], moce["num_seeds"]) == ("mae", 3)
    assert (moce["mean"], moce["std"]) == (pytest.approx(0.03), pytest.approx(0.01))
    # its one seed is compared with that seed of mae
    assert (random["mean"], random["std"], random["num_seeds"]) == (pytest.approx(-0.4), None, 1)


def test_differences_are_taken_to_the_control_where_there_is_one():
    rows = [row(name, "knn", 0, value) for name, value in (("moce", 0.7), ("mae", 0.5))]
    assert [d["reference"] for d in differences(rows)] == ["mae"]
    rows.append(row("control", "knn", 0, 0.6))
    assert [(d["backbone"], d["reference"], d["mean"]) for d in differences(rows)] == [
        ("moce", "control", pytest.approx(0.1)),
        ("mae", "control", pytest.approx(-0.1)),
    ]


def test_further_steps_are_compared_with_the_control_after_as_many():
    values = {"control": 0.59, "control+all": 0.61, "control+own": 0.64, "moce+own": 0.63}
    rows = [row(name, "knn", 0, value) for name, value in values.items()]
    found = {(d["backbone"], d["reference"]): d["mean"] for d in differences(rows)}
    assert found == {
        ("control+own", "control+all"): pytest.approx(0.03),
        ("moce+own", "control+own"): pytest.approx(-0.01),
        ("moce+own", "control+all"): pytest.approx(0.02),
    }
    # where no such control is at hand, the usual reference
    assert differences([rows[0], rows[3]])[0]["reference"] == "control"
    rows += [row(name, "knn", 0, value) for name, value in (("mae+own", 0.61), ("mae+all", 0.58))]
    found |= {("mae+own", "mae+all"): pytest.approx(0.03)}
    assert {(d["backbone"], d["reference"]): d["mean"] for d in differences(rows)} == found
    # what the clusters add to a task's training images
    names = ["control", "control+own", "mae+own", "mae+train", "control+train"]
    assert references_of("mae+train", names) == ["mae+own"]
    assert references_of("control+train", names) == ["control+own"]
    assert references_of("mae+own", ["mae+train", "mae+own"]) == []
    # in a run without a control, the MAE takes its place
    names = ["moce", "mae", "moce+own", "mae+own", "mae+all"]
    assert references_of("moce+own", names) == ["mae+own", "mae+all"]
    assert references_of("moce", names) == ["mae"]


def test_a_value_that_does_not_depend_on_the_seed_stands_for_all_and_has_no_deviation():
    fixed = [
        {**row(n, "knn", 0, v), "is_drawn": False} for n, v in (("control", 0.5), ("moce", 0.6))
    ]
    drawn = [row("random", "knn", seed, 0.1 * seed) for seed in range(3)]
    moce, random = differences([*fixed, *drawn])
    assert (moce["num_seeds"], moce["std"], moce["mean"]) == (1, None, pytest.approx(0.1))
    assert (random["num_seeds"], random["mean"]) == (3, pytest.approx(-0.4))
    assert random["std"] == pytest.approx(0.1)


def test_steps_that_a_backbone_lacks_stand_in_its_rows_and_are_shown():
    rows = [row("moce", "knn", s, 0.7) for s in (0, 1)] + [row("mae", "knn", 0, 0.5)]
    metrics = make_metrics("t", "accuracy", rows, {"moce": 0, "mae": 237})
    moce, mae = metrics["summary"]
    assert "steps_fewer" not in moce and mae["steps_fewer"] == 237
    names = backbone_texts(metrics)
    assert names == {"moce": "moce", "mae": "mae (237 steps fewer)"}
    assert (value_text(moce), value_text(mae)) == ("0.7000 ± 0.0000", "0.5000")
    (difference,) = metrics["differences"]
    assert difference_text(difference, names) == "moce - mae (237 steps fewer), knn: +0.2000"
    suite = suite_metrics([metrics], {})
    assert [r.get("steps_fewer") for r in suite["summary"]] == [None, 237]


def test_without_mae_the_first_backbone_is_the_reference():
    rows = [row("random", "knn", 0, 0.1), row("moce", "knn", 0, 0.4)]
    assert [(d["backbone"], d["reference"]) for d in differences(rows)] == [("moce", "random")]
    assert differences([]) == differences(rows[:1]) == []


def test_means_over_tasks_and_their_deviation():
    tables = []
    for name, values in {"a": (0.5, 0.6, 0.7), "b": (0.2, 0.2, 0.2)}.items():
        rows = [row("mae", "knn", s, v) for s, v in enumerate(values)]
        rows += [row("moce", "knn", s, v + 0.1) for s, v in enumerate(values)]
        tables.append(make_metrics(name, "accuracy", rows))
    found = suite_metrics(tables, {"c": "ConfigError: nothing there"})
    mae = found["summary"][0]
    assert (mae["mean"], mae["std"]) == (pytest.approx(0.4), pytest.approx(0.05))
    assert found["differences"][0]["mean"] == pytest.approx(0.1)
    assert found["failed"].keys() == {"c"} and len(found["results"]) == 12
    assert {r["task"] for r in found["results"]} == {"a", "b"}


def test_means_over_tasks_have_no_deviation_where_a_task_has_one_seed():
    seeds = {"a": (0.5, 0.6), "b": (0.3,)}
    tables = [
        make_metrics(name, "accuracy", [row("mae", "knn", s, v) for s, v in enumerate(values)])
        for name, values in seeds.items()
    ]
    assert suite_metrics(tables, {})["summary"][0]["std"] is None


def test_rows_of_a_stage_that_was_trained_anew_do_not_count_nor_does_a_new_stage_cost_others(
    tmp_path,
):
    path, own = tmp_path / "results.jsonl", {"moce": "a", "mae": "b"}
    old = Ledger(path, {"knn": "x"}, own, {"moce": "1", "mae": "2"})
    for name in own:
        old.add(row(name, "knn", 0, 0.1))
    stages = {"moce": "1", "mae": "2", "control": "3"}
    assert len(Ledger(path, {"knn": "x"}, {"control": "c"}, stages).rows()) == 2
    stages["moce"] = "4"
    assert set(Ledger(path, {"knn": "x"}, {"mae": "b"}, stages).rows()) == {Fit("mae", "knn", 0)}


def test_only_rows_of_the_present_conditions_count(tmp_path):
    path = tmp_path / "results.jsonl"
    old = Ledger(path, {"knn": "a", "linear": "b"}, {"moce": "route 0", "mae": "x"})
    for name in ("moce", "mae"):
        old.add(row(name, "knn", 0, 0.1))
        old.add(row(name, "linear", 0, 0.2))
    assert len(old.rows()) == 4
    # another budget of linear, another route of the MoCE
    new = Ledger(path, {"knn": "a", "linear": "c"}, {"moce": "route 1"})
    assert set(new.rows()) == {Fit("mae", "knn", 0)}
    new.add(row("moce", "knn", 0, 0.9))
    assert new.rows()[Fit("moce", "knn", 0)]["value"] == 0.9
    assert old.rows()[Fit("moce", "knn", 0)]["value"] == 0.1


def test_line_cut_off_by_a_kill_costs_only_itself(tmp_path):
    path = tmp_path / "results.jsonl"
    ledger = Ledger(path, {"knn": "a"}, {"mae": "x"})
    ledger.add(row("mae", "knn", 0, 0.1))
    with path.open("a") as file:
        file.write(json.dumps({"common": "a"})[:7])
    ledger.add(row("mae", "knn", 1, 0.2))
    assert [fit.seed for fit in ledger.rows()] == [0, 1]


def test_budget_names_what_a_protocol_depends_on():
    transfer = TransferConfig()
    budget = Classification.budget
    assert budget(transfer, "knn") == {"max_train": None, "knn_k": 10}
    assert budget(transfer, "finetune").keys() == {"max_train", "finetune"}
    added = {"segment_": {"cat_max_ratio"}, "detect_": set()}
    for prefix, kind in (("segment_", Segmentation), ("detect_", Detection)):
        fields = kind.budget(transfer, "finetune")
        own = {name for name in transfer.flat() if name.startswith(prefix)}
        assert fields.keys() == {"max_train", "last_block", *own, *added[prefix]} and len(own) > 6


def test_a_field_that_was_added_later_counts_where_it_is_set():
    usual = TransferConfig()
    other = TransferConfig(segmentation=SegmentationConfig(cat_max_ratio=1))
    assert "segment_cat_max_ratio" not in usual.flat()
    assert other.flat() == usual.flat() | {"segment_cat_max_ratio": 1}
    budgets = [Segmentation.budget(transfer, "finetune") for transfer in (usual, other)]
    assert budgets[0] != budgets[1] and budgets[0]["cat_max_ratio"] == 0.75


def test_a_choice_by_evidence_counts_where_the_control_is_what_it_was(tmp_path):
    path, own = tmp_path / "results.jsonl", dict.fromkeys(("moce", "moce:vote", "mae"), "o")
    own |= dict.fromkeys(("moce:validate", "moce:validate+own", "moce+own"), "o")

    def open_as(own, select, control):
        stages = {"moce": "1", "mae": "2"}
        chosen = {"choosing": select, "further": "90000", "select": select}
        return Ledger(path, {"knn": "x"}, own, stages, control=control, **chosen)

    for select in ("vote", "validate"):
        path.unlink(missing_ok=True)
        for name in own:
            open_as(own, select, "c").add(row(name, "knn", 0, 0.1))
        by_evidence = {name for name in own if "validate" in name}
        if select == "validate":
            by_evidence |= {"moce", "moce+own"}
        found = {
            control: {fit.backbone for fit in open_as({}, select, control).rows()}
            for control in ("c", "d", None)
        }
        assert found == {"c": set(own), "d": own.keys() - by_evidence, None: found["d"]}


def test_identities_are_those_that_the_valid_rows_were_made_with(tmp_path):
    path, stages = tmp_path / "results.jsonl", {"moce": "1", "mae": "2"}
    first = Ledger(path, {"knn": "a"}, {"moce": "m", "mae": "x"}, stages)
    other = Ledger(path, {"knn": "b"}, first.own, stages)
    fits = [Fit(name, "knn", 0) for name in first.own]
    for ledger in (first, other):
        for fit in fits:
            ledger.add(row(*fit, 0.1))
    # of a backbone that is not requested now, too
    again = Ledger(path, {"knn": "a"}, {"moce": "m"}, stages)
    assert again.identities() == {fit: first.identity(fit) for fit in fits}
    assert other.identities() == {fit: other.identity(fit) for fit in fits}
    assert not set(first.identities().values()) & set(other.identities().values())


def test_without_further_steps_the_rows_of_those_taken_last_stay(tmp_path):
    path, stages = tmp_path / "results.jsonl", {"control": "1", "mae": "2"}
    own = dict.fromkeys(("control", "control+own", "control+all", "mae+own"), "o")

    def open_as(names=(), further=None, stages=stages):
        given = {name: own[name] for name in names}
        return Ledger(path, {"knn": "x"}, given, stages, further=further)

    def backbones(**conditions):
        return {fit.backbone for fit in open_as(**conditions).rows()}

    for name in own:
        open_as(own, "90000").add(row(name, "knn", 0, 0.1))
    open_as(["control"]).add(row("control", "knn", 1, 0.2))
    assert backbones() == backbones(further="90000") == set(own)
    assert backbones(stages={"control": "3", "mae": "2"}) == {"mae+own"}
    # never those of several numbers of images side by side
    open_as(["mae+own"], "9").add(row("mae+own", "knn", 0, 0.3))
    assert backbones() == backbones(further="9") == {"control", "mae+own"}
    assert open_as().rows()[Fit("mae+own", "knn", 0)]["value"] == 0.3
    assert backbones(further="90000") == set(own)
    assert open_as(further="90000").rows()[Fit("mae+own", "knn", 0)]["value"] == 0.1


def test_rows_of_other_choices_or_other_further_steps_do_not_count_unless_they_are_asked_for(
    tmp_path,
):
    path, own = tmp_path / "results.jsonl", {"control": "c", "moce": "m", "control+own": "f"}
    stages = {"control": "1", "moce": "2"}

    def open_as(own, choosing="vote", further="90000"):
        return Ledger(path, {"knn": "x"}, own, stages, choosing=choosing, further=further)

    for name in own:
        open_as(own).add(row(name, "knn", 0, 0.1))
    asked = {"control": "c"}
    assert {fit.backbone for fit in open_as(asked).rows()} == set(own)
    assert {fit.backbone for fit in open_as(asked, further="9").rows()} == {"control", "moce"}
    # own steps of the control need no choice of experts; earlier versions noted one
    kept = {fit.backbone for fit in open_as(asked, choosing="merge").rows()}
    assert kept == {"control", "control+own"}
    lines = read_jsonl(path)
    lines[-1]["stage"] = fingerprint(["1", "vote", "90000"])
    write_jsonl(path, lines)
    assert {fit.backbone for fit in open_as(asked).rows()} == set(own)
    assert {fit.backbone for fit in open_as(asked, choosing="merge").rows()} == {"control"}
    # of what is asked for, its own fingerprint says everything
    assert len(open_as(own, choosing="merge", further="9").rows()) == 3
