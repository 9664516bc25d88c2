"""Nothing of a tar is lost or misread in silence, however it was made."""

import io
import os
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tars import read_members

from moce_dist.config import DataConfig
from moce_dist.data.audit import verify
from moce_dist.data.ingest import ingest
from moce_dist.data.shards import read_range, scan_shard, write_index
from moce_dist.data.tarscan import read_files, scan_tar
from moce_dist.settings import ConfigError

LONG = "/".join(["a long name of a folder " * 4] * 2)


def tar(*words, cwd):
    subprocess.run(["tar", *map(str, words)], cwd=cwd, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path, some_image):
    """Six samples of an image and a label, in folders, one of them with a long name."""
    root = tmp_path / "tree"
    for number in range(6):
        folder = root / ("cat", "dog", LONG)[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(some_image(number))
        (folder / f"{number}.cls").write_bytes(b"%d" % number)
    return root


def gnu(*words):
    return lambda tree, out: tar("--sort=name", *words, "-cf", out, ".", cwd=tree)


def python(form):
    def make(tree, out):
        with tarfile.open(out, "w", format=form) as archive:
            archive.add(tree, ".", filter=lambda info: info)

    return make


def appended(tree, out):
    folders = sorted(path.name for path in tree.iterdir())
    tar("--sort=name", "-cf", out, folders[0], cwd=tree)
    for name in folders[1:]:
        tar("--sort=name", "-rf", out, name, cwd=tree)


def parts(tree, out):
    for name in sorted(path.name for path in tree.iterdir()):
        tar("--sort=name", "-cf", out.with_name(f"part-{name[:3]}.tar"), name, cwd=tree)
    return sorted(out.parent.glob("part-*.tar"))


def joined_by_cat(tree, out):
    out.write_bytes(b"".join(part.read_bytes() for part in parts(tree, out)))


def joined_without_end_marks(tree, out):
    contents = [part.read_bytes() for part in parts(tree, out)]
    blocks = [c[: -(-len(c.rstrip(b"\0")) // 512) * 512] for c in contents]
    out.write_bytes(b"".join(blocks) + bytes(1024))


def joined_by_tar(tree, out):
    first, *others = parts(tree, out)
    out.write_bytes(first.read_bytes())
    for part in others:
        tar("-Af", out, part, cwd=tree)


def far_apart(tree, out):
    """A megabyte and a half of zeros between archives, as on tapes."""
    out.write_bytes(b"".join(part.read_bytes() + bytes(3 * 2**19) for part in parts(tree, out)))


WAYS = {
    "gnu": gnu("--format=gnu"),
    "oldgnu": gnu("--format=oldgnu"),
    "posix": gnu("--format=posix"),
    "one block": gnu("-b1"),
    "large blocks": gnu("-b2048"),
    "numeric owner": gnu("--numeric-owner", "--mtime=1970-01-01", "--format=posix"),
    "absolute": lambda tree, out: tar("-P", "--sort=name", "-cf", out, tree, cwd=tree),
    "label": gnu("-V", "a volume"),
    "times of a backup": gnu("--format=gnu", "--incremental"),
    "global note": gnu("--format=posix", "--pax-option=globexthdr.name=g,comment=by hand"),
    "python gnu": python(tarfile.GNU_FORMAT),
    "python pax": python(tarfile.PAX_FORMAT),
    "appended": appended,
    "cat": joined_by_cat,
    "cat without end marks": joined_without_end_marks,
    "concatenated by tar": joined_by_tar,
    "far apart": far_apart,
}


def read(path):
    """All samples as {last part of the key: {extension: content}}, and the faults."""
    shard, faults = scan_shard(str(path))
    found = {}
    for key, start, end in zip(shard.keys, shard.starts, shard.ends, strict=True):
        sample = read_members(str(path), start, end)
        files = read_files(memoryview(read_range(str(path), start, end - start)))
        assert {name.rpartition(".")[2]: content for name, content in files} == sample
        found[key.rsplit("/")[-1]] = sample
    images = zip(shard.keys, shard.offsets, shard.sizes, strict=True)
    for key, offset, size in images:
        assert found[key.rsplit("/")[-1]]["png"] == read_range(str(path), offset, size)
    return found, faults


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_make_a_tar_gives_what_tar_and_tarfile_give(tmp_path, tree, way):
    path, out = tmp_path / "a.tar", tmp_path / "out"
    WAYS[way](tree, path)
    found, faults = read(path)
    assert faults == []
    out.mkdir()
    tar("-xif", path, cwd=out)
    extracted = {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert {f"{k}.{e}": c for k, sample in found.items() for e, c in sample.items()} == extracted
    with tarfile.open(path, ignore_zeros=True) as archive:
        names = Counter(Path(member.name).name for member in archive if member.isfile())
    assert names == Counter(extracted.keys())
    index = write_index(tmp_path, [scan_shard(str(path))[0]])
    assert list(verify(index, DataConfig())) == []


def archive(path, *members):
    """Members are (name, content), (name, type, name of the target) or (name, None): sparse."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as made:
        for name, content, *target in members:
            info = tarfile.TarInfo(name)
            if target:
                info.type, info.linkname = content, target[0]
            else:
                info.size = len(content)
            made.addfile(info, None if target else io.BytesIO(content))
    return path


def faults_of(path):
    return {fault.key: fault.reason for fault in scan_shard(str(path))[1]}


def test_every_link_is_named_and_its_neighbours_are_read(tmp_path, some_image):
    path = archive(
        tmp_path / "a.tar",
        ("a/0.png", some_image(0)),
        ("a/1.png", tarfile.LNKTYPE, "a/0.png"),
        ("a/2.png", tarfile.SYMTYPE, "../elsewhere.png"),
        ("a/3.png", some_image(3)),
        ("a/4.png", some_image(4)),
        ("a/4.cls", tarfile.LNKTYPE, "a/0.cls"),
        ("a/link", tarfile.SYMTYPE, "a"),
        ("a/5.png", tarfile.FIFOTYPE, ""),
    )
    assert scan_shard(str(path))[0].keys == ["a/0", "a/3"]
    assert faults_of(path) == {
        "a/1": "member png is a hard link to a/0.png",
        "a/2": "member png is a symbolic link to ../elsewhere.png",
        "a/4": "member cls is a hard link to a/0.cls",
        "a/5": "member png is of the type b'6'",
    }


def test_hard_links_of_gnu_tar_are_as_many_faults(tmp_path, tree):
    for number in (0, 1, 2):
        os.link(tree / ("cat", "dog", LONG)[number] / f"{number}.png", tree / f"again{number}.png")
    tar("--sort=name", "-cf", tmp_path / "a.tar", ".", cwd=tree)
    found, faults = read(tmp_path / "a.tar")
    assert (len(found), len(faults)) == (6, 3)
    assert all("is a hard link to ./" in fault.reason for fault in faults)


@pytest.mark.parametrize(
    "form", ["gnu", "posix", "posix --sparse-version=0.0", "posix --sparse-version=0.1"]
)
def test_sparse_files_are_named(tmp_path, some_image, form):
    with (tmp_path / "1.png").open("wb") as file:
        file.truncate(2**20)
        file.seek(2**20)
        file.write(some_image(1))
    for number in (0, 2):
        (tmp_path / f"{number}.png").write_bytes(some_image(number))
    words = f"--format={form}".split()
    tar("-S", *words, "-cf", "a.tar", "0.png", "1.png", "2.png", cwd=tmp_path)
    found, faults = read(tmp_path / "a.tar")
    assert found == {"0": {"png": some_image(0)}, "2": {"png": some_image(2)}}
    assert [(f.key, "sparse" in f.reason) for f in faults] == [("1", True)]


def test_every_image_that_a_key_swallows_is_named(tmp_path, some_image):
    dotted = [(f"camera/IMG_2020.01.{n:03d}.jpg", some_image(n, "JPEG")) for n in range(9)]
    plain = [(f"phone/{n}.jpg", some_image(n, "JPEG")) for n in range(9)]
    path = archive(tmp_path / "a.tar", *dotted, *plain)
    assert len(scan_shard(str(path))[0].keys) == 9
    assert sorted(faults_of(path)) == [name for name, _ in dotted]
    with pytest.raises(ConfigError, match="9 of 18 samples cannot be used"):
        ingest(f"shards:{path}", tmp_path / "out", DataConfig(), tmp_path / "faults.jsonl")


def test_a_sample_with_an_image_swallows_only_what_belongs_to_it(tmp_path, some_image):
    members = ["a.jpg", "a.seg.png", "a.depth.tif", "b.jpg", "b.2.jpg", "b.copy 3.jpg", "c.seg.png"]
    path = archive(tmp_path / "a.tar", *((name, some_image(1, "JPEG")) for name in members))
    assert scan_shard(str(path))[0].keys == ["a", "b"]
    assert sorted(faults_of(path)) == ["b.2.jpg", "b.copy 3.jpg", "c"]


def test_images_of_all_kinds_count_but_usual_ones_first(tmp_path, some_image):
    members = [("a.jfif", "JPEG"), ("b.im", "PNG"), ("b.png", "PNG"), ("c.avif", "AVIF")]
    path = archive(tmp_path / "a.tar", *((name, some_image(1, kind)) for name, kind in members))
    shard, faults = scan_shard(str(path))
    assert (shard.keys, faults) == (["a", "b", "c"], [])
    assert read_range(str(path), shard.offsets[1], 4) == b"\x89PNG"


@pytest.mark.parametrize("prefix", ["./", "cat/", ""])
def test_hidden_members_leave_their_neighbours_alone(tmp_path, some_image, prefix, caplog):
    members = []
    for number in range(4):
        for name, content in (
            (f"{number}.cls", b"1"),
            (f"{number}.jpg", some_image(number, "JPEG")),
        ):
            members += [(f"{prefix}._{name}", b"\0\5\x16\7" + bytes(80)), (prefix + name, content)]
    path = archive(tmp_path / "a.tar", *members, ("__MACOSX/0.jpg", b"x"), ("README", b"x"))
    shard, faults = scan_shard(str(path))
    assert (shard.num_samples, faults) == (4, [])
    assert all(
        read_members(str(path), a, b)["cls"] == b"1"
        for a, b in zip(shard.starts, shard.ends, strict=True)
    )
    assert "left out: 9 hidden, 1 without an ending" in caplog.text


@pytest.mark.parametrize("tail", [b"more", b"\x89PNG" + bytes(600), b"x" * 512])
def test_bytes_behind_the_end_mark_are_a_fault(three_tars, tail):
    content = three_tars[0].read_bytes()
    three_tars[0].write_bytes(content + tail)
    shard, (fault,) = scan_shard(str(three_tars[0]))
    assert shard.num_samples == 5
    assert fault.key is None and f"at byte {len(content)}" in fault.reason
    index = write_index(three_tars[0].parent, [shard])
    assert [f.key for f in verify(index, DataConfig())] == [None]


def damage(path, names):
    """Overwrite a letter of members' headers: their checksums are no longer right."""
    with tarfile.open(path) as tar:
        offsets = [tar.getmember(name).offset for name in names]
    with path.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            file.write(b"x")


def test_behind_a_damaged_header_the_next_whole_one_is_read(tmp_path, some_image):
    """Of a hundred images one is lost, as `tar -x` loses it, and not all that follow."""
    members = [
        (f"{n:02d}.{e}", c) for n in range(9) for e, c in (("cls", b"1"), ("png", some_image(n)))
    ]
    path = archive(tmp_path / "a.tar", *members)
    damage(path, ("03.png", "06.cls"))
    shard, faults = scan_shard(str(path))
    assert shard.keys == [f"{n:02d}" for n in range(9) if n != 3]
    assert [(f.key, "damaged header" in f.reason) for f in faults] == [(None, True)] * 2
    for key, offset, size in zip(shard.keys, shard.offsets, shard.sizes, strict=True):
        assert read_range(str(path), offset, size) == some_image(int(key))
    index = write_index(tmp_path, [shard])
    assert list(verify(index, DataConfig(), known=[(str(path), None)])) == []


@pytest.mark.parametrize("size", [b"-5", b"abc"])
def test_a_size_that_is_none_costs_one_image(tmp_path, some_image, size):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(4):
            info = tarfile.TarInfo(f"{number}.png")
            info.pax_headers = {"size": size.decode()} if number == 1 else {}
            content = some_image(number)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    shard, faults = scan_shard(str(path))
    assert shard.keys == ["0", "2", "3"] and faults
    for key, offset, count in zip(shard.keys, shard.offsets, shard.sizes, strict=True):
        assert read_range(str(path), offset, count) == some_image(int(key))


def test_folders_may_have_any_letter_in_their_names(tmp_path, some_image):
    names = ["a\nb.c/0.png", "x\ty/1.png", "caf\udce9/2.png", "\x1b[31m/3.png"]
    path = archive(tmp_path / "a.tar", *((name, some_image(1)) for name in names))
    shard, faults = scan_shard(str(path))
    assert shard.keys == ["a\nb.c/0", "x\ty/1", "caf\\xe9/2", "\x1b[31m/3"] and faults == []


def test_archives_one_behind_the_other_share_no_sample(tmp_path, some_image):
    """The label of the second archive is no label of the first one's last image."""
    for name, members in (
        ("a", [("x.png", some_image(1))]),
        ("b", [("x.cls", b"1"), ("y.png", some_image(2))]),
    ):
        archive(tmp_path / f"{name}.tar", *members)
    path = tmp_path / "ab.tar"
    path.write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    shard, faults = scan_shard(str(path))
    assert shard.keys == ["x", "y"]
    assert [fault.key for fault in faults] == ["x"]
    assert set(read_members(str(path), shard.starts[0], shard.ends[0])) == {"png"}


def test_verify_notices_what_an_index_lacks(three_tars, tmp_path):
    """A planted mistake: a reader that ends at the first end mark."""
    path = tmp_path / "ab.tar"
    path.write_bytes(b"".join(p.read_bytes() for p in three_tars))
    whole, _ = scan_shard(str(path))
    index = write_index(tmp_path, [whole.take(list(range(5)))])
    found = list(verify(index, DataConfig()))
    assert [f.key for f in found] == [f"t{tar}/{row}.png" for tar in (1, 2) for row in range(5)]
    known = [(str(path), f"t{tar}/{row}") for tar in (1, 2) for row in range(5)]
    assert list(verify(index, DataConfig(), known=known)) == []


@pytest.mark.parametrize("size", [b"g" * 11, b"-0000001000"])
def test_verify_ends_at_junk_behind_a_tar_that_looks_like_a_header(size, three_tars, tmp_path):
    block = bytearray(512)
    block[124:135], block[156:157] = size, tarfile.XGLTYPE
    path = tmp_path / "a.tar"
    path.write_bytes(three_tars[0].read_bytes() + block)
    index = write_index(tmp_path, [scan_shard(str(path))[0]])
    (fault,) = verify(index, DataConfig())
    assert fault.key is None and "bytes that are part of no member" in fault.reason


def test_a_thousand_mutated_tars_are_read_or_refused(tree, tmp_path):
    joined_by_cat(tree, tmp_path / "a.tar")
    whole, draws = (tmp_path / "a.tar").read_bytes().rstrip(b"\0"), np.random.default_rng(0)
    refused = 0
    for number in range(1000):
        content = bytearray(whole)
        # half of the damage in the first headers
        for _ in range(draws.integers(1, 9)):
            content[draws.integers(len(content) if number % 2 else 2000)] = draws.integers(256)
        if number % 3 == 0:
            del content[draws.integers(len(content)) :]
        try:
            scan = scan_tar(io.BytesIO(content + bytes(1024)))
        except tarfile.ReadError:
            refused += 1
            continue
        assert scan.bytes == len(content) + 1024
        assert all(0 <= s.start < s.end <= scan.bytes for s in scan.samples)
    assert 0 < refused < 900


class ClientError(Exception):
    """As botocore's and aiohttp's, which are no OSError."""


def test_an_error_of_reading_is_no_damage_of_the_tar(three_tars):
    class Failing(io.FileIO):
        reads = 0

        def read(self, size=-1):
            self.reads += 1
            if self.reads == self.failing:
                raise ClientError
            return super().read(size)

    with Failing(three_tars[0]) as file:
        file.failing = 0
        assert len(scan_tar(file).samples) == 5
        number = file.reads
    for failing in range(1, number + 1):
        with Failing(three_tars[0]) as file:
            file.failing = failing
            with pytest.raises(OSError, match=r"cannot be read \(ClientError\)"):
                scan_tar(file)


@pytest.fixture
def long_tar(tmp_path, tar_of):
    """Twelve megabytes, so that it is read in several requests."""
    return tar_of(tmp_path / "long.tar", [(f"{n:02d}.bmp", os.urandom(2**20)) for n in range(12)])


@pytest.mark.parametrize("kind", ["busy", "cut"])
def test_a_remote_tar_is_scanned_again_after_a_passing_error(long_tar, file_server, caplog, kind):
    files, expected = {"/a.tar": long_tar.read_bytes()}, scan_shard(str(long_tar))
    assert expected[0].num_samples == 12
    quiet = file_server(files)
    assert scan_shard(f"{quiet.url}/a.tar", path=str(long_tar)) == expected and not caplog.text
    requests = len(quiet.asked)
    for failing in range(1, requests + 1):
        server = file_server(files, lambda n, failing=failing: kind * (n == failing))
        assert scan_shard(f"{server.url}/a.tar", path=str(long_tar)) == expected
        assert len(server.asked) == requests + failing > 4
        assert f"{server.url}/a.tar: " in caplog.text and "it is read again" in caplog.text


@pytest.mark.parametrize(
    ("kind", "first", "reason"),
    [
        ("busy", 2, "the server answers with status 503"),
        ("forbidden", 2, "the server answers with status 403"),
        ("whole", 2, "the server ignores byte ranges"),
        ("cut", 2, r"cannot be read \(ClientPayloadError\)"),
    ],
)
def test_a_lasting_error_ends_ingest_and_names_the_tar(
    tmp_path, long_tar, file_server, kind, first, reason
):
    server = file_server({"/a.tar": long_tar.read_bytes()}, lambda n: kind * (n >= first))
    config = DataConfig(read_deadline_s=0.5, max_fault_fraction=1)
    with pytest.raises(OSError, match=rf"{server.url}/a\.tar: {reason}"):
        ingest(f"shards:{server.url}/a.tar", tmp_path / "out", config, tmp_path / "faults.jsonl")
    assert not (tmp_path / "out").exists() and not (tmp_path / "faults.jsonl").exists()
    # what will not change is not asked again
    assert (len(server.asked) > 3) == (kind in ("busy", "cut"))


def test_a_tar_of_a_busy_server_is_not_called_missing(long_tar, file_server):
    files = {"/a.tar": long_tar.read_bytes()}
    busy = file_server(files, lambda n: "busy" * (n <= 2))
    assert scan_shard(f"{busy.url}/a.tar", path=str(long_tar)) == scan_shard(str(long_tar))
    server = file_server(files, lambda n: "missing")
    with pytest.raises(ConfigError, match=r"a\.tar: no such shard"):
        scan_shard(f"{server.url}/a.tar")
    assert len(server.asked) == 1
