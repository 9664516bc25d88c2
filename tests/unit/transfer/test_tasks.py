"""Reading tasks: what is right is read whole, what is wrong is named."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from moce_dist.settings import ConfigError
from moce_dist.transfer.classification.official import OFFICIAL
from moce_dist.transfer.classification.task import TASKS, Classification
from moce_dist.transfer.kinds import task_names
from moce_dist.transfer.request import Request, check_request

from .conftest import png


def test_folder_is_read_in_order_of_its_classes(image_folder):
    task = Classification.open("imagefolder", image_folder)
    assert task.classes == ["columns", "rows"]
    assert (len(task.train), len(task.test)) == (48, 24)
    assert [i.label for i in task.train] == [0] * 24 + [1] * 24
    assert task.train[0].key == "train/columns/000.png"
    task.scan(threads=2)


@pytest.fixture
def data(tmp_path: Path, image_folder: Path) -> Path:
    return Path(shutil.copytree(image_folder, tmp_path / "data"))


def test_val_stands_in_for_test(data):
    (data / "test").rename(data / "val")
    assert Classification.open("imagefolder", data).test[0].key == "val/columns/000.png"


def test_choices_are_made_on_val(data):
    shutil.copytree(data / "test", data / "val")
    (data / "val/rows/000.png").unlink()
    chosen, tested = (Classification.open("imagefolder", data, split) for split in ("val", "test"))
    assert {item.key.split("/")[0] for item in chosen.test} == {"val"}
    assert {item.key.split("/")[0] for item in tested.test} == {"test"}
    assert len(chosen.test) == len(tested.test) - 1 and chosen.train == tested.train
    assert chosen.fingerprint() != tested.fingerprint()


def test_without_a_third_split_choices_are_made_on_a_fifth_of_the_training_images(data):
    chosen, tested = (Classification.open("imagefolder", data, split) for split in ("val", "test"))
    everything = {item.key for item in tested.train}
    kept, held = ({item.key for item in part} for part in (chosen.train, chosen.test))
    assert kept | held == everything and not kept & held
    assert 0.1 < len(held) / len(everything) < 0.4
    again = Classification.open("imagefolder", data, "val")
    assert [item.key for item in again.test] == [item.key for item in chosen.test]
    # a folder that stands in for the test is no folder for choices
    (data / "test").rename(data / "val")
    assert {i.key.split("/")[0] for i in Classification.open("imagefolder", data, "val").test} == {
        "train"
    }


@pytest.mark.parametrize("missing", ["train", "test"])
def test_missing_split_is_named(data, missing):
    shutil.rmtree(data / missing)
    with pytest.raises(ConfigError, match=f"has no folder {missing}"):
        Classification.open("imagefolder", data)


def test_empty_class_is_named(data):
    for file in (data / "test" / "rows").iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match="test/rows: holds no images"):
        Classification.open("imagefolder", data)


def test_splits_with_other_classes_are_refused(data):
    (data / "test" / "rows").rename(data / "test" / "diagonals")
    with pytest.raises(ConfigError, match="differ in the classes"):
        Classification.open("imagefolder", data)


def test_single_class_is_no_task(data):
    for split in ("train", "test"):
        shutil.rmtree(data / split / "rows")
    with pytest.raises(ConfigError, match="has 1 class folders"):
        Classification.open("imagefolder", data)


@pytest.mark.parametrize("content", [b"", b"no image at all", None])
def test_scan_names_what_cannot_be_read(data, content):
    bad = data / "train" / "rows" / "007.png"
    cut = png(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8))[:-3000]
    bad.write_bytes(cut if content is None else content)
    with pytest.raises(ConfigError, match=r"rows/007\.png: unreadable image"):
        Classification.open("imagefolder", data).scan(threads=2)


def test_fingerprint_sees_labels_and_sizes(data):
    before = Classification.open("imagefolder", data).fingerprint()
    assert Classification.open("imagefolder", data).fingerprint() == before
    file = data / "train" / "rows" / "000.png"
    file.rename(data / "train" / "columns" / "999.png")
    assert Classification.open("imagefolder", data).fingerprint() != before


def test_subset_is_drawn_by_its_seed(image_folder):
    task = Classification.open("imagefolder", image_folder)
    one, same, other = (task.subset(10, seed) for seed in (0, 0, 1))
    assert one.train == same.train != other.train
    assert len(one.train) == 10 and one.test == task.test
    assert task.subset(None, 0) is task and task.subset(1000, 0) is task


@pytest.mark.parametrize("name", ["digits", "silhouettes"])
def test_sample_tasks_have_every_class_in_both_splits(name):
    task = Classification.open(name, None)
    for items in (task.train, task.test):
        assert {item.label for item in items} == set(range(len(task.classes)))
    train = {item.content for item in task.train}
    assert not any(item.content in train for item in task.test)


def test_table_names_the_tasks():
    samples = {"digits", "silhouettes", "climate"}
    assert set(TASKS) == {*samples, "imagefolder", "webdataset", *OFFICIAL}
    assert len(OFFICIAL) == 11


LOGISTIC = ("logistic", "logistic10")


@pytest.mark.parametrize("protocol", LOGISTIC)
def test_logistic_regression_is_refused_where_images_have_several_labels(protocol, config):
    request = Request("voc2007", None, ("mae",), ("finetune", protocol), 1, None)
    with pytest.raises(ConfigError) as refused:
        check_request(request, config)
    allowed = "must be one of finetune, linear, knn for voc2007"
    assert str(refused.value) == f"--protocol {protocol}: {allowed}"


def test_every_task_of_one_label_an_image_takes_logistic_regression(config):
    of_one_label = set(TASKS) - {"voc2007"}
    for name in of_one_label:
        check_request(Request(name, None, ("mae",), LOGISTIC, 1, None), config)
    for name in set(task_names()) - of_one_label:
        with pytest.raises(ConfigError, match=f"--protocol logistic: must be one of .* {name}$"):
            check_request(Request(name, None, ("mae",), LOGISTIC, 1, None), config)
    allowed = "must be one of finetune, linear, knn, logistic, logisticN"
    with pytest.raises(ConfigError, match=f"--protocol logistic0: {allowed}"):
        check_request(Request("digits", None, ("mae",), ("logistic0",), 1, None), config)
