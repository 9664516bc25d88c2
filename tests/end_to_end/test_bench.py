"""Benchmarks print one JSON object with the promised keys, and nothing else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MACHINE = {"cpu", "cores", "memory_gib", "gpu", "python", "torch"}
TINY = (
    "model.width=32", "model.num_heads=2", "model.depth=2", "moe.layers=[1]",
    "model.decoder_width=16", "model.decoder_num_heads=2", "data.image_size=32",
    "model.patch_size=8", "mae.batch_size=16", "moce.batch_size=16", "cluster.num_clusters=8",
    "bench.rounds=2", "bench.warmup_rounds=0",
)  # fmt: skip


def bench(name, *overrides, rounds=2):
    flags = [flag for override in (*TINY, *overrides) for flag in ("--set", override)]
    command = [sys.executable, "jobs/bench.py", name, *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["bench"] == name
    assert document["machine"].keys() == MACHINE
    assert document["config"]["bench.rounds"] == rounds
    for result in document["variants"].values():
        assert 0 < result["min"] <= result["median"] <= result["max"]
    return document


def test_step_prints_all_variants_and_moves_nothing():
    document = bench("step")
    kinds = {"dense", "cluster", "token", "ddp", "fsdp2", "deepspeed"}
    assert document["variants"].keys() == kinds | {f"{kind}_bf16" for kind in kinds}
    assert document["ratios"].keys() == {
        "cluster/dense", "cluster/token", "cluster_bf16/dense_bf16", "cluster_bf16/token_bf16",
        "dense/ddp", "dense_bf16/ddp_bf16", "dense/fsdp2", "dense_bf16/fsdp2_bf16",
        "dense/deepspeed", "dense_bf16/deepspeed_bf16",
    }  # fmt: skip
    medians = {name: result["median"] for name, result in document["variants"].items()}
    assert document["ratios"]["cluster/dense"] == pytest.approx(
        medians["cluster"] / medians["dense"]
    )
    figures = document["figures"]
    assert figures["bytes_exchanged_per_image"] == figures["images_dropped"] == 0
    # all baselines train the same model
    assert figures["fsdp2_apart"] < 0.05 and figures["deepspeed_apart"] < 0.05
    assert not document["skipped"]


@pytest.mark.long
def test_step_counts_what_travels_when_groups_are_free():
    figures = bench("step", "gate.groups=free", "moe.layers=[0,1]", "gate.noise=10")["figures"]
    assert figures["bytes_exchanged_per_image"] > 0
    assert figures["images_dropped"] == 0


@pytest.mark.long
@pytest.mark.skipif(
    os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")),
    reason="two hosts on one machine need root and iproute2",
)
def test_exchange_slows_the_link_of_two_hosts_and_leaves_none():
    document = bench("exchange")
    baselines = {"ddp", "fsdp2", "deepspeed"}
    assert document["variants"].keys() == {"dense", "cluster", "token", *baselines}
    ratios = {"token/cluster", "cluster/dense", *(f"dense/{name}" for name in baselines)}
    assert document["ratios"].keys() == ratios
    assert document["figures"]["link_mbit"] > 0
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert "moce-" not in left.stdout


def test_what_cannot_be_measured_is_named(monkeypatch, capsys):
    from benches import exchange
    from benches.settings import load_bench_config

    monkeypatch.setattr(exchange, "missing", lambda: "needs root for network namespaces")
    report = exchange.run(load_bench_config(ROOT / "configs" / "bench" / "exchange.yaml"))
    document = json.loads(report.to_json())
    assert not document["variants"] and not document["ratios"]
    assert {"token", "link_mbit", "token/cluster"} <= document["skipped"].keys()


def test_wrong_name_is_refused(ask):
    refused = ask("bench", "stepp")
    refused.assert_refused(2, "stepp")
    assert not refused.out


@pytest.mark.long
def test_start_names_its_parts_and_compares_two_copies():
    document = bench("start", "bench.rounds=1", f"bench.against={ROOT}", rounds=1)
    figures = document["figures"]
    parts = [figures[f"{part}_s"] for part in ("command", "ray", "worker", "engine", "step")]
    assert min(parts) >= 0 and sum(parts) == pytest.approx(figures["first_step_s"])
    for name in ("first_step", "next_stage", "after_shards"):
        assert document["variants"].keys() >= {name, f"{name}_against"}
        assert f"{name}/{name}_against" in document["ratios"]


SMALL_CLUSTER = ("bench.rows=4000", "bench.dim=8", "cluster.iterations=3")


def test_cluster_compares_with_faiss_and_keeps_sizes_exact():
    document = bench("cluster", *SMALL_CLUSTER)
    medians = {name: v["median"] for name, v in document["variants"].items()}
    faiss = min(medians["faiss_1_thread"], medians["faiss_2_threads"])
    assert document["ratios"] == {"moce_dist_off/faiss": medians["moce_dist_off"] / faiss}
    figures = document["figures"]
    assert figures["size_max_minus_min"] <= 1
    assert figures["objective_off_over_faiss"] == pytest.approx(1, abs=1e-3)
    assert figures["objective_exact_over_faiss"] > 0.999
    private, all_of_it = (figures[f"peak_{kind}_gib_per_worker"] for kind in ("private", "rss"))
    assert 0.1 < private <= all_of_it < 4 and "peak_rss_gib_of_driver" not in figures


def test_cluster_runs_the_variants_that_are_asked_for():
    document = bench("cluster", *SMALL_CLUSTER, "bench.variants=[moce_dist_exact]")
    assert document["variants"].keys() == {"moce_dist_exact"} and not document["ratios"]
    assert "faiss_1_thread" in document["skipped"]
    assert 0.1 < document["figures"]["peak_rss_gib_of_driver"] < 4
    with pytest.raises(AssertionError, match=r"bench\.variants \(exact\) must be of faiss_1"):
        bench("cluster", *SMALL_CLUSTER, "bench.variants=[exact]")


def test_balance_is_exact_beside_programs_that_are_there_or_says_who_is_missing():
    document = bench("balance", "bench.rows=3000", "bench.dim=6", "cluster.iterations=4")
    assert {"moce_dist", "moce_dist_settle"} <= document["variants"].keys()
    for theirs, ours in (("k_means_constrained", "moce_dist"), ("pot", "moce_dist_settle")):
        if theirs in document["variants"]:
            assert f"{ours}/{theirs}" in document["ratios"]
        else:
            assert {theirs, f"{ours}/{theirs}"} <= document["skipped"].keys()
    # transport costs the least there is
    if "pot" in document["variants"]:
        assert document["figures"]["cost_over_pot"] == pytest.approx(1, abs=1e-6)
