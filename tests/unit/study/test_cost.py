"""Operations against torch's own count, literal numbers, and a published size."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moce_dist.config import Config, make_config
from moce_dist.cost.sizes import clustering_flop, features_flop, run_cost, training_flop
from moce_dist.model.mae import MaskedAutoencoder

SMALL = {
    "data": {"image_size": 28},
    "model": {
        **{"width": 64, "depth": 4, "num_heads": 4, "patch_size": 7},
        **{"decoder_width": 48, "decoder_depth": 2, "decoder_num_heads": 3},
    },
    "cluster": {"num_clusters": 32},
    "parallel": {"precision": "fp32"},
}


@pytest.fixture
def config():
    return make_config(SMALL)


def count(run):
    # the fused kernel computes the attention once more in the backward pass
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_training_is_what_torch_counts(config):
    model = MaskedAutoencoder(config)
    images, noise = torch.rand(3, 3, 28, 28), torch.rand(3, config.num_patches)
    counted = count(lambda: model(images, noise).mean().backward())
    assert training_flop(config) == counted / 3


def test_features_are_what_torch_counts(config):
    model = MaskedAutoencoder(config)
    with torch.no_grad():
        counted = count(lambda: model.features(torch.rand(2, 3, 28, 28)))
    assert features_flop(config) == counted / 2


def test_features_of_an_earlier_block_and_of_pixels(config):
    def reckon(**cluster):
        return make_config({**SMALL, "cluster": {**SMALL["cluster"], **cluster}})

    model, block = MaskedAutoencoder(config), reckon(feature_block=0)
    model.blocks = model.blocks[:1]
    with torch.no_grad():
        counted = count(lambda: model.features(torch.rand(2, 3, 28, 28)))
    assert features_flop(block) == counted / 2 < features_flop(config)
    pixels = reckon(encoder="pixels")
    assert features_flop(pixels) == 0
    # the mean colours of 8 x 8 fields, and a price
    assert clustering_flop(pixels, 500, 3) == 3 * 2 * 500 * 32 * 193


def test_forgetting_the_decoder_would_be_noticed(config):
    shallow = make_config({**SMALL, "model": {**SMALL["model"], "decoder_depth": 1}})
    assert training_flop(shallow) < 0.9 * training_flop(config)


def test_vit_base_takes_58_gflop_an_image():
    assert training_flop(Config()) / 1e9 == pytest.approx(58.1, abs=0.1)


def test_cost_by_hand(config):
    images = {"mae": 1000, "features": 500, "cluster": 500, "moce": 2000}
    cost = run_cost(config, images, iterations=3)
    assert (cost.mae_images, cost.moce_images) == (1000, 2000)
    assert cost.training == 3000 * training_flop(config)
    # 3 iterations of 500 images against 32 centroids of 64 numbers and a price
    assert clustering_flop(config, 500, 3) == 3 * 2 * 500 * 32 * 65
    assert cost.clustering == 500 * features_flop(config) + 6_240_000
    assert cost.flop == cost.training + cost.clustering
