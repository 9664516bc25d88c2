"""The benchmark of the planner at a tiny size: what it promises is there and means something."""

import json

import numpy as np
import pytest
from benches.harness import run_fresh
from benches.placement import Shape, gated_table, run
from benches.settings import load_bench_config

TINY = Shape(clusters=64, experts=8, layers=3, groups=4)


def test_report_has_the_promised_keys():
    config = load_bench_config(None, ["bench.rounds=2", "bench.warmup_rounds=0"])
    report = json.loads(run(config, TINY, TINY._replace(clusters=96)).to_json())
    assert report["variants"].keys() == {"plan_4096", "plan_65536"}
    for variant in report["variants"].values():
        assert variant["unit"] == "s" and variant["runs"] == 2
        assert 0 < variant["min"] <= variant["median"] <= variant["max"]
    figures = report["figures"]
    assert figures["max_over_mean_images"] == pytest.approx(1)
    assert 0 < figures["local_fraction_contiguous"] < figures["local_fraction"] <= 1
    assert 0.02 < figures["peak_rss_gib"] < 4


def test_table_is_seeded_and_layers_agree_more_than_by_chance():
    table = gated_table(2, 2000, 8, seed=3)
    assert (table == gated_table(2, 2000, 8, seed=3)).all()
    assert (table != gated_table(2, 2000, 8, seed=4)).any()
    joint = np.zeros((8, 8))
    np.add.at(joint, tuple(table), 1 / 2000)
    independent = np.outer(joint.sum(axis=1), joint.sum(axis=0))
    assert np.abs(joint - independent).sum() > 0.3


def test_failing_process_is_named():
    with pytest.raises(RuntimeError, match=r"benches\.placement: "):
        run_fresh("benches.placement", *TINY._replace(experts=0), 0)
