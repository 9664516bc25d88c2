"""Runs without experts, and with experts that tokens choose, go through every command."""

import json
import subprocess
import sys

import pytest

from moce_dist.__main__ import main as command
from moce_dist.config import load_config
from moce_dist.settings import ConfigError

SHORT = ("parallel.num_workers=1", "mae.epochs=2", "moce.epochs=2", "moce.warmup_epochs=0")
KINDS = {"dense": ("control", "mae"), "token": ("token", "control")}
OTHERS = {"dense": "has no experts (moe.kind dense)", "token": "experts that tokens choose"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """The kind of the module's run; both are tried."""
    return request.param


@pytest.fixture(scope="module")
def made(kind, tmp_path_factory, run_job, ask, arguments):
    """A finished run of that kind, with `control: true`, and what the jobs said."""
    root = tmp_path_factory.mktemp(kind) / "run"
    flags = arguments(root, *SHORT, f"moe.kind={kind}", "control=true")
    plan = ask("pretrain", *flags, "--dry-run").assert_done().out
    done = run_job("pretrain", *flags).assert_done()
    return root, plan, done


@pytest.fixture(scope="module")
def task(images, tmp_path_factory):
    root = tmp_path_factory.mktemp("task")
    for number, path in enumerate(sorted(images.rglob("*.png"))[::5]):
        target = root / ("train", "test")[number % 2] / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return root


@pytest.fixture(scope="module")
def transferred(made, task, run_job):
    """The run after a transfer with its default backbones."""
    flags = ("--run", made[0], "--task", "imagefolder", "--data", task)
    budget = ("--set", "transfer.finetune.epochs=1", "--set", "transfer.finetune.batch_size=16")
    run_job("transfer", *flags, "--protocol", "knn,finetune", *budget).assert_done()
    return made[0] / "transfer" / "imagefolder"


def test_it_is_planned_and_trained(made, kind, learned):
    root, plan, done = made
    if kind == "dense":
        assert "experts    none (moe.kind dense)" in plan
        assert "control    stage moce of a run without experts is the control itself" in plan
        assert not (root / "control").exists() and "is the control itself" in done.err
    else:
        assert "experts    4 in each of blocks [1, 3], chosen by tokens" in plan
        assert len(learned(root / "control")["metrics"]) == len(learned(root / "moce")["metrics"])


def test_its_backbones_are_compared_and_exported(made, kind, transferred):
    folder = transferred
    metrics = json.loads((folder / "metrics.json").read_text())
    own, other = KINDS[kind]
    assert list(dict.fromkeys(row["backbone"] for row in metrics["results"])) == [own, other]
    fewer = {row["backbone"]: row.get("steps_fewer", 0) for row in metrics["summary"]}
    steps = len((made[0] / "moce" / "metrics.jsonl").read_text().splitlines())
    assert fewer == {own: 0, other: steps if other == "mae" else 0}
    assert {row["std"] for row in metrics["summary"]} == {None}
    # digits and silhouettes are easy to tell apart, by chance half would be right
    assert all(r["value"] > 0.6 for r in metrics["results"] if r["protocol"] == "knn")
    card = (folder / "backbone" / "README.md").read_text()
    if kind == "dense":
        assert "trained without experts" in card and not (folder / "choice.json").exists()
        return
    choice = json.loads((folder / "choice.json").read_text())
    for layer in choice["layers"]:
        assert sum(layer["weights"]) == pytest.approx(1) and len(layer["weights"]) == 4
    assert all(1 / 4 < scale <= 1 for scale in choice["scale"])
    assert "averaged by the share of the images' tokens" in card
    assert "their clusters" not in card


def test_timm_alone_loads_it(transferred):
    where = f"local-dir:{transferred / 'backbone'}"
    code = (
        "import sys, timm, torch\n"
        f"m = timm.create_model({where!r}, pretrained=True).eval()\n"
        "print(m(torch.zeros(1, 3, 32, 32)).shape[1], 'moce_dist' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["32", "False"]


def test_report_summary_and_predictions(made, kind, transferred, run_job, capsys, images):
    root = made[0]
    out = run_job("report", root).assert_done().out
    title = {"dense": "control", "token": "TokenMoE"}[kind]
    assert f"\n{title} loss: " in out and "MoCE loss" not in out.replace(title, "")
    assert f"images per expert: {'no experts' if kind == 'dense' else 'tokens choose'}" in out
    assert "+- " not in out and "could not read" not in out
    page = (root / "report.html").read_text()
    assert f"{title} held-out loss" in page and f"(moe.kind {kind})" in page
    command(["predict", str(transferred), str(next(images.rglob("*.png")))])
    assert "probability" in json.loads(capsys.readouterr().out)["classes"][0]


def test_what_it_does_not_have_is_refused_in_one_line(made, kind, task, ask):
    root, named = made[0], "moe.kind " + kind
    flags = ("--run", root, "--task", "imagefolder", "--data", task)
    refused = ask("transfer", *flags, "--backbone", "moce,mae")
    refused.assert_refused(2, "--backbone moce", OTHERS[kind], named, ", ".join(KINDS[kind]))
    ask("transfer", *flags, "--experts", "0,0").assert_refused(2, "--experts", named)
    with pytest.raises(ConfigError, match="has no routes: the run has"):
        command(["routes", str(root)])
    shown = ask("transfer", *flags, "--dry-run").assert_done().out
    assert f"backbones  {', '.join(KINDS[kind])}" in shown and named in shown


def test_doctor_and_configuration(kind, tmp_path, capsys, config):
    path = tmp_path / "kind.yaml"
    path.write_text(config.read_text().replace("moe: {", f"moe: {{kind: {kind}, "))
    from moce_dist.doctor import topology_lines

    lines = "\n".join(topology_lines(load_config(path)))
    assert ("no experts" in lines) == (kind == "dense")
