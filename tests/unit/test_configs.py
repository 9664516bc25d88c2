"""Every YAML in configs/ loads, says what it costs, and is completed by editors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from benches.settings import load_bench_config

from moce_dist.config import load_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
OTHERS = {"transfer", "bench"}
PRETRAIN = [p for p in CONFIGS if not OTHERS & set(p.relative_to(ROOT / "configs").parts)]


def name(path):
    return str(path.relative_to(ROOT / "configs"))


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_config_loads(path):
    load = load_bench_config if path.parent.name == "bench" else load_config
    load(path)


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_config_names_the_schema_for_editors(path):
    folder = path.parent if path.parent.name == "bench" else ROOT / "configs"
    schema = os.path.relpath(folder / "schema.json", path.parent)
    assert path.read_text().startswith(f"# yaml-language-server: $schema={schema}\n")


@pytest.mark.parametrize("path", PRETRAIN, ids=name)
def test_pretraining_config_opens_with_its_cost_and_result(path):
    opening = path.read_text()[:1200]
    assert "measured" in opening, "say hardware, time and result, measured or not measured"


@pytest.mark.parametrize("path", PRETRAIN, ids=name)
def test_pretraining_config_dry_runs(path, tmp_path):
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "jobs/pretrain.py", "--config", path, "--run", run, "--dry-run"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout and not run.exists()
