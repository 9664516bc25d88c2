"""A detector's fit on several ranks: every image once, gradients and figures of one process.

What torchvision draws on each rank is taken away where weights are compared with those of one
process. Every set has six training and five test images of 56 x 48 pixels, one object in each.
"""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from moce_dist.run.files import read_faults, read_jsonl

DAMAGED = ["train2017/000003.jpg", "val2017/000001.jpg"]


def write_split(root, split, count, draws):
    (root / split).mkdir()
    images, objects = [], []
    for i in range(count):
        x, y = (int(corner) for corner in draws.integers(1, 12, 2))
        w, h = (int(side) for side in draws.integers(24, 36, 2))
        pixels = draws.integers(0, 60, (48, 56, 3), np.uint8)
        pixels[y : y + h, x : x + w] = (220, 40 + 170 * (i % 2), 40)
        name = f"{i:06d}.jpg"
        Image.fromarray(pixels).save(root / split / name, quality=95)
        images.append({"id": 100 + i, "file_name": name, "width": 56, "height": 48})
        outline = [x, y, x + w, y, x + w, y + h, x, y + h]
        about = {"id": i + 1, "image_id": 100 + i, "category_id": 3 + i % 2, "iscrowd": 0}
        objects.append(about | {"bbox": [x, y, w, h], "area": w * h, "segmentation": [outline]})
    tree = {"images": images, "annotations": objects}
    tree["categories"] = [{"id": 3, "name": "red"}, {"id": 4, "name": "yellow"}]
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(tree))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root, draws = tmp_path_factory.mktemp("coco"), np.random.default_rng(4)
    (root / "annotations").mkdir()
    write_split(root, "train2017", 6, draws)
    write_split(root, "val2017", 5, draws)
    return root


@pytest.fixture(scope="module")
def damaged(data, tmp_path_factory):
    """The same, one training and one test image of which cannot be read."""
    root = shutil.copytree(data, tmp_path_factory.mktemp("damaged") / "coco")
    for key in DAMAGED:
        (root / key).write_bytes(b"")
    return root


def budget(ranks, batch_size, steps, *overrides):
    sizes = f"transfer.detection.batch_size={batch_size}", f"transfer.detection.steps={steps}"
    return [f"parallel.num_workers={ranks}", *sizes, *overrides]


def call(root, **options):
    return {"function": "fit_task", "kind": "detect", "root": str(root), **options}


def weights(folder):
    return load_file(folder / "last" / "model.safetensors")


def skipped(folder):
    return [(fault["key"], fault["reason"]) for fault in read_faults(folder / "faults.jsonl")]


