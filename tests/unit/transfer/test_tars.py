"""Labelled tars of one's own."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from moce_dist.settings import ConfigError
from moce_dist.transfer.classification.task import Classification

from .conftest import png, texture


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def samples(prefix: str, count: int) -> list[tuple[str, bytes]]:
    draws, members = np.random.default_rng(len(prefix)), []
    for i in range(count):
        members += [(f"{prefix}{i}.cls", f"{i % 2}\n".encode())]
        members += [(f"{prefix}{i}.png", png(texture(i % 2, draws)))]
    return members


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    write_tar(tmp_path / "train-000.tar", samples("a", 4))
    write_tar(tmp_path / "train-001.tar", samples("b", 3))
    write_tar(tmp_path / "test-000.tar", samples("c", 5))
    return tmp_path


def test_tars_are_read_in_order_with_their_labels(tars):
    task = Classification.open("webdataset", tars)
    assert [item.key for item in task.train][3:5] == ["train-000.tar/a3", "train-001.tar/b0"]
    assert [item.label for item in task.test] == [0, 1, 0, 1, 0]
    assert task.classes == ["0", "1"] and task.metric == "accuracy"
    assert task.train[5].read() == dict(samples("b", 3))["b1.png"]
    assert task.train[5].size() == len(task.train[5].read())
    task.scan(threads=2)


def test_names_of_classes_are_read(tars):
    (tars / "classes.txt").write_text("rows\ncolumns\nboth\n")
    assert Classification.open("webdataset", tars).classes == ["rows", "columns", "both"]
    (tars / "classes.txt").write_text("rows\n")
    with pytest.raises(ConfigError, match=r"\.cls = 1: .*classes.txt lists 1 classes"):
        Classification.open("webdataset", tars)


def test_val_stands_in_for_test(tars):
    (tars / "test-000.tar").rename(tars / "val-7.tar")
    assert len(Classification.open("webdataset", tars).test) == 5


def test_damaged_image_is_named_by_its_sample(tars):
    write_tar(tars / "test-000.tar", [("x.png", b"nothing"), ("x.cls", b"0")])
    with pytest.raises(ConfigError, match=r"test-000\.tar/x: unreadable image"):
        Classification.open("webdataset", tars).scan(threads=2)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("x.png", b"p")], "sample x has no label"),
        ([("x.cls", b"1")], "x: sample has no image"),
        ([("x.png", b"p"), ("x.cls", b"cat")], "'cat': must be a class number"),
        ([("x.png", b"p"), ("x.cls", b"-1")], "'-1': must be a class number"),
        ([], "holds no samples"),
    ],
)
def test_wrong_samples_are_named(tars, members, message):
    write_tar(tars / "train-001.tar", members)
    with pytest.raises(ConfigError, match=f"train-001.tar: .*{message}"):
        Classification.open("webdataset", tars)


def test_missing_and_cut_tars_are_named(tars):
    whole = (tars / "train-001.tar").read_bytes()
    (tars / "train-001.tar").write_bytes(whole[:2000])
    with pytest.raises(ConfigError, match=r"train-001\.tar: cut off"):
        Classification.open("webdataset", tars)
    (tars / "train-001.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ConfigError, match=r"train-001\.tar: "):
        Classification.open("webdataset", tars)
    (tars / "test-000.tar").unlink()
    with pytest.raises(ConfigError, match="has no tars of test or val"):
        Classification.open("webdataset", tars)


def test_a_key_of_two_samples_is_refused(tars):
    write_tar(tars / "train-001.tar", samples("b", 3) + samples("b", 1))
    with pytest.raises(ConfigError, match=r"train-001\.tar: b0: two samples have this key"):
        Classification.open("webdataset", tars)
