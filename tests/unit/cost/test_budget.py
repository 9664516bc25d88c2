"""The budget of a step: literal numbers, monotony, measured terms, and what is refused."""

import json
from pathlib import Path

import pytest
from in_process import run_here
from PIL import Image

from moce_dist.config import load_config
from moce_dist.cost import sizes
from moce_dist.cost.budget import budget, budget_lines, utilisation
from moce_dist.settings import ConfigError

ROOT = Path(__file__).parents[3]
NODES = (
    "parallel.num_workers=32", "parallel.num_groups=4", "moce.batch_size=4096",
    "data.loader_processes=100", "hardware.host_ms=0",
)  # fmt: skip


def reckon(*overrides):
    return budget(load_config(None, [*NODES, *overrides]))


def test_terms_by_hand():
    found = reckon("hardware.node_gbit_s=100", "gate.groups=shared")
    # 128 images of 58.1 GFLOP at 40 % of 989 TFLOP/s
    assert found.compute().value == pytest.approx(128 * 58.11e9 / (0.4 * 989e12) * 1e3, rel=1e-3)
    shared = sizes.shared_parameters(found.config)
    assert found.gradient_bytes() == 4 * shared
    # 2 * 3 / 4 of it through 12.5 GB/s; experts stay inside a node: 8 replicas over NVLink
    between = 1.5 * 4 * shared / 12.5e9
    inside = 2 * 7 / 8 * 4 * 2 * 6 * sizes.expert_parameters(found.config) / 450e9
    assert found.gradients().value == pytest.approx(1e3 * (between + inside))
    last = 1e3 * 1.5 * sizes.BUCKET_BYTES / 12.5e9
    left = 1e3 * (between + inside) - 2 / 3 * found.compute().value
    assert found.gradients_exposed().value == pytest.approx(left + last)
    assert found.exchange().value == 0


def test_exchange_by_hand():
    found = reckon("hardware.images_leaving=0.15", "hardware.node_gbit_s=400")
    moved = 128 * 6 * 0.15 * 4 * 76_800
    assert found.exchange().value == pytest.approx(1e3 * moved / (50e9 / 8))
    assert found.exchange().source == "computed"
    # placed at random, three of four images have their expert on another of the four places
    assert reckon().images_leaving().value == 0.75


@pytest.mark.parametrize(
    ("change", "term"),
    [
        ("hardware.node_gbit_s=25", "gradients_exposed"),
        ("hardware.utilisation=0.2", "compute"),
        ("hardware.decode_images_s=2", "loader"),
        ("parallel.zero_stage=1", "gradients_exposed"),
        ("hardware.host_ms=9", "host"),
    ],
)
def test_what_is_worse_costs_more(change, term):
    before, after = reckon(), reckon(change)
    assert getattr(after, term)().value > getattr(before, term)().value
    assert after.step().value > before.step().value
    assert after.rate().value < before.rate().value


def test_little_hides_behind_the_last_of_many_micro_batches():
    one, many = reckon(), reckon("parallel.micro_batches=8")
    last = one.gradients_exposed().value - max(
        0.0, one.gradients().value - 2 / 3 * one.compute().value
    )
    left = many.gradients().value - 2 / 3 * many.compute().value / 8
    assert many.gradients_exposed().value == pytest.approx(min(left + last, many.gradients().value))


def test_terms_of_zero_by_hand():
    plain, zero = (
        reckon("gate.groups=shared"),
        reckon("gate.groups=shared", "parallel.zero_stage=1"),
    )
    # gradients pass twice, the weights that are gathered once
    assert zero.gradients().value == pytest.approx(1.5 * plain.gradients().value)
    shared, experts = (
        size(zero.config) for size in (sizes.shared_parameters, sizes.local_expert_parameters)
    )
    # 4 groups of 8 ranks: an expert's moments lie on its 8 replicas
    mine = shared / 32 + experts / 8
    # beside its moments, DeepSpeed keeps a copy of the weights that it updates, and one bucket
    saved = (8 * (shared + experts - mine) - 4 * mine - sizes.BUCKET_BYTES) / 2**30
    assert plain.memory().value - zero.memory().value == pytest.approx(saved)
    assert zero.optimiser().value / plain.optimiser().value == pytest.approx(
        mine / (shared + experts)
    )


def test_recomputing_costs_a_forward_pass():
    plain, less = reckon(), reckon("parallel.activation_checkpointing=true")
    assert less.compute().value == pytest.approx(4 / 3 * plain.compute().value)


def test_bfloat16_halves_the_gradients():
    half, full = reckon("parallel.reduce_dtype=bf16"), reckon()
    assert 2 * half.gradient_bytes() == full.gradient_bytes()
    assert 2 * half.gradients().value == pytest.approx(full.gradients().value)


def test_measured_terms_go_before_and_are_marked(tmp_path):
    file = tmp_path / "terms.json"
    file.write_text(json.dumps({"host_ms": 3.5, "decode_images_s": 700.0}))
    found = reckon(f"hardware.terms={file}")
    assert str(found.host()) == "host 3.5 ms (measured)"
    assert found.loader().source == "measured" and found.compute().source == "computed"


def test_benchmarks_write_terms_that_a_budget_reads(tmp_path):
    from benches.harness import Report
    from benches.settings import load_bench_config

    file = tmp_path / "terms.json"
    file.write_text('{"host_ms": 2.5}')
    Report("decode", load_bench_config(None), terms={"decode_images_s": 650.0}).write_terms(file)
    found = reckon(f"hardware.terms={file}")
    assert str(found.host()) == "host 2.5 ms (measured)"
    assert found.hardware.decode_images_s == 650


