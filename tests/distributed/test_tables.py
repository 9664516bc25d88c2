"""Routing tables that are made beside the steps are those of the readable reference."""

import numpy as np
import pytest
import torch

from moce_dist.model.gate import NoiseSchedule, logits, noisy_scores, routing_table, shared_groups

REPLAN = 5
FAST = ["moce.base_lr=0.5", "gate.lr_scale=10", "gate.noise_fraction=0.3", "logging.every_steps=7"]


def tables(pools, run, ranks, *more):
    overrides = [f"parallel.num_workers={ranks}", f"parallel.replan_steps={REPLAN}", *FAST, *more]
    results = pools(ranks).run("tables_and_weights", run=str(run), overrides=overrides)
    for other in results[1:]:
        for (*_, mine, _), (*_, theirs, _) in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    return results[0]


def reference(cases, seen, step, made_from, *more):
    """The table of `step` from the weights before step `made_from`."""
    config = cases.tiny_config([*FAST, *more])
    weight, groups, _, embedding = (torch.from_numpy(value) for value in seen[made_from])
    steps = int(len(seen) * config.gate.noise_fraction)
    scores = logits(weight, embedding)
    return routing_table(
        scores,
        config.gate,
        noise=NoiseSchedule(config.seed, config.gate.noise, steps).sample(step, scores.shape),
        num_groups=2,
        cluster_group=groups if config.gate.groups == "shared" else None,
    )


def differing(cases, seen, lag, *more):
    """Steps whose table is not that of the weights `lag` steps before; plans take the newest."""
    steps = [step for step in range(len(seen)) if step % REPLAN]
    at_plans = [step for step in range(len(seen)) if not step % REPLAN]
    for step in at_plans:
        np.testing.assert_array_equal(seen[step][2], reference(cases, seen, step, step, *more))
    return [s for s in steps if (seen[s][2] != reference(cases, seen, s, s - lag, *more)).any()]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "option", ["gate.groups=free", "gate.groups=shared", "gate.assign=balanced"]
)
def test_a_table_follows_from_the_weights_of_the_step_before(pools, cases, own_run, ranks, option):
    seen = tables(pools, own_run, ranks, option)
    assert len(seen) == 22
    assert differing(cases, seen, 1, option) == []


def test_clusters_choose_their_groups_at_every_plan_and_keep_them(pools, cases, own_run):
    seen = tables(pools, own_run, 2, "gate.groups=shared")
    config, chosen = cases.tiny_config(FAST), []
    steps = int(len(seen) * config.gate.noise_fraction)
    noise = NoiseSchedule(config.seed, config.gate.noise, steps)
    for step in range(0, len(seen), REPLAN):
        scores = logits(torch.from_numpy(seen[step][0]), torch.from_numpy(seen[step][3]))
        noisy = noisy_scores(scores, noise.sample(step, scores.shape))
        chosen.append(np.asarray(shared_groups(noisy, 2)).tolist())
    assert [np.asarray(groups).tolist() for _, groups, *_ in seen] == [
        chosen[step // REPLAN] for step in range(len(seen))
    ]
    assert any(each != chosen[0] for each in chosen)


def test_planted_other_weights_are_noticed(pools, cases, own_run):
    seen = tables(pools, own_run, 1)
    assert differing(cases, seen, 0)


def test_tables_stay_between_refreshes(pools, cases, own_run):
    seen = tables(pools, own_run, 2, "gate.refresh_steps=3")
    for step in range(1, len(seen)):
        if step % 3 and step % REPLAN:
            np.testing.assert_array_equal(seen[step][2], seen[step - 1][2])
    assert (seen[3][2] == reference(cases, seen, 3, 2)).all()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_make_a_large_table_together(pools, ranks):
    for found, expected in pools(ranks).run("large_tables", steps=5):
        np.testing.assert_array_equal(found, expected)
        assert (found[1:] != found[:-1]).any(axis=(1, 2)).all()


def test_a_planted_other_gate_is_noticed_in_its_share_alone(pools):
    found, expected = pools(3).run("large_tables", steps=1, planted=True)[0]
    # of five layers, the first rank makes one and the others two each
    assert (found != expected).any(axis=(0, 2)).tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_cannot_make_its_share_fails_and_so_do_all(pools, rank):
    said = pools(3).run("large_tables", steps=1, failing=rank)
    others = [text for at, text in enumerate(said) if at != rank]
    assert others == ["another rank could not make its share of the routing table"] * 2
    assert "NoneType" in said[rank]
    # the group is as good as before
    found, expected = pools(3).run("large_tables", steps=2)[0]
    np.testing.assert_array_equal(found, expected)
