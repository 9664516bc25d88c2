"""A run that goes on from the middle of another one: shared bits, changed rate, refused fields."""

import json
import shutil

import pytest

ALONE = ("parallel.num_workers=1", "mae.epochs=4", "checkpoint.every_steps=10", "checkpoint.keep=9")
STAGE = ("--stage", "mae")


@pytest.fixture(scope="module")
def base(tmp_path_factory, run_job, arguments):
    """Stage mae of a run, one process, all its checkpoints kept."""
    root = tmp_path_factory.mktemp("base") / "run"
    run_job("pretrain", *arguments(root, *ALONE), *STAGE).assert_done()
    return root


@pytest.fixture
def fork(run_job, tmp_path):
    """Fork a run into `tmp_path / "run"`; `by=ask` where that is refused."""

    def make(source, step, *flags, stage=STAGE, by=run_job):
        command = ["--fork", source, "--at", step, "--run", tmp_path / "run"]
        return by("pretrain", *command, *flags, *stage)

    return make


def test_a_fork_without_changes_is_the_run_itself(fork, base, learned, tmp_path):
    # what a fork that was interrupted left is made anew
    (tmp_path / "run" / ".fork").mkdir(parents=True)
    (tmp_path / "run" / "ingested").mkdir()
    (tmp_path / "run" / "ingested" / "half").write_text("")
    result = fork(base, 10).assert_done()
    assert "mae: resuming at step 10 of" in result.err
    assert learned(tmp_path / "run" / "mae") == learned(base / "mae")
    assert not (tmp_path / "run" / ".fork").exists()
    assert not (tmp_path / "run" / "ingested" / "half").exists()


def test_a_fork_changes_the_rate_and_remembers_where_it_came_from(
    fork, base, read_metrics, run_job, ask, arguments, tmp_path
):
    source, run, change = tmp_path / "source", tmp_path / "run", "mae.base_lr=1e-4"
    shutil.copytree(base, source)
    fork(source, 20, "--set", change).assert_done()
    mine, whole = read_metrics(run / "mae"), read_metrics(base / "mae")
    assert mine[:20] == whole[:20] and len(mine) == len(whole)
    for one, other in zip(mine[20:], whole[20:], strict=True):
        assert one["lr"] == pytest.approx(other["lr"] / 10) and one["step"] == other["step"]
    manifest = json.loads((base / "mae/checkpoints/step_00000020/manifest.json").read_text())
    assert json.loads((run / "provenance.json").read_text())["forked_from"] == {
        "run": str(source), "stage": "mae", "step": 20,
        "changed": ["mae.base_lr: 0.001 -> 0.0001"], "checkpoint": manifest["sha256"],
    }  # fmt: skip
    # the same command has nothing left to do, and the other run is not needed any more
    assert "mae: complete" in fork(source, 20, "--set", change).assert_done().err
    fork(source, 10, "--set", change, by=ask).assert_refused(2, f"--run {run}: is another run")
    shutil.rmtree(source)
    assert "mae: complete" in fork(source, 20, "--set", change).assert_done().err
    again = run_job("pretrain", *arguments(run, *ALONE, change), *STAGE).assert_done()
    assert "mae: complete" in again.err
    assert "forked_from" in json.loads((run / "provenance.json").read_text())


def test_a_fork_that_replaces_a_run_has_the_data_of_the_other_one(ask, base, images, tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(base, source)
    config = (source / "config.yaml").read_text()
    (source / "config.yaml").write_text(config.replace(str(images), f"{tmp_path}/gone"))
    run.mkdir()
    (run / "config.yaml").write_text(config)
    command = ["--fork", source, "--at", 20, "--run", run, *STAGE, "--fresh", "--dry-run"]
    assert "not here" not in ask("pretrain", *command).assert_done().out


@pytest.mark.parametrize(
    ("step", "flags", "parts"),
    [
        (11, (), ("--at 11: ", "no checkpoint of that step (mae: 10, 20, 30, 36)")),
        (20, ("--set", "mae.epochs=2"), ("--at 20: stage mae is over after 18 steps",)),
        (20, ("--set", "seed=4"), ("may not change seed: 0 -> 4; it may change mae.epochs",)),
        (20, ("--set", "mae.batch_size=64"), ("may not change mae.batch_size: 32 -> 64",)),
        (20, ("--set", "mae.nothing=1"), ("mae.nothing",)),
        (20, ("--config", "x.yaml"), ("--config: not with --fork",)),
    ],
)
def test_what_a_fork_may_not_do_is_refused(ask, base, tmp_path, step, flags, parts):
    command = ("--fork", base, "--at", step, "--run", tmp_path / "run", *flags, *STAGE)
    ask("pretrain", *command).assert_refused(2, *parts)
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_no_start(fork, ask, base, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(base, source)
    file = source / "mae/checkpoints/step_00000020/rank-00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    fork(source, 20, by=ask).assert_refused(2, "--at 20: ", "rank-00000.safetensors is damaged")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_fork_of_stage_moce_shares_what_came_before(fork, finished, learned, tmp_path):
    run = tmp_path / "run"
    fork(finished, 120, stage=()).assert_done()
    assert learned(run / "moce") == learned(finished / "moce")
    for name in ("mae", "clusters", "shards"):
        assert (run / name / "COMPLETE").samefile(finished / name / "COMPLETE")
    files = [(run / "moce" / "routing"), (finished / "moce" / "routing")]
    mine, whole = ({p.name: p.read_text() for p in f.iterdir()} for f in files)
    # an interval that went on in the other run is not measured here
    placed = [p for p in (run / "moce" / "placement").iterdir() if int(p.stem[5:]) < 120]
    newest = max(placed, key=lambda p: int(p.stem[5:]))
    assert json.loads(newest.read_text())["measured_in_interval"] is None
    assert json.loads((finished / newest.relative_to(run)).read_text())["measured_in_interval"]
    # whoever goes on begins with a record of its own
    assert mine.keys() - whole.keys() == {"step_120.json"} and whole.items() <= mine.items()
    changed = fork(finished, 120, "--fresh", "--set", "mae.base_lr=1", stage=())
    changed.assert_refused(2, "a fork of stage moce may not change mae.base_lr: 0.001 -> 1.0")
