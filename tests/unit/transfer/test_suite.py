"""A suite of tasks: each on its own, one table of all, and failures that stop nobody else."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moce_dist.run import lease
from moce_dist.run.directory import Run
from moce_dist.settings import ConfigError
from moce_dist.transfer.choosing import open_stage
from moce_dist.transfer.request import Request
from moce_dist.transfer.suite import (
    FitsJob,
    Order,
    attempt,
    carry_out,
    carry_out_away,
    prepare,
    train_here,
)

from .conftest import by_global_name, transfer, write_checkpoint


def write_suite(path: Path, *entries: dict[str, object], **transfer_fields: object) -> str:
    tree = {"transfer": {"suite": list(entries), **transfer_fields}}
    path.write_text(json.dumps(tree))  # JSON is YAML
    return str(path)


@pytest.fixture
def entries(image_folder: Path, scene_folder: Path) -> list[dict[str, object]]:
    return [
        {"task": "imagefolder", "data": str(image_folder), "protocol": ["knn", "linear"]},
        {"task": "imagefolder", "data": str(image_folder), "name": "few", "protocol": ["knn"]}
        | {"set": ["transfer.max_train=8"]},
        {"task": "ade20k", "data": str(scene_folder)},
    ]


def metrics_of(run: Run, task: str) -> dict[str, object]:
    return json.loads((run.transfer(task) / "metrics.json").read_text())


def test_suite_makes_every_task_and_one_table(run, entries, job, tmp_path, capsys):
    suite = write_suite(tmp_path / "suite.yaml", *entries)
    flags = ["--task", "all", "--config", suite, "--run", str(run.root)]
    job.main([*flags, "--backbone", "moce,mae"])
    shown = capsys.readouterr().out
    assert "mean over 2 tasks" in shown and "few" in shown and "mIoU" in shown
    found = metrics_of(run, "all")
    assert [task["task"] for task in found["tasks"]] == ["imagefolder", "few", "ade20k"]
    knn = [r["value"] for r in found["results"] if (r["backbone"], r["protocol"]) == ("mae", "knn")]
    mean = next(r for r in found["summary"] if (r["backbone"], r["protocol"]) == ("mae", "knn"))
    assert mean["mean"] == pytest.approx(sum(knn) / 2) and mean["num_tasks"] == 2
    assert {(d["backbone"], d["reference"]) for d in found["differences"]} == {("moce", "mae")}
    assert metrics_of(run, "few")["results"][0]["num_train"] == 8
    assert metrics_of(run, "imagefolder")["results"][0]["num_train"] == 48


def test_failing_task_stops_nobody_else(run, entries, tmp_path):
    missing = {"task": "cars", "data": str(tmp_path / "nowhere")}
    suite = write_suite(tmp_path / "suite.yaml", missing, entries[1], task="all")
    done = transfer(run, "--config", suite, "--backbone", "mae")
    assert done.returncode == 1
    assert "1 of 2 tasks failed: cars (ConfigError: --data" in done.stderr.splitlines()[-1]
    assert "few" in done.stdout
    found = metrics_of(run, "all")
    assert found["failed"].keys() == {"cars"} and len(found["tasks"]) == 1


@pytest.mark.timeout(300)
def test_suite_runs_in_parallel_on_ray(run, entries, tmp_path):
    suite = write_suite(
        tmp_path / "suite.yaml", *entries[:2], {"task": "pets", "data": str(tmp_path)}
    )
    flags = ["--task", "all", "--config", suite, "--backbone", "mae"]
    done = transfer(run, *flags, "--set", "parallel.num_workers=2")
    assert done.returncode == 1, done.stderr
    assert "ray: starting an embedded cluster" in done.stderr
    assert "pets (ConfigError: --data" in done.stderr
    assert [task["task"] for task in metrics_of(run, "all")["tasks"]] == ["imagefolder", "few"]
    alone = transfer(run, "--task", "imagefolder", *("--data", str(entries[0]["data"])))
    assert alone.returncode == 0, alone.stderr


def ordered(job, *flags: str) -> tuple[Run, Order]:
    """Return the order that a command line makes."""
    args = job.parse(flags)
    run, config = job.open_configured(args)
    return run, job.make_orders(args, run, config)[0]


def test_a_task_goes_on_by_calls_between_its_trainings(clustered, image_folder, job):
    run, order = ordered(
        job,
        *("--run", str(clustered.root), "--task", "imagefolder", "--data", str(image_folder)),
        *("--protocol", "knn,finetune", "--backbone", "moce+own,control+own,control+all"),
        *("--continue-images", "16", "--set", "transfer.continued.batch_size=8"),
        *("--set", "logging.tensorboard=false", "--fresh"),
    )
    (run.transfer("imagefolder") / "old").mkdir(parents=True)
    met = []

    def call(whose, function, *arguments):
        met.append("call")
        assert whose.folder in dict(lease.held())
        return function(*arguments)

    def train(needed):
        met.append(needed.folder.name)
        # nobody else may write where the ranks do
        assert {needed.folder, needed.folder.parent} & dict(lease.held()).keys()
        train_here(needed)

    metrics = carry_out_away(run, order, train, call)
    assert {row["backbone"] for row in metrics["results"]} == set(order.request.backbones)
    assert len(metrics["results"]) == 6
    assert met[::2] == ["call"] * 5
    assert met[1::2] == ["moce+own-16", "control+own-16", met[5], "imagefolder"]
    assert met[5].startswith("16-")
    # what was there is set aside once, not at every call
    assert len([*run.transfer("imagefolder").parent.glob("imagefolder*")]) == 2
    assert not lease.held()
    met.clear()
    again = carry_out_away(run, replace(order, is_fresh=False), train, call)
    assert again == metrics and met == ["call"]
    assert carry_out(run, replace(order, is_fresh=False)) == metrics


def test_a_task_without_data_is_refused_before_any_call(run, job, tmp_path):
    flags = ("--run", str(run.root), "--task", "cars", "--data", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="--data"):
        carry_out_away(*ordered(job, *flags, "--backbone", "mae"), pytest.fail, pytest.fail)


@pytest.mark.timeout(300)
def test_detector_is_fitted_by_two_processes_of_torchrun(run, coco_folder):
    done = transfer(
        run,
        *("--task", "coco", "--data", str(coco_folder), "--backbone", "mae"),
        *("--set", "parallel.num_workers=2"),
        launcher=["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"],
    )
    assert done.returncode == 0, done.stderr
    (row,) = metrics_of(run, "coco")["results"]
    assert (row["num_train"], row["num_test"]) == (6, 3) and 0 <= row["box"]["AP"] <= 1


@pytest.mark.parametrize(("task", "expected"), [("coco", 6), ("ade20k", 2), ("digits", 16)])
def test_workers_share_the_images_of_a_step(task, expected, config, tmp_path):
    recipe = config.transfer.detection.model_copy(update={"batch_size": 6})
    budget = config.transfer.model_copy(update={"detection": recipe})
    config = config.model_copy(update={"transfer": budget})
    request = Request(task, None, ("mae",), ("finetune",), 1, None)
    assert FitsJob(Run(tmp_path), config, request).batch_size == expected


@pytest.mark.parametrize(("workers", "parts"), [(1, 2), (4, 8), (32, 32)])
def test_one_worker_holds_no_more_images_than_each_of_all(
    workers, parts, config, tmp_path, monkeypatch
):
    parallel = config.parallel.model_copy(update={"num_workers": workers, "micro_batches": 2})
    finetune = config.transfer.finetune.model_copy(update={"batch_size": 64})
    budget = config.transfer.model_copy(update={"finetune": finetune})
    config = config.model_copy(update={"parallel": parallel, "transfer": budget})
    monkeypatch.setattr(
        "moce_dist.transfer.suite.carry_out", lambda run, order: order.config.parallel
    )
    order = Order(Request("digits", None, ("mae",), ("finetune",), 1, None), config)
    found = attempt(Run(tmp_path), order).metrics
    # batches of 64: a micro-batch has at least two images, for batch normalisation
    assert (found.num_workers, found.micro_batches) == (1, parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "imagefolder"}, "transfer.suite.1.name = 'imagefolder': is taken"),
        ({"name": "all"}, "transfer.suite.1.name = 'all': is taken"),
        ({"name": "../x"}, "must be a folder's name"),
        ({"task": "carz"}, "--task carz: must be one of"),
        ({"protocol": ["svm"]}, "--protocol svm: must be one of"),
        ({"set": ["transfer.knn=3"]}, "transfer.knn = 3: unknown key"),
        ({"set": ["data.image_size=32"]}, "data.image_size: 16 -> 32"),
    ],
)
def test_wrong_entry_is_refused_before_anything_runs(change, message, run, entries, job, tmp_path):
    suite = write_suite(tmp_path / "suite.yaml", entries[0], entries[1] | change)
    with pytest.raises(ConfigError, match=message):
        job.main(["--task", "all", "--config", suite, "--run", str(run.root)])
    assert not (run.root / "transfer").exists()


def test_suite_without_tasks_is_refused(run, job):
    with pytest.raises(ConfigError, match=r"lists no tasks in transfer\.suite"):
        job.main(["--task", "all", "--run", str(run.root)])


def test_entries_without_data_take_that_of_the_flag(run, job, tmp_path, image_folder, capsys):
    suite = write_suite(tmp_path / "suite.yaml", {"task": "imagefolder"}, {"task": "digits"})
    flags = ["--task", "all", "--run", str(run.root), "--config", suite, "--dry-run"]
    job.main([*flags, "--data", str(image_folder)])
    shown = capsys.readouterr().out
    assert f"{image_folder}: 48 training" in shown and "own images: 1000 training" in shown


def test_protocols_that_a_task_cannot_have_are_left_out_of_it_alone(run, job, tmp_path):
    suite = write_suite(tmp_path / "suite.yaml", {"task": "digits"}, {"task": "voc2007"})
    flags = ["--task", "all", "--run", str(run.root), "--config", suite]
    args = job.parse([*flags, "--protocol", "knn, logistic", "--data", str(tmp_path)])
    orders = job.make_orders(args, *job.open_configured(args))
    assert [o.request.protocols for o in orders] == [("knn", "logistic"), ("knn",)]


def test_dry_run_prints_every_task(run, entries, job, tmp_path, capsys):
    suite = write_suite(tmp_path / "suite.yaml", *entries)
    job.main(["--task", "all", "--config", suite, "--run", str(run.root), "--dry-run"])
    shown = capsys.readouterr().out
    assert shown.count("task       ") == 3 and "called few" in shown
    assert not (run.root / "transfer").exists()


def test_a_fresh_task_that_is_attempted_again_goes_on(run, image_folder, config):
    request = Request("imagefolder", image_folder, ("mae",), ("knn", "finetune"), 1, None)
    order = Order(request, config, is_fresh=True)
    before = attempt(run, replace(order, is_fresh=False))
    (fresh,) = prepare(run, [order], train_here)
    assert not (run.transfer("imagefolder") / "results.jsonl").exists()
    first = attempt(run, fresh)
    results = (run.transfer("imagefolder") / "results.jsonl").read_text()
    # its node was lost behind the last line, and Ray sends the same order again
    assert attempt(run, fresh).metrics == first.metrics == before.metrics
    assert (run.transfer("imagefolder") / "results.jsonl").read_text() == results
    assert len(list(run.root.glob("transfer/imagefolder.before-*/results.jsonl"))) == 1


def test_fits_take_the_checkpoints_that_the_choice_was_made_from(run, image_folder, config, models):
    request = Request("imagefolder", image_folder, ("moce",), ("finetune",), 1, None)
    folder = run.stage("moce") / "checkpoints"
    spoilt = {n: torch.zeros_like(t) for n, t in by_global_name(models["moce"], config).items()}

    def later(job):
        # training goes on, and deletes what was chosen
        write_checkpoint(folder / "step_00000006", spoilt)
        shutil.rmtree(folder / "step_00000005")
        train_here(job)

    shutil.copytree(run.root, run.root.parent / "other")
    other = Run(run.root.parent / "other")
    expected = carry_out(other, Order(request, config))
    assert carry_out(run, Order(request, config), later)["results"] == expected["results"]
    shutil.rmtree(folder / "step_00000006")
    shutil.copytree(other.stage("moce") / "checkpoints" / "step_00000005", folder / "step_00000005")
    shutil.rmtree(run.transfer("imagefolder"))

    def keeping(job):
        write_checkpoint(folder / "step_00000006", spoilt)
        train_here(job)

    def call(_, function, *arguments):
        return function(*pickle.loads(pickle.dumps(arguments)))

    away = carry_out_away(run, Order(request, config), keeping, call)
    assert away["results"] == expected["results"]
    # another process must read them again
    stages = {name: open_stage(run, name) for name in ("mae", "moce")}
    sent = pickle.loads(pickle.dumps(stages))
    assert sent["moce"].weights.keys() == stages["moce"].weights.keys()
    shutil.rmtree(folder / "step_00000006")
    with pytest.raises(ConfigError, match="was deleted by its stage, which still trains"):
        _ = pickle.loads(pickle.dumps(stages))["moce"].weights
