"""Experts and the one-process dispatcher against a loop over images."""

from types import SimpleNamespace

import pytest
import torch
from timm.layers import Mlp

from moce_dist.config import load_config
from moce_dist.model.customize import cluster_probabilities
from moce_dist.model.gate import output_scales, routing_table
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.model.moce import (
    Experts,
    LocalDispatcher,
    MoceMlp,
    experts_from_dense,
    global_names,
    is_groupable,
    is_stacked,
)

SMALL = [
    "model.width=32", "model.depth=4", "model.num_heads=2", "model.decoder_width=16",
    "model.decoder_depth=1", "model.decoder_num_heads=2", "data.image_size=32",
    "model.patch_size=8", "moe.num_experts=3", "parallel.precision=fp32",
]  # fmt: skip


def test_every_image_gets_its_expert():
    torch.manual_seed(0)
    experts, hidden = 3, 16
    layer = Experts(experts, 4, hidden)
    mlps = []
    for e in range(experts):
        mlp = Mlp(4, hidden)
        for name in ("fc1", "fc2"):
            for part in ("weight", "bias"):
                getattr(layer, name).__getattr__(part).data[e].normal_()
                getattr(getattr(mlp, name), part).data.copy_(
                    getattr(getattr(layer, name), part).data[e]
                )
        mlps.append(mlp)
    x, chosen = torch.randn(5, 2, 4), torch.tensor([[2, 0, 2, 2, 0]])
    dispatcher = LocalDispatcher(chosen, experts)
    ((rows, counts, _),) = dispatcher.dispatch(x, 0)
    assert counts == [2, 0, 3]
    y = dispatcher.combine([layer(rows, counts, layer.cast(rows))], 0)
    expected = torch.stack([mlps[e](image) for e, image in zip(chosen[0], x, strict=True)])
    assert torch.allclose(y, expected, atol=1e-6)


