"""One MoCE step on a GPU against the CPU; skipped where there is none."""

import numpy as np
import pytest
import torch

from moce_dist.config import load_config
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.model.moce import LocalDispatcher

pytestmark = pytest.mark.gpu

SMALL = [
    "model.size=small", "model.depth=4", "data.image_size=64", "model.patch_size=8",
    "model.decoder_depth=1", "moe.num_experts=4",
]  # fmt: skip


def losses_and_gradients(device, precision):
    torch.manual_seed(0)
    config = load_config(None, [*SMALL, f"parallel.precision={precision}"])
    model = MaskedAutoencoder(config, centroids=torch.randn(8, 384), num_local_experts=4)
    draws = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 64, 64, generator=draws)
    noise = torch.rand(8, 64, generator=draws)
    routes = torch.randint(0, 4, (len(config.moe_layers), 8), generator=draws)
    model.to(device)
    dispatcher = LocalDispatcher(routes.to(device), 4)
    scales = torch.ones(routes.shape, device=device)
    losses = model(images.to(device), noise.to(device), dispatcher, scales)
    losses.mean().backward()
    gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return losses.detach().cpu(), gradients


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 5e-2)])
def test_step_on_gpu_equals_step_on_cpu(precision, tolerance):
    expected, reference = losses_and_gradients("cpu", "fp32")
    losses, gradients = losses_and_gradients("cuda", precision)
    assert torch.allclose(losses, expected, rtol=tolerance)
    total = np.sqrt(sum(g.pow(2).sum().item() for g in reference.values()))
    error = np.sqrt(sum((gradients[n] - g).pow(2).sum().item() for n, g in reference.items()))
    assert error <= tolerance * total