def test_every_image_is_used_once_and_scores_are_those_of_one_process(pools, data, tmp_path):
    train, test = (
        sorted(f"{folder}/{path.name}" for path in (data / folder).iterdir())
        for folder in ("train2017", "val2017")
    )
    out, options = tmp_path / "fit", budget(2, 3, 4, "transfer.detection.lr=1e-3")
    fitting = {"function": "images_used", "root": str(data), "out": str(out)}
    found = pools(2).run("fit", **fitting, overrides=options)
    figures, learnt, seen, scored = zip(*found, strict=True)
    assert figures[0] == figures[1] and figures[0].keys() == {"box", "mask"}
    assert all(math.isfinite(figures[0][kind]["AP"]) for kind in ("box", "mask"))
    # two epochs of two steps, of whose three images the first rank takes two
    assert [len(keys) for keys in learnt] == [8, 4]
    for epoch in range(2):
        parts = [keys[epoch * len(keys) // 2 :][: len(keys) // 2] for keys in learnt]
        assert sorted([*parts[0], *parts[1]]) == train
    assert (seen[0], seen[1]) == (test[::2], test[1::2]) and scored == (test, [])

    measuring = call(data, function="measure_saved", folder=str(out / "last"))
    (one,) = pools(1).run("fit", **measuring, overrides=budget(1, 3, 4))
    many = pools(2).run("fit", **measuring, overrides=budget(2, 3, 4))
    assert many == [one, (*one[:2], [])]
    assert one[0]["box AP"] == figures[0]["box"]["AP"] > 0
    assert [kind for kind, _ in one[2]] == ["bbox", "segm"] and len(one[2][0][1]) > 0
    drawn = [{p.name: p.read_bytes() for p in (out / name).iterdir()} for name in ("by1", "by2")]
    assert drawn[0] == drawn[1] and sorted(drawn[0]) == [f"{i:06d}.png" for i in range(4)]
    assert json.loads((out / "seen" / "scores.json").read_text())["skipped_images"] == 0


CHECKPOINTED = "parallel.activation_checkpointing=true"
LAW = [
    (5, 2, False, ()),
    # of the two images of a step one cannot be read
    (2, 3, True, ("parallel.zero_stage=2", "parallel.micro_batches=2", CHECKPOINTED)),
]


@pytest.mark.parametrize(("batch_size", "steps", "has_damage", "overrides"), LAW)
def test_weights_are_those_of_one_process(
    batch_size, steps, has_damage, overrides, pools, data, damaged, tmp_path
):
    common = call(damaged if has_damage else data)
    one, many = tmp_path / "one", tmp_path / "many"
    pools(1).run("fit", **common, out=str(one), overrides=budget(1, batch_size, steps))
    options = budget(2, batch_size, steps, *overrides)
    found = pools(2).run("fit", **common, out=str(many), overrides=options)
    assert found[0] == found[1] and isinstance(found[0], dict)
    expected, found = weights(one), weights(many)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name].double() - tensor.double()).norm()
        assert error <= 1e-5 * tensor.double().norm() + 1e-6, name
    # an epoch's one use of a image is its one line
    assert [key for key, _ in skipped(many)] == (DAMAGED if has_damage else [])
    assert skipped(many) == skipped(one)


def test_interrupted_fit_is_bit_equal_on_equal_ranks_and_goes_on_on_one(pools, damaged, tmp_path):
    options = {**call(damaged), "views": 3, "adam": True}
    options["overrides"] = budget(2, 4, 5, "transfer.detection.drop_path=0.2")
    whole, parts, alone = (tmp_path / name for name in ("whole", "parts", "alone"))
    expected = pools(2).run("fit", **options, out=str(whole))
    assert pools(2).run("fit", **options, out=str(parts), kill=3) == ["KilledError: "] * 2
    assert (parts / "state.safetensors").exists()
    shutil.copytree(parts, alone)
    assert pools(2).run("fit", **options, out=str(parts)) == expected
    found, reference = weights(parts), weights(whole)
    assert all(torch.equal(found[name], reference[name]) for name in reference)
    for name in ("views.jsonl", "seen/scores.json"):
        assert (parts / name).read_text() == (whole / name).read_text()
    assert len(skipped(whole)) > 2 and skipped(parts) == skipped(whole)
    assert not (parts / "skipped.jsonl").exists() and (parts / "best" / "config.json").exists()

    options["overrides"] = budget(1, 4, 5)
    (figures,) = pools(1).run("fit", **options, out=str(alone))
    assert math.isfinite(figures["box"]["AP"]) and skipped(alone) == skipped(whole)
    assert [line["step"] for line in read_jsonl(alone / "views.jsonl")] == [3, 5]
    assert not (alone / "state.safetensors").exists()


def test_a_fit_without_any_readable_image_ends_all_ranks_with_one_line(pools, data, tmp_path):
    root = shutil.copytree(data, tmp_path / "coco")
    for path in (root / "train2017").iterdir():
        path.write_bytes(b"")
    options = call(root, out=str(tmp_path / "fit"))
    found = pools(2).run("fit", **options, overrides=budget(2, 3, 2))
    found += pools(1).run("fit", **options, overrides=budget(1, 3, 2))
    for line in found:
        assert re.fullmatch(r"ValueError: train2017/\d+\.jpg: .*image is empty; nor can .*", line)
    refused = pools(2).run("fit", **options, overrides=budget(2, 1, 2))
    assert re.search(r"parallel.num_workers \(2\) must be at most 1 for", refused[0])
