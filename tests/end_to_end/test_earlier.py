"""A run directory of version 0.1.0 is taken up and finished, or refused in one line.

`data/run_0.1.0.tar.xz` was written by that version from 48 handwritten digits: stage mae, features,
clusters and tars are complete, and stage moce was interrupted at step 16 of 24.
"""

import shutil
import tarfile
from pathlib import Path

import pytest

WRITTEN = Path(__file__).parent / "data" / "run_0.1.0.tar.xz"
# the command's own file; its folder of images is gone
CONFIG = """
data: {source: "folder:/data/img", image_size: 32, holdout_fraction: 0.1, shard_bytes: 65536,
       loader_processes: 0}
model: {size: tiny, width: 16, depth: 2, num_heads: 2, patch_size: 8,
        decoder_width: 16, decoder_depth: 1, decoder_num_heads: 2}
moe: {num_experts: 2, layers: [1]}
cluster: {num_clusters: 4}
mae: {epochs: 4, warmup_epochs: 1, batch_size: 8, base_lr: 1e-3}
moce: {epochs: 4, warmup_epochs: 1, batch_size: 8, base_lr: 1e-3}
parallel: {num_workers: 1, num_groups: 1, precision: fp32, replan_steps: 7}
checkpoint: {every_steps: 8}
logging: {every_steps: 1, tensorboard: false}
"""
# what 0.1.0 did, and the default is not any more
AS_THEN = ("--set", "moe.shared_base=false")


@pytest.fixture
def run(tmp_path):
    """The run directory as it was left."""
    with tarfile.open(WRITTEN) as archive:
        archive.extractall(tmp_path / "run", filter="data")
    return tmp_path / "run"


@pytest.fixture
def command(tmp_path, run):
    """Arguments of jobs/pretrain.py that made it."""
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return ["--config", tmp_path / "tiny.yaml", "--run", run]


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_finished_stages_are_taken_up_and_the_run_is_finished(run, command, run_job):
    shutil.rmtree(run / "moce")
    kept = {name: contents(run / name) for name in ("ingested", "mae", "features", "shards")}
    assignments = (run / "clusters" / "assignments.parquet").read_bytes()
    done = run_job("pretrain", *command, *AS_THEN, "--set", "control=true").assert_done()
    for stage in ("mae", "features", "clusters", "shards"):
        assert f"{stage}: complete" in done.err
    assert {name: contents(run / name) for name in kept} == kept
    assert (run / "clusters" / "assignments.parquet").read_bytes() == assignments
    for stage in ("moce", "control"):
        assert (run / stage / "COMPLETE").exists()
    shown = run_job("report", run).assert_done().out
    assert "MoCE loss" in shown and "could not read" not in shown


def test_a_stage_in_another_order_of_images_is_refused_and_stays(run, command, run_job):
    before = contents(run / "moce")
    refused = run_job("pretrain", *command, *AS_THEN)
    refused.assert_refused(2, "step_00000016", "order 1, this one has 2", "with that version")
    assert contents(run / "moce") == before


def test_a_default_that_has_changed_is_named(run, command, ask):
    before = contents(run / "moce")
    ask("pretrain", *command).assert_refused(2, "moe.shared_base: False -> True")
    assert contents(run / "moce") == before
