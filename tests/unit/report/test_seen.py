"""Reconstructions and the map of clusters to experts, from real checkpoints and images."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from moce_dist.config import make_config
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.report.gate import read_gate
from moce_dist.report.page import render, write_report
from moce_dist.report.reconstruct import read_samples, reconstruct
from moce_dist.report.record import read_record
from moce_dist.train.checkpoint import load_weights, write_weights

from .conftest import SMALL, write_shards
from .parsed import Page

CHECKPOINT = "moce/checkpoints/step_00000020"


def look(root):
    record = read_record(root)
    gate = read_gate(record)
    assert record.problems == []
    return gate, reconstruct(record, gate)


def test_equal_experts_see_what_the_mae_sees(seen):
    root, _ = seen
    _, found = look(root)
    assert found.columns == [
        "original",
        "masked",
        "MAE, step 10",
        "MAE, step 30",
        "control",
        "MoCE, own experts",
        "MoCE, other experts",
    ]
    for row in found.rows:
        early, *losses = [tile.loss for tile in row.tiles[2:]]
        assert losses == [losses[0]] * 4 and early != losses[0]
        assert row.other != row.cluster
    assert sorted(found.clusters) == [0, 1, 2] and found.losses.shape == (3, 3)
    assert (found.losses == found.losses[:, :1]).all()


def test_early_model_is_that_of_the_first_checkpoint_of_the_stage(seen):
    root, _ = seen
    kept = sorted(path.name for path in (root / "mae" / "checkpoints").iterdir())
    assert kept == ["step_00000010", "step_00000030"]
    (root / "mae" / "checkpoints" / kept[0] / "rank-00000.safetensors").write_bytes(b"no")
    _, found = look(root)
    assert found.columns[2:4] == ["MAE, step 30", "control"]


def test_held_out_images_are_shown_in_the_clusters_they_were_assigned_to(seen):
    root, _ = seen
    record = read_record(root)
    _, found = look(root)
    assert not found.is_held_out
    held_out = record.run.ingested / "holdout"
    held_out.parent.mkdir()
    write_shards(held_out, np.random.default_rng(1))
    keys = [(f"c{colour}/{number}", 2 - colour) for colour in range(3) for number in range(5)]
    table = {"key": [key for key, _ in keys], "cluster": [cluster for _, cluster in keys]}
    pq.write_table(pa.table(table), record.run.holdout_clusters)
    _, found = look(root)
    assert found.is_held_out and sorted(found.clusters) == [0, 1, 2]
    samples = read_samples(record, record.config, read_gate(record))
    colours = samples.images.mean(dim=(2, 3)).argmax(dim=1)
    assert samples.clusters.tolist() == (2 - colours).tolist()


def test_losses_are_those_of_the_model(seen):
    """The number under an image is what training would count for it, under the same mask."""
    root, _ = seen
    _, found = look(root)
    config = make_config({**SMALL, "parallel": {"precision": "fp32"}}).without_experts
    model = MaskedAutoencoder(config)
    model.load_state_dict(load_weights(root / "mae" / "checkpoints" / "step_00000010"))
    record = read_record(root)
    samples = read_samples(record, record.config, read_gate(record))
    noise = torch.rand(len(samples.images), 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        losses = model(samples.images, noise)
    first = [samples.clusters.tolist().index(c) for c in found.clusters]
    told = [row.tiles[2].loss for row in found.rows]
    assert told == pytest.approx(losses[first].tolist(), rel=1e-6)


def test_spoilt_expert_is_told_by_the_clusters_that_take_it(seen):
    root, weights = seen
    gate, found = look(root)
    cluster = found.clusters[0]
    expert = int(gate.table[1, cluster])
    name = f"blocks.1.mlp.experts.{expert}.fc2.weight"
    weights[name] = weights[name] + torch.randn(weights[name].shape) * 3
    write_weights(root / CHECKPOINT, weights)
    _, spoilt = look(root)
    column = [int(gate.table[1, c]) == expert for c in spoilt.clusters]
    assert sum(column) == 1
    changed = (spoilt.losses != found.losses).all(axis=0)
    assert changed.tolist() == column
    assert (spoilt.losses == found.losses).all(axis=0).tolist() == [not c for c in column]


def test_image_that_cannot_be_decoded_is_left_out(seen):
    root, _ = seen
    _, found = look(root)
    assert len(found.rows) == 3
    assert "What experts know" in render(read_record(root))


def test_map_is_the_checkpoints(seen):
    root, _ = seen
    gate, _ = look(root)
    assert gate.table.shape == (2, 3) and (np.sort(gate.table) == np.arange(3)).all()
    assert gate.where == "checkpoint moce/step_00000020"
    assert (gate.chosen > 1 / 3).all() and (gate.runner_up != gate.table).all()
    total = gate.chosen + gate.runner_up_p
    assert ((total > 2 / 3) & (total <= 1 + 1e-12)).all()


def test_second_best_expert_of_a_cluster_is_text_of_the_page(seen):
    root, _ = seen
    gate, _ = look(root)
    text = " ".join(Page(write_report(root)).text.split())
    for layer in range(2):
        for cluster in range(3):
            cell = gate.cell(layer, cluster)
            p = round(100 * gate.runner_up_p[layer, cluster])
            assert cell["second"] == f"next {gate.runner_up[layer, cluster]}: {p}"
            assert f"{cell['expert']}{cell['percent']} %{cell['second']} %" in text


def test_without_checkpoint_the_map_is_the_last_table_and_there_are_no_reconstructions(finished):
    gate, found = look(finished)
    assert gate.where == "the table of step 200" and np.isfinite(gate.chosen).all()
    assert found == "no checkpoint of stage mae was kept"


def test_damaged_checkpoint_is_passed_over(seen):
    root, _ = seen
    (root / CHECKPOINT / "rank-00000.safetensors").write_bytes(b"no")
    page = write_report(root).read_text()
    assert "could not read moce/checkpoints/step_00000020" in page
    assert "No routing was written yet" in page and "MoCE, own experts" not in page
