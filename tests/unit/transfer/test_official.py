"""The published sets, from tiny folders in the exact layout of each."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from moce_dist.data.images import decode_image
from moce_dist.settings import ConfigError
from moce_dist.transfer.classification.official import OFFICIAL
from moce_dist.transfer.classification.task import Classification

from .conftest import png, texture

# what a builder promises: (training labels, test labels), sorted by key
Promise = tuple[list[int], list[int]]


def image(path: Path, label: int, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(texture(label % 2, np.random.default_rng(seed))))


def lines(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")


def aircraft(root: Path) -> Promise:
    data = root / "fgvc-aircraft-2013b" / "data"
    lines(data / "variants.txt", "707-320", "DC-3 Dakota")
    for split, ids in (("trainval", ["11", "12", "13"]), ("test", ["21", "22"])):
        names = ["707-320", "DC-3 Dakota", "DC-3 Dakota"]
        lines(data / f"images_variant_{split}.txt", *map(" ".join, zip(ids, names, strict=False)))
        for i in ids:
            image(data / "images" / f"{i}.jpg", int(i))
    return [0, 1, 1], [0, 1]


def caltech(root: Path) -> Promise:
    folder = root / "caltech101" / "101_ObjectCategories"
    for name, count in (("BACKGROUND_Google", 2), ("ant", 32), ("binocular", 35), ("rare", 5)):
        for i in range(count):
            image(folder / name / f"image_{i + 1:04d}.jpg", count, i)
    return [0] * 30 + [1] * 30 + [2] * 2, [0] * 2 + [1] * 5 + [2] * 3


def cars(root: Path) -> Promise:
    folder = root / "stanford_cars"
    fields = [(name, "O") for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")]
    fields += [("class", "O"), ("fname", "O")]
    labels = {"train": [2, 1, 3], "test": [3, 1]}
    for split, classes in labels.items():
        rows = [(1, 2, 3, 4, c, f"{i + 1:05d}.jpg") for i, c in enumerate(classes)]
        for *_, c, name in rows:
            image(folder / f"cars_{split}" / name, c)
        name = "devkit/cars_train_annos" if split == "train" else "cars_test_annos_withlabels"
        (folder / "devkit").mkdir(parents=True, exist_ok=True)
        savemat(folder / f"{name}.mat", {"annotations": np.array([rows], dtype=fields)})
    names = np.array(["AM General Hummer", "Acura RL", "Audi TT"], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names[None]})
    return [1, 0, 2], [2, 0]


def records(labels: list[tuple[int, ...]]) -> bytes:
    draws = np.random.default_rng(len(labels))
    pixels = [draws.integers(0, 256, 3072, np.uint8).tobytes() for _ in labels]
    return b"".join(bytes(label) + p for label, p in zip(labels, pixels, strict=True))


def cifar10(root: Path) -> Promise:
    folder = root / "cifar-10-batches-bin"
    lines(folder / "batches.meta.txt", *("airplane", "automobile", "bird"), "")
    for i in range(1, 6):
        (folder / f"data_batch_{i}.bin").write_bytes(records([(i % 3,), (0,)]))
    (folder / "test_batch.bin").write_bytes(records([(2,), (1,)]))
    return [1, 0, 2, 0, 0, 0, 1, 0, 2, 0], [2, 1]


def cifar100(root: Path) -> Promise:
    folder = root / "cifar-100-binary"
    lines(folder / "fine_label_names.txt", "apple", "bear", "can")
    (folder / "train.bin").write_bytes(records([(9, 0), (8, 2)]))
    (folder / "test.bin").write_bytes(records([(7, 1)]))
    return [0, 2], [1]


def dtd(root: Path) -> Promise:
    folder = root / "dtd" / "dtd"
    for split in ("train", "val", "test"):
        names = [f"{name}/{name}_{split}.jpg" for name in ("banded", "zigzagged")]
        lines(folder / "labels" / f"{split}1.txt", *names)
        for label, name in enumerate(names):
            image(folder / "images" / name, label)
    return [0, 0, 1, 1], [0, 1]


def flowers(root: Path) -> Promise:
    folder = root / "flowers-102"
    for i in range(1, 8):
        image(folder / "jpg" / f"image_{i:05d}.jpg", i)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 5, 5, 2, 3]])})
    ids = {"trnid": [[1, 2]], "valid": [[3, 7]], "tstid": [[4, 5, 6]]}
    savemat(folder / "setid.mat", {name: np.array(rows) for name, rows in ids.items()})
    return [76, 0, 101, 2], [4, 4, 1]


def food(root: Path) -> Promise:
    folder = root / "food-101"
    for split, count in (("train", 3), ("test", 1)):
        found = {n: [f"{n}/{split}{i}" for i in range(count)] for n in ("apple_pie", "waffles")}
        lines(folder / "meta" / f"{split}.json", json.dumps(found))
        for names in found.values():
            for i, name in enumerate(names):
                image(folder / "images" / f"{name}.jpg", i)
    return [0] * 3 + [1] * 3, [0, 1]


def pets(root: Path) -> Promise:
    folder = root / "oxford-iiit-pet"
    rows = {
        "trainval": ["Abyssinian_1 1 1 1", "great_dane_2 2 2 1"],
        "test": ["great_dane_9 2 2 1"],
    }
    for split, found in rows.items():
        lines(folder / "annotations" / f"{split}.txt", *found)
        for row in found:
            image(folder / "images" / f"{row.split()[0]}.jpg", 0)
    return [0, 1], [1]


def sun(root: Path) -> Promise:
    folder = root / "SUN397"
    lines(folder / "ClassName.txt", "/a/abbey", "/c/church/indoor")
    for name in ("a/abbey/sun_a", "c/church/indoor/sun_b"):
        for i in range(3):
            image(folder / f"{name}{i}.jpg", i)
    lines(folder / "Training_01.txt", "/a/abbey/sun_a0.jpg", "/c/church/indoor/sun_b2.jpg")
    lines(folder / "Testing_01.txt", "/c/church/indoor/sun_b1.jpg", "/a/abbey/sun_a1.jpg")
    return [0, 1], [0, 1]


def voc(root: Path) -> None:
    folder = root / "VOCdevkit" / "VOC2007"
    found = {
        "000005": [("chair", 0), ("chair", 1), ("sofa", 1)],
        "000007": [("car", 0)],
        "000001": [("dog", 0), ("person", 0)],
    }
    for name, objects in found.items():
        text = "".join(
            f"<object><name>{n}</name><difficult>{d}</difficult>"
            f"<part><name>head</name></part></object>"
            for n, d in objects
        )
        lines(folder / "Annotations" / f"{name}.xml", f"<annotation>{text}</annotation>")
        image(folder / "JPEGImages" / f"{name}.jpg", 0)
    lines(folder / "ImageSets" / "Main" / "trainval.txt", "000005", "000007")
    lines(folder / "ImageSets" / "Main" / "test.txt", "000001")


BUILDERS: dict[str, Callable[[Path], Promise]] = {
    **{"aircraft": aircraft, "caltech101": caltech, "cars": cars, "cifar10": cifar10},
    **{"cifar100": cifar100, "dtd": dtd, "flowers102": flowers, "food101": food},
    **{"pets": pets, "sun397": sun},
}


def test_every_set_is_tested():
    assert {*BUILDERS, "voc2007"} == set(OFFICIAL)


@pytest.mark.parametrize("name", BUILDERS)
def test_official_splits_and_labels(name, tmp_path):
    promised = BUILDERS[name](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    task = Classification.open(name, tmp_path)
    for items, labels in zip((task.train, task.test), promised, strict=True):
        assert sorted(item.label for item in items) == sorted(labels)
    if name in ("aircraft", "cars", "cifar10", "cifar100", "flowers102"):
        assert ([i.label for i in task.train], [i.label for i in task.test]) == promised
    keys = [item.key for item in (*task.train, *task.test)]
    assert len(set(keys)) == len(keys)
    task.scan(threads=1)
    assert sorted(tmp_path.rglob("*")) == before, "reading writes nothing"


def test_metrics_are_those_of_the_sets():
    per_class = {name for name, o in OFFICIAL.items() if o.metric == "mean_class_accuracy"}
    assert per_class == {"aircraft", "caltech101", "flowers102", "pets"}
    assert {name for name, o in OFFICIAL.items() if o.metric == "mAP"} == {"voc2007"}


def test_class_names(tmp_path):
    for name, expected in {
        "aircraft": ["707-320", "DC-3 Dakota"],
        "caltech101": ["ant", "binocular", "rare"],
        "cars": ["AM General Hummer", "Acura RL", "Audi TT"],
        "pets": ["Abyssinian", "Great Dane"],
        "sun397": ["abbey", "church/indoor"],
        "cifar10": ["airplane", "automobile", "bird"],
    }.items():
        BUILDERS[name](tmp_path)
        assert list(Classification.open(name, tmp_path).classes) == expected
    flowers(tmp_path)
    assert len(Classification.open("flowers102", tmp_path).classes) == 102


def test_caltech_draws_thirty_by_name_whatever_else_is_there(tmp_path):
    caltech(tmp_path)
    whole = Classification.open("caltech101", tmp_path)
    train, test = ({item.key for item in part} for part in (whole.train, whole.test))
    assert not train & test
    assert [item.key for item in whole.train][:30] != sorted(train | test)[:30]
    # validation draws from the training images of every class, independently of their own draw
    folder = tmp_path / "caltech101" / "101_ObjectCategories" / "many"
    for i in range(300):
        image(folder / f"image_{i + 1:04d}.jpg", 300, i)
    tried = Classification.open("caltech101", tmp_path, "val")
    many = [sum("/many/" in item.key for item in part) for part in (tried.train, tried.test)]
    assert sum(many) == 30 and 1 <= many[1] <= 12
    shutil.rmtree(folder)
    # an image of another class, and one of the test, are missing
    lacking = [max(key for key in test if name in key) for name in ("/rare/", "/binocular/")]
    for key in lacking:
        (tmp_path / key).unlink()
    partial = Classification.open("caltech101", tmp_path)
    others = {item.key for item in partial.train if "/rare/" not in item.key}
    assert others == {key for key in train if "/rare/" not in key}
    assert {item.key for item in partial.test if "/binocular/" in item.key} == {
        key for key in test if "/binocular/" in key and key not in lacking
    }


def test_pixels_of_cifar_stand_where_they_belong(tmp_path):
    cifar10(tmp_path)
    raw = (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").read_bytes()
    planes = np.frombuffer(raw[3073 + 1 :], np.uint8).reshape(3, 32, 32)
    shown = decode_image(Classification.open("cifar10", tmp_path).test[1].read())
    assert np.array_equal(shown, planes.transpose(1, 2, 0))


def test_voc_has_several_labels_and_leaves_out_difficult_ones(tmp_path):
    voc(tmp_path)
    task = Classification.open("voc2007", tmp_path)
    assert task.is_multi_label and len(task.classes) == 20
    labels = dict(zip(task.classes, task.train[0].label, strict=True))
    assert {name: y for name, y in labels.items() if y} == {"chair": 1, "sofa": -1}
    labels = dict(zip(task.classes, task.test[0].label, strict=True))
    assert {name for name, y in labels.items() if y} == {"dog", "person"}


def test_pickled_cifar_is_refused_and_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "exploded",)

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ConfigError, match=r"expects cifar-10-batches-bin/.*pickled .* is not read"):
        Classification.open("cifar10", tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_missing_folder_is_named_with_what_was_expected(name, tmp_path):
    with pytest.raises(ConfigError, match=f"needs --data; expected DATA/{OFFICIAL[name].needs[0]}"):
        Classification.open(name, None)
    with pytest.raises(ConfigError, match="is not a folder; expected DATA/"):
        Classification.open(name, tmp_path / "nothing")
    with pytest.raises(ConfigError, match=f"expects {OFFICIAL[name].needs[0]}") as caught:
        Classification.open(name, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir()), "asking for a set makes no folder"


@pytest.mark.parametrize(
    "name", [n for n in sorted(BUILDERS) if not n.startswith("c") or n == "cars"]
)
def test_listed_image_that_is_missing_is_named(name, tmp_path):
    BUILDERS[name](tmp_path)
    victim = sorted(p for p in tmp_path.rglob("*.jpg") if "BACKGROUND" not in str(p))[0]
    victim.unlink()
    with pytest.raises(ConfigError, match=f"{victim.name}: is listed but missing"):
        Classification.open(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("aircraft", "fgvc-aircraft-2013b/data/images_variant_test.txt", b"21 Unheard Of\n"),
        ("cars", "stanford_cars/devkit/cars_meta.mat", b"no mat"),
        ("flowers102", "flowers-102/setid.mat", b""),
        ("food101", "food-101/meta/train.json", b"{"),
        ("pets", "oxford-iiit-pet/annotations/test.txt", b"one two\n"),
        ("dtd", "dtd/dtd/labels/val1.txt", b"\xff\xfe"),
    ],
)
def test_damaged_list_is_one_clear_line(name, file, content, tmp_path):
    BUILDERS[name](tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ConfigError, match=f"--task {name} cannot be read: ") as caught:
        Classification.open(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_an_image_of_no_class_is_named(tmp_path):
    sun(tmp_path)
    (tmp_path / "SUN397/ClassName.txt").write_bytes(b"/a/abbey\n")
    with pytest.raises(ConfigError, match=r"sun_b2\.jpg: is of no class of ClassName\.txt"):
        Classification.open("sun397", tmp_path)


def test_wrong_labels_and_sizes_are_refused(tmp_path):
    cifar10(tmp_path)
    folder = tmp_path / "cifar-10-batches-bin"
    (folder / "test_batch.bin").write_bytes(records([(3,)]))
    with pytest.raises(ConfigError, match=r"test_batch\.bin/0: label 3, must be below 3"):
        Classification.open("cifar10", tmp_path)
    (folder / "test_batch.bin").write_bytes(records([(1,)])[:-5])
    with pytest.raises(ConfigError, match="must be a multiple of 3073"):
        Classification.open("cifar10", tmp_path)
    voc(tmp_path)
    annotation = tmp_path / "VOCdevkit" / "VOC2007" / "Annotations" / "000007.xml"
    annotation.write_text("<annotation><object><name>unicorn</name></object></annotation>")
    with pytest.raises(ConfigError, match="'unicorn' is no class of VOC2007"):
        Classification.open("voc2007", tmp_path)
    annotation.write_text("<annotation>")
    with pytest.raises(ConfigError, match="voc2007 cannot be read"):
        Classification.open("voc2007", tmp_path)


def test_empty_split_is_refused(tmp_path):
    pets(tmp_path)
    shutil.rmtree(tmp_path / "oxford-iiit-pet" / "images")
    (tmp_path / "oxford-iiit-pet" / "images").mkdir()
    (tmp_path / "oxford-iiit-pet" / "annotations" / "test.txt").write_text("")
    (tmp_path / "oxford-iiit-pet" / "annotations" / "trainval.txt").write_text("")
    with pytest.raises(ConfigError, match="lists no training images"):
        Classification.open("pets", tmp_path)


def test_voc_goes_through_the_whole_job(tmp_path, run, job):
    voc(tmp_path / "voc")
    flags = ["--task", "voc2007", "--data", str(tmp_path / "voc"), "--run", str(run.root)]
    job.main([*flags, "--backbone", "mae"])
    metrics = json.loads((run.transfer("voc2007") / "metrics.json").read_text())
    assert metrics["metric"] == "mAP"
    for row in metrics["results"]:
        assert row["measures"].keys() == {"mAP", "mAP_all_points", "mAP_uninterpolated"}
        assert row["value"] == row["measures"]["mAP"] and 0 <= row["value"] <= 1
    assert [row["protocol"] for row in metrics["results"]] == ["finetune", "linear", "knn"]


def test_flowers_are_measured_per_class_by_the_whole_job(tmp_path, run, job):
    flowers(tmp_path / "flowers")
    flags = ["--task", "flowers102", "--data", str(tmp_path / "flowers"), "--run", str(run.root)]
    job.main([*flags, "--backbone", "mae", "--protocol", "knn"])
    metrics = json.loads((run.transfer("flowers102") / "metrics.json").read_text())
    assert metrics["metric"] == "mean_class_accuracy"
    assert metrics["results"][0]["measures"].keys() == {"mean_class_accuracy", "accuracy"}
