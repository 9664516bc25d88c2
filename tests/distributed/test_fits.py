"""Fits on several ranks are the fits of one process: equal batches, gradients, figures, resumption.

Without draws (stochastic depth, dropout) weights agree to the round-off of float32 sums; Mixup
draws for whole batches, so it may stay on.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """34 training and 17 test images of two classes."""
    root, draws = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 17), ("test", 8)):
        for label, name in enumerate(("dark", "bright")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count + label * (split == "test")):
                pixels = draws.integers(60 * label, 190 + 60 * label, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Six training and five test images; in some of them most pixels do not count."""
    root, draws = tmp_path_factory.mktemp("scenes"), np.random.default_rng(1)
    for split, count in (("training", 6), ("validation", 5)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            pixels = draws.integers(0, 120, (40 + 2 * i, 44, 3), np.uint8)
            mask = np.ones(pixels.shape[:2], np.uint8)
            pixels[:, 20:] += 110
            mask[:, 20:] = 2
            mask[: 36 if i % 3 == 0 else 4] = 0
            Image.fromarray(pixels).save(root / "images" / split / f"{i}.png")
            Image.fromarray(mask).save(root / "annotations" / split / f"{i}.png")
    (root / "classes.txt").write_text("dark\nbright\n")
    return root


@pytest.fixture
def roots(images, scenes):
    return {"classify": images, "segment": scenes}


def on(ranks, *overrides):
    return [f"parallel.num_workers={ranks}", *overrides]


def call(roots, kind, **options):
    return {"function": "fit_task", "kind": kind, "root": str(roots[kind]), **options}


def weights(folder):
    return load_file(folder / "last" / "model.safetensors")


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name].double() - tensor.double()).norm()
        assert error <= tolerance * tensor.double().norm() + 1e-6, name


CHECKPOINTED = "parallel.activation_checkpointing=true"
MIXED = ("transfer.finetune.mixup=0.8", "transfer.finetune.cutmix=1")
LAW = [
    ("classify", 2, ()),
    ("classify", 2, ("parallel.zero_stage=1", CHECKPOINTED)),
    ("classify", 2, ("parallel.zero_stage=2", "parallel.micro_batches=2")),
    ("classify", 2, MIXED),
    ("classify", 1, ("parallel.micro_batches=4", CHECKPOINTED)),
    ("segment", 2, ()),
    ("segment", 2, ("parallel.zero_stage=2", CHECKPOINTED)),
]


@pytest.mark.parametrize(("kind", "ranks", "overrides"), LAW)
def test_weights_are_those_of_one_process(kind, ranks, overrides, pools, roots, tmp_path):
    common = call(roots, kind)
    mixed = [field for field in overrides if field in MIXED]
    (expected,) = pools(1).run("fit", **common, out=tmp_path / "one", overrides=mixed)
    found = pools(ranks).run(
        "fit", **common, out=tmp_path / "many", overrides=on(ranks, *overrides)
    )
    # the first figure is a share of few images or pixels: round-off may tip one of them
    assert all(each == found[0] for each in found) and found[0].keys() == expected.keys()
    assert_close(weights(tmp_path / "many"), weights(tmp_path / "one"))


def test_layers_keep_their_rates_in_adamw(pools, roots, tmp_path):
    # not for segmentation: AdamW makes whole steps of the round-off of gradients that are zero,
    # such as those of biases before a normalisation
    common, small = call(roots, "classify", adam=True), ("transfer.finetune.base_lr=1e-3",)
    pools(1).run("fit", **common, out=tmp_path / "one", overrides=small)
    for zero_stage in (0, 1):
        options = on(2, *small, f"parallel.zero_stage={zero_stage}")
        out = tmp_path / str(zero_stage)
        pools(2).run("fit", **common, out=out, overrides=options)
        assert_close(weights(out), weights(tmp_path / "one"))


def test_statistics_of_all_ranks_hold_no_graph(pools, roots, tmp_path):
    options = {**call(roots, "segment", overrides=on(2)), "function": "graphs_left"}
    assert pools(2).run("fit", **options, out=tmp_path) == [[], []]


@pytest.mark.parametrize("kind", ["classify", "segment"])
def test_figures_are_those_of_one_process(kind, pools, roots, tmp_path):
    common = call(roots, kind)
    pools(1).run("fit", **common, out=tmp_path / "fit", overrides=[])
    folder = str(tmp_path / "fit" / "last")
    measuring = {**common, "function": "measure_saved"}
    one, *_ = pools(1).run("fit", **measuring, folder=folder, overrides=on(1))
    assert pools(2).run("fit", **measuring, folder=folder, overrides=on(2)) == [one, one]
    if kind == "segment":
        shown = [tmp_path / "fit" / f"by{ranks}" for ranks in (1, 2)]
        names = [sorted(path.name for path in folder.iterdir()) for folder in shown]
        assert names[0] == names[1] == ["0.png", "1.png", "2.png", "3.png", "scores.json"]
        assert len({(folder / "scores.json").read_text() for folder in shown}) == 1


@pytest.fixture(scope="module")
def damaged(images, scenes, tmp_path_factory):
    """The same with some files cut off: two of each training split, one of each test split."""
    top = tmp_path_factory.mktemp("damaged")
    roots = {"classify": images, "segment": scenes}
    files = {
        "classify": ["train/dark/03.png", "train/bright/16.png", "test/dark/05.png"],
        "segment": [f"images/{name}.png" for name in ("training/0", "training/4", "validation/2")],
    }
    for kind, root in roots.items():
        shutil.copytree(root, top / kind)
        for name in files[kind]:
            path = top / kind / name
            path.write_bytes(path.read_bytes()[:40])
    return {kind: top / kind for kind in roots}


