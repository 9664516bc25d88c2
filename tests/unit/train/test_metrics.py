"""metrics.jsonl: increasing steps, cut back on resume, whole lines only."""

import importlib.util
import time

import pytest

from moce_dist.config import LoggingConfig, make_config
from moce_dist.run.files import read_jsonl
from moce_dist.settings import ConfigError
from moce_dist.train.metrics import Clock, MetricsLog
from moce_dist.train.trackers import StepProfile, check_trackers, open_trackers

SCALARS = {"step": 3, "loss": 0.5, "images_per_expert": [[1, 2]], "grad_norm": None}


def test_resume_drops_the_steps_that_will_be_run_again(tmp_path):
    log = MetricsLog(tmp_path, start_step=0)
    for step in range(6):
        log.write({"step": step, "loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a kill in the middle of a line
    again = MetricsLog(tmp_path, start_step=4)
    again.write({"step": 4, "loss": 2.0})
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[-1]["loss"] == 2.0


def test_tensorboard_gets_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = open_trackers(LoggingConfig(), tmp_path, start_step=0, settings={})
    log = MetricsLog(tmp_path, start_step=0, trackers=trackers)
    log.write(SCALARS)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (scalar,) = events.Scalars("loss")
    assert (scalar.step, scalar.value) == (3, 0.5)


def needs(name):
    return pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"needs {name}: pip install '.[{name}]'"
    )


@needs("mlflow")
def test_mlflow_gets_every_number_and_a_resumed_stage_goes_on_in_its_run(tmp_path):
    folder = tmp_path / "100%20 of #1" / "run" / "mae"  # means something in a URL
    folder.mkdir(parents=True)
    logging = LoggingConfig(tensorboard=False, trackers=("mlflow",))
    # step 4 runs again: the checkpoint that the stage resumed at was older
    for start, steps in ((3, (3, 4)), (4, (4, 5))):
        opened = open_trackers(logging, folder, start_step=start, settings={"seed": 7})
        log = MetricsLog(folder, start_step=start, trackers=opened)
        for step in steps:
            log.write({**SCALARS, "step": step})
        log.close()
    from mlflow.tracking import MlflowClient

    client = MlflowClient((folder / "mlflow").as_uri())
    [run] = client.search_runs([client.get_experiment_by_name("run").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(3, 0.5), (4, 0.5), (5, 0.5)]
    assert run.data.params == {"seed": "7"}
    assert [path.name for path in tmp_path.iterdir()] == ["100%20 of #1"]


@needs("wandb")
def test_wandb_writes_an_offline_run(tmp_path):
    folder = tmp_path / "run" / "mae"
    folder.mkdir(parents=True)
    logging = LoggingConfig(tensorboard=False, trackers=("wandb",))
    log = MetricsLog(
        folder,
        start_step=0,
        trackers=open_trackers(logging, folder, start_step=0, settings={"seed": 7}),
    )
    log.write(SCALARS)
    log.close()
    [file] = folder.glob("wandb/offline-run-*/run-run-mae-*.wandb")
    # wandb's own process writes it, and may be a moment late
    end = time.monotonic() + 60
    while b"loss" not in file.read_bytes():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_tracker_that_is_not_installed_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"logging.trackers: mlflow is not installed: pip"):
        check_trackers(LoggingConfig(trackers=("mlflow",)))
    check_trackers(LoggingConfig())
    with pytest.raises(ConfigError, match=r"logging\.trackers"):
        make_config({"logging": {"trackers": ["comet"]}})


def test_profile_holds_the_steps_that_were_asked_for(tmp_path):
    import gzip
    import json

    import torch

    profile = StepProfile(tmp_path, (2, 4))
    for step in range(6):
        profile.at(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(8).sum()
    profile.close()
    path = tmp_path / "profile" / "steps_2-3.json.gz"
    trace = json.loads(gzip.decompress(path.read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"step 2", "step 3"} <= names and not {"step 1", "step 4"} & names
    assert "aten::sum" in path.with_name("steps_2-3.txt").read_text()
    StepProfile(tmp_path / "none", None).at(2)
    assert not (tmp_path / "none").exists()


def test_what_is_not_finite_is_null(tmp_path):
    log = MetricsLog(tmp_path, start_step=0)
    log.write(
        {
            "step": 0,
            "grad_norm": float("nan"),
            "loss": float("inf"),
            "lr": 0.5,
            "a": [[float("nan"), 1]],
        }
    )
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 0, "grad_norm": null, "loss": null, "lr": 0.5, "a": [[null, 1]]}\n'


def test_lap_starts_anew():
    clock = Clock()
    clock.count(10)
    clock.wait(0.5)
    assert clock.lap()["data_wait_s"] == 0.5
    lap = clock.lap()
    assert lap.pop("seconds") >= 0
    assert lap == {"images_per_s": 0, "data_wait_s": 0, "save_s": 0}
    with clock.saving():
        pass
    assert clock.lap()["save_s"] >= 0
