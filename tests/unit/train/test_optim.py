"""Learning rate and parameter groups on numbers."""

import pytest
import torch

from moce_dist.config import GateConfig, MoeConfig, StageConfig, load_config
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.train.optim import (
    has_decay,
    learning_rate,
    optimizer_factory,
    parameter_groups,
    set_learning_rate,
)

STAGE = StageConfig(epochs=10, warmup_epochs=2, batch_size=512, base_lr=1e-3, min_lr=1e-5)


def test_schedule_warms_up_then_falls_as_a_cosine():
    def at(step):
        return learning_rate(STAGE, step, steps_per_epoch=5, total_steps=50)

    peak = 1e-3 * 512 / 256
    assert at(0) == pytest.approx(peak / 10) and at(9) == pytest.approx(peak)
    assert at(10) == pytest.approx(peak)
    assert at(30) == pytest.approx((peak + 1e-5) / 2)
    assert at(50) == pytest.approx(1e-5)
    assert all(at(s) >= at(s + 1) for s in range(10, 49))


def small_moce():
    config = load_config(
        None,
        ["model.width=16", "model.depth=2", "model.num_heads=2", "model.decoder_width=8",
         "model.decoder_depth=1", "model.decoder_num_heads=2", "data.image_size=16",
         "model.patch_size=8", "moe.num_experts=2"],
    )  # fmt: skip
    return MaskedAutoencoder(config, centroids=torch.randn(4, 16), num_local_experts=2)


def test_decay_is_for_matrices_only():
    model = small_moce()
    decayed = {n for n, p in model.named_parameters() if has_decay(n, p)}
    assert "blocks.1.mlp.experts.fc1.weight" in decayed and "blocks.0.attn.qkv.weight" in decayed
    assert "patch_embed.proj.weight" in decayed
    for name in ("blocks.1.mlp.experts.fc1.bias", "norm.weight", "cls_token", "gate.weight"):
        assert name in dict(model.named_parameters()) and name not in decayed


def test_every_parameter_is_in_one_group_and_the_gate_has_its_own_rate():
    model = small_moce()
    groups = parameter_groups(model, STAGE, GateConfig(lr_scale=10), MoeConfig())
    members = [id(p) for g in groups for p in g["params"]]
    assert len(members) == len(set(members)) == len(list(model.parameters()))
    optimizer = optimizer_factory(STAGE)(groups)
    set_learning_rate(optimizer, 0.5)
    rates = {g["name"]: g["lr"] for g in optimizer.param_groups}
    assert rates == {"decay": 0.5, "no_decay": 0.5, "gate": 5.0}


def test_experts_have_a_rate_and_a_decay_of_their_own_where_they_differ():
    model, gate = small_moce(), GateConfig()
    usual = {g["name"] for g in parameter_groups(model, STAGE, gate, MoeConfig())}
    assert usual == {"decay", "no_decay"}
    for moe, decay, rate in (
        (MoeConfig(lr_scale=3), STAGE.weight_decay, 1.5),
        (MoeConfig(mean_decay=0.1), 0.0, 0.5),
    ):
        groups = parameter_groups(model, STAGE, gate, moe)
        optimizer = optimizer_factory(STAGE)(groups)
        set_learning_rate(optimizer, 0.5)
        by_name = {g["name"]: g for g in optimizer.param_groups}
        experts = {id(p) for n, p in model.named_parameters() if ".experts." in n}
        apart = by_name["experts_decay"]["params"] + by_name["experts_no_decay"]["params"]
        assert {id(p) for p in apart} == experts
        assert by_name["experts_decay"]["weight_decay"] == decay
        assert by_name["experts_no_decay"]["weight_decay"] == 0
        assert {by_name[name]["lr"] for name in ("experts_decay", "experts_no_decay")} == {rate}
        assert by_name["decay"]["lr"] == by_name["no_decay"]["lr"] == 0.5
        assert by_name["decay"]["weight_decay"] == STAGE.weight_decay


def test_a_fixed_gate_is_not_changed():
    groups = parameter_groups(small_moce(), STAGE, GateConfig(assign="fixed"), MoeConfig())
    optimizer = optimizer_factory(STAGE)(groups)
    set_learning_rate(optimizer, 0.5)
    assert {g["name"]: g["lr"] for g in optimizer.param_groups}["gate"] == 0


def test_adamw_has_the_coefficients_of_its_stage():
    make = optimizer_factory(StageConfig(betas=(0.8, 0.97)))
    made = make([{"params": [torch.nn.Parameter(torch.ones(2))]}])
    assert isinstance(made, torch.optim.AdamW) and made.defaults["betas"] == (0.8, 0.97)
