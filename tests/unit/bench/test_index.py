"""The bench of a large index runs small, and says what it measured."""

from benches import index
from benches.settings import make_bench_config


def test_a_small_index_is_measured_and_named_as_small():
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
    # a key of 12 bytes, its offset, an offset and a size; and what is said once a shard
    assert 32 < report.figures["shared_bytes_per_sample"] < 40
    assert report.figures["private_bytes_1e8"] < 200e6
    assert report.skipped == {"1e8": "measured with 20000 samples"}
