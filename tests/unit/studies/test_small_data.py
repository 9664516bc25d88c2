"""The small study's data: relatives stay on one side, and no copy of a test is trained on."""

import gzip
import io
import json
import zipfile
from itertools import combinations

import numpy as np
import pytest
import small_data
import small_images
from PIL import Image
from small_data import (
    UNLIKE,
    ImageSet,
    build,
    domain_files,
    link_unlike,
    split_groups,
    task_files,
    unlike,
)
from small_images import SmallImage
from small_packages import Package, unpack

from moce_dist.data.audit import find_match, hash_images
from moce_dist.settings import ConfigError


def pixels(*seed, side=32):
    """Colours that run into each other, unlike those of any other seed."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(cells).resize((side, side), Image.Resampling.BILINEAR))


def family(label, group, size=3, **kwargs):
    return [
        SmallImage(pixels(label, group, i), f"{label}/{group}", str(label), **kwargs)
        for i in range(size)
    ]


@pytest.fixture
def two_classes():
    return [image for label in (0, 1) for group in range(12) for image in family(label, group)]


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def places(images, files):
    """Groups of the images that files (path, PNG) hold, by the first part of their paths."""
    groups = {image.pixels.tobytes(): image.group for image in images}
    found = {}
    for path, content in files:
        decoded = np.asarray(Image.open(io.BytesIO(content)))
        found.setdefault(path.split("/")[0], set()).add(groups[decoded.tobytes()])
    return found


def test_a_group_is_in_one_split_and_shares_are_kept(two_classes):
    found = places(two_classes, task_files(two_classes, min_class=10))
    assert {split: len(groups) for split, groups in found.items()} == {
        "train": 14,
        "val": 4,
        "test": 6,
    }
    assert not any(a & b for a, b in combinations(found.values(), 2))


def test_splits_that_images_come_with_are_kept_and_not_added_to(two_classes):
    given = family(0, 99, split="test")
    splits = split_groups([*two_classes, *given])
    of_class = {split for group, split in splits.items() if group.startswith("0/")}
    assert splits["0/99"] == "test" and of_class == {"test", "val"}
    assert [group for group, split in splits.items() if group[0] == "0" and split == "test"] == [
        "0/99"
    ]


def test_equal_and_mirrored_images_are_one_image(two_classes):
    first = two_classes[0]
    again = [
        first._replace(group="other"),
        first._replace(group="mirror", pixels=np.ascontiguousarray(first.pixels[:, ::-1])),
        SmallImage(np.full((32, 32, 3), 7, np.uint8), "one shade"),
    ]
    assert list(unlike([*two_classes, *again])) == two_classes


def test_the_unlike_data_hold_no_domain_of_their_tasks(tmp_path):
    for name in (*UNLIKE, "relief", "brain"):
        save(tmp_path / "pretrain" / name / "0.png", pixels(len(name)))
    domains = [path.name for path in (tmp_path / "pretrain").iterdir()]
    for _ in range(2):
        folder = link_unlike(tmp_path, domains)
        assert {path.parent.name for path in folder.glob("*/*.png")} == {"relief", "brain"}


def test_nothing_of_a_test_is_trained_on(tmp_path, two_classes, capsys):
    """A mirrored, darkened copy of a test image and that image's relatives are left out."""
    splits = split_groups(two_classes)
    tested = next(image for image in two_classes if splits.get(image.group) == "test")
    leak = SmallImage((tested.pixels[:, ::-1] * 0.9).astype(np.uint8), "somewhere else")
    other = SmallImage(pixels(5), "somewhere else")
    sets = {
        "blocks": ImageSet(lambda _: two_classes, 10),
        "other": ImageSet(lambda _: [leak, other]),
    }
    for name in ("climate-ade20k/images/validation", "composited-coco/val2017"):
        save(tmp_path / "tasks" / name / "0.png", pixels(9, len(name)))
    build(tmp_path, tmp_path.joinpath, sets)
    trained = sorted((tmp_path / "pretrain").glob("*/*.png"))
    found = places(two_classes, ((path.parent.name, path.read_bytes()) for path in trained[:-1]))
    assert found == {"blocks": {i.group for i in two_classes if i.group not in splits}}
    assert trained[-1].parent.name == "other" and len(trained) == 14 * 3 + 1
    assert (np.asarray(Image.open(trained[-1])) == other.pixels).all()
    hashes = hash_images(sorted((tmp_path / "held_out").glob("*/**/*.png")))
    assert len(hashes.names) == (6 + 4) * 3 + 2
    assert not any(find_match(hashes, path.read_bytes()) for path in trained)
    (planted,) = [content for _, content in domain_files([leak], hash_images(trained))]
    assert find_match(hashes, planted) is not None
    before = {path: path.stat().st_mtime_ns for path in trained}
    build(
        tmp_path,
        tmp_path.joinpath,
        {name: ImageSet(lambda _: 1 / 0, s.min_class) for name, s in sets.items()},
    )
    assert {path: path.stat().st_mtime_ns for path in trained} == before
    assert "blocks: 2 classes, train 42, val 12, test 18" in capsys.readouterr().out


