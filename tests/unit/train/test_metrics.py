"""metrics.jsonl: increasing steps, cut back on resume, whole lines only."""

from moce_dist.run.files import read_jsonl
from moce_dist.train.metrics import Clock, MetricsLog


def test_resume_drops_the_steps_that_will_be_run_again(tmp_path):
    log = MetricsLog(tmp_path, start_step=0, tensorboard=False)
    for step in range(6):
        log.write({"step": step, "loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a kill in the middle of a line
    again = MetricsLog(tmp_path, start_step=4, tensorboard=False)
    again.write({"step": 4, "loss": 2.0})
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[-1]["loss"] == 2.0


def test_tensorboard_gets_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, start_step=0, tensorboard=True)
    log.write({"step": 3, "loss": 0.5, "images_per_expert": [[1, 2]]})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (scalar,) = events.Scalars("loss")
    assert (scalar.step, scalar.value) == (3, 0.5)


def test_what_is_not_finite_is_null(tmp_path):
    log = MetricsLog(tmp_path, start_step=0, tensorboard=False)
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
    assert lap["data_wait_s"] == 0 and lap["images_per_s"] == 0
