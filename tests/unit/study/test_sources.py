"""What a study finds out about its data before it makes anything."""

import json
import shutil
from pathlib import Path

import pytest
from in_process import load_script
from PIL import Image

from moce_dist.data import ingest
from moce_dist.launch import tasks
from moce_dist.run.tasks import map_here
from moce_dist.settings import ConfigError
from moce_dist.study import sources
from moce_dist.study.plan import wanted_sources
from moce_dist.study.sources import LISTED, list_tasks, make_sources

ROOT = Path(__file__).parents[3]
TASKS = [
    {"task": "imagefolder", "name": "sprites", "data": "tasks/sprites"},
    {"task": "imagefolder", "name": "emoji", "data": "tasks/emoji"},
    {"task": "imagefolder", "name": "more", "data": "tasks/emoji"},
]
ARMS = {"mae": {"backbone": "mae"}, "moce": {}}


@pytest.fixture
def data(tmp_path):
    """Three splits of two tasks; their files are not images, and nobody decodes them."""
    for task in ("sprites", "emoji"):
        for split in ("train", "val", "test"):
            for name in ("left", "right"):
                folder = tmp_path / "data" / "tasks" / task / split / name
                folder.mkdir(parents=True)
                (folder / "0.png").write_bytes(b"image")
    return tmp_path / "data"


@pytest.fixture
def study(read, data):
    return read(data=str(data), tasks=TASKS, arms=ARMS)


@pytest.fixture
def listed(monkeypatch):
    """Count the readings of folders."""
    calls, read = [], sources.list_task

    def count(request, config):
        calls.append((request.data.name, config.transfer.evaluate))
        return read(request, config)

    monkeypatch.setattr(sources, "list_task", count)
    return calls


def test_a_folder_is_listed_once_and_again_when_it_has_changed(study, data, tmp_path, listed):
    found = list_tasks(study, "val", tmp_path)
    assert not found.missing and len(found.times) == 2
    assert listed == [("sprites", "val"), ("emoji", "val")]
    (tmp_path / LISTED).write_text(json.dumps(found.times))
    assert list_tasks(study, "val", tmp_path) == found and len(listed) == 2
    assert list_tasks(study, "test", tmp_path).times.keys().isdisjoint(found.times)
    assert len(listed) == 4, "other images are evaluated"
    shutil.rmtree(data / "tasks" / "emoji" / "train")
    with pytest.raises(ConfigError, match=r"tasks, emoji: .*tasks/emoji: has no folder train"):
        list_tasks(study, "val", tmp_path)


def test_a_wrong_task_is_named_with_its_folder(read, data, tmp_path):
    shutil.rmtree(data / "tasks" / "sprites" / "val")
    study = read(data=str(data), tasks=TASKS, arms=ARMS)
    with pytest.raises(ConfigError) as error:
        list_tasks(study, "val", tmp_path)
    assert "tasks, sprites in " in str(error.value) and "too few to validate" in str(error.value)
    assert str(data / "tasks" / "sprites") in str(error.value)
    few = {name: {**arm, "tasks": ["emoji"]} for name, arm in ARMS.items()}
    study = read(data=str(data), tasks=TASKS, arms=few)
    assert not list_tasks(study, "val", tmp_path).missing, "of no arm, so it is not listed"


def test_missing_data_are_an_error_and_in_a_dry_run_a_note(study, data, tmp_path, capsys):
    shutil.rmtree(data / "tasks")
    job, config = load_script(ROOT / "jobs" / "study.py"), tmp_path / "study.yaml"
    out = tmp_path / "out"
    command = ["--config", str(config), "--out", str(out)]
    with pytest.raises(ConfigError) as error:
        job.main(command)
    assert f"tasks, sprites: --data {data}/tasks/sprites: is not a folder" in str(error.value)
    assert "(and 2 more)" in str(error.value) and not out.exists()
    job.main([*command, "--set", "num_images=1000", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("not here   tasks, ") for line in lines) == 3
    assert any(line.startswith("in all") for line in lines) and not out.exists()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_data_are_ingested_on_the_workers_of_the_configuration(
    read, data, tmp_path, monkeypatch, num_workers
):
    """Where a worker is enough there is no cluster; `map_tasks` decides that."""
    on, source = [], tmp_path / "pretrain"
    source.mkdir()
    for name in "abcd":
        Image.new("RGB", (9, 9), (ord(name),) * 3).save(source / f"{name}.png")

    def map_tasks(parallel, *work):
        on.append(parallel.num_workers)
        return map_here(*work)

    monkeypatch.setattr(tasks, "map_tasks", map_tasks)
    study = read(
        f"config.parallel.num_workers={num_workers}",
        *("config.mae.batch_size=60", "config.moce.batch_size=60"),
        data=str(tmp_path),
        arms=ARMS,
    )
    (found,) = make_sources(wanted_sources(study), tmp_path / "out").values()
    assert (found.folder / ingest.INDEX_NAME).is_file() and set(on) == {num_workers}
