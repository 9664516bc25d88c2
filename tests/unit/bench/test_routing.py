"""The bench of routing tables runs small; it compares every table with the reference's itself."""

import pytest
from benches import routing
from benches.settings import make_bench_config

from moce_dist.settings import ConfigError


def test_tables_of_a_small_gate_are_measured():
    report = routing.run(
        make_bench_config(
            {
                "bench": {"rounds": 3, "warmup_rounds": 1, "step_ms": 2},
                "model": {"size": "tiny"},
                "moe": {"num_experts": 4},
                "cluster": {"num_clusters": 32},
                "parallel": {"num_workers": 2, "num_groups": 2, "use_gpu": False},
            }
        )
    )
    waits = {"first_rank", "other_rank", "first_rank_fixed", "other_rank_fixed"}
    assert set(report.variants) == {"at_once", *waits}
    assert set(report.ratios) == {f"{wait}/at_once" for wait in waits}
    assert all(variant["runs"] == 3 for variant in report.variants.values())
    assert report.figures["made_cpu_s"] > 0 and report.figures["step_ms"] == 2


def test_a_rank_alone_is_refused():
    alone = make_bench_config({"parallel": {"num_workers": 1, "num_groups": 1}})
    with pytest.raises(ConfigError, match=r"num_workers \(1\): routing needs at least 2 ranks"):
        routing.run(alone)