@pytest.mark.parametrize("recomputes", ["false", "true"])
def test_passes_take_as_long_as_those_that_were_measured(tmp_path, recomputes):
    override = f"parallel.activation_checkpointing={recomputes}"
    share = utilisation(reckon(override).config, images=128, seconds=0.02, tflops=700)
    file = tmp_path / "terms.json"
    file.write_text(json.dumps({"bf16_tflops": 700, "utilisation": share}))
    found = reckon(override, f"hardware.terms={file}")
    assert found.compute().value == pytest.approx(20)
    assert found.compute().source == "measured" and found.optimiser().source == "computed"


def test_compute_is_measured_if_the_utilisation_is(tmp_path):
    file = tmp_path / "terms.json"
    file.write_text('{"bf16_tflops": 700}')
    assert reckon(f"hardware.terms={file}").compute().source == "computed"
    file.write_text('{"utilisation": 0.5}')
    assert reckon(f"hardware.terms={file}").compute().source == "measured"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"host_ms": "fast"}', "host_ms"),
        ('{"utilisation": 1.5}', "utilisation"),
        ('{"hostms": 1}', "hostms is not one of the measured terms"),
        # nothing measures it
        ('{"node_gbit_s": 100}', "node_gbit_s is not one of the measured terms"),
        ("[1]", "must be a mapping"),
        ("{", "terms"),
    ],
)
def test_terms_that_are_none_are_refused(tmp_path, text, named):
    file = tmp_path / "terms.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=named):
        reckon(f"hardware.terms={file}")


def test_dry_run_of_512_gpus_and_a_billion_images_marks_every_term(tmp_path):
    overrides = (
        "parallel.num_workers=512", "parallel.num_groups=64", "moe.num_experts=64",
        "hardware.num_images=1000000000", "moce.batch_size=65536", "mae.batch_size=65536",
    )  # fmt: skip
    flags = [flag for override in overrides for flag in ("--set", override)]
    config = ("--config", "configs/pretrain/vit_base.yaml")
    done = run_here("pretrain", *config, "--run", tmp_path / "run", "--dry-run", *flags)
    assert done.returncode == 0, done.stderr
    budgeted = done.stdout[done.stdout.index("budget") :].splitlines()
    assert "64 nodes of 8 GPUs" in budgeted[0]
    assert budgeted.pop().startswith("not here   shards:/data/imagenet/")
    assert all("computed)" in line or "(set)" in line for line in budgeted[1:])
    assert "1,000,000,000 images" in budgeted[-1]


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_state_is_a_part_of_memory(zero):
    many = ("gate.groups=shared", "parallel.micro_batches=8", f"parallel.zero_stage={zero}")
    found = reckon(*many, "parallel.activation_checkpointing=true")
    assert 0.5 < found.state().value / found.memory().value < 1


def test_zero_of_large_experts_pays_and_its_bucket_is_small():
    many = ("gate.groups=shared", "parallel.micro_batches=8")
    plain, zero = reckon(*many), reckon(*many, "parallel.zero_stage=1")
    assert zero.state().value < 0.7 * plain.state().value


def test_dry_run_of_an_index_counts_its_images_and_a_dense_run_has_no_experts(tmp_path):
    index = tmp_path / "index"
    (tmp_path / "images").mkdir()
    for number in range(20):
        image = Image.new("RGB", (8, 8), (number, 0, 9))
        image.save(tmp_path / "images" / f"{number}.png")
    source = ("--source", f"folder:{tmp_path / 'images'}", "--set", "data.holdout_fraction=0")
    assert run_here("ingest", *source, "--out", index).returncode == 0
    flags = ("--set", f"data.source=index:{index}", "--set", "moe.kind=dense", "--dry-run")
    quickstart = "configs/quickstart.yaml"
    done = run_here("pretrain", "--config", quickstart, "--run", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    assert "for 20 images" in done.stdout.splitlines()[-1]
    assert "experts of a layer" not in done.stdout


def test_without_a_number_of_images_no_days_are_promised():
    assert not any("days" in line for line in budget_lines(load_config(None), None))


def test_days_are_of_the_stages_that_run():
    both = ("mae.epochs=800", "moce.epochs=10")
    days = reckon(*both).days(10**6).value
    alone = reckon(*both, "base_run=old").days(10**6).value
    assert alone == pytest.approx(days * 10 / 810)
    assert reckon(*both, "base_run=old", "control=true").days(10**6).value == pytest.approx(
        2 * alone
    )
    dense = ("moe.kind=dense", "gate.groups=shared")
    plain, twice = (reckon(*both, *dense, f"control={c}").days(10**6).value for c in (False, True))
    assert plain == twice


def test_accumulated_and_rounded_gradients_lie_beside_the_buckets():
    gib = 2**30
    of_all = 4 * 86e6 / gib  # float32 gradients of a ViT-B, at least
    plain = reckon("parallel.reduce_dtype=fp32").memory().value
    assert reckon("parallel.reduce_dtype=bf16").memory().value > plain + of_all
    one = reckon("parallel.reduce_dtype=bf16", "parallel.zero_stage=1").memory().value
    assert one == reckon("parallel.reduce_dtype=fp32", "parallel.zero_stage=1").memory().value


def test_tokens_travel_in_full_buffers_wherever_clusters_are_read():
    images = reckon("gate.groups=free").exchange().value
    for groups in ("free", "shared"):
        tokens = reckon("moe.kind=token", f"gate.groups={groups}", "moe.capacity_factor=1.5")
        assert tokens.exchange().value == pytest.approx(1.5 * images)
