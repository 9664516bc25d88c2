"""The checkpoint benchmark at a tiny size: real ranks, the promised keys."""

import json

import pytest
from benches.checkpoint import run
from benches.settings import load_bench_config

TINY = [
    "model.width=32", "model.num_heads=2", "model.depth=2", "data.image_size=32",
    "model.patch_size=8", "model.decoder_depth=1", "model.decoder_width=16",
    "model.decoder_num_heads=2", "moe.num_experts=2", "moce.batch_size=4", "mae.batch_size=4",
    "cluster.num_clusters=4", "parallel.num_workers=2", "parallel.num_groups=2",
    "parallel.precision=fp32", "parallel.use_gpu=false", "checkpoint.every_steps=2",
    "bench.rounds=2", "bench.warmup_rounds=0",
]  # fmt: skip


def test_checkpoint_reports_blocking_save_stall_and_their_ratio():
    config = load_bench_config(None, TINY)
    report = json.loads(run(config).to_json())
    assert report["bench"] == "checkpoint" and report["skipped"] == {}
    assert report["variants"].keys() == {"save_blocking", "save_stall"}
    for variant in report["variants"].values():
        assert variant["unit"] == "s" and variant["runs"] == 2
    blocking, stall = (report["variants"][v]["median"] for v in ("save_blocking", "save_stall"))
    assert blocking > 0
    assert report["ratios"] == {"save_stall/save_blocking": pytest.approx(stall / blocking)}
    # weights, and two moments of what has a gradient
    assert 1e-4 < report["figures"]["state_gib"] < 1e-2
    assert report["figures"]["steps"] >= 2
