"""Free choices of the method on real ranks: shared units, experts' rate and decay, a fixed gate."""

import numpy as np
import pytest
from comparing import merged

SGD = ["moce.optimizer=sgd", "moce.base_lr=1.6", "moce.weight_decay=0", "gate.noise=0"]


def weights(pools, run, ranks, steps, *extra, zero=0):
    """Weights after some steps, by global name, and the steps' metrics."""
    overrides = [f"parallel.num_workers={ranks}", f"parallel.zero_stage={zero}", *SGD, *extra]
    results = pools(ranks).run(
        "take_steps", run=str(run), overrides=overrides, placement="scrambled", steps=steps
    )
    return merged(results, "weights"), results


def experts_of(found):
    """{parameter: (E, ...)} of the routed experts."""
    stems = sorted({name for name in found if ".experts.0." in name})
    return {
        name: np.stack([found[name.replace("experts.0", f"experts.{e}")] for e in range(4)])
        for name in stems
    }


@pytest.mark.parametrize(("ranks", "zero"), [(1, 0), (2, 0), (2, 2)])
def test_mean_decay_moves_experts_towards_the_mean_of_all(pools, clustered_run, ranks, zero):
    # steps that are long enough for experts to part at once
    decay, far = 0.1, ["moce.base_lr=80", "moe.shared_base=false"]
    first, _ = weights(pools, clustered_run, ranks, 1, *far, zero=zero)
    plain, results = weights(pools, clustered_run, ranks, 2, *far, zero=zero)
    extra = [*far, f"moe.mean_decay={decay}"]
    pulled, _ = weights(pools, clustered_run, ranks, 2, *extra, zero=zero)
    share = results[0]["metrics"][1]["lr"] * decay
    before, without = experts_of(first), experts_of(plain)
    parted = 0.0
    for name, stack in experts_of(pulled).items():
        # gradients are those of the weights before either moved them
        pull = share * (before[name].mean(axis=0) - before[name])
        np.testing.assert_allclose(stack, without[name] + pull, rtol=1e-4, atol=1e-6, err_msg=name)
        parted = max(parted, np.abs(pull).max())
    assert parted > 1e-4, "the experts had not parted: nothing was tested"
    shared = "blocks.1.attn.qkv.weight"
    np.testing.assert_allclose(pulled[shared], plain[shared], rtol=1e-5, atol=1e-6)


def test_rates_are_those_of_the_experts_and_of_the_gate_alone(pools, clustered_run):
    start, _ = weights(pools, clustered_run, 2, 1, "moce.base_lr=1e-30")
    plain, _ = weights(pools, clustered_run, 2, 1)
    scaled, _ = weights(pools, clustered_run, 2, 1, "moe.lr_scale=3", "gate.lr_scale=5")
    for name in plain:
        scale = 5 if name.startswith("gate.") else 3 if ".experts." in name else 1
        moved, expected = scaled[name] - start[name], scale * (plain[name] - start[name])
        limit = 1e-3 * np.abs(expected).max() + 1e-6
        np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=limit, err_msg=name)
    assert np.abs(plain["gate.weight"] - start["gate.weight"]).max() > 1e-5


@pytest.mark.parametrize("zero", [0, 2])
def test_a_fixed_gate_learns_nothing_and_all_layers_agree(pools, clustered_run, zero):
    extra = ["gate.assign=fixed", "gate.noise=1"]
    first, results = weights(pools, clustered_run, 2, 1, *extra, zero=zero)
    last, later = weights(pools, clustered_run, 2, 3, *extra, zero=zero)
    assert np.array_equal(first["gate.weight"], last["gate.weight"])
    table = later[0]["table"]
    assert np.array_equal(table, results[0]["table"]) and (table == table[0]).all()
    assert np.bincount(table[0]).tolist() == [2] * 4
    metrics = later[0]["metrics"][-1]
    assert metrics["loss_confidence"] == pytest.approx(0, abs=1e-6)
    # one rank, the same table, the same steps
    one, _ = weights(pools, clustered_run, 1, 3, *extra)
    for name in one:
        np.testing.assert_allclose(last[name], one[name], rtol=2e-4, atol=2e-6, err_msg=name)
