"""The benchmarks of steps: legal numbers of ranks, terms of a budget, the link of two hosts."""

from pathlib import Path

import pytest
import torch
from benches import exchange, peaks, step
from benches.harness import Report
from benches.settings import load_bench_config

from moce_dist.config import load_config
from moce_dist.cost import sizes
from moce_dist.cost.budget import budget

CONFIGS = Path(__file__).parents[3] / "configs" / "bench"
TINY = (
    "model.width=32", "model.num_heads=2", "model.depth=2", "model.decoder_width=16",
    "model.decoder_num_heads=2", "model.decoder_depth=1", "data.image_size=32",
    "model.patch_size=8", "moe.num_experts=4", "cluster.num_clusters=8", "mae.batch_size=48",
    "moce.batch_size=48",
)  # fmt: skip


@pytest.mark.parametrize(
    ("workers", "groups", "gpus", "expected"),
    [
        (4, 2, 3, 2),
        (8, 4, 7, 4),
        (4, 4, 3, 2),
        (2, 2, 1, 1),
        (2, 2, 2, 2),
        (2, 2, 8, 2),
        (2, 2, 0, 2),
    ],
)
def test_ranks_are_the_most_that_are_legal_with_a_gpu_each(workers, groups, gpus, expected):
    ranks = (f"parallel.num_workers={workers}", f"parallel.num_groups={groups}")
    config = load_bench_config(None, [*TINY, *ranks])
    assert step.on_gpus(config, gpus).parallel.num_workers == expected
    cpus = load_bench_config(None, [*TINY, *ranks, "parallel.use_gpu=false"])
    assert step.on_gpus(cpus, gpus) == cpus


def test_terms_of_the_passes_are_read_by_a_budget(tmp_path):
    config = load_bench_config(None, TINY)
    terms = step.compute_terms(config, torch.device("cpu"))
    assert terms.keys() == {"bf16_tflops", "utilisation"} and min(terms.values()) > 0
    # the product is so small that a CPU may be faster elsewhere
    terms["utilisation"] = min(1.0, terms["utilisation"])
    file = tmp_path / "terms.json"
    Report("step", config, terms=terms).write_terms(file)
    found = budget(load_config(None, [f"hardware.terms={file}"]))
    assert found.compute().source == "measured"
    assert found.hardware.bf16_tflops == terms["bf16_tflops"]


def test_no_term_of_a_gpu_comes_from_a_cpu(monkeypatch):
    times = {name: [1.0, 2.0] for name in (*step.KINDS, *step.BASELINES)}
    times |= {f"{name}_bf16": series for name, series in times.items()}
    result = {"times": times, "figures": {}, "terms": {}}
    monkeypatch.setattr(step, "run_ranks", lambda *_: result)
    report = step.run(load_bench_config(None, TINY))
    assert report.terms == {} and report.ratios["dense/ddp"] == 1.0


def test_rates_of_a_device_are_positive():
    cpu = torch.device("cpu")
    assert peaks.product_tflops(cpu, torch.float32) > 0 and peaks.memory_gb_s(cpu) > 0


def test_nothing_passes_beside_the_link(monkeypatch):
    found = {}
    monkeypatch.setattr(exchange, "run_ranks", lambda *_, **options: found.update(options) or {})
    exchange.Hosts(["a", "b"]).run("exchange:measure", load_bench_config(None, TINY))
    # between two ranks of one machine NCCL would use neither network nor link
    assert found["environment"].items() >= {
        ("NCCL_P2P_DISABLE", "1"), ("NCCL_SHM_DISABLE", "1"), ("NCCL_NET", "Socket"),
        ("NCCL_SOCKET_IFNAME", "eth0"), ("GLOO_SOCKET_IFNAME", "eth0"),
    }  # fmt: skip
    assert found["prefixes"] == [["ip", "netns", "exec", name] for name in "ab"]


def test_model_of_several_buckets_is_as_large_as_it_says():
    config = load_bench_config(CONFIGS / "step_buckets.yaml")
    parameters = sizes.dense_parameters(config)
    assert parameters > 13e6 and 4 * parameters > 2 * sizes.BUCKET_BYTES
    assert config.parallel.num_workers == 2, "exchange is for two hosts"
