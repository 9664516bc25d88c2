"""Features on a GPU are computed in bfloat16, near those of a CPU; skipped where there is none."""

import pytest
import torch

from moce_dist.config import load_config
from moce_dist.features.encoder import EncoderInput, timm_encoder
from moce_dist.model.device import choose_device
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.train.encoder import build_encoder

pytestmark = pytest.mark.gpu

SMALL = [
    "model.size=small", "model.depth=4", "data.image_size=64", "model.patch_size=8",
    "model.decoder_depth=1",
]  # fmt: skip


def distance(found, expected):
    assert found.dtype == torch.float32 and found.is_cuda
    return float((found.cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 3e-2)])
def test_features_on_gpu_are_near_those_of_the_cpu(tmp_path, precision, tolerance):
    torch.manual_seed(0)
    path = tmp_path / "mae.pth"
    overrides = [*SMALL, f"parallel.precision={precision}", f"cluster.encoder={path}"]
    config = load_config(None, overrides)
    torch.save({"model": MaskedAutoencoder(config).state_dict()}, path)
    device = choose_device(config.parallel)
    assert device.type == "cuda"
    images = torch.randn(8, 3, 64, 64)
    expected = build_encoder(config, None, torch.device("cpu"))(images)
    error = distance(build_encoder(config, None, device)(images), expected)
    assert error < tolerance and (precision == "fp32" or error > 1e-5)


def test_timm_model_on_gpu_is_near_that_of_the_cpu():
    own, images = EncoderInput(160, (0.5,) * 3, (0.5,) * 3), torch.randn(4, 3, 160, 160)
    found = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        torch.manual_seed(1)
        bf16 = device.type == "cuda"
        found.append(timm_encoder("test_vit", own, device, bf16=bf16, pretrained=False)(images))
    assert distance(found[1], found[0]) < 3e-2