def test_readers_name_groups_and_classes(tmp_path):
    game = tmp_path / "wesnoth-1.16-data/usr/share/games/wesnoth/1.16/data/core/images"
    for name in ("elves/archer+female-bow-2", "elves/archer-die1", "orcs/grunt", "orcs/wolf/ride"):
        save(game / f"units/{name}.png", pixels(*name.encode()))
    save(game / "units/orcs/speck.png", pixels(1, side=16))
    art = tmp_path / "openclipart-png/usr/share/openclipart/png"
    for name in ("food/fruit/apple_red", "food/fruit/apple_02", "unsorted/apple"):
        save(art / f"{name}.png", pixels(*name.encode()))
    (art / "food/link.png").symlink_to(art / "unsorted/apple.png")
    textures = tmp_path / "openarena-081-textures/usr/share/games/openarena/baseoa"
    textures.mkdir(parents=True)
    buffer = io.BytesIO()
    Image.fromarray(pixels(3, side=128)).save(buffer, "PNG")
    with zipfile.ZipFile(textures / "pak4-textures.pk3", "w") as archive:
        archive.writestr("textures/walls/stone02_b.png", buffer.getvalue())

    def read(reader):
        return [(image.group, image.label) for image in reader(tmp_path.joinpath)]

    assert read(small_images.sprites) == [
        ("elves/archer", "elves"),
        ("elves/archer", "elves"),
        ("orcs/grunt", "orcs"),
        ("orcs/wolf", "orcs"),
    ]
    assert read(small_images.clip_art) == [
        ("food/fruit/apple", "food"),
        ("food/fruit/apple", "food"),
        ("unsorted/apple", None),
    ]
    assert read(small_images.textures) == [("walls/stone", "walls")] * 4


def test_styles_and_sexes_of_an_emoji_are_one_group(tmp_path):
    names = {"1f468-200d-1f33e": "People & Body", "1f469-200d-1f33e": "People & Body"}
    names["2764-fe0f"] = "Symbols"
    entries = [{"image": f"{name}.png", "category": kind} for name, kind in names.items()]
    google = tmp_path / "emoji-datasource-google/package"
    for name in names:
        save(google / f"img/google/64/{name}.png", pixels(*name.encode()))
        folder = tmp_path / "emoji-datasource-twitter/package/img/twitter/64"
        save(folder / f"{name}.png", pixels(1, *name.encode()))
    (google / "emoji.json").write_text(json.dumps(entries))
    fluent = tmp_path / "@lobehub/fluent-emoji-3d/package/assets"
    save(fluent / "2764.webp", pixels(2))
    found = [(image.group, image.label) for image in small_images.emoji(tmp_path.joinpath)]
    assert found == [("1f33e", "People")] * 4 + [("2764", "Symbols")] * 3


def test_official_split_of_fashion(tmp_path):
    root = tmp_path / "dataset-fashion-mnist/usr/share/datasets/fashion-mnist"
    root.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    for part, rows in (("train", slice(0, 3)), ("t10k", slice(3, 5))):
        for name, content in (
            ("images-idx3", bytes(16) + images[rows].tobytes()),
            ("labels-idx1", bytes(8) + bytes([9, 1, 0][: rows.stop - rows.start])),
        ):
            (root / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    found = list(small_images.fashion(tmp_path.joinpath))
    assert [image.split for image in found] == [None] * 3 + ["test"] * 2
    assert [image.label for image in found] == ["boot", "trouser", "t_shirt", "boot", "trouser"]
    assert all(
        (f.pixels[2:30, 2:30] == image).all() for f, image in zip(found, images, strict=True)
    )


def test_a_package_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    package = Package("some-images", "1.0", "MIT")
    (tmp_path / "some-images").mkdir()
    assert unpack(package, tmp_path) == tmp_path / "some-images"
    fails = tmp_path / "apt-get"
    fails.write_text("#!/bin/sh\necho 'W: slow' >&2\necho 'E: Unable to locate it' >&2\nexit 100\n")
    fails.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(ConfigError, match=r"some-images 1\.0: apt-get download failed: E: Unable"):
        unpack(package, tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="package x 2: needs npm, which is not installed"):
        unpack(Package("x", "2", "MIT", "npm"), tmp_path)
    with pytest.raises(ConfigError, match="--out"):
        small_data.main([])
