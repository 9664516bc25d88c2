"""Requests under changing conditions: figures, rows and models that stay, and those that go."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moce_dist.__main__ import main
from moce_dist.report.page import write_report
from moce_dist.report.summary import summary_lines
from moce_dist.run.artefacts import mark_complete, read_marker
from moce_dist.run.directory import Run
from moce_dist.transfer import compare
from moce_dist.transfer.backbone import run_backbone
from moce_dist.transfer.classification.task import Classification
from moce_dist.transfer.compare import Comparison
from moce_dist.transfer.request import Request
from moce_dist.transfer.results import Ledger
from moce_dist.transfer.saved import identity_of

from .conftest import by_global_name, write_checkpoint

Ask = Callable[..., dict[str, Any]]
VALIDATE = ("--set", "transfer.evaluate=val")


@pytest.fixture
def folder(run: Run) -> Path:
    return run.transfer("imagefolder")


@pytest.fixture
def ask(run: Run, folder: Path, image_folder: Path, job) -> Ask:
    """Carry out a request on the run; return what it left in metrics.json."""

    def ask(backbones: str, protocols: str, *flags: str) -> dict[str, Any]:
        where = ["--run", str(run.root), "--task", "imagefolder", "--data", str(image_folder)]
        job.main([*where, "--backbone", backbones, "--protocol", protocols, *flags])
        return json.loads((folder / "metrics.json").read_text())

    return ask


def limited(images: int) -> tuple[str, str]:
    return "--set", f"transfer.max_train={images}"


def test_figures_of_a_request_that_failed_are_not_those_of_an_earlier_one(ask, folder, monkeypatch):
    first = ask("moce", "knn")
    assert [row["num_test"] for row in first["results"]] == [24] and read_marker(folder)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(compare, "export_backbone", fail)
        with pytest.raises(OSError, match="No space left on device"):
            ask("moce", "knn", *VALIDATE)
    # its figures were written, and nothing says that they belong to a finished request
    left = json.loads((folder / "metrics.json").read_text())
    assert [row["num_test"] for row in left["results"]] != [24] and read_marker(folder) is None
    assert ask("moce", "knn") == first
    assert len((folder / "results.jsonl").read_text().splitlines()) == 2, "nothing is repeated"
    assert {"metrics.json", "backbone/README.md"} <= read_marker(folder)["files"].keys()
    assert "| backbone | protocol | accuracy |" in (folder / "backbone/README.md").read_text()


@pytest.mark.parametrize(
    ("protocol", "kept"), [("linear", {"last"}), ("finetune", {"best", "last"})]
)
def test_no_model_of_other_conditions_stands_beside_a_row(protocol, kept, ask, folder, caplog):
    viewed = ("--set", "transfer.view_every_steps=1", "--set", "transfer.finetune.epochs=2")
    models = folder / "models" / f"mae-{protocol}-0"

    def made_as() -> dict[str, str | None]:
        return {path.name: identity_of(path) for path in models.iterdir() if path.is_dir()}

    ask("mae", protocol, *viewed, *limited(10))
    first = made_as()
    assert first.keys() == kept and len(set(first.values())) == 1 and None not in first.values()
    # finished, then extended: the same conditions
    ask("mae", protocol, *viewed, *limited(10))
    ask("mae", f"{protocol},knn", *viewed, *limited(10))
    assert made_as() == first and "other conditions" not in caplog.text

    ask("mae", protocol, *viewed, *limited(4))
    second = made_as()
    assert second.keys() == kept and not set(second.values()) & set(first.values())
    caplog.clear()
    again = ask("mae", protocol, *viewed, *limited(10))
    assert {row["protocol"]: row["num_train"] for row in again["results"]}[protocol] == 10
    assert made_as() == {}
    assert caplog.text.count("is of other conditions than its row") == len(kept)


def test_models_of_rows_that_are_shown_but_not_asked_for_are_of_their_conditions_too(ask, folder):
    ask("mae,random", "linear", *limited(10))
    ask("mae,random", "linear", *limited(4))
    shown = ask("mae", "knn", *limited(10))
    assert {(r["backbone"], r["protocol"], r["num_train"]) for r in shown["results"]} == {
        ("mae", "linear", 10), ("random", "linear", 10), ("mae", "knn", 10),
    }  # fmt: skip
    assert not [*folder.glob("models/*/last")]


def test_a_fit_that_saves_no_model_leaves_none_of_other_conditions(ask, folder):
    ask("mae", "linear", *limited(10))
    assert [*folder.glob("models/*/last")]
    ask("mae", "linear", *limited(4), "--set", "transfer.save_models=false")
    assert not [*folder.glob("models/*/last")]


def test_a_model_that_does_not_say_what_it_was_made_from_is_kept(ask, folder, image_folder, capsys):
    """As versions before saved it."""
    ask("mae", "linear", *limited(10))
    ask("mae", "linear", *limited(4))
    last = folder / "models" / "mae-linear-0" / "last"
    content = json.loads((last / "config.json").read_text())
    del content["moce_dist"]["about"]["of"]
    (last / "config.json").write_text(json.dumps(content))
    assert identity_of(last) is None
    ask("mae", "linear", *limited(10))
    assert (last / "model.safetensors").exists()
    capsys.readouterr()
    main(["predict", str(folder), str(image_folder / "test" / "rows"), "--backbone", "mae"])
    assert len(capsys.readouterr().out.splitlines()) == 12


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"moce_dist": {}}', '{"moce_dist": 1}'])
def test_a_model_without_readable_description_has_no_identity(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert identity_of(tmp_path) is None


@pytest.fixture
def ledger_of(run: Run, config, image_folder: Path) -> Callable[..., Ledger]:
    """Open the results of a request for backbones; their weights play no part here."""
    task = Classification.open("imagefolder", image_folder)

    def ledger_of(*backbones: str, experts: tuple[int, ...] | None = None, **fields) -> Ledger:
        request = Request("imagefolder", image_folder, backbones, ("knn",), 1, experts)
        transfer = config.transfer.model_copy(update=fields)
        changed = config.model_copy(update={"transfer": transfer})
        made = {name: run_backbone(name, config, None) for name in backbones}
        return Comparison(request, run, changed, task).ledger(made)

    return ledger_of


def write_control(run: Run, config, models, step: int, *, is_finished: bool = True) -> None:
    weights = {n: t + 0.01 * step for n, t in by_global_name(models["mae"], config).items()}
    write_checkpoint(run.stage("control") / "checkpoints" / f"step_{step:08d}", weights)
    if is_finished:
        mark_complete(run.stage("control"), {}, [])


CHOSEN = ("moce", "moce:vote", "moce:validate")


@pytest.mark.parametrize("select", ["vote", "validate"])
def test_a_choice_by_evidence_counts_as_long_as_the_control_is_what_it_was(
    select, run, config, models, ledger_of
):
    by_evidence = {"moce:validate", *(["moce"] if select == "validate" else [])}
    others = {"mae", *CHOSEN} - by_evidence

    def fill(*backbones: str) -> None:
        ledger = ledger_of(*backbones, select=select)
        for name in backbones:
            ledger.add({"backbone": name, "protocol": "knn", "seed": 0, "value": 0.5})

    def valid() -> set[str]:
        return {fit.backbone for fit in ledger_of("timm:x", select=select).rows()}

    fill(*CHOSEN, "mae")
    assert valid() == {*others, *by_evidence}
    # it is no candidate before it is finished
    write_control(run, config, models, 5, is_finished=False)
    assert valid() == {*others, *by_evidence}
    mark_complete(run.stage("control"), {}, [])
    assert valid() == others, "it appeared"
    fill(*CHOSEN, "control", "mae")
    assert valid() == {*others, *by_evidence, "control"}
    write_control(run, config, models, 6)
    assert valid() == others, "it changed"


def test_experts_that_are_named_were_not_chosen_by_evidence(run, config, models, ledger_of):
    given = {"experts": (0, 1), "select": "validate"}
    row = {"backbone": "moce", "protocol": "knn", "seed": 0, "value": 0.5}
    ledger_of("moce", **given).add(row)
    write_control(run, config, models, 5)
    assert [fit.backbone for fit in ledger_of("mae", **given).rows()] == ["moce"]
    assert not ledger_of("mae", select="validate").rows()


def test_a_control_is_not_compared_with_a_choice_that_did_not_know_it(run, config, models, ask):
    ask("moce:validate,mae", "knn")
    write_control(run, config, models, 5)
    with_control = ask("control", "knn")
    assert [row["backbone"] for row in with_control["results"]] == ["mae", "control"]
    assert [each["backbone"] for each in with_control["differences"]] == ["mae"]
    again = ask("moce:validate", "knn")
    assert {row["backbone"] for row in again["results"]} == {"moce:validate", "mae", "control"}


def test_a_metric_says_that_it_was_measured_on_validation_images(run, ask, folder, capsys):
    assert ask("moce,mae", "knn")["metric"] == "accuracy"
    assert "(val)" not in capsys.readouterr().out
    metrics = ask("moce,mae", "knn", *VALIDATE)
    assert metrics["metric"] == "accuracy (val)"
    assert {row["num_train"] + row["num_test"] for row in metrics["results"]} == {48}
    shown = capsys.readouterr().out
    assert "imagefolder: accuracy (val)" in shown and "│ accuracy (val) │" in shown
    card = (folder / "backbone" / "README.md").read_text()
    assert "| backbone | protocol | accuracy (val) |" in card
    page = write_report(run.root).read_text()
    assert "(accuracy (val))" in page and "knn: accuracy (val)" in page
    assert "task imagefolder, accuracy (val):" in summary_lines(run.root)
    ask("moce,mae", "knn")
    assert "(val)" not in (folder / "backbone" / "README.md").read_text()


def test_a_suite_says_which_tasks_were_measured_on_validation_images(
    run, image_folder, job, tmp_path, capsys
):
    entry = {"task": "imagefolder", "data": str(image_folder), "protocol": ["knn"]}
    tried = {**entry, "name": "tried", "set": ["transfer.evaluate=val"]}
    recipe = tmp_path / "suite.yaml"
    recipe.write_text(json.dumps({"transfer": {"suite": [entry, tried]}}))
    flags = ["--task", "all", "--config", str(recipe), "--run", str(run.root)]
    job.main([*flags, "--backbone", "mae"])
    found = json.loads((run.transfer("all") / "metrics.json").read_text())
    assert [task["metric"] for task in found["tasks"]] == ["accuracy", "accuracy (val)"]
    assert [row["metric"] for row in found["results"]] == ["accuracy", "accuracy (val)"]
    assert "accuracy (val)" in capsys.readouterr().out
