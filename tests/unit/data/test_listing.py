"""One lister of image files, and the same rules wherever images are listed."""

import io
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import moce_dist
from moce_dist.data.decoders import image_endings
from moce_dist.data.listing import ending, list_images
from moce_dist.data.sources import expand_shards, list_folder
from moce_dist.settings import ConfigError
from moce_dist.transfer.classification.task import Classification
from moce_dist.transfer.commands import list_named
from moce_dist.transfer.segmentation.task import Segmentation

APPLE_DOUBLE = b"\0\x05\x16\x07" + bytes(80)
LEFT_BEHIND = ("._a.png", ".DS_Store", "Thumbs.db", "THUMBS.DB", "desktop.ini", ".hidden.png")
FOLDERS = (".ipynb_checkpoints", ".Trash-1000/files", "__MACOSX", "@eaDir", "$RECYCLE.BIN")


def png(number, kind="PNG"):
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def litter(folder):
    """What desktops, editors and disks leave in a folder of images."""
    for name in LEFT_BEHIND:
        (folder / name).write_bytes(APPLE_DOUBLE)
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
        (folder / name / "copy.png").write_bytes(png(99))


@pytest.fixture
def classes(tmp_path):
    """DATA/{train,test}/{a,b}, three images each."""
    data = tmp_path / "task"
    for split in ("train", "test"):
        for name in "ab":
            (data / split / name).mkdir(parents=True)
            for number in range(3):
                (data / split / name / f"{number}.png").write_bytes(png(number))
    return data


def scenes_of(classes):
    """The same images as ADE20K has them, classes side by side."""
    data = classes.parent / "ade"
    for split, theirs in (("train", "training"), ("test", "validation")):
        for part in ("images", "annotations"):
            shutil.copytree(classes / split, data / part / theirs, symlinks=True)
    (data / "classes.txt").write_text("one\ntwo\n")
    return data


def counts(classes):
    """How many images each of the readers finds: of the training split, of all for ADE20K."""
    task = Classification.open("imagefolder", classes)
    scenes = Segmentation.read("ade20k", scenes_of(classes))
    return [
        len(task.train),
        len(list_folder(classes / "train").files),
        len(list_named([str(classes / "train")])),
        len(scenes.train),
    ]


def test_what_desktops_leave_behind_is_passed_over_everywhere(classes):
    for folder in (classes / "train", classes / "train" / "a", classes / "test" / "b"):
        litter(folder)
    assert counts(classes) == [6] * 4
    listing = list_images(classes / "train")
    assert listing.left_out == {"hidden": 2 * (len(LEFT_BEHIND) + len(FOLDERS))}


def test_linked_folders_are_followed_everywhere(classes, tmp_path):
    shutil.move(classes / "train" / "a", tmp_path / "store")
    (classes / "train" / "a").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "more").symlink_to(classes / "test" / "a")
    assert counts(classes) == [9] * 4


def test_loops_and_links_into_the_tree_are_noticed_everywhere(classes):
    (classes / "train" / "a" / "up").symlink_to("..")
    (classes / "train" / "a" / "above").symlink_to(classes.parent)
    (classes / "train" / "a" / "again").symlink_to("../b")
    assert counts(classes) == [6] * 4
    left_out = list_images(classes / "train").left_out
    assert left_out == {"linked folder that leads above": 2, "linked folder met before": 1}


def test_an_earlier_name_of_a_link_takes_nothing_from_a_real_folder(classes):
    (classes / "train" / "a" / "0").symlink_to(classes / "train" / "b")
    labels = [item.label for item in Classification.open("imagefolder", classes).train]
    assert labels == [0] * 3 + [1] * 3


def test_every_ending_that_can_be_opened_counts_in_any_case(classes):
    folder = classes / "train" / "a"
    for number, name in enumerate(sorted(image_endings())):
        (folder / f"x{number}.{name.upper() if number % 2 else name}").write_bytes(png(number))
    listing = list_images(folder)
    assert {ending(file.path.name) for file in listing.files} == image_endings()
    assert len(Classification.open("imagefolder", classes).train) == 6 + len(image_endings())


