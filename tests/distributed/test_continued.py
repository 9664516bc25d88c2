"""Stage moce from another run's experts, on new images that leave clusters empty."""

import io

import numpy as np
import pytest
from PIL import Image

from moce_dist.data.shards import write_index
from moce_dist.data.writer import ShardWriter
from moce_dist.run.files import read_jsonl
from moce_dist.train.checkpoint import latest_checkpoint, load_weights

SIZES = {0: 9, 1: 30, 3: 17, 4: 1}
"""Images of the new data by cluster: none in 2, and none in the last ones, 5 to 7."""


def overrides(ranks, zero=0, *more):
    return [f"parallel.num_workers={ranks}", f"parallel.zero_stage={zero}", *more]


@pytest.fixture(scope="module")
def base(pools, clustered_run, tmp_path_factory):
    """The newest checkpoint of a run with experts of its own."""
    root = tmp_path_factory.mktemp("base")
    for name in ("shards", "clusters"):
        (root / name).symlink_to(clustered_run / name)
    pools(2).run("train_to_end", run=str(root), overrides=overrides(2))
    return latest_checkpoint(root / "moce" / "checkpoints")


@pytest.fixture(scope="module")
def new_shards(tmp_path_factory):
    """Other images, one cluster a tar."""
    folder, draws = tmp_path_factory.mktemp("new") / "shards", np.random.default_rng(1)
    shards = []
    for cluster, size in SIZES.items():
        writer = ShardWriter(folder, f"cluster-{cluster:05d}-000000.tar", cluster=cluster)
        for number in range(size):
            file = io.BytesIO()
            Image.fromarray(draws.integers(0, 255, (32, 32, 3), np.uint8)).save(file, "PNG")
            writer.add(f"n{cluster}/{number:04d}", {"png": file.getvalue()})
        shards.append(writer.close())
    write_index(folder, shards)
    return folder


@pytest.fixture
def run(tmp_path, new_shards, clustered_run):
    """Return a function that makes a run directory on the new shards and the old clusters."""

    def make(name):
        root = tmp_path / name
        root.mkdir()
        (root / "shards").symlink_to(new_shards)
        (root / "clusters").symlink_to(clustered_run / "clusters")
        return root

    return make


@pytest.mark.parametrize(("ranks", "zero"), [(1, 0), (2, 1)])
@pytest.mark.parametrize("groups", ["free", "shared"])
def test_it_starts_with_the_experts_and_routes_of_the_other_run(
    pools, run, base, ranks, zero, groups
):
    # with another seed, under which a gate of its own would route otherwise
    options = overrides(ranks, zero, "seed=1", "gate.noise=0", f"gate.groups={groups}")
    results = pools(ranks).run("start_of", run=str(run("run")), overrides=options, start=str(base))
    expected = {k: v.numpy() for k, v in load_weights(base).items()}
    got = {name: tensor for result in results for name, tensor in result["weights"].items()}
    # buffers are no parameters; all experts are there, each different from the others
    assert {name for name in expected if name.startswith("blocks")} <= got.keys() <= expected.keys()
    for name, tensor in got.items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)
    experts = [got[f"blocks.1.mlp.experts.{e}.fc1.weight"] for e in range(4)]
    assert not np.array_equal(experts[0], experts[1])
    for result in results:
        assert result["kinds"] == {"weight"}
        assert result["counts"] == [9, 30, 0, 17, 1, 0, 0, 0]
        if groups == "free":
            assert np.array_equal(result["table"], result["logits"].argmax(axis=2))


def test_clusters_and_experts_without_images_train_alike_on_1_and_2_ranks(pools, run, base):
    metrics = {}
    for ranks in (1, 2):
        root = run(f"on-{ranks}")
        pools(ranks).run(
            "continue_to_end",
            run=str(root),
            overrides=overrides(ranks, 0, "gate.noise=0"),
            start=str(base),
        )
        metrics[ranks] = read_jsonl(root / "moce" / "metrics.jsonl")
    losses = {ranks: [line["loss"] for line in lines] for ranks, lines in metrics.items()}
    np.testing.assert_allclose(losses[1], losses[2], rtol=1e-4)
    assert len(losses[1]) == 8 and np.isfinite(losses[1]).all()
    used = np.array([line["images_per_expert"] for line in metrics[2]])
    assert (used.sum(axis=2) <= 16).all() and used.sum() == 2 * 2 * sum(SIZES.values())
    assert (used == 0).any(), "no expert was without images: the case is not tested"
