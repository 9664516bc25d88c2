"""COCO's layout: what is read, what is refused, and by which line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as run_lengths

from moce_dist.settings import ConfigError
from moce_dist.transfer.detection.coco_json import unpack_counts
from moce_dist.transfer.detection.task import Detection

Tree = dict[str, Any]


@pytest.fixture
def data(tmp_path: Path, coco_folder: Path) -> Path:
    return Path(shutil.copytree(coco_folder, tmp_path / "data"))


def change(data: Path, edit: Callable[[Tree], object], split: str = "train2017") -> None:
    path = data / "annotations" / f"instances_{split}.json"
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))


def test_layout_is_read(coco_folder):
    found = Detection.read("coco", coco_folder)
    assert (found.classes, found.category_ids) == (("yellow", "red"), (3, 8))
    assert (len(found.train), len(found.test), found.has_masks) == (6, 3, True)
    # in the order of the ids, each with its own file
    assert [p.id for p in found.test] == [986, 993, 1000]
    assert [p.key for p in found.test][-1] == "val2017/000000000000.jpg"
    assert all(len(p.annotations) == 2 for p in found.train)
    found.scan(threads=2)


def test_other_endings_are_read(data):
    for split in ("train", "val"):
        (data / f"{split}2017").rename(data / split)
        old = data / "annotations" / f"instances_{split}2017.json"
        old.rename(data / "annotations" / f"instances_{split}.json")
    assert Detection.read("coco", data).train[0].key.startswith("train/")


def test_two_candidates_are_refused(data):
    for split in ("train2014", "train2015"):
        source = data / "annotations" / "instances_train2017.json"
        shutil.copy(source, data / "annotations" / f"instances_{split}.json")
    source.unlink()
    with pytest.raises(ConfigError, match=r"instances_train2014\.json: one of 2 files for train"):
        Detection.read("coco", data)


def test_sets_without_outlines_have_no_masks(data, caplog):
    change(data, lambda tree: [a.pop("segmentation") for a in tree["annotations"]])
    change(data, lambda tree: [a.update(segmentation=[]) for a in tree["annotations"]], "val2017")
    assert not Detection.read("coco", data).has_masks
    assert not caplog.records


def test_one_missing_outline_leaves_boxes_alone_and_says_so(data, caplog):
    change(data, lambda tree: tree["annotations"][0].pop("segmentation"))
    assert not Detection.read("coco", data).has_masks
    assert "1 of 18 objects have no outline" in caplog.text


def test_image_without_anything_to_learn_is_no_training_image(data, caplog):
    def edit(tree: Tree) -> None:
        tree["annotations"][0]["bbox"][2] = 0
        tree["annotations"][1]["iscrowd"] = 1

    for split in ("train2017", "val2017"):
        change(data, edit, split)
    found = Detection.read("coco", data)
    assert (len(found.train), len(found.test)) == (5, 3)
    assert len(found.test[-1].annotations) == 2 and not found.test[-1].learnable()
    assert "1 boxes have no area, the first is" in caplog.text


def first(tree: Tree, **changes: Any) -> None:
    tree["annotations"][0].update(changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: first(t, image_id=5), r"annotation 1: image_id 5 is no image's"),
        (lambda t: first(t, category_id=4), r"annotation 1: category_id 4 is no category's"),
        (lambda t: first(t, image_id=[5]), r"annotation 1: image_id \[5\] is no image's"),
        (lambda t: first(t, bbox=[60, 2, 9, 9]), r"annotation 1: bbox .* lies outside its image"),
        (lambda t: first(t, bbox=[-9, 2, 9, 9]), r"annotation 1: bbox .* lies outside its image"),
        (
            lambda t: first(t, bbox=[2, 900, 9, 9]),
            r"annotation 1: bbox .* lies outside its image",
        ),
        (lambda t: first(t, bbox=[2, 2, 1e6, 9]), "reaches far outside of its image of 56 x 40"),
        (lambda t: first(t, bbox=[2, -900, 9, 910]), "reaches far outside of its image"),
        (lambda t: first(t, segmentation=[[2, 2, 1e300, 2, 9, 9]]), "reaches far outside of its"),
        (lambda t: first(t, segmentation=[[2, 2, 9, 900, 9, 9]]), "reaches far outside of its"),
        (lambda t: first(t, bbox=[0.1, 0.2, 0.3]), "must be four numbers"),
        (lambda t: first(t, bbox=[1, 2, float("nan"), 3]), "must be four numbers"),
        (lambda t: first(t, bbox=None), "must be four numbers"),
        (lambda t: first(t, segmentation=[[1, 2, 3, 4]]), "must be polygons"),
        (lambda t: first(t, segmentation=[[1, 2, 3, 4, 5, None]]), "must be polygons"),
        (lambda t: first(t, segmentation={"size": [9, 9], "counts": [81]}), r"size \[9, 9\]"),
        (lambda t: first(t, segmentation={"size": [40, 56], "counts": [1]}), "do not add up"),
        (lambda t: first(t, segmentation={"size": [40, 56], "counts": "11"}), "do not add up"),
        (lambda t: t["images"][0].pop("width"), r"images\[0\] has no width"),
        (
            lambda t: t["images"][1].update(id=1000),
            r"images\[1\].id \(1000\) must be a number once",
        ),
        (lambda t: t["images"][1].update(id=10**30), r"images\[1\].id .* must be a number once"),
        (lambda t: t["categories"][0].update(id=2**63), r"categories\[0\].id .* a number once"),
        (lambda t: t["images"][1].update(height=0), "height 0 is no size"),
        *(
            (lambda t, v=v: first(t, area=v), r"annotation 1: area .* must be a number of pixels")
            for v in (None, "900", float("nan"), float("inf"), -1, True, [9], 10**400)
        ),
        *(
            (lambda t, v=v: first(t, iscrowd=v), r"annotation 1: iscrowd .* must be 0 or 1")
            for v in (None, "0", 2, float("nan"), {})
        ),
        (lambda t: first(t, bbox=["8", "8", "30", "30"]), "must be four numbers"),
        (lambda t: first(t, bbox=[8, 8, 10**400, 30]), "must be four numbers"),
        (lambda t: first(t, segmentation=[8, 8, 38, 8, 38, 38]), "must be polygons"),
        (lambda t: first(t, segmentation=[["8", "8", "38", "8", "38", "38"]]), "must be polygons"),
        (lambda t: first(t, segmentation=[[]]), "must be polygons"),
        (lambda t: first(t, segmentation=[[[8, 8], [38, 8], [38, 38]]]), "must be polygons"),
        (lambda t: first(t, category_id=3.0), r"category_id 3\.0 is no category's"),
        (lambda t: t["images"][0].update(width=56.0), r"width 56\.0 is no size"),
        (
            lambda t: t["images"][0].update(file_name=None),
            r"file_name None is no text",
        ),
        (lambda t: t["categories"][0].update(name=7), r"categories\[0\]\.name 7 is no text"),
        (lambda t: t.update(annotations=[]), "its list annotations is empty"),
        (lambda t: t.pop("categories"), "has no list categories"),
        (lambda t: t["categories"].pop(), r"annotation 2: category_id 8 .* \(and 5 more\)"),
    ],
)
def test_wrong_entry_is_named_with_its_file(data, edit, message):
    change(data, edit)
    with pytest.raises(ConfigError, match=f"instances_train2017.json: .*{message}") as caught:
        Detection.read("coco", data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(5))
def test_packed_run_lengths_are_read_as_the_library_packs_them(seed):
    draws = np.random.default_rng(seed)
    mask = np.asfortranarray(draws.random((70, 90)) < draws.random(), np.uint8)
    mask[:, 20:60] = seed % 2
    packed = run_lengths.encode(mask)["counts"].decode()
    flat = np.concatenate([[0], mask.T.ravel()])
    edges = [0, *np.flatnonzero(np.diff(flat)).tolist(), mask.size]
    assert unpack_counts(packed) == np.diff(edges).tolist()


def test_class_lists_of_the_splits_must_be_equal(data):
    change(data, lambda t: t["categories"].append({"id": 9, "name": "blue"}), "val2017")
    with pytest.raises(ConfigError, match=r"val2017\.json: lists 3 categories, .* lists 2"):
        Detection.read("coco", data)
    change(data, lambda t: t["categories"].append({"id": 9, "name": "green"}))
    with pytest.raises(ConfigError, match=r"category 9 \(blue\) is 9 \(green\)"):
        Detection.read("coco", data)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("annotations", r"instances_train2017\.json: is missing; expected DATA/annotations"),
        ("annotations/instances_val2017.json", r"instances_val2017\.json: is missing"),
        ("val2017", r"val2017: is no folder; it holds the images of instances_val2017"),
        ("train2017/000000000003.jpg", r"train2017/000000000003\.jpg: is missing, the annotations"),
    ],
)
def test_missing_file_or_folder_is_named(data, path, message):
    shutil.rmtree(data / path) if (data / path).is_dir() else (data / path).unlink()
    with pytest.raises(ConfigError, match=message):
        Detection.read("coco", data)


def test_damaged_json_is_named(data):
    path = data / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ConfigError, match=r"instances_val2017\.json: is no JSON"):
        Detection.read("coco", data)


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xd8 nothing", "unreadable image"), (None, "it has 9 x 8 pixe")]
)
def test_scan_finds_damaged_images_and_other_sizes(data, content, message):
    path = data / "val2017" / "000000000001.jpg"
    if content is None:
        Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(path)
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"val2017/000000000001\.jpg: .*{message}"):
        Detection.read("coco", data).scan(threads=1)


def test_fingerprint_follows_annotations_and_files(data):
    before = Detection.read("coco", data).fingerprint()
    assert Detection.read("coco", data).fingerprint() == before
    change(data, lambda t: first(t, bbox=[3, 3, 5, 5]))
    assert Detection.read("coco", data).fingerprint() != before


def test_json_that_is_too_deep_is_named(data):
    (data / "annotations" / "instances_val2017.json").write_text("[" * 10**5)
    with pytest.raises(ConfigError, match=r"instances_val2017\.json: is no JSON"):
        Detection.read("coco", data)


def turned(path: Path, orientation: int, size: tuple[int, int]) -> Image.Image:
    """Rewrite an image as a camera that was held otherwise stores it; return it as stored."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    draws = np.random.default_rng(orientation)
    stored = Image.fromarray(draws.integers(0, 256, (size[1], size[0], 3), np.uint8))
    stored.save(path, "PNG", exif=exif)
    return stored


@pytest.mark.parametrize(
    ("orientation", "stored", "rotation"),
    [
        (6, (40, 56), Image.Transpose.ROTATE_270),  # annotated 56 x 40, as it is upright
        (6, (56, 40), None),  # annotated as it is stored
        (3, (56, 40), Image.Transpose.ROTATE_180),  # nobody can tell
    ],
)
def test_annotations_of_a_turned_image_stay_in_place(data, caplog, orientation, stored, rotation):
    found = Detection.read("coco", data)
    assert (found.train[0].width, found.train[0].height) == (56, 40)
    image = turned(found.train[0].image, orientation, stored)
    expected = image if rotation is None else image.transpose(rotation)
    np.testing.assert_array_equal(np.asarray(found.train[0].load().image), np.asarray(expected))
    found.scan(threads=1)
    assert ("1 annotated images are turned by EXIF" in caplog.text) == (orientation == 3)


def test_a_turned_image_of_neither_size_is_named(data):
    found = Detection.read("coco", data)
    turned(found.train[0].image, 6, (41, 57))
    with pytest.raises(ConfigError, match="it has 57 x 41 pixels, its annotations are for 56 x 40"):
        found.scan(threads=1)