@pytest.mark.parametrize("form", ["JPEG jfif", "AVIF avif", "JPEG2000 jp2"])
def test_images_of_these_endings_are_read(tmp_path, form):
    kind, name = form.split()
    (tmp_path / f"photo.{name}").write_bytes(png(1, kind))
    folder = list_folder(tmp_path)
    assert [(file.key, file.size > 0) for file in folder.files] == [("photo", True)]


def test_what_is_left_out_is_counted_by_ending(tmp_path, caplog):
    (tmp_path / "a.png").write_bytes(png(1))
    for name in ("b.HEIC", "c.heic", "d.txt", "README", ".hidden"):
        (tmp_path / name).write_bytes(b"x")
    assert list_folder(tmp_path).left_out == "2 .heic, 1 .txt, 1 hidden, 1 without an ending"
    assert len(list_named([str(tmp_path)])) == 1
    assert "left out: 2 .heic" in caplog.text
    (tmp_path / "a.png").unlink()
    with pytest.raises(ConfigError, match=r"holds no images \(only 2 \.heic"):
        list_folder(tmp_path)


def test_what_cannot_be_read_is_named(classes):
    (classes / "train" / "a" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(classes / "train" / "a" / "pipe.png")
    with pytest.raises(ConfigError, match=r"(gone|pipe)\.png: .* \(and 1 more\)"):
        Classification.open("imagefolder", classes)


def test_images_beside_the_class_folders_are_named(classes, caplog):
    (classes / "train" / "stray.png").write_bytes(png(1))
    assert len(Classification.open("imagefolder", classes).train) == 6
    assert "1 images in no class folder" in caplog.text


def test_masks_in_upper_case_and_names_twice(classes):
    data = scenes_of(classes)
    mask = data / "annotations" / "training" / "a" / "0.png"
    mask.rename(mask.with_suffix(".PNG"))
    assert len(Segmentation.read("ade20k", data).train) == 6
    mask.write_bytes(png(0))
    with pytest.raises(ConfigError, match="has the same name"):
        Segmentation.read("ade20k", data)


def test_hidden_tars_are_no_part_of_a_pattern(tmp_path):
    for name in ("a.tar", "._a.tar"):
        (tmp_path / name).write_bytes(b"x")
    assert expand_shards(f"{tmp_path}/*.tar") == [str(tmp_path / "a.tar")]


@pytest.mark.parametrize(
    "stray", [".DS_Store", "ant/.DS_Store", "ant/Thumbs.db", "ant/._image_0001.jpg", "readme.txt"]
)
def test_a_stray_file_does_not_disturb_caltech(tmp_path, stray):
    folder = tmp_path / "caltech101" / "101_ObjectCategories"
    for name in ("accordion", "ant", "barrel"):
        (folder / name).mkdir(parents=True)
        for number in range(1, 8):
            (folder / name / f"image_{number:04d}.jpg").write_bytes(png(number, "JPEG"))
    clean = Classification.open("caltech101", tmp_path)
    assert (len(clean.classes), len(clean.train), len(clean.test)) == (3, 9, 12)
    (folder / stray).write_bytes(APPLE_DOUBLE)
    assert Classification.open("caltech101", tmp_path) == clean


def test_there_is_one_lister():
    root = Path(moce_dist.__file__).parent
    found = subprocess.run(
        ["grep", "-rlE", r"os\.walk|scandir|iterdir\(\)|rglob\(", "--include=*.py", root / "data",
         root / "samples", root / "transfer"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = {str(Path(line).relative_to(root)) for line in found.stdout.splitlines()}
    # desktop.py reads an installed package; writer.py asks whether its own folder is empty, and
    # further.py lists the checkpoint that it has written
    assert names == {
        "data/listing.py", "samples/desktop.py", "data/writer.py", "transfer/further.py",
    }  # fmt: skip
