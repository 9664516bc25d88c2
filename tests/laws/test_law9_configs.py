"""Every YAML in configs/ loads, says what it costs, and is completed by editors."""

import json
import os
from pathlib import Path

import pytest
from benches.settings import load_bench_config
from in_process import load_script, run_here

from moce_dist.config import load_config
from moce_dist.study.request import json_schema, read_study

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
OTHERS = {"transfer", "bench", "studies"}
STUDIES = [p for p in CONFIGS if p.parent.name == "studies"]
PRETRAIN = [p for p in CONFIGS if not OTHERS & set(p.relative_to(ROOT / "configs").parts)]


def name(path):
    return str(path.relative_to(ROOT / "configs"))


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_config_loads(path):
    {"bench": load_bench_config, "studies": read_study}.get(path.parent.name, load_config)(path)


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_config_names_the_schema_for_editors(path):
    has_own = path.parent.name in ("bench", "studies")
    folder = path.parent if has_own else ROOT / "configs"
    schema = os.path.relpath(folder / "schema.json", path.parent)
    assert path.read_text().startswith(f"# yaml-language-server: $schema={schema}\n")


def test_schema_of_studies_is_the_one_of_the_code():
    committed = (ROOT / "configs" / "studies" / "schema.json").read_text()
    assert json.loads(committed) == json_schema()


BENCHES = sorted((ROOT / "configs" / "bench").glob("*.yaml"))


@pytest.mark.parametrize("path", BENCHES, ids=name)
def test_bench_config_dry_runs(path):
    done = run_here("bench", path.stem.partition("_")[0], "--config", path, "--dry-run")
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("path", STUDIES, ids=name)
def test_study_dry_runs(path, tmp_path, capsys):
    job = load_script(ROOT / "jobs" / "study.py")
    job.main(["--config", str(path), "--out", str(tmp_path / "out"), "--dry-run"])
    assert "TFLOP" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", [*PRETRAIN, *STUDIES], ids=name)
def test_config_of_a_run_opens_with_its_cost_and_result(path):
    opening = path.read_text()[:1200]
    assert "measured" in opening, "say hardware, time and result, measured or not measured"


@pytest.mark.parametrize("path", PRETRAIN, ids=name)
def test_pretraining_config_dry_runs(path, tmp_path):
    run = tmp_path / "run"
    done = run_here("pretrain", "--config", path, "--run", run, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout and not run.exists()
