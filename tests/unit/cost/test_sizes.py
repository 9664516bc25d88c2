"""Formulas of sizes against the model itself, and literal numbers."""

import pytest

from moce_dist.config import load_config
from moce_dist.cost import sizes
from moce_dist.model.mae import MaskedAutoencoder

SMALL = [
    "model.width=32", "model.depth=4", "model.num_heads=2", "data.image_size=32",
    "model.patch_size=8", "model.decoder_width=16", "model.decoder_depth=2",
    "model.decoder_num_heads=2", "moe.num_experts=4", "moe.layers=[1, 3]",
    "parallel.num_groups=2", "parallel.num_workers=2",
]  # fmt: skip


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def test_parameters_are_those_of_the_model():
    import torch

    config = load_config(None, SMALL)
    dense = MaskedAutoencoder(config)
    assert sizes.dense_parameters(config) == count(dense.parameters())
    moce = MaskedAutoencoder(config, centroids=torch.randn(8, 32), num_local_experts=2)
    named = dict(moce.named_parameters())
    experts = count(p for name, p in named.items() if ".experts." in name)
    assert sizes.local_expert_parameters(config) == experts
    gate = count(p for name, p in named.items() if name.startswith("gate."))
    assert sizes.shared_parameters(config) == count(named.values()) - experts - gate


def test_vit_base_is_as_large_as_published():
    # 86 million of the encoder and 26 million of the decoder
    assert sizes.dense_parameters(load_config(None)) == pytest.approx(111.7e6, rel=2e-3)
