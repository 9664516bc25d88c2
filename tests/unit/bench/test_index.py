"""The bench of a large index runs small, and says what it measured."""

from benches import index
from benches.settings import make_bench_config


def test_a_small_index_is_measured():
    report = index.run(
        make_bench_config(
            {
                "bench": {"index_samples": 20_000, "rounds": 1, "warmup_rounds": 0},
                "cluster": {"num_clusters": 16},
                "moce": {"batch_size": 64},
            }
        )
    )
    assert set(report.variants) == {"start", "resume", "plan_step", "save"}
    # a key of 12 bytes, its offset, four numbers of 20 bytes; and what is said once a shard
    assert 36 < report.figures["shared_bytes_per_sample"] < 42
    assert report.figures["join_us_per_sample"] > 0
    assert report.figures["samples"] == 20_000
    assert 0 < report.figures["private_bytes"] < 200e6
