"""The bench of routing tables runs small; it compares every table with the reference's itself."""

from benches import routing
from benches.settings import make_bench_config


def test_tables_of_a_small_gate_are_measured():
    report = routing.run(
        make_bench_config(
            {
                "bench": {"rounds": 3, "warmup_rounds": 1},
                "model": {"size": "tiny"},
                "moe": {"num_experts": 4},
                "cluster": {"num_clusters": 32},
                "parallel": {"num_workers": 2, "num_groups": 2},
            }
        )
    )
    assert set(report.variants) == {"at_once", "first_rank", "other_rank"}
    assert all(variant["runs"] == 3 for variant in report.variants.values())
    assert report.figures["made_cpu_s"] > 0
