"""A task's own steps: images by the task's mass over clusters, on any ranks, resumed bit-equal."""

import numpy as np
import pytest

from moce_dist.run.files import read_jsonl
from moce_dist.train.checkpoint import latest_checkpoint, load_weights, read_manifest, write_weights
from moce_dist.train.pretrained import initial_weights

# of 8 clusters with 20 or 21 images three are the task's
QUOTAS = (16, 0, 0, 0, 8, 0, 8, 0)
BATCH = 8


def steps(run, out="own"):
    return {"out": out, "epochs": 2.5, "quotas": QUOTAS, "start": str(run / "start")}


def overrides(ranks):
    fixed = [f"parallel.num_workers={ranks}", f"transfer.continued.batch_size={BATCH}"]
    return [*fixed, "transfer.continued.warmup_fraction=0.2", "checkpoint.every_steps=2"]


@pytest.fixture
def start(own_run, cases):
    """A run whose dense weights are not those that any stage would begin with."""
    config = cases.tiny_config(["seed=7"])
    weights = initial_weights(config)
    write_weights(own_run / "start", weights)
    return own_run, weights


def train(pool, run, ranks, out="own"):
    named = {"run": str(run), "overrides": overrides(ranks), "stage": steps(run, out)}
    results = pool.run("train_to_end", **named)
    return [{k: n for each in results for k, n in each[step].items()} for step in results[0]]


def lines(run, out, *names):
    return [[x[name] for name in names] for x in read_jsonl(run / out / "metrics.jsonl")]


def test_own_steps_see_the_tasks_clusters_by_mass_on_any_ranks(pools, start):
    run, weights = start
    one, two = train(pools(1), run, 1, "one"), train(pools(2), run, 2, "two")
    assert one == two
    assert len(one) == 10 and all(len(batch) == BATCH for batch in one)
    clusters = [[int(key[1]) for key in batch] for batch in one]
    # every step and every epoch of four steps at the shares 4 : 2 : 2
    assert all(
        np.bincount(ids, minlength=8).tolist() == [4, 0, 0, 0, 2, 0, 2, 0] for ids in clusters
    )
    assert all(len({k for batch in one[e : e + 4] for k in batch}) == 32 for e in (0, 4))
    # warm-up of two steps, then a cosine, from the moce stage's rate for this batch
    rates = [lr for (lr,) in lines(run, "two", "lr")]
    assert rates[0] == pytest.approx(rates[1] / 2) and rates[1] == max(rates) > rates[-1] > 0
    losses = [np.array(lines(run, out, "loss")) for out in ("one", "two")]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    last = latest_checkpoint(run / "two" / "checkpoints")
    trained, manifest = load_weights(last), read_manifest(last)
    assert manifest["step"] == 10 and manifest["stage"] == "two"
    moved = {n for n in trained if not np.array_equal(trained[n], weights[n])}
    assert {"blocks.1.mlp.fc1.weight", "decoder_pred.weight"} <= moved
    assert trained.keys() == weights.keys()


def test_own_steps_that_are_killed_end_in_the_same_bits(pools, start):
    run, _ = start
    train(pools(2), run, 2, "whole")
    named = {"run": str(run), "overrides": overrides(2), "stage": steps(run, "parts")}
    for stop in (3, 8):
        pools(2).run("train_part", **named, stop=stop)
    pools(2).run("train_to_end", **named)
    assert lines(run, "parts", "step", "loss") == lines(run, "whole", "step", "loss")
    mine, whole = (
        read_manifest(latest_checkpoint(run / out / "checkpoints"))["files"]
        for out in ("parts", "whole")
    )
    assert mine == whole


def test_another_start_is_another_training(pools, start):
    run, weights = start
    train(pools(1), run, 1, "one")
    write_weights(run / "start", {name: tensor * 1.01 for name, tensor in weights.items()})
    train(pools(1), run, 1, "planted")
    assert lines(run, "planted", "loss")[0] != lines(run, "one", "loss")[0]
