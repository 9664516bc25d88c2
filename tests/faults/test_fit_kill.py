"""A fine-tuning on two Ray Train workers that is interrupted, killed, or loses a worker.

At equal ranks the same command ends in the same weights, bit for bit, and the same figures.
"""

import json
import shutil
import signal

import pytest

pytestmark = pytest.mark.long
ALL = ("ingested", "mae", "features", "clusters", "shards", "moce")
FIT = "models/moce-finetune-0"
BUDGET = (
    "transfer.finetune.epochs=12", "transfer.finetune.warmup_epochs=1",
    "transfer.finetune.batch_size=16", "transfer.finetune.base_lr=2e-3",
    "transfer.save_every_steps=20",
)  # fmt: skip


@pytest.fixture(scope="module")
def task(images, tmp_path_factory):
    """The images as a task: every third one is for the test."""
    root = tmp_path_factory.mktemp("task")
    for path in images.glob("*/*.png"):
        folder = root / ("val" if int(path.stem) % 3 == 0 else "train") / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    return root


def command(run, task):
    flags = ["--run", run, "--task", "imagefolder", "--data", task, "--backbone", "moce"]
    return [*flags, "--protocol", "finetune", *(x for o in BUDGET for x in ("--set", o))]


def outcome(run):
    folder = run / "transfer" / "imagefolder"
    metrics = json.loads((folder / "metrics.json").read_text())
    return (folder / FIT / "last" / "model.safetensors").read_bytes(), metrics["results"]


@pytest.fixture(scope="module")
def whole(finished, task, run_job, tmp_path_factory):
    """What comes out when nothing happens."""
    run = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(finished, run)
    run_job("transfer", *command(run, task)).assert_done()
    return outcome(run)


@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL", "worker"])
def test_the_fit_goes_on_and_ends_the_same(how, whole, task, start, part_of):
    run = part_of(*ALL)
    state = run / "transfer" / "imagefolder" / FIT / "state.safetensors"
    job = start("transfer", *command(run, task))
    job.wait_until(state.exists, "a saved state")
    if how == "worker":
        job.workers()[0].kill()
    else:
        job.process.send_signal(signal.Signals[how])
    result = job.finish()
    job.assert_nothing_stays()
    expected = {"SIGINT": 130, "SIGKILL": -signal.SIGKILL, "worker": 0}[how]
    assert result.status == expected, result.err
    if how != "worker":
        assert not (run / "transfer" / "imagefolder" / "COMPLETE").exists()
        again = start("transfer", *command(run, task))
        result = again.finish().assert_done()
        again.assert_nothing_stays()
    assert "goes on after step" in result.err
    assert outcome(run) == whole
