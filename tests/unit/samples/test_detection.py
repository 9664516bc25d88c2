"""The detection sets: layout, split, and outlines that lie on what was pasted."""

import json

import numpy as np
import pytest
from PIL import Image

from moce_dist.samples import carriers, desktop, detection
from moce_dist.settings import ConfigError
from moce_dist.transfer.detection.jitter import decode_mask
from moce_dist.transfer.detection.task import Detection

NUM_TREES = (574, 279, 61, 37)


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> Detection:
    out = tmp_path_factory.mktemp("trees") / "out"
    detection.write_trees(out)
    return Detection.read("coco", out)


def write_packages(root):
    """Installed packages in small: yellow noise as cut-outs, blue noise as wallpapers."""
    draws = np.random.default_rng(0)
    for name in desktop.STAMP_SUBJECTS:
        folder = root / "tuxpaint" / "stamps" / name / "inner"
        (folder / "cartoon").mkdir(parents=True)
        for i in range(4):
            pixels = draws.integers(150, 256, (60, 80, 4), np.uint8)
            pixels[..., 2] = 0
            pixels[..., 3] = 0
            pixels[5:50, 10:70, 3] = 255
            pixels[5:25, 10:40, 3] = 0
            Image.fromarray(pixels).save(folder / f"{i}.png")
        Image.fromarray(pixels).save(folder / "cartoon" / "left_out.png")
        Image.fromarray(np.full((60, 80, 4), 255, np.uint8)).save(folder / "plain.png")
    for path in desktop.wallpaper_paths():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = draws.integers(0, 60, (300, 320, 3), np.uint8)
        pixels[..., 2] += 150
        Image.fromarray(pixels).save(root / path)
    return root


@pytest.fixture(scope="module")
def composited(tmp_path_factory) -> Detection:
    root = tmp_path_factory.mktemp("composited")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_DIRS", f"/nowhere:{write_packages(root / 'share')}")
        patch.setattr(detection, "NUM_SCENES", {"train2017": 12, "val2017": 4})
        detection.write_composited(root / "out")
    return Detection.read("coco", root / "out")


def test_trees_have_boxes_alone_and_all_photographs_are_read(trees):
    assert trees.classes == ("tree",) and not trees.has_masks
    trees.scan(threads=1)
    counts = [len(carriers.trees(name).boxes) for name in carriers.TREE_PHOTOGRAPHS]
    assert tuple(counts) == NUM_TREES
    # test tiles do not overlap, so no tree is learnt from twice or counted twice in full
    whole = sum(a.area for p in trees.test for a in p.annotations)
    boxes = np.concatenate([carriers.trees(n).boxes for n in carriers.TREE_PHOTOGRAPHS[1:3]])
    assert whole <= np.prod(boxes[:, 2:] - boxes[:, :2], axis=1).sum()


def test_training_and_test_photographs_differ():
    train, test = (
        {name for name, _ in detection.TREE_SPLITS[split]} for split in ("train2017", "val2017")
    )
    assert not train & test and train | test == set(carriers.TREE_PHOTOGRAPHS)


def test_tile_keeps_what_it_shows_of_a_tree():
    pixels = np.zeros((128, 128, 3), np.uint8)
    boxes = np.array([[-10, 20, 30, 40], [-30, 0, 10, 10], [200, 0, 220, 10], [5, 5, 9, 9]])
    scene = detection.tile_scene(pixels, boxes)
    assert scene.boxes.tolist() == [[0, 20, 30, 40], [0, 0, 10, 10], [5, 5, 9, 9]]
    assert scene.ignored == [False, True, False]
    assert detection.tile_scene(pixels, boxes[2:3]) is None
    assert detection.tile_scene(pixels, boxes[1:2]) is None


def test_outlines_lie_on_the_cut_outs(composited):
    assert composited.classes == ("cut-out",) and composited.has_masks
    assert (len(composited.train), len(composited.test)) == (12, 4)
    for some_image in [*composited.train, *composited.test]:
        pixels = np.asarray(some_image.load().image, int)
        yellow = pixels[..., 0] > pixels[..., 2]
        union = np.zeros((128, 128), bool)
        for a in some_image.annotations:
            mask = decode_mask(a.segmentation, 128, 128) == 1
            rows, columns = np.nonzero(mask)
            x, y, width, height = a.box
            assert (columns.min(), rows.min()) == (x, y)
            assert (columns.max() + 1, rows.max() + 1) == (x + width, y + height)
            assert a.area == mask.sum() and not (union & mask).any()
            union |= mask
        assert (union != yellow).mean() < 0.04


def test_cut_outs_and_wallpapers_of_the_splits_differ(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_DIRS", str(write_packages(tmp_path)))
    for items in (desktop.stamps(), desktop.wallpapers()):
        train, test = ({i.name for i in detection.part(items, s)} for s in detection.NUM_SCENES)
        assert not train & test and train | test == {i.name for i in items}
        assert {i.label for i in items if i.name in test} == {i.label for i in items}
    assert not [s for s in desktop.stamps() if "left_out" in s.name or "plain" in s.name]


def test_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"tuxpaint/stamps: in no folder .* apt-get install tuxp"):
        desktop.check_installed()
    write_packages(tmp_path)
    desktop.check_installed()
    (tmp_path / "backgrounds" / "mate" / "nature" / "Wood.jpg").unlink()
    with pytest.raises(ConfigError, match=r"mate/nature/Wood\.jpg: in no folder"):
        desktop.check_installed()


def test_set_is_written_once(trees, tmp_path, monkeypatch):
    out = trees.train[0].image.parents[1]
    monkeypatch.setattr(carriers, "trees", None)
    detection.write_trees(out)
    tree = json.loads((out / "annotations" / "instances_val2017.json").read_text())
    assert len(tree["images"]) == len(trees.test)
