"""Law 1: a distributed MoCE step equals the one-process step on the concatenated batch."""

import copy
import itertools
import shutil
import tarfile

import numpy as np
import pytest
import torch
from comparing import assert_close, global_batch, merged
from ranks import fresh_run

from moce_dist.data.images import normalise
from moce_dist.data.plan import PADDING
from moce_dist.model.gate import balance_loss, confidence_loss
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.model.moce import LocalDispatcher, global_names, is_stacked
from moce_dist.run.files import read_faults
from moce_dist.train import setup

CONFIGURATIONS = [
    # ranks, groups, ZeRO stage, micro-batches, placement
    (1, 2, 0, 1, "planned"),
    (2, 2, 0, 1, "planned"),
    (2, 2, 0, 2, "scrambled"),
    (2, 4, 0, 1, "scrambled"),
    (4, 2, 0, 1, "scrambled"),
    (4, 4, 0, 1, "scrambled"),
    (2, 2, 1, 2, "scrambled"),
    (4, 2, 1, 1, "scrambled"),
    (2, 2, 2, 1, "scrambled"),
    (4, 2, 2, 2, "scrambled"),
]
MATRIX = list(itertools.product((1, 2, 4), (1, 2, 4), (0, 1, 2), (1, 2), ("planned", "scrambled")))


def reference(job, table, combine, step=0):
    """One process, no engine, float64: loss, gradients by global name, total norm."""
    config = copy.deepcopy(job.config)
    experts = config.moe.num_experts
    model = MaskedAutoencoder(config, centroids=setup.centroids_of(job), num_local_experts=experts)
    residents = [list(range(experts))] * len(config.moe_layers)
    weights = setup.first_weights(job)
    state = model.state_dict()
    for name in state:
        if is_stacked(name):
            names = global_names(name, config.moe_layers, residents)
            state[name] = torch.stack([weights[n] for n in names])
        elif name in weights:
            state[name] = weights[name]
    model.load_state_dict(state)
    model.double()
    batch = global_batch(job, step)
    # an empty slot has no cluster and weight 0; it may go anywhere
    ids = batch.clusters[0]
    ids = torch.where(ids == PADDING, 0, ids)
    table = torch.from_numpy(table)
    # float64 all the way: the gate's own function computes in float32
    p = torch.einsum("led,kd->lke", model.gate.weight, model.gate.cluster_embedding).softmax(-1)
    chosen = torch.stack([p[i][ids, table[i][ids]] for i in range(len(table))])
    scales = chosen if combine == "prob" else chosen / chosen.detach()
    losses = model(
        normalise(batch.images).double(),
        batch.noise.double(),
        LocalDispatcher(table[:, ids], experts),
        scales,
    )
    counts = batch.cluster_counts
    # an unreadable image counts in the divisor, an empty slot does not
    loss = (losses * batch.weights).sum() / counts.sum()
    total = loss + config.gate.balance_weight * balance_loss(p, counts)
    total = total + config.gate.confidence_weight * confidence_loss(p, counts)
    total.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if is_stacked(name):
            names = global_names(name, config.moe_layers, residents)
            gradients |= dict(zip(names, parameter.grad.numpy(), strict=True))
        else:
            gradients[name] = parameter.grad.numpy()
    norm = float(np.sqrt(sum((g**2).sum() for g in gradients.values())))
    return {"loss": loss.item(), "loss_total": total.item(), "gradients": gradients, "norm": norm}


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_zero_in_many_buckets_equals_one_process(pools, cases, clustered_run, zero_stage):
    extra = ["moce.optimizer=sgd", "moce.base_lr=0.1"]
    configuration = (2, 2, zero_stage, 1, "scrambled")
    # 32 x 128 weights of an MLP fit in no bucket
    overrides, results = run(pools, clustered_run, configuration, extra, bucket=1000)
    job = cases.make_job(clustered_run, overrides)
    expected = reference(job, results[0]["table"], "straight_through")
    for name, gradient in merged(results, "gradients").items():
        assert_close(name, gradient, expected["gradients"][name], expected["norm"], 1e-5)


