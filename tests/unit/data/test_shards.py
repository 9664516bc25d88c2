"""Shards: scanning tars (whole, cut off, damaged), writing them, and their index."""

import hashlib
import io
import os
import subprocess
import tarfile

import pytest
import webdataset
from tars import read_members

from moce_dist.data.shards import (
    Fault,
    read_index,
    scan_shard,
    write_index,
)
from moce_dist.data.tarscan import split_name
from moce_dist.data.writer import ShardSeries, ShardWriter, all_or_nothing
from moce_dist.settings import ConfigError


def test_names_split_as_webdataset_splits_them():
    names = [
        "a.png",
        "x/y.z/c.seg.PNG",
        "x.y/README",
        "README",
        "a/b..png",
        "é/ü.jpg",
    ]
    for name in names:
        key, extension = webdataset.tariterators.base_plus_ext(name)
        assert split_name(name) == (None if key is None else (key, extension.lower())), name
    assert split_name("__meta__.json") == ("__meta__", "json")
    assert split_name("__meta.json__") is None
    # WebDataset takes d/ for the key of the last one
    hidden = [".hidden.png", "d/._c.jpg", "./._c.jpg", "__MACOSX/c.jpg", "d/.Trash/c.jpg"]
    assert [split_name(name) for name in hidden] == [None] * 5


def test_scan_finds_every_sample_where_tarfile_finds_it(three_tars):
    shard, faults = scan_shard(str(three_tars[1]))
    content = three_tars[1].read_bytes()
    assert faults == []
    assert shard.keys == [f"t1/{row}" for row in range(5)]
    assert shard.sha256 == hashlib.sha256(content).hexdigest()
    assert shard.bytes == len(content)
    with tarfile.open(three_tars[1]) as tar:
        images = [tar.extractfile(m).read() for m in tar if m.name.endswith("png")]
    ranges = zip(shard.offsets, shard.sizes, strict=True)
    assert [content[offset : offset + size] for offset, size in ranges] == images
    assert shard.starts == [0, *shard.ends[:-1]]
    assert all(position % 512 == 0 for position in shard.starts + shard.ends)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_scan_reads_long_names_of_all_formats(tmp_path, some_image, form):
    name = "/".join(["folder" * 10] * 3) + "/image"
    path = tmp_path / "long.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for key in ("first", name):
            info = tarfile.TarInfo(f"{key}.png")
            info.size = len(some_image(1))
            tar.addfile(info, io.BytesIO(some_image(1)))
    shard, faults = scan_shard(str(path))
    assert (shard.keys, faults) == (["first", name], [])
    assert read_members(str(path), shard.starts[1], shard.ends[1]) == {"png": some_image(1)}


def test_scan_passes_over_what_webdataset_passes_over(tmp_path, tar_of, some_image):
    members = [
        ("README", b"hello"),
        ("a.png", some_image(0)),
        ("._b.png", b"x"),
        ("b.png", some_image(1)),
    ]
    path = tar_of(tmp_path / "mixed.tar", members)
    shard, faults = scan_shard(str(path))
    assert (shard.keys, faults) == (["a", "b"], [])


def test_every_cut_keeps_whole_samples_and_is_one_fault(three_tars):
    path = three_tars[0]
    content = path.read_bytes()
    whole, _ = scan_shard(str(path))
    for size in range(512, whole.ends[-1] + 1, 128):
        path.write_bytes(content[:size])
        shard, faults = scan_shard(str(path))
        # of the very first sample nothing tells that a label should follow the image
        if size >= whole.ends[0]:
            assert shard.num_samples == sum(end <= size for end in whole.ends)
        assert all(end <= size for end in shard.ends), size
        assert [(fault.shard, fault.key) for fault in faults] == [(str(path), None)], size
        assert "cut off" in faults[0].reason


def test_tar_cut_off_in_its_first_header_is_no_tar(three_tars):
    os.truncate(three_tars[0], 100)
    with pytest.raises(ConfigError, match=r"part-0\.tar: is not an uncompressed tar"):
        scan_shard(str(three_tars[0]))


@pytest.mark.parametrize("where", ["header", "checksum"])
def test_damage_inside_a_tar_is_noticed(three_tars, where):
    content = bytearray(three_tars[0].read_bytes())
    shard, _ = scan_shard(str(three_tars[0]))
    position = shard.starts[2] + {"header": 0, "checksum": 150}[where]
    content[position] ^= 0xFF
    three_tars[0].write_bytes(content)
    damaged, faults = scan_shard(str(three_tars[0]))
    assert damaged.keys == ["t0/0", "t0/1", "t0/3", "t0/4"]
    assert [fault.key for fault in faults] == ["t0/2", None]
    assert "damaged header after 4 members" in faults[1].reason


def test_samples_without_a_image_are_faults(tmp_path, tar_of, some_image):
    members = [
        ("a.png", some_image(0)),
        ("b.txt", b"words"),
        ("c.png", b""),
        ("d.cls", b"3"),
        ("d.JPEG", some_image(1, "JPEG")),
    ]
    path = tar_of(tmp_path / "odd.tar", members)
    shard, faults = scan_shard(str(path))
    assert shard.keys == ["a", "d"]
    assert faults == [
        Fault(str(path), "b", "sample has no image member"),
        Fault(str(path), "c", "image is empty"),
    ]


def test_same_key_twice_in_a_row_is_two_samples(tmp_path, tar_of, some_image):
    members = [("a.png", some_image(0)), ("a.cls", b"1"), ("a.png", some_image(1)), ("a.cls", b"2")]
    shard, _ = scan_shard(str(tar_of(tmp_path / "twice.tar", members)))
    assert shard.keys == ["a", "a"]
    assert shard.sizes == [len(some_image(0)), len(some_image(1))]


