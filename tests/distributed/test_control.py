"""Stage control: the dense MAE, trained on with exactly what stage moce is trained on with."""

import pytest
from ranks import fresh_run

from moce_dist.run.files import read_jsonl
from moce_dist.train.checkpoint import latest_checkpoint, load_weights, read_manifest


def overrides(ranks):
    return [f"parallel.num_workers={ranks}", "gate.noise=1"]


def metrics(run, stage, *names):
    lines = read_jsonl(run / stage / "metrics.jsonl")
    return [[line[name] for name in names] for line in lines]


@pytest.fixture(scope="module")
def trained(pools, clustered_run, tmp_path_factory):
    """Both stages on one and on two ranks: the run, and what each step learnt from, by stage."""
    found = {}
    for ranks in (1, 2):
        run = fresh_run(clustered_run, tmp_path_factory.mktemp(f"on-{ranks}") / "run")
        seen = {}
        for stage in ("moce", "control"):
            results = pools(ranks).run(
                "train_to_end", run=str(run), overrides=overrides(ranks), stage=stage
            )
            seen[stage] = [
                {key: noise for each in results for key, noise in each[step].items()}
                for step in results[0]
            ]
        found[ranks] = run, seen
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_control_sees_the_images_and_masks_of_stage_moce(trained, ranks):
    _, seen = trained[ranks]
    assert len(seen["control"]) == 22
    assert sum(map(len, seen["control"])) == 2 * 164
    assert seen["control"] == seen["moce"] == trained[1][1]["moce"]
    # planted: the order of another step is another batch
    assert seen["control"][1:] != seen["moce"][:-1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_schedule_and_start_are_those_of_stage_moce(trained, ranks):
    run, _ = trained[ranks]
    names = ("step", "epoch", "images_seen", "lr")
    assert metrics(run, "control", *names) == metrics(run, "moce", *names)
    (control, *_), (moce, *_) = (metrics(run, stage, "loss") for stage in ("control", "moce"))
    # experts start as copies of the dense MLPs, whose output the gate does not scale
    assert control == pytest.approx(moce, rel=1e-5)
    assert metrics(run, "control", "loss") != metrics(run, "moce", "loss")
    lines = read_jsonl(run / "control" / "metrics.jsonl")
    assert all("images_per_expert" not in line for line in lines)


def test_the_control_is_a_dense_mae(trained):
    checkpoint = latest_checkpoint(trained[2][0] / "control" / "checkpoints")
    weights = load_weights(checkpoint)
    assert "blocks.1.mlp.fc1.weight" in weights
    assert not [name for name in weights if "experts" in name or name.startswith("gate")]
    assert read_manifest(checkpoint)["stage"] == "control"


def test_an_interrupted_control_ends_in_the_same_bits(pools, clustered_run, trained, tmp_path):
    run, _ = trained[2]
    parts = fresh_run(clustered_run, tmp_path / "parts")
    named = {"run": str(parts), "overrides": overrides(2), "stage": "control"}
    for stop in (6, 15):
        pools(2).run("train_part", **named, stop=stop)
    pools(2).run("train_to_end", **named)
    assert metrics(parts, "control", "step", "loss") == metrics(run, "control", "step", "loss")
    mine, whole = (
        read_manifest(latest_checkpoint(root / "control" / "checkpoints"))["files"]
        for root in (parts, run)
    )
    assert mine == whole


def test_ranks_agree_whether_a_stage_is_complete(pools, clustered_run, tmp_path):
    run = fresh_run(clustered_run, tmp_path / "run")
    # the first rank decides; planted: alone, the second one would wait for it
    counts = pools(2).run(
        "stage_with_doubts",
        run=str(run),
        overrides=["parallel.num_workers=2", "mae.epochs=1", "mae.warmup_epochs=0"],
        doubts=[None, None, 1, 0],
    )
    assert counts == [[1, 0, 0, 1]] * 2
