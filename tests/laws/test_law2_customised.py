"""The task model: customised dense ViT against the MoCE encoder, for every route (law 2)."""

import itertools

import pytest
import timm
import torch

from moce_dist.config import Config, GateConfig, make_config
from moce_dist.model.customize import cluster_probabilities, customize, moe_shape, routes
from moce_dist.model.gate import output_scales
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.model.moce import (
    LocalDispatcher,
    experts_from_dense,
    global_names,
    hidden_axis,
    is_stacked,
)

NUM_EXPERTS = 3


@pytest.fixture(
    scope="module",
    params=[
        {"shared_base": False},
        {"shared_fraction": 0.5, "shared_base": False},
        {"shared_base": True},
        {"shared_fraction": 0.5, "shared_base": True},
    ],
    ids=["routed", "shared", "offsets", "both"],
)
def config(request: pytest.FixtureRequest) -> Config:
    return make_config(
        {
            "data": {"image_size": 16},
            "model": {
                **{"width": 24, "depth": 4, "num_heads": 2, "patch_size": 4},
                **{"decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2},
            },
            "moe": {"num_experts": NUM_EXPERTS, "layers": [1, 3], **request.param},
            "parallel": {"precision": "fp32"},
        }
    )


@pytest.fixture(scope="module")
def moce(config: Config) -> MaskedAutoencoder:
    torch.manual_seed(0)
    model = MaskedAutoencoder(config, centroids=torch.randn(5, 24), num_local_experts=NUM_EXPERTS)
    # biases and norms start at 0 and 1; a mistake there would not show
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


@pytest.fixture(scope="module")
def weights(config: Config, moce: MaskedAutoencoder) -> dict[str, torch.Tensor]:
    by_name = {}
    for name, tensor in moce.state_dict().items():
        if is_stacked(name):
            residents = [range(NUM_EXPERTS)] * 2
            names = global_names(name, config.moe_layers, residents)
            by_name |= dict(zip(names, tensor, strict=True))
        else:
            by_name[name] = tensor
    return by_name


def timm_vit(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    model = timm.create_model(
        "vit_tiny_patch16_224",
        **{"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2},
        **{"num_classes": 0, "global_pool": "avg", "fc_norm": False},
    )
    model.double().load_state_dict(state, strict=True)
    return model.eval()


@pytest.mark.parametrize("route", list(itertools.product(range(NUM_EXPERTS), repeat=2)))
@torch.no_grad()
def test_law_2_customised_vit_equals_moce_encoder_on_every_route(route, moce, weights):
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    experts = torch.tensor(route)[:, None].expand(2, 3)
    expected = moce.features(images, LocalDispatcher(experts, NUM_EXPERTS), torch.ones(2, 3))
    found = timm_vit(customize(weights, route))(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("combine", ["prob", "straight_through"])
@torch.no_grad()
def test_law_2_holds_for_images_of_each_cluster_as_the_gate_routes_them(combine, moce, weights):
    p = cluster_probabilities(weights)
    table = routes(weights, GateConfig())
    for cluster in range(5):
        images, ids = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.full((2,), cluster)
        scales = output_scales(p.log(), table, ids, combine)
        dispatcher = LocalDispatcher(table[:, ids], NUM_EXPERTS)
        expected = moce.features(images, dispatcher, scales.double())
        scale = scales[:, 0].tolist() if combine == "prob" else None
        found = timm_vit(customize(weights, table[:, cluster].tolist(), scale=scale))(images)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_another_route_gives_other_features(weights):
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    one, other = (timm_vit(customize(weights, route))(images) for route in ((0, 1), (0, 2)))
    assert (one - other).abs().max() > 1e-3


def test_routes_are_the_argmax_of_logits_spelt_out():
    weights = {
        # layer 0: expert 0 likes the first axis, expert 1 the second; layer 1 the other way round
        "gate.weight": torch.tensor([[[1.0, 0], [0, 1]], [[0, 1.0], [1, 0]]]),
        "gate.cluster_embedding": torch.tensor([[2.0, 1], [1, 3], [5, 4]]),
    }
    assert routes(weights, GateConfig()).tolist() == [[0, 1, 0], [1, 0, 1]]


def test_balanced_routes_take_equal_shares():
    weights = {
        "gate.weight": torch.tensor([[[1.0], [0.5]]]),
        "gate.cluster_embedding": torch.tensor([[1.0], [2.0], [3.0], [4.0]]),
    }
    assert routes(weights, GateConfig()).tolist() == [[0, 0, 0, 0]]
    # clusters 2 and 3 lose most when they leave expert 0
    assert routes(weights, GateConfig(assign="balanced")).tolist() == [[1, 1, 0, 0]]


def test_dense_mae_loses_only_its_decoder(config):
    dense = MaskedAutoencoder(config)
    state = customize(dense.state_dict(), ())
    assert {n for n in dense.state_dict() if n not in state} == {
        n for n in dense.state_dict() if n.startswith(("decoder_", "mask_token"))
    }
    timm_vit(state)


def grow(dense: dict[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
    shares = {"shared_units": config.shared_units, "has_base": config.has_base}
    return experts_from_dense(dense, config.moe_layers, NUM_EXPERTS, **shares)


def test_experts_copied_from_dense_customise_back_to_it(config):
    dense = MaskedAutoencoder(config).state_dict()
    grown = grow(dense, config)
    assert moe_shape(grown) == ([1, 3], NUM_EXPERTS)
    back = customize(grown, (2, 0))
    assert back.keys() == customize(dense, ()).keys()
    assert all(torch.equal(back[name], dense[name]) for name in back)


def test_a_row_of_one_expert_is_its_route_to_the_bit(weights):
    scale = (0.5, 0.25)
    route = customize(weights, (2, 0), scale=scale)
    rows = customize(weights, [[0, 0, 1.0], [1.0, 0, 0]], scale=scale)
    assert route.keys() == rows.keys()
    assert all(torch.equal(route[name], rows[name]) for name in route)


def test_weights_average_experts_and_scale_folds_into_the_last_linear(config, weights):
    found = customize(weights, [[0.5, 0.25, 0.25], 1], scale=(0.8, 1.0))
    units = config.shared_units
    for part, factor in (
        ("fc1.weight", 1),
        ("fc1.bias", 1),
        ("fc2.weight", 0.8),
        ("fc2.bias", 0.8),
    ):
        # 0 where there is no base: an expert is what it adds to it
        bases = [weights.get(f"blocks.{b}.mlp.base.{part}", torch.zeros(())) for b in (1, 3)]
        a, b, c = (bases[0] + weights[f"blocks.1.mlp.experts.{e}.{part}"] for e in range(3))
        axis = hidden_axis(part)
        routed, other = (
            t if axis is None else t.narrow(axis, units, t.shape[axis] - units)
            for t in (found[f"blocks.1.mlp.{part}"], found[f"blocks.3.mlp.{part}"])
        )
        torch.testing.assert_close(routed, factor * (a / 2 + b / 4 + c / 4), rtol=0, atol=1e-14)
        assert torch.equal(other, bases[1] + weights[f"blocks.3.mlp.experts.1.{part}"])
        if axis is not None and units:
            # what is shared has no weight of the gate's
            shared = found[f"blocks.1.mlp.{part}"].narrow(axis, 0, units)
            assert torch.equal(shared, weights[f"blocks.1.mlp.shared.{part}"])


@pytest.mark.parametrize("row", [[1 / 3] * 3, [0.2, 0.5, 0.3]])
def test_averages_of_equal_experts_are_the_dense_model_to_the_bit(row, config):
    dense = MaskedAutoencoder(config).state_dict()
    grown = grow(dense, config)
    back = customize(grown, [row, row])
    assert all(torch.equal(back[name], dense[name]) for name in back)
    grown["blocks.1.mlp.experts.1.fc1.weight"] = grown["blocks.1.mlp.experts.1.fc1.weight"] + 1e-3
    planted = customize(grown, [row, row])
    assert not torch.equal(planted["blocks.1.mlp.fc1.weight"], dense["blocks.1.mlp.fc1.weight"])


def test_with_its_decoder_the_customised_model_is_a_dense_autoencoder(config, moce, weights):
    dense = MaskedAutoencoder(config).double()
    dense.load_state_dict(customize(weights, (1, 2), with_decoder=True))
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    noise = torch.rand(2, 16)
    experts = torch.tensor([[1, 1], [2, 2]])
    expected = moce(images, noise, LocalDispatcher(experts, NUM_EXPERTS), torch.ones(2, 2))
    torch.testing.assert_close(dense(images, noise), expected, rtol=0, atol=1e-12)


def test_a_mix_beyond_an_expert_lies_on_the_line_from_the_average(weights):
    average, expert, beyond = (
        customize(weights, [row, row])
        for row in ([1 / 3] * 3, [0.0, 1.0, 0.0], [-1 / 6, 4 / 3, -1 / 6])
    )
    for name, tensor in beyond.items():
        expected = average[name].double() + 1.5 * (expert[name].double() - average[name].double())
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)
    name = "blocks.1.mlp.fc1.weight"
    assert (beyond[name] - expert[name]).abs().max() > 1e-3


@pytest.mark.parametrize("row", [[0.5, 0.4, 0.0], [float("nan"), 1.0, 0.0], [0.5, 0.5]])
def test_weights_that_do_not_sum_to_1_are_refused(row, weights):
    with pytest.raises(ValueError, match="must be 3 numbers that sum to 1"):
        customize(weights, [row, 0])


def test_customising_leaves_the_given_weights_alone(weights):
    before = {name: tensor.clone() for name, tensor in weights.items()}
    customize(weights, (0, 1), scale=(0.5, 0.25))
    assert all(torch.equal(before[name], weights[name]) for name in before)


@pytest.mark.parametrize("route", [(0,), (0, 1, 2), (0, 3), (-1, 0)])
def test_route_that_does_not_fit_is_refused(route, weights):
    with pytest.raises(ValueError, match="route"):
        customize(weights, route)


def test_scale_of_wrong_length_is_refused(weights):
    with pytest.raises(ValueError, match="scale has 1 numbers"):
        customize(weights, (0, 1), scale=(0.5,))


def test_unknown_tensor_is_not_dropped_silently(weights):
    with pytest.raises(ValueError, match=r"head\.weight"):
        customize({**weights, "head.weight": torch.zeros(2, 2)}, (0, 1))
