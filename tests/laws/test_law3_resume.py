"""Law 3: an epoch uses every sample once; a resumed run is the uninterrupted run."""

from collections import Counter

import pytest
from ranks import fresh_run

from moce_dist.run.files import read_jsonl


def overrides(ranks, zero=0, **more):
    fixed = [f"parallel.num_workers={ranks}", f"parallel.zero_stage={zero}"]
    return fixed + [f"{k}={v}" for k, v in more.items()]


def losses(run):
    return {line["step"]: line["loss"] for line in read_jsonl(run / "moce" / "metrics.jsonl")}


def test_every_sample_once_an_epoch_on_any_number_of_ranks(pools, cases, clustered_run):
    plan = cases.make_job(clustered_run, overrides(1)).plan()
    steps = plan.steps_per_epoch
    by_ranks = {}
    for ranks in (1, 2, 4):
        results = pools(ranks).run(
            "stream_keys",
            run=str(clustered_run),
            overrides=overrides(ranks),
            start=0,
            stop=2 * steps,
        )
        for first in (0, steps):
            used = Counter(
                key for r in results for step, keys, _ in r for key in keys
                if first <= step < first + steps
            )  # fmt: skip
            assert used == Counter(plan.table.keys)
        by_ranks[ranks] = [
            sorted(key for r in results for key in r[step][1]) for step in range(2 * steps)
        ]
    assert by_ranks[1] == by_ranks[2] == by_ranks[4]


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_resumed_run_is_bit_equal_at_equal_ranks(pools, clustered_run, tmp_path, zero_stage):
    whole, parts = (fresh_run(clustered_run, tmp_path / name) for name in ("whole", "parts"))
    options = overrides(2, zero_stage)
    pools(2).run("train_to_end", run=str(whole), overrides=options)
    for stop in (6, 15):  # checkpoints are at multiples of 4, placements at multiples of 5
        pools(2).run("train_part", run=str(parts), overrides=options, stop=stop)
    pools(2).run("train_to_end", run=str(parts), overrides=options)
    assert losses(parts) == losses(whole)
    assert len(losses(whole)) == 22


def test_shared_groups_stay_local_while_the_gate_is_noisy_and_resume_bit_equal(
    pools, clustered_run, tmp_path
):
    whole, parts, free = (fresh_run(clustered_run, tmp_path / n) for n in ("whole", "parts", "f"))
    noise = ["gate.noise=2", "gate.noise_fraction=1"]
    options = [*overrides(2), *noise, "gate.groups=shared"]
    pools(2).run("train_to_end", run=str(whole), overrides=options)
    pools(2).run("train_to_end", run=str(free), overrides=[*overrides(2), *noise])
    # the first part goes on at a plan, the second within one: there the stored groups decide
    for stop in (7, 10):
        pools(2).run("train_part", run=str(parts), overrides=options, stop=stop)
    pools(2).run("train_to_end", run=str(parts), overrides=options)
    assert losses(parts) == losses(whole)
    shared, other = (
        sum(line["images_exchanged"] for line in read_jsonl(run / "moce" / "metrics.jsonl"))
        for run in (whole, free)
    )
    # clusters of 20 and of 21 images: now and then one too many for its group is read by the other
    assert shared <= 0.03 * 22 * 16 * 2 < other


def test_run_that_one_rank_was_asked_to_stop_saves_on_all_and_goes_on(
    pools, clustered_run, tmp_path
):
    whole, parts = (fresh_run(clustered_run, tmp_path / name) for name in ("whole", "parts"))
    options = overrides(2)
    pools(2).run("train_to_end", run=str(whole), overrides=options)
    said = pools(2).run(
        "train_until_asked", run=str(parts), overrides=options, asked_rank=1, questions=7
    )
    # checkpoints are at multiples of 4: this one is there because somebody asked
    assert said == ["moce: state saved at step 7 of 22"] * 2
    assert (parts / "moce" / "checkpoints" / "step_00000007" / "manifest.json").exists()
    pools(2).run("train_to_end", run=str(parts), overrides=options)
    assert losses(parts) == losses(whole)


def test_fewer_ranks_take_more_micro_batches_and_learn_the_same(pools, clustered_run, tmp_path):
    whole, parts = (fresh_run(clustered_run, tmp_path / name) for name in ("whole", "parts"))
    elastic = ["parallel.num_workers=4", "parallel.min_workers=1", "parallel.zero_stage=1"]
    pools(4).run("train_to_end", run=str(whole), overrides=elastic)
    pools(4).run("train_part", run=str(parts), overrides=elastic, stop=6)
    pools(1).run("train_part", run=str(parts), overrides=elastic, stop=11)
    pools(2).run("train_to_end", run=str(parts), overrides=elastic)
    expected = losses(whole)
    assert losses(parts).keys() == expected.keys()
    for step, loss in losses(parts).items():
        assert loss == pytest.approx(expected[step], rel=1e-4)
    for file in sorted((whole / "moce" / "routing").iterdir()):
        assert (parts / "moce" / "routing" / file.name).read_text() == file.read_text()


def test_run_resumed_on_other_ranks_sees_the_same_batches_and_tables(
    pools, clustered_run, tmp_path
):
    whole, parts = (fresh_run(clustered_run, tmp_path / name) for name in ("whole", "parts"))
    pools(2).run("train_to_end", run=str(whole), overrides=overrides(2))
    pools(4).run("train_part", run=str(parts), overrides=overrides(4), stop=9)
    pools(1).run("train_part", run=str(parts), overrides=overrides(1), stop=17)
    pools(2).run("train_to_end", run=str(parts), overrides=overrides(2))
    expected = losses(whole)
    assert losses(parts).keys() == expected.keys()
    for step, loss in losses(parts).items():
        assert loss == pytest.approx(expected[step], rel=1e-4)
    for file in sorted((whole / "moce" / "routing").iterdir()):
        assert (parts / "moce" / "routing" / file.name).read_text() == file.read_text()


def test_planted_other_seed_gives_other_batches(pools, clustered_run):
    one, other = (
        pools(1).run(
            "stream_keys", run=str(clustered_run), overrides=[*overrides(1), f"seed={s}"],
            start=0, stop=3,
        )[0]
        for s in (0, 1)
    )  # fmt: skip
    assert [set(keys) for _, keys, _ in one] != [set(keys) for _, keys, _ in other]


def test_a_run_in_another_order_of_images_is_refused_in_a_line(pools, own_run):
    options = overrides(1)
    pools(1).run("train_part", run=str(own_run), overrides=options, stop=6, order=1)
    (said,) = pools(1).run("refusal", run=str(own_run), overrides=options)
    assert "order 1, this one has 2" in said and "step_00000004" in said and "\n" not in said