@pytest.mark.parametrize("kind", ["classify", "segment"])
def test_images_damaged_under_way_are_skipped_and_counted_on_any_ranks(
    kind, pools, damaged, tmp_path
):
    common = call(damaged, kind)
    (one,) = pools(1).run("fit", **common, out=tmp_path / "one", overrides=[])
    first, second = pools(2).run("fit", **common, out=tmp_path / "many", overrides=on(2))
    assert first == one and second.keys() - {"skipped"} == one.keys() - {"skipped"}
    assert_close(weights(tmp_path / "many"), weights(tmp_path / "one"))
    steps, keys = zip(*one["skipped"], strict=True)
    expected = {
        "classify": {"train/dark/03.png", "train/bright/16.png", "test/dark/05.png"},
        "segment": {"training/0", "training/4", "validation/2"},
    }
    assert {key.removeprefix(str(damaged[kind]) + "/") for key in keys} == expected[kind]
    assert steps.count(None) == 1 and None not in steps[:-1]


def test_images_are_skipped_where_ranks_have_unequal_parts_of_a_batch(pools, damaged, tmp_path):
    # Mixup's pairs: of ten images one rank has six, the other four
    odd = ["transfer.finetune.batch_size=10"]
    common = call(damaged, "classify")
    (one,) = pools(1).run("fit", **common, out=tmp_path / "one", overrides=odd)
    many = pools(2).run("fit", **common, out=tmp_path / "many", overrides=on(2, *odd))
    assert many[0] == one and len({key for _, key in one["skipped"]}) == 3
    assert_close(weights(tmp_path / "many"), weights(tmp_path / "one"))


@pytest.mark.parametrize("kind", ["classify", "segment"])
def test_interrupted_fit_counts_what_it_skipped_before(kind, pools, damaged, tmp_path):
    common = call(damaged, kind, overrides=on(2), adam=True)
    whole = pools(2).run("fit", **common, out=tmp_path / "whole")
    killed = pools(2).run("fit", **common, out=tmp_path / "parts", kill=3)
    assert killed == ["KilledError: "] * 2
    assert pools(2).run("fit", **common, out=tmp_path / "parts") == whole
    assert any(step is not None and step < 2 for step, _ in whole[0]["skipped"])
    assert not (tmp_path / "parts" / "skipped.jsonl").exists()


@pytest.mark.parametrize(("kind", "zero_stage"), [("classify", 0), ("classify", 2), ("segment", 1)])
def test_resumed_fit_is_bit_equal_at_equal_ranks(kind, zero_stage, pools, roots, tmp_path):
    options = on(2, f"parallel.zero_stage={zero_stage}", "transfer.finetune.drop_path=0.2", *MIXED)
    common = call(roots, kind, overrides=options, adam=True)
    whole = pools(2).run("fit", **common, out=tmp_path / "whole", views=3)
    killed = pools(2).run("fit", **common, out=tmp_path / "parts", views=3, kill=3)
    assert killed == ["KilledError: "] * 2
    assert (tmp_path / "parts" / "state.safetensors").exists()
    assert pools(2).run("fit", **common, out=tmp_path / "parts", views=3) == whole
    found, expected = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    views = [(tmp_path / name / "views.jsonl").read_text() for name in ("whole", "parts")]
    assert views[0] == views[1] and (tmp_path / "whole" / "best" / "config.json").exists()
    lines = [json.loads(line) for line in views[0].splitlines()]
    assert lines[-1]["measures"] == whole[0] == whole[1]


def test_fit_goes_on_elsewhere_after_one_rank_was_asked_to_stop(pools, roots, tmp_path):
    common = call(roots, "segment", save_every=100)
    pools(2).run("fit", **common, out=tmp_path / "whole", overrides=on(2))
    out = tmp_path / "parts"
    first = on(2, "parallel.zero_stage=2")
    said = pools(2).run("fit", **common, out=out, overrides=first, ask=4)
    assert said == ["StoppedError: ade20k random seed 3: state saved at step 4 of 6"] * 2
    pools(1).run("fit", **common, out=out, overrides=on(1))
    assert_close(weights(out), weights(tmp_path / "whole"))
    assert not (out / "state.safetensors").exists()


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("transfer.finetune.base_lr=1e38", "FloatingPointError: .* loss is nan at step"),
        ("transfer.finetune.base_lr=1e12", "FloatingPointError: .* gradient norm is nan at step"),
        ("transfer.finetune.batch_size=2", r"parallel.num_workers \(2\) must be at most 1 for"),
    ],
)
def test_all_ranks_end_with_one_line(field, said, pools, roots, tmp_path):
    common = call(roots, "classify", out=tmp_path)
    found = pools(2).run("fit", **common, overrides=on(2, field))
    assert found[0] == found[1]
    assert re.search(said, found[0])


def test_a_fit_whose_weights_are_ruined_leaves_no_model(pools, roots, tmp_path):
    common = call(roots, "classify", out=tmp_path, overrides=on(2)) | {"function": "ruined_fit"}
    found = pools(2).run("fit", **common)
    assert found[0] == found[1]
    assert re.fullmatch(r"FloatingPointError: .*: after step \d+: \S+ is not finite", found[0])
    assert not (tmp_path / "last").exists() and not (tmp_path / "best").exists()
