"""Re-planning: experts arrive whole, training goes on as if none had moved, no sample is lost."""

import json
from collections import Counter

import numpy as np
import pytest
from ranks import fresh_run

from moce_dist.run.files import read_jsonl

CONFIGURATIONS = [
    # ranks, groups, ZeRO stage
    (1, 2, 0),
    (2, 2, 1),
    pytest.param((2, 4, 2), marks=pytest.mark.long),
    (4, 2, 0),
    pytest.param((4, 2, 1), marks=pytest.mark.long),
    pytest.param((4, 2, 2), marks=pytest.mark.long),
    (4, 4, 0),
]


def overrides(ranks, groups, zero):
    return [
        f"parallel.num_workers={ranks}", f"parallel.num_groups={groups}",
        f"parallel.zero_stage={zero}",
    ]  # fmt: skip


def lines(run):
    return {line["step"]: line for line in read_jsonl(run / "moce" / "metrics.jsonl")}


def union(parts):
    tensors = {}
    for part in parts:
        for name, value in part.items():
            if name in tensors:
                np.testing.assert_array_equal(tensors[name], value, err_msg=str(name))
            tensors[name] = value
    return tensors


def keys_per_step(results):
    keys = {}
    for result in results:
        for step, read in result["keys"]:
            keys.setdefault(step, []).extend(read)
    return {step: sorted(read) for step, read in keys.items()}


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_moved_experts_are_the_same_and_train_on(
    pools, cases, clustered_run, tmp_path, configuration
):
    ranks, options = configuration[0], overrides(*configuration)
    runs = {moves: fresh_run(clustered_run, tmp_path / f"moves-{moves}") for moves in (True, False)}
    results = {
        moves: pools(ranks).run("train_replanning", run=str(run), overrides=options, moves=moves)
        for moves, run in runs.items()
    }
    steps = [step for step, *_ in results[True][0]["snapshots"]]
    assert steps == [0, 5, 10, 15, 20]
    for i, step in enumerate(steps):
        rows = [result["snapshots"][i] for result in results[True]]
        before, after = union(row[2] for row in rows), union(row[3] for row in rows)
        kinds = {"weight"} if step == 0 else {"weight", "exp_avg", "exp_avg_sq"}
        assert {kind for kind, _ in before} == kinds
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value, err_msg=str(name))
    travelled = [moved for _, moved, *_ in results[True][0]["snapshots"]]
    assert any(travelled) == (ranks > 1)
    # what a step contains is not the placement's business
    plan = cases.make_job(clustered_run, options).plan()
    for result in results.values():
        keys = keys_per_step(result)
        for first in range(0, 2 * plan.steps_per_epoch, plan.steps_per_epoch):
            epoch = range(first, first + plan.steps_per_epoch)
            assert Counter(k for s in epoch for k in keys[s]) == Counter(plan.table.keys)
    assert keys_per_step(results[True]) == keys_per_step(results[False])
    for step, line in lines(runs[True]).items():
        assert line["loss"] == pytest.approx(lines(runs[False])[step]["loss"], rel=1e-4)


def test_resumed_after_a_move_goes_on_bit_equal(pools, clustered_run, tmp_path):
    whole, parts = (fresh_run(clustered_run, tmp_path / name) for name in ("whole", "parts"))
    options = {"overrides": overrides(2, 2, 2), "moves": True}
    pools(2).run("train_replanning", run=str(whole), **options)
    for stop in (14, 21):  # checkpoints at 12 and 20, moves at 5, 10, 15 and 20
        pools(2).run("train_replanning", run=str(parts), stop=stop, **options)
    pools(2).run("train_replanning", run=str(parts), **options)
    expected = lines(whole)
    assert len(expected) == 22
    assert {s: x["loss"] for s, x in lines(parts).items()} == {
        s: x["loss"] for s, x in expected.items()
    }


def test_placement_files_hold_prediction_and_measurement(pools, cases, clustered_run, tmp_path):
    run, options = fresh_run(clustered_run, tmp_path / "run"), overrides(2, 2, 0)
    pools(2).run("train_to_end", run=str(run), overrides=options)
    plan, metrics = cases.make_job(clustered_run, options).plan(), lines(run)
    files = [json.loads(p.read_text()) for p in (run / "moce" / "placement").iterdir()]
    files.sort(key=lambda file: file["step"])
    assert [file["step"] for file in files] == [0, 5, 10, 15, 20]
    done = 0
    for file in files:
        predicted, measured = file["predicted_per_epoch"], file["measured_in_interval"]
        assert predicted["images"] == pytest.approx(plan.table.num_samples)
        assert predicted["images_exchanged"] <= predicted["images_exchanged_contiguous"]
        assert predicted["images_per_group"] == pytest.approx([plan.table.num_samples / 2] * 2)
        interval = [metrics[step] for step in range(done, done + measured["steps"])]
        # counted by groups from the placement, and by ranks from the exchange: the same here
        for key in ("images_exchanged", "bytes_exchanged"):
            assert measured[key] == sum(line[key] for line in interval)
        totals = np.sum([line["images_per_expert"] for line in interval], axis=0)
        assert measured["images_per_expert"] == totals.tolist()
        assert sum(measured["images_per_group"]) == measured["images"] == totals[0].sum()
        assert measured["local_fraction"] == pytest.approx(
            1 - measured["images_exchanged"] / (2 * measured["images"])
        )
        done += measured["steps"]
    assert done == 22


def test_a_loader_starts_once_whatever_is_planned_anew(pools, own_run):
    options = [
        *overrides(1, 2, 0), "moce.epochs=28", "parallel.replan_steps=100",
        "logging.every_steps=50", "checkpoint.every_steps=1000",
    ]  # fmt: skip
    (seen,) = pools(1).run("loader_starts", run=str(own_run), overrides=options)
    assert seen["replans"] == [0, 100, 200, 300] and len(seen["keys"]) == 308
    assert seen["starts"] == 1
    used = Counter(key for keys in seen["keys"] for key in keys)
    assert set(used.values()) == {28} and len(used) == 164