def run(pools, run_root, configuration, extra=(), case="take_steps", **arguments):
    ranks, groups, zero, micro, placement = configuration
    overrides = [
        f"parallel.num_workers={ranks}", f"parallel.num_groups={groups}",
        f"parallel.zero_stage={zero}", f"parallel.micro_batches={micro}", *extra,
    ]  # fmt: skip
    results = pools(ranks).run(
        case, run=str(run_root), overrides=overrides, placement=placement, **arguments
    )
    return overrides, results


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_step_equals_one_process(pools, cases, clustered_run, configuration):
    extra = ["moce.optimizer=sgd", "moce.base_lr=0.1"]
    overrides, results = run(pools, clustered_run, configuration, extra)
    expected = reference(
        cases.make_job(clustered_run, overrides), results[0]["table"], "straight_through"
    )
    for result in results:
        metrics = result["metrics"][0]
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert metrics["loss_total"] == pytest.approx(expected["loss_total"], rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(expected["norm"], rel=1e-5)
    gradients = merged(results, "gradients")
    assert gradients.keys() == expected["gradients"].keys()
    for name, gradient in gradients.items():
        assert_close(name, gradient, expected["gradients"][name], expected["norm"], 1e-5)
    ranks, groups, *_, placement = configuration
    if placement == "scrambled" and min(ranks, groups) > 1:
        assert results[0]["metrics"][0]["images_exchanged"] > 0


PADDED = [
    (1, 2, 0, 1, "planned"),
    (2, 2, 0, 1, "scrambled"),
    (4, 2, 0, 1, "scrambled"),
    (2, 2, 2, 1, "scrambled"),
]


@pytest.mark.parametrize("configuration", PADDED, ids=str)
def test_last_step_of_an_epoch_is_the_mean_of_its_images(
    pools, cases, clustered_run, tmp_path, configuration
):
    # 164 images of 16: step 10 has four images and twelve empty slots; one image is cut off
    root = fresh_run(clustered_run, tmp_path / "run")
    options = [f"parallel.num_workers={configuration[0]}", "parallel.num_groups=2"]
    job = cases.make_job(root, options)
    keys = [key for key in global_batch(job, 10).keys if key]
    assert len(keys) == 4
    spoil(root, keys[1])
    extra = ["moce.optimizer=sgd", "moce.base_lr=0.1"]
    overrides, results = run(pools, root, configuration, extra, first=10)
    job = cases.make_job(root, overrides)
    expected = reference(job, results[0]["table"], "straight_through", step=10)
    for result in results:
        assert result["metrics"][0]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert result["metrics"][0]["grad_norm"] == pytest.approx(expected["norm"], rel=1e-5)
    for name, gradient in merged(results, "gradients").items():
        assert_close(name, gradient, expected["gradients"][name], expected["norm"], 1e-5)
    assert {fault["key"] for fault in read_faults(root / "faults.jsonl")} == {keys[1]}


def spoil(root, key):
    """Overwrite the image of a sample in a copy of the run's shards."""
    shards = (root / "shards").resolve()
    (root / "shards").unlink()
    shutil.copytree(shards, root / "shards")
    for tar in (root / "shards").glob("*.tar"):
        with tarfile.open(tar) as file:
            found = [m for m in file.getmembers() if m.name == f"{key}.png"]
        for member in found:
            content = bytearray(tar.read_bytes())
            content[member.offset_data : member.offset_data + member.size] = bytes(member.size)
            tar.write_bytes(content)


@pytest.mark.long
@pytest.mark.parametrize("configuration", MATRIX, ids=str)
def test_full_matrix(pools, cases, clustered_run, configuration):
    test_step_equals_one_process(pools, cases, clustered_run, configuration)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize("clip", [0.05, 1e3])
def test_clipped_step_moves_weights_as_the_clipped_gradient(
    pools, cases, clustered_run, zero_stage, clip
):
    lr = 100.0  # far enough for float32 weights to show the gradient
    extra = [f"moce.clip_norm={clip}", "moce.optimizer=sgd", f"moce.base_lr={lr * 16}"]
    extra.append("moce.weight_decay=0")
    configuration = (2, 2, zero_stage, 1, "scrambled")
    overrides, results = run(pools, clustered_run, configuration, extra)
    job = cases.make_job(clustered_run, overrides)
    expected = reference(job, results[0]["table"], "straight_through")
    assert 0.05 < expected["norm"] < 1e3
    least = min(clip, expected["norm"])
    start = setup.first_weights(job)
    for name, weight in merged(results, "weights").items():
        if name in start:
            moved = (start[name].numpy() - weight) / lr
            clipped = expected["gradients"][name] * least / expected["norm"]
            assert_close(name, moved, clipped, least, 1e-3)


@pytest.mark.parametrize(
    ("shared", "shared_name"),
    [
        ("moe.shared_fraction=0.5", "blocks.1.mlp.shared.fc2.weight"),
        ("moe.shared_base=true", "blocks.1.mlp.base.fc2.bias"),
    ],
)
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_shared_weights_equal_one_process(
    pools, cases, clustered_run, zero_stage, shared, shared_name
):
    extra = [shared, "moce.optimizer=sgd"]
    configuration = (2, 2, zero_stage, 1, "scrambled")
    overrides, results = run(pools, clustered_run, configuration, extra)
    expected = reference(
        cases.make_job(clustered_run, overrides), results[0]["table"], "straight_through"
    )
    gradients = merged(results, "gradients")
    assert gradients.keys() == expected["gradients"].keys()
    assert {shared_name, "blocks.1.mlp.experts.0.fc2.bias"} <= gradients.keys()
    for name, gradient in gradients.items():
        assert_close(name, gradient, expected["gradients"][name], expected["norm"], 1e-5)
    # it begins with the loss of the dense model
    whole = run(pools, clustered_run, configuration, ["moce.optimizer=sgd"])[1]
    first, dense = (each[0]["metrics"][0]["loss"] for each in (results, whole))
    assert first == pytest.approx(dense, rel=1e-5)


def test_prob_combine_equals_one_process(pools, cases, clustered_run):
    extra = ["gate.combine=prob"]
    overrides, results = run(pools, clustered_run, (2, 2, 0, 1, "scrambled"), extra)
    expected = reference(cases.make_job(clustered_run, overrides), results[0]["table"], "prob")
    for name, gradient in merged(results, "gradients").items():
        assert_close(name, gradient, expected["gradients"][name], expected["norm"], 1e-5)


def test_bf16_step_is_near_one_process(pools, cases, clustered_run):
    extra = ["parallel.precision=bf16"]
    overrides, results = run(pools, clustered_run, (2, 2, 0, 1, "scrambled"), extra)
    fp32 = [o for o in overrides if "precision" not in o]
    expected = reference(
        cases.make_job(clustered_run, fp32), results[0]["table"], "straight_through"
    )
    assert results[0]["metrics"][0]["loss"] == pytest.approx(expected["loss"], rel=1e-2)
    gradients = merged(results, "gradients")
    total = np.sqrt(sum(((g - expected["gradients"][n]) ** 2).sum() for n, g in gradients.items()))
    assert total <= 5e-2 * expected["norm"]


def test_grouped_products_equal_one_process(pools, cases, clustered_run):
    # few clusters and many images, so that every expert of a place has some
    extra = ["moce.batch_size=64"]
    configuration = (2, 2, 0, 1, "scrambled")
    overrides, results = run(pools, clustered_run, configuration, extra, case="take_grouped_steps")
    assert all(result["grouped"] > 0 for result in results)
    expected = reference(
        cases.make_job(clustered_run, overrides), results[0]["table"], "straight_through"
    )
    for name, gradient in merged(results, "gradients").items():
        assert_close(name, gradient, expected["gradients"][name], expected["norm"], 1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_step_equals_one_process(pools, cases, clustered_run):
    extra = ["parallel.compile=true"]
    configuration = (2, 2, 0, 1, "scrambled")
    overrides, results = run(pools, clustered_run, configuration, extra, case="take_compiled_steps")
    assert all(result["graphs"] > 0 for result in results)
    assert results[0]["metrics"][0]["images_exchanged"] > 0
    expected = reference(
        cases.make_job(clustered_run, overrides), results[0]["table"], "straight_through"
    )
    for name, gradient in merged(results, "gradients").items():
        assert_close(name, gradient, expected["gradients"][name], expected["norm"], 1e-5)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_recomputed_activations_change_nothing(pools, clustered_run, zero_stage):
    configuration = (2, 2, zero_stage, 1, "scrambled")
    plain, recomputed = (
        merged(run(pools, clustered_run, configuration, extra)[1], "gradients")
        for extra in ([], ["parallel.activation_checkpointing=true"])
    )
    for name, gradient in plain.items():
        np.testing.assert_array_equal(recomputed[name], gradient, err_msg=name)


def test_planted_wrong_scale_is_caught(pools, cases, clustered_run):
    overrides, results = run(pools, clustered_run, (2, 2, 0, 1, "scrambled"))
    expected = reference(
        cases.make_job(clustered_run, overrides), results[0]["table"], "straight_through"
    )
    name, gradient = max(merged(results, "gradients").items(), key=lambda item: item[0])
    with pytest.raises(AssertionError):
        assert_close(name, gradient * 1.001, expected["gradients"][name], expected["norm"], 1e-5)


def test_sgd_steps_agree_over_ranks(pools, clustered_run):
    extra = ["moce.optimizer=sgd", "moce.base_lr=0.1", "gate.noise=0"]
    runs = [
        merged(run(pools, clustered_run, c, extra, steps=4)[1], "weights")
        for c in [(1, 2, 0, 1, "planned"), (2, 2, 1, 1, "scrambled"), (4, 2, 2, 1, "scrambled")]
    ]
    for other in runs[1:]:
        for name, weight in runs[0].items():
            np.testing.assert_allclose(other[name], weight, rtol=2e-4, atol=2e-6, err_msg=name)