@pytest.mark.parametrize("has_base", [False, True], ids=["own", "offsets"])
@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 5], [0, 0, 0], [1, 1, 1]])
def test_grouped_product_equals_one_by_one(counts, has_base):
    torch.manual_seed(0)
    mlp, results = MoceMlp(3, 8, shared_units=16, has_base=has_base), []
    parameters = [*mlp.experts.parameters(), *(mlp.base.parameters() if has_base else ())]
    for parameter in parameters:
        torch.nn.init.normal_(parameter)
    rows, weight = torch.randn(sum(counts), 2, 8), torch.randn(sum(counts), 2, 8)
    for forward in (mlp.experts.one_by_one, mlp.experts.grouped):
        x = rows.clone().requires_grad_()
        y = forward(x, counts, mlp.weights(x))
        gradients = torch.autograd.grad((y * weight).sum(), [x, *parameters])
        results.append([y, *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_given_ends_of_the_experts_tokens_are_used():
    torch.manual_seed(0)
    experts, counts = Experts(2, 8, 16), [2, 3]
    rows = torch.randn(5, 2, 8)
    weights = experts.cast(rows)
    expected = experts.one_by_one(rows, counts, weights)
    given, wrong = (torch.tensor(ends, dtype=torch.int32) for ends in ([4, 10], [2, 10]))
    torch.testing.assert_close(experts.grouped(rows, counts, weights, given), expected)
    assert not experts.grouped(rows, counts, weights, wrong).allclose(expected)


@pytest.mark.parametrize(
    ("change", "counts", "major", "expected"),
    [
        ({}, [3, 1], 9, True),
        ({}, [3, 0], 9, False),
        ({}, [0, 0], 9, False),
        ({}, [3, 1], 8, False),
        ({}, [3, 1], 10, False),
        ({"dtype": torch.float32}, [3, 1], 9, False),
        ({"shape": (4, 5, 12)}, [3, 1], 9, False),
        ({"is_cuda": False}, [3, 1], 9, False),
    ],
)
def test_products_are_grouped_only_where_that_is_right_and_fast(
    monkeypatch, change, counts, major, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    rows = {"is_cuda": True, "dtype": torch.bfloat16, "shape": (4, 5, 16), "device": "cuda:0"}
    assert is_groupable(SimpleNamespace(**rows | change), counts) is expected


def test_an_offset_and_its_base_compute_what_their_sum_does():
    torch.manual_seed(0)
    mlp, whole = MoceMlp(3, 4, has_base=True), MoceMlp(3, 4)
    offsets, base = mlp.experts, mlp.base
    with torch.no_grad():
        for name in ("fc1", "fc2"):
            for part in ("weight", "bias"):
                offset, shared, total = (
                    getattr(getattr(each, name), part) for each in (offsets, base, whole.experts)
                )
                total.copy_(offset.normal_() + shared.normal_())
    rows, counts = torch.randn(6, 2, 4), [3, 1, 2]
    found, expected = (each.experts(rows, counts, each.weights(rows)) for each in (mlp, whole))
    torch.testing.assert_close(found, expected)
    # the base's gradient is the sum of all experts', each offset's is its own expert's
    for y in (found, expected):
        y.square().sum().backward()
    gradient = whole.experts.fc1.weight.grad
    torch.testing.assert_close(offsets.fc1.weight.grad, gradient)
    torch.testing.assert_close(base.fc1.weight.grad, gradient.sum(dim=0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = mlp.weights(rows)
    assert all(s.dtype is torch.bfloat16 for s in sums)
    assert sums[0].equal((offsets.fc1.weight + base.fc1.weight).bfloat16())


def test_idle_experts_get_zero_gradients_not_none():
    layer = Experts(3, 4, 8)
    rows = torch.randn(2, 1, 4)
    layer(rows, [0, 2, 0], layer.cast(rows)).sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert (parameter.grad[[0, 2]] == 0).all()
    assert layer.fc1.weight.grad[1].abs().sum() > 0


@pytest.mark.parametrize("has_base", [False, True])
@pytest.mark.parametrize("shared", [0.0, 0.5, 0.25])
def test_experts_start_as_the_dense_mlp(shared, has_base):
    fields = [f"moe.shared_fraction={shared}", f"moe.shared_base={has_base}"]
    config = load_config(None, [*SMALL, *fields])
    dense = MaskedAutoencoder(config)
    sparse = MaskedAutoencoder(config, centroids=torch.randn(6, 32), num_local_experts=3)
    units = config.shared_units
    assert units == shared * 128
    weights = experts_from_dense(
        dense.state_dict(), config.moe_layers, 3, shared_units=units, has_base=has_base
    )
    state = sparse.state_dict()
    assert ("blocks.1.mlp.base.fc1.weight" in state) == has_base
    for name in state:
        if is_stacked(name):
            names = global_names(name, config.moe_layers, [[0, 1, 2]] * len(config.moe_layers))
            state[name] = torch.stack([weights[n] for n in names])
        elif name in weights:
            state[name] = weights[name]
    sparse.load_state_dict(state)
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    routes = torch.randint(0, 3, (len(config.moe_layers), 4))
    loss = sparse(images, noise, LocalDispatcher(routes, 3), torch.ones(routes.shape))
    assert torch.allclose(loss, dense(images, noise), atol=1e-6)


def test_clusters_may_be_of_features_wider_than_the_model():
    config = load_config(None, SMALL)
    torch.manual_seed(0)
    model = MaskedAutoencoder(config, centroids=torch.randn(6, 80), num_local_experts=3)
    assert model.gate.weight.shape == (len(config.moe_layers), 3, 80)
    assert model.gate.cluster_embedding.shape == (6, 80)
    log_p = model.gate.logits().log_softmax(dim=-1)
    routes = torch.from_numpy(routing_table(model.gate.logits(), config.gate))
    ids = torch.tensor([0, 2, 5, 5])
    scales = output_scales(log_p, routes, ids, "straight_through")
    dispatcher = LocalDispatcher(routes[:, ids], 3)
    model(torch.randn(4, 3, 32, 32), torch.rand(4, 16), dispatcher, scales).mean().backward()
    assert model.gate.weight.grad.abs().sum() > 0
    names = {n: t for n, t in model.state_dict().items() if n.startswith("gate.")}
    assert cluster_probabilities(names).allclose(log_p.exp())


def test_global_names_follow_residents_not_slots():
    names = global_names("blocks.3.mlp.experts.fc1.weight", (1, 3), [[0, 2], [5, 4]])
    assert names == [
        "blocks.3.mlp.experts.5.fc1.weight", "blocks.3.mlp.experts.4.fc1.weight",
    ]  # fmt: skip
    assert not is_stacked("blocks.3.mlp.fc1.weight")


def test_encoder_names_are_timms():
    import timm

    config = load_config(None, [*SMALL, "moe.kind=dense"])
    encoder = {n for n in MaskedAutoencoder(config).state_dict() if "decoder" not in n}
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2,
        num_classes=0,
    )  # fmt: skip
    assert encoder - {"mask_token"} == set(vit.state_dict())


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large", "huge"])
def test_named_sizes_have_timms_shapes(size):
    import timm

    config = load_config(None, [f"model.size={size}", "parallel.precision=fp32"])
    with torch.device("meta"):
        vit = timm.create_model(f"vit_{size}_patch{14 if size == 'huge' else 16}_224")
    assert config.model.shape == (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads)
