"""A stage that is taken from another run: its last checkpoint, in this run's own folder."""

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import save_file

from moce_dist.run.artefacts import COMPLETE, file_sha256, fingerprint, is_complete, mark_complete
from moce_dist.settings import ConfigError
from moce_dist.train import checkpoint as checkpoints
from moce_dist.train.checkpoint import FORMAT, MANIFEST, damage, load_weights, start_from
from moce_dist.train.finished import has_last_checkpoint, link_stage, trained_id


def write_checkpoint(folder, step, value):
    """A whole checkpoint of one weight and its moment."""
    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    checkpoint.mkdir(parents=True)
    weights = checkpoint / "rank-00000.safetensors"
    save_file({"weight/a": torch.full((2,), value), "exp_avg/a": torch.zeros(2)}, weights)
    manifest = {"format": FORMAT, "step": step, "files": {weights.name: file_sha256(weights)}}
    manifest["sha256"] = fingerprint(manifest)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    return checkpoint


def finish(folder, inputs, step, value):
    checkpoint = write_checkpoint(folder, step, value)
    mark_complete(folder, inputs, checkpoint.iterdir())


@pytest.fixture
def source(tmp_path):
    """A finished stage with two checkpoints."""
    folder = tmp_path / "base" / "mae"
    write_checkpoint(folder, 5, 1.0)
    finish(folder, {"data": "x"}, 10, 2.0)
    return folder


def test_the_last_checkpoint_is_linked_and_outlives_the_other_run(tmp_path, source):
    mae = tmp_path / "run" / "mae"
    link_stage(source, mae)
    (linked,) = (mae / "checkpoints").iterdir()
    assert linked.name == "step_00000010" and damage(linked) is None
    assert is_complete(mae, {"base": trained_id(source)}) and has_last_checkpoint(mae)
    for file in linked.iterdir():
        assert file.samefile(source / "checkpoints" / linked.name / file.name)
    before = {path: path.stat().st_mtime_ns for path in mae.rglob("*")}
    link_stage(source, mae)
    assert {path: path.stat().st_mtime_ns for path in mae.rglob("*")} == before
    shutil.rmtree(source)
    assert load_weights(linked)["a"].tolist() == [2, 2]


def test_where_no_links_can_be_it_is_copied(tmp_path, source, monkeypatch):
    def refuse(*_):
        raise OSError("another file system")

    monkeypatch.setattr("os.link", refuse)
    link_stage(source, tmp_path / "mae")
    (copied,) = (tmp_path / "mae" / "checkpoints").iterdir()
    assert damage(copied) is None
    assert not (copied / MANIFEST).samefile(source / "checkpoints" / copied.name / MANIFEST)


def test_an_interrupted_link_is_made_whole(tmp_path, source):
    mae = tmp_path / "mae"
    link_stage(source, mae)
    (mae / COMPLETE).unlink()
    (linked,) = (mae / "checkpoints").iterdir()
    (linked / MANIFEST).unlink()
    link_stage(source, mae)
    assert damage(linked) is None and has_last_checkpoint(mae)


def test_another_base_sets_the_stage_aside(tmp_path, source):
    mae = tmp_path / "run" / "mae"
    link_stage(source, mae)
    other = tmp_path / "other" / "mae"
    finish(other, {"data": "y"}, 7, 3.0)
    link_stage(other, mae)
    assert [path.name for path in (mae / "checkpoints").iterdir()] == ["step_00000007"]
    (aside,) = mae.parent.glob("mae.before-*")
    assert (aside / "checkpoints" / "step_00000010").is_dir()


def test_an_unfinished_or_damaged_base_is_named(tmp_path, source):
    checkpoint = source / "checkpoints" / "step_00000010" / "rank-00000.safetensors"
    content = bytearray(checkpoint.read_bytes())
    content[-1] ^= 1
    checkpoint.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{source}: the last checkpoint is damaged"):
        link_stage(source, tmp_path / "mae")
    (source / COMPLETE).unlink()
    with pytest.raises(ConfigError, match=f"{source}: is not complete"):
        link_stage(source, tmp_path / "mae")
    assert not (tmp_path / "mae").exists()


def test_a_process_reads_a_checkpoint_once_and_again_when_it_changed(source, monkeypatch):
    read = []

    def counted(path):
        read.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(checkpoints, "file_sha256", counted)
    last = source / "checkpoints" / "step_00000010" / "rank-00000.safetensors"
    # a change soon after another may have the same time: new files are read every time
    monkeypatch.setattr(checkpoints, "_SETTLED_S", 3600)
    assert trained_id(source) == trained_id(source) and read == [last.name] * 2
    monkeypatch.setattr(checkpoints, "_SETTLED_S", -1)
    assert trained_id(source) == trained_id(source) and read == [last.name] * 3
    content, seen = bytearray(last.read_bytes()), last.stat()
    content[-1] ^= 1
    time.sleep(0.05)
    last.write_bytes(content)
    os.utime(last, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    with pytest.raises(ConfigError, match="the last checkpoint is damaged"):
        trained_id(source)


class Naming:
    """Names of a model without experts."""

    def global_names(self, name):
        return [name]


class Engine:
    """What is asked for, as the real engine asks."""

    def __init__(self, names):
        self.names, self.found = names, {}

    def load_state(self, lookup, *, step):
        for name in self.names:
            for kind in ("weight", "exp_avg"):
                self.found[name, kind] = lookup(name, kind)
        self.step = step


def test_a_start_takes_weights_without_moments_and_misses_none(source):
    checkpoint = source / "checkpoints" / "step_00000010"
    engine = Engine(["a"])
    start_from(checkpoint, engine, Naming())
    assert engine.found["a", "weight"].tolist() == [2, 2] and engine.step == 0
    assert engine.found["a", "exp_avg"] is None
    with pytest.raises(ConfigError, match="step_00000010: has no weight b"):
        start_from(checkpoint, Engine(["a", "b"]), Naming())
