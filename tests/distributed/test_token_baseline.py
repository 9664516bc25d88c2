"""The token-routed baseline learns what its definition says, and its checkpoints load anywhere."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close, global_batch, merged

from moce_dist.data.images import normalise
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.parallel.token import token_bytes_exchanged
from moce_dist.train import setup

# room for all tokens, so that none is dropped; without the balance loss, which is a rank's own
TOKEN = ["moe.kind=token", "moe.capacity_factor=4", "gate.balance_weight=0"]


def overrides(ranks, *more):
    return [f"parallel.num_workers={ranks}", "parallel.num_groups=2", *TOKEN, *more]


class TokenExperts(torch.nn.Module):
    """A token takes its most probable expert, weighted with that probability."""

    def __init__(self, weights, block, num_experts):
        super().__init__()
        stem = f"blocks.{block}.mlp"
        self.names = {
            "gate": f"{stem}.moe.deepspeed_moe.gate.wg.weight",
            **{
                f"{e}.{part}": f"{stem}.experts.{e}.{part}"
                for e in range(num_experts)
                for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
            },
        }
        self.num_experts = num_experts
        self.tensors = {
            short: weights[name].double().requires_grad_() for short, name in self.names.items()
        }

    def forward(self, x):
        p = F.linear(x, self.tensors["gate"]).softmax(-1)
        best = p.argmax(-1)
        result = torch.zeros_like(x)
        for e in range(self.num_experts):
            w1, b1, w2, b2 = (
                self.tensors[f"{e}.{part}"]
                for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
            )
            y = F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
            result = result + y * (p[..., e] * (best == e))[..., None]
        return result


def reference(job, gates):
    """One process, float64: loss and gradients by global name."""
    config = job.config
    weights = setup.first_weights(job) | gates
    model = MaskedAutoencoder(config)
    state = model.state_dict()
    model.load_state_dict(state | {n: w for n, w in weights.items() if n in state})
    layers = {i: TokenExperts(weights, i, config.moe.num_experts) for i in config.moe_layers}
    for index, layer in layers.items():
        model.blocks[index].mlp = layer
    model.double()
    batch = global_batch(job)
    loss = model(normalise(batch.images).double(), batch.noise.double()).mean()
    loss.backward()
    gradients = {n: p.grad.numpy() for n, p in model.named_parameters()}
    for layer in layers.values():
        for short, name in layer.names.items():
            gradient = layer.tensors[short].grad
            gradients[name] = np.zeros(1) if gradient is None else gradient.numpy()
    return loss.item(), gradients


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_distributed_token_step_equals_its_definition(pools, cases, clustered_run, zero_stage):
    # steps too small to see, so that the weights returned are those of the start
    options = overrides(2, "moce.optimizer=sgd", "moce.base_lr=1e-12", "moce.weight_decay=0")
    options.append(f"parallel.zero_stage={zero_stage}")
    results = pools(2).run("take_steps", run=str(clustered_run), overrides=options)
    weights = merged(results, "weights")
    gates = {n: torch.from_numpy(w) for n, w in weights.items() if n.endswith("gate.wg.weight")}
    loss, gradients = reference(cases.make_job(clustered_run, options), gates)
    metrics = results[0]["metrics"][0]
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    found = merged(results, "gradients")
    assert found.keys() == gradients.keys()
    for name, gradient in found.items():
        assert_close(name, gradient, gradients[name], norm, 1e-5)


def test_bytes_of_the_baseline_are_those_of_its_collectives(pools, cases, clustered_run):
    options = overrides(2)
    results = pools(2).run(
        "exchange_collectives", run=str(clustered_run), overrides=options, placement="planned"
    )
    config = cases.tiny_config(options)
    # layers; there and back, forward and backward
    assert [r["calls"] for r in results] == [2 * 4, 2 * 4]
    sent = token_bytes_exchanged(config, 2, tokens=8 * 5, element_size=4)
    # every call moves the whole buffer, of which half stays
    assert results[0]["elements"] * 4 // 2 == sent
    assert results[0]["metrics"]["bytes_exchanged"] == 2 * sent


def test_token_checkpoint_of_2_ranks_loads_on_1(pools, own_run):
    options = [o for o in overrides(2, "moce.epochs=0.3") if "capacity" not in o]
    pools(2).run("train_to_end", run=str(own_run), overrides=options)
    two, one = (
        merged(
            pools(ranks).run("saved_state", run=str(own_run), overrides=overrides(ranks)), "tensors"
        )
        for ranks in (2, 1)
    )
    assert two.keys() == one.keys() and len(two) > 100
    for name, value in two.items():
        np.testing.assert_array_equal(one[name], value, err_msg=str(name))
