"""Held-out losses by cluster against dense models of every route, image by image."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from moce_dist.__main__ import main
from moce_dist.config import to_yaml
from moce_dist.data.images import normalise
from moce_dist.data.shards import write_index
from moce_dist.data.writer import ShardWriter
from moce_dist.model.customize import customize, routes
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.run.artefacts import mark_complete
from moce_dist.run.directory import Run
from moce_dist.run.files import write_atomic
from moce_dist.settings import ConfigError
from moce_dist.transfer import heldout

from .conftest import NUM_CLUSTERS, NUM_EXPERTS, by_global_name, png, texture, write_checkpoint


@pytest.fixture
def held_out(run: Run, config, models) -> Run:
    """The run with a control and 30 held-out images of five clusters, one of which is no image."""
    draws, clusters = np.random.default_rng(0), {}
    writer = ShardWriter(run.ingested / "holdout", "holdout-000000.tar")
    for number in range(30):
        key = f"d/{number:02d}"
        clusters[key] = number % (NUM_CLUSTERS - 1)
        content = b"no image" if number == 7 else png(texture(number % 2, draws))
        writer.add(key, {"png": content})
    write_index(run.ingested / "holdout", [writer.close()])
    run.shards.mkdir()
    table = {"key": list(clusters), "cluster": pa.array(clusters.values(), pa.int32())}
    pq.write_table(pa.table(table), run.shards / "holdout.parquet")
    weights = {n: t * 1.1 for n, t in by_global_name(models["mae"], config).items()}
    write_checkpoint(run.stage("control") / "checkpoints" / "step_00000005", weights)
    mark_complete(run.stage("control"), {}, [])
    return run


def said(run: Run, capsys) -> dict:
    main(["heldout", str(run.root)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {line["cluster"]: line for line in lines}


def dense_losses(config, weights, batches, chosen) -> float:
    """Mean loss of the images of some clusters under one dense model."""
    model, found = MaskedAutoencoder(config).eval(), []
    model.load_state_dict(weights)
    with torch.no_grad():
        for batch in batches:
            loss = model(normalise(batch.images), batch.noise)
            is_used = (batch.weights > 0) & torch.isin(batch.clusters[0], torch.tensor(chosen))
            found += loss[is_used].tolist()
    return float(np.mean(found))


def test_batches_of_loader_processes_are_those_of_this_one(held_out, config):
    table = heldout.held_out_table(held_out, config)
    data = config.data.model_copy(update={"loader_processes": 1})
    other = config.model_copy(update={"data": data})
    both = [list(heldout.held_out_batches(table, each)) for each in (config, other)]
    for one, two in zip(*both, strict=True):
        assert torch.equal(one.images, two.images) and one.keys == two.keys


@pytest.mark.parametrize("combine", ["straight_through", "prob"])
def test_losses_are_those_of_the_dense_models_of_each_route(
    held_out, config, models, capsys, combine
):
    gate = config.gate.model_copy(update={"combine": combine})
    config = config.model_copy(update={"gate": gate})
    write_atomic(held_out.root / "config.yaml", to_yaml(config))
    rows = said(held_out, capsys)
    assert list(rows) == [*range(NUM_CLUSTERS), "all"]
    counts = [rows[k]["images"] for k in range(NUM_CLUSTERS)]
    assert counts == [6, 6, 5, 6, 6, 0] and rows["all"]["images"] == 29
    assert rows[5]["own"] is None and rows[5]["worst"] is None
    batches = list(heldout.held_out_batches(heldout.held_out_table(held_out, config), config))
    weights = by_global_name(models["moce"], config)
    table = routes(weights, config.gate)
    p = torch.einsum("led,kd->lke", weights["gate.weight"], weights["gate.cluster_embedding"])
    for cluster in (0, 3):
        route = table[:, cluster].tolist()
        chosen = [float(p.softmax(2)[i, cluster, e]) for i, e in enumerate(route)]
        scale = chosen if combine == "prob" else None
        by_shift = [
            dense_losses(
                config,
                customize(
                    weights,
                    [(e + shift) % NUM_EXPERTS for e in route],
                    scale=scale,
                    with_decoder=True,
                ),
                batches,
                [cluster],
            )
            for shift in range(NUM_EXPERTS)
        ]
        row = rows[cluster]
        assert row["own"] == pytest.approx(by_shift[0], rel=1e-4)
        assert row["others"] == pytest.approx(np.mean(by_shift[1:]), rel=1e-4)
        assert row["worst"] == pytest.approx(max(by_shift[1:]), rel=1e-4)
    scale = None
    if combine == "prob":
        # the mean over the clusters of the own expert's weight, as the routed output has it
        scale = [float(p.softmax(2)[i, range(NUM_CLUSTERS), table[i]].mean()) for i in range(2)]
    even = customize(weights, [[1 / 3] * 3] * 2, scale=scale, with_decoder=True)
    control = {n: t * 1.1 for n, t in by_global_name(models["mae"], config).items()}
    for name, model in (("average", even), ("control", control)):
        expected = dense_losses(config, model, batches, list(range(NUM_CLUSTERS)))
        assert rows["all"][name] == pytest.approx(expected, rel=1e-4)
    assert not held_out.faults.exists()


def test_equal_experts_are_as_good_as_each_other(held_out, config, models, capsys):
    weights = by_global_name(models["moce"], config)
    same = {
        name: weights[f"{name.split('.experts.')[0]}.experts.0.{name.split('.', 5)[5]}"].clone()
        if ".experts." in name
        else tensor
        for name, tensor in weights.items()
    }
    write_checkpoint(held_out.stage("moce") / "checkpoints" / "step_00000006", same)
    row = said(held_out, capsys)["all"]
    assert row["own"] == pytest.approx(row["average"], rel=1e-5)
    assert row["own"] == pytest.approx(row["worst"], rel=1e-5)
    assert row["own"] != pytest.approx(row["control"], rel=1e-3)


def test_runs_without_held_out_images_or_experts_are_refused(run, config):
    with pytest.raises(ConfigError, match="has no held-out images"):
        main(["heldout", str(run.root)])
    write_atomic(run.root / "config.yaml", to_yaml(config.without_experts))
    with pytest.raises(ConfigError, match="has no"):
        main(["heldout", str(run.root)])
