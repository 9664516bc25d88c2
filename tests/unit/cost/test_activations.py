"""Memory of activations against what autograd keeps in a forward pass of the real model."""

import pytest
import torch

from moce_dist.config import load_config
from moce_dist.cost.budget import budget
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.model.moce import LocalDispatcher
from moce_dist.train.setup import prepare_blocks


def configured(kind, checkpointing, images):
    return load_config(
        None,
        [
            "model.size=small", f"moe.kind={kind}", "moe.num_experts=8", "cluster.num_clusters=16",
            f"parallel.activation_checkpointing={checkpointing}",
            f"mae.batch_size={images}", f"moce.batch_size={images}",
        ],
    )  # fmt: skip


def saved_bytes(model, layers, images):
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    choice = LocalDispatcher(torch.zeros(layers, images, dtype=torch.int64), 1)
    chosen = (choice, torch.ones(layers, images)) if layers else ()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(torch.randn(images, 3, 224, 224), torch.rand(images, 196), *chosen).sum()
    assert loss.isfinite()
    return sum(seen.values())


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [("dense", False), ("cluster", False), ("dense", True), ("cluster", True)],
)
def test_an_image_takes_what_autograd_keeps_of_it(kind, checkpointing):
    config = configured(kind, checkpointing, 4)
    layers = len(config.moe_layers)
    centroids = torch.randn(16, config.model.shape.width) if layers else None
    model = MaskedAutoencoder(config, centroids=centroids, num_local_experts=1)
    prepare_blocks([*model.blocks, *model.decoder_blocks], config.parallel)
    kept = (saved_bytes(model, layers, 4) - saved_bytes(model, layers, 2)) / 2
    large, small = (
        budget(configured(kind, checkpointing, n)).memory().value * 2**30 for n in (4, 2)
    )
    assert (large - small) / 2 == pytest.approx(kept, rel=0.15)
