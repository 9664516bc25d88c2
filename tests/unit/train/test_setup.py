"""Blocks give what plain ones give, recomputed and compiled; first weights take little memory."""

import shutil

import pytest
import torch

from moce_dist.config import ParallelConfig, load_config
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.model.moce import LocalDispatcher
from moce_dist.train.job import StageJob
from moce_dist.train.setup import first_weights, prepare_blocks

SMALL = [
    "model.width=16", "model.depth=2", "model.num_heads=2", "model.decoder_width=8",
    "model.decoder_depth=1", "model.decoder_num_heads=2", "data.image_size=16",
    "model.patch_size=4", "parallel.precision=fp32",
]  # fmt: skip


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("recompute", [True, pytest.param(False, marks=pytest.mark.long)])
def test_compiled_blocks_keep_names_losses_and_gradients(recompute):
    torch.manual_seed(0)
    config = load_config(None, [*SMALL, "moe.num_experts=2"])
    model = MaskedAutoencoder(config, centroids=torch.randn(4, 16), num_local_experts=2)
    dispatcher, scales = LocalDispatcher(torch.tensor([[0, 1, 1, 0]]), 2), torch.ones(1, 4)
    inputs = torch.randn(4, 3, 16, 16), torch.rand(4, 16), dispatcher, scales
    names, expected = list(model.state_dict()), model(*inputs)
    weights = [p for n, p in model.named_parameters() if not n.startswith("gate.")]
    gradients = torch.autograd.grad(expected.sum(), weights)
    prepare_blocks(
        [*model.blocks, *model.decoder_blocks],
        ParallelConfig(compile=True, activation_checkpointing=recompute, precision="fp32"),
    )
    assert list(model.state_dict()) == names
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    loss = model(*inputs)
    # the dense encoder block and the decoder's are of one kind, the attention is another
    assert counters["stats"]["unique_graphs"] >= 3 and not counters["graph_break"]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(torch.autograd.grad(loss.sum(), weights), gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def kept_bytes(*, recompute):
    """Bytes of activations that a forward pass keeps for the backward pass."""
    torch.manual_seed(0)
    config = load_config(None, [*SMALL, "moe.num_experts=2"])
    model = MaskedAutoencoder(config, centroids=torch.randn(4, 16), num_local_experts=2)
    parallel = ParallelConfig(activation_checkpointing=recompute, precision="fp32")
    prepare_blocks([*model.blocks, *model.decoder_blocks], parallel)
    weights, sizes = {p.data_ptr() for p in model.parameters()}, []

    def pack(tensor):
        sizes.append(0 if tensor.data_ptr() in weights else tensor.nbytes)
        return tensor

    dispatcher = LocalDispatcher(torch.tensor([[0, 1, 1, 0]]), 2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(4, 3, 16, 16), torch.rand(4, 16), dispatcher, torch.ones(1, 4))
    return sum(sizes)


def test_recomputed_blocks_keep_less():
    assert kept_bytes(recompute=True) < 0.5 * kept_bytes(recompute=False)


@pytest.mark.parametrize("fields", [[], ["moe.shared_base=true"], ["moe.shared_fraction=0.5"]])
def test_first_weights_of_many_experts_take_no_more_memory(tmp_path, fields):
    sizes = []
    for experts in (2, 16):
        config = load_config(None, [*SMALL, *fields, f"moe.num_experts={experts}"])
        weights = first_weights(StageJob(config, tmp_path, "moce", ""))
        assert f"blocks.1.mlp.experts.{experts - 1}.fc1.weight" in weights
        storages = (tensor.untyped_storage() for tensor in weights.values())
        sizes.append(sum({each.data_ptr(): each.nbytes() for each in storages}.values()))
    assert sizes[0] == sizes[1]