@pytest.mark.parametrize("content", [b"", b"no tar at all, only text" * 100, b"\x1f\x8b" * 600])
def test_what_is_no_tar_is_refused_by_name(tmp_path, content):
    path = tmp_path / "bad.tar"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.tar: is not an uncompressed tar file"):
        scan_shard(str(path))


def test_missing_shard_is_refused_by_name(tmp_path):
    for path in (tmp_path / "none.tar", tmp_path):
        with pytest.raises(ConfigError, match="no such shard"):
            scan_shard(str(path))


def test_writer_makes_tars_that_others_read(tmp_path, some_image):
    writer = ShardWriter(tmp_path, "w.tar")
    for row in range(20):
        writer.add(f"k/{row}", {"png": some_image(row), "cls": str(row).encode()})
    assert not (tmp_path / "w.tar").exists()
    shard = writer.close()
    assert scan_shard(str(tmp_path / "w.tar"), path="w.tar") == (shard, [])
    assert subprocess.run(["tar", "-tf", tmp_path / "w.tar"], check=True, capture_output=True)
    found = list(webdataset.WebDataset(str(tmp_path / "w.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == shard.keys
    assert [sample["png"] for sample in found] == [some_image(row) for row in range(20)]
    assert [sample["cls"] for sample in found] == [str(row).encode() for row in range(20)]


def test_series_closes_a_tar_at_its_size(tmp_path, some_image):
    series = ShardSeries(tmp_path, "train", 8192)
    for row in range(30):
        content = some_image(row)
        series.writer(len(content) + 1024).add(f"{row:03d}", {"png": content})
    shards = series.close()
    assert [shard.path for shard in shards] == [f"train-{n:06d}.tar" for n in range(len(shards))]
    assert len(shards) > 3
    assert all((tmp_path / s.path).stat().st_size == s.bytes <= 8192 + 1024 for s in shards)
    assert [key for shard in shards for key in shard.keys] == [f"{row:03d}" for row in range(30)]


def test_sample_larger_than_a_shard_stands_alone(tmp_path):
    series = ShardSeries(tmp_path, "train", 1000)
    for key in "abc":
        series.writer(5000).add(key, {"png": bytes(5000)})
    assert [shard.keys for shard in series.close()] == [["a"], ["b"], ["c"]]


def test_index_returns_what_was_written(tmp_path, three_tars):
    shards = [scan_shard(str(path), cluster=3)[0] for path in three_tars]
    written = write_index(tmp_path, shards)
    assert read_index(tmp_path) == written
    assert (written.num_samples, written.shards[0].cluster) == (15, 3)
    assert written.url(shards[0]) == str(three_tars[0])
    assert read_index(tmp_path).shards[1].take([4, 0]).keys == ["t1/4", "t1/0"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80abc", "is not an index"),
        (b"{", "is not an index"),
        (b"[]", "is not an index"),
        (b'{"format": "other", "shards": []}', "format is 'other'"),
        (b'{"format": "moce_dist.index.v1", "shards": [{"no": 1}]}', "is not an index"),
        (None, "no such index"),
    ],
)
def test_foreign_index_is_refused_by_name(tmp_path, content, message):
    if content is not None:
        (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_index(tmp_path)
    assert str(tmp_path / "index.json") in str(caught.value)


@pytest.mark.parametrize("at", [0, 1])
def test_a_passing_error_of_a_server_is_no_missing_index(tmp_path, three_tars, file_server, at):
    written = write_index(tmp_path, [scan_shard(str(three_tars[0]))[0]])
    files = {"/index.json": (tmp_path / "index.json").read_bytes()}
    server = file_server(files, lambda n: "busy" * (n == at))
    assert read_index(server.url).shards == written.shards


@pytest.mark.parametrize(
    ("trouble", "error", "message"),
    [
        ("missing", ConfigError, "no such index"),
        ("forbidden", OSError, "the server answers with status 403"),
        ("busy", OSError, "the server answers with status 503"),
    ],
)
def test_a_lasting_error_of_a_server_is_named(tmp_path, file_server, trouble, error, message):
    server = file_server({"/index.json": b"{}"}, lambda n: trouble)
    with pytest.raises(error, match=rf"{server.url}/index\.json: .*{message}"):
        read_index(server.url, deadline_s=0.1)


def test_failed_attempt_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), all_or_nothing(out, ("*.tar", "sub/*.tar")):
        (out / "sub").mkdir()
        (out / "a.tar").touch()
        (out / "sub" / "b.tar").touch()
        raise ZeroDivisionError
    assert not out.exists()


def test_killed_attempt_is_cleared_by_the_next(tmp_path):
    (tmp_path / ".begun").touch()
    (tmp_path / "a.tar").touch()
    with all_or_nothing(tmp_path, ("*.tar",)):
        assert not (tmp_path / "a.tar").exists()
        (tmp_path / "b.tar").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["b.tar"]


def test_tars_of_somebody_else_are_never_removed(tmp_path):
    (tmp_path / "train-000000.tar").write_text("precious")
    with (
        pytest.raises(ConfigError, match=r"holds train-000000\.tar already"),
        all_or_nothing(tmp_path, ("*.tar",)),
    ):
        pytest.fail("must not begin")
    assert (tmp_path / "train-000000.tar").read_text() == "precious"


def test_a_tar_that_was_removed_is_not_finished(tmp_path):
    writer = ShardWriter(tmp_path, "0.tar")
    for row in range(3):
        writer.add(f"{row}", {"jpg": bytes(2**20)})
    (temporary,) = tmp_path.iterdir()
    temporary.unlink()
    with pytest.raises(FileNotFoundError, match=r"\.0\.tar\."):
        writer.close()
    assert list(tmp_path.iterdir()) == []
