"""The job from flags to metrics.json, on a small run made of real files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moce_dist.run import Run, read_marker

ROOT = Path(__file__).parents[3]


def transfer(run: Run, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "jobs" / "transfer.py"), "--run", str(run.root), *flags]
    return subprocess.run(
        command, cwd=run.root, env=environment, capture_output=True, text=True, check=False
    )


def test_comparison_is_written_skipped_and_extended(run, image_folder):
    flags = ["--task", "imagefolder", "--data", str(image_folder)]
    flags += ["--backbone", "moce,mae,random"]
    done = transfer(run, *flags, "--protocol", "knn,linear")
    assert done.returncode == 0, done.stderr
    assert "imagefolder: accuracy" in done.stdout
    folder = run.transfer("imagefolder")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.keys() == {"task", "metric", "results", "summary"}
    assert [(r["backbone"], r["protocol"], r["seed"]) for r in metrics["results"]] == [
        (b, p, 0) for b in ("moce", "mae", "random") for p in ("knn", "linear")
    ]
    assert all((r["num_train"], r["num_test"]) == (48, 24) for r in metrics["results"])
    # stripes of two directions: chance is 0.5
    assert all(r["value"] > 0.8 for r in metrics["results"] if r["protocol"] == "linear")
    choice = json.loads((folder / "choice.json").read_text())
    experts = [layer["expert"] for layer in choice["layers"]]
    assert {str(r["choice"]) for r in metrics["results"]} == {str(experts), "None"}
    assert sum(choice["clusters"].values()) == choice["num_images"] == 48
    assert read_marker(folder)["files"].keys() == {
        *("metrics.json", "choice.json", "backbone/model.safetensors"),
        *("backbone/config.json", "backbone/README.md"),
    }
    assert "| mae | linear |" in (folder / "backbone" / "README.md").read_text()

    before = (folder / "metrics.json").stat().st_mtime_ns
    again = transfer(run, *flags, "--protocol", "knn,linear")
    assert again.returncode == 0 and "nothing to do" in again.stderr
    assert (folder / "metrics.json").stat().st_mtime_ns == before

    more = transfer(run, *flags, "--protocol", "finetune", "--seeds", "2")
    assert more.returncode == 0, more.stderr
    lines = (folder / "results.jsonl").read_text().splitlines()
    assert len(lines) == 6 + 6
    extended = json.loads((folder / "metrics.json").read_text())
    assert extended["results"][:6] == metrics["results"]
    assert len(extended["summary"]) == 9


def test_other_experts_replace_the_rows_of_the_moce_alone(run, image_folder):
    flags = ["--task", "imagefolder", "--data", str(image_folder), "--protocol", "knn"]
    for experts in ("0,0", "2,1"):
        done = transfer(run, *flags, "--experts", experts)
        assert done.returncode == 0, done.stderr
        metrics = json.loads((run.transfer("imagefolder") / "metrics.json").read_text())
        chosen = {r["backbone"]: r["choice"] for r in metrics["results"]}
        assert chosen == {"moce": [int(e) for e in experts.split(",")], "mae": None}
    choice = json.loads((run.transfer("imagefolder") / "choice.json").read_text())
    assert choice["select"] == "given"
    assert len((run.transfer("imagefolder") / "results.jsonl").read_text().splitlines()) == 3


def test_changed_budget_repeats_only_its_protocol(run, image_folder):
    flags = ["--task", "imagefolder", "--data", str(image_folder), "--backbone", "mae"]
    assert transfer(run, *flags, "--protocol", "knn,linear").returncode == 0
    changed = transfer(
        run, *flags, "--protocol", "knn,linear", "--set", "transfer.linear_epochs=3"
    )
    assert changed.returncode == 0, changed.stderr
    assert "linear seed 0" in changed.stderr and "knn seed 0" not in changed.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "digitz"], "--task digitz: must be one of"),
        ([], "--task: is missing"),
        (["--task", "imagefolder"], "needs --data"),
        (["--task", "imagefolder", "--data", "/nowhere"], "--data /nowhere: is not a folder"),
        (["--task", "digits", "--data", "/tmp"], "leave --data out"),
        (["--task", "digits", "--backbone", "moco"], "--backbone moco: must be one of"),
        (["--task", "digits", "--backbone", "mae,mae"], "distinct names"),
        (["--task", "digits", "--protocol", "svm"], "--protocol svm: must be one of"),
        (["--task", "ade20k", "--protocol", "knn"], "must be one of finetune for ade20k"),
        (["--task", "digits", "--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--task", "digits", "--experts", "0"], "must name 2 experts"),
        (["--task", "digits", "--experts", "0,3"], "from 0 to 2"),
        (["--task", "digits", "--experts", "a,b"], "must be whole numbers"),
        (["--task", "digits", "--set", "model.depth=6"], "model.depth"),
        (["--task", "ade20k", "--set", "transfer.segment_crop=36"], "multiple of twice"),
        (["--task", "digits", "--bogus"], "--bogus"),
    ],
)
def test_wrong_request_ends_with_one_line_and_status_2(flags, message, run):
    done = transfer(run, *flags)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not (run.root / "transfer").exists()


def test_run_without_the_needed_stage_is_refused(run):
    (run.stage("moce") / "checkpoints").rename(run.root / "elsewhere")
    done = transfer(run, "--task", "digits")
    assert done.returncode == 2 and "moce/checkpoints: is missing" in done.stderr


def test_dry_run_writes_nothing(run):
    done = transfer(run, "--task", "digits", "--dry-run")
    assert done.returncode == 0 and "backbones  moce, mae" in done.stdout
    assert not (run.root / "transfer").exists()


def test_fresh_sets_the_task_aside(run, image_folder):
    flags = ["--task", "imagefolder", "--data", str(image_folder), "--backbone", "mae"]
    flags += ["--protocol", "knn"]
    assert transfer(run, *flags).returncode == 0
    assert transfer(run, *flags, "--fresh").returncode == 0
    folders = sorted(p.name for p in (run.root / "transfer").iterdir())
    assert folders[0] == "imagefolder" and folders[1].startswith("imagefolder.before-")
    assert (run.root / "config.yaml").exists()


def test_unreadable_image_is_found_by_the_scan(run, image_folder, tmp_path):
    import shutil

    data = tmp_path / "damaged"
    shutil.copytree(image_folder, data)
    bad = data / "test" / "rows" / "005.png"
    bad.write_bytes(bad.read_bytes()[:-40])
    done = transfer(run, "--task", "imagefolder", "--data", str(data))
    assert done.returncode == 2
    assert f"{bad}: unreadable image" in done.stderr
