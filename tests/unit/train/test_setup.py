"""Settings of the training state that must not be ignored."""

import shutil

import pytest
import torch

from moce_dist.config import load_config
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.settings import ConfigError
from moce_dist.train.setup import compile_blocks, worker_device

SMALL = [
    "model.width=16", "model.depth=2", "model.num_heads=2", "model.decoder_width=8",
    "model.decoder_depth=1", "model.decoder_num_heads=2", "data.image_size=16",
    "model.patch_size=4", "parallel.precision=fp32",
]  # fmt: skip


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_keep_names_and_losses():
    torch.manual_seed(0)
    model = MaskedAutoencoder(load_config(None, SMALL))
    images, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    names, expected = list(model.state_dict()), model(images, noise)
    compile_blocks(model)
    assert list(model.state_dict()) == names
    assert model.blocks[0]._compiled_call_impl is not None
    assert torch.allclose(model(images, noise), expected, rtol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"parallel\.use_gpu"):
        worker_device(load_config(None, ["parallel.use_gpu=true"]))
