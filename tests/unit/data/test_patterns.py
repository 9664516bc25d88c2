"""What is there is a path before it is a pattern."""

import io
import tarfile

import pytest

from moce_dist.data.shards import read_range, scan_shard
from moce_dist.data.sources import expand_shards, parse_source
from moce_dist.settings import ConfigError

FILES = (
    "[v1] final/p-0.tar", "[v1] final/p-1.tar", "v{1}/p-0.tar", "v{1}/p-1.tar", "v{1/p.tar",
    "a,b/x.tar", "plain/a,b.tar", "plain/p0.tar", "plain/p1.tar", "plain/p{0..1}.tar", "q?/x*.tar",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def expand(pattern):
    return expand_shards(parse_source(f"shards:{pattern}")[1])


@pytest.mark.parametrize("name", FILES)
def test_file_that_is_named_exactly_is_that_file(name, folder):
    assert expand(name) == expand(folder / name) == [str(folder / name)]


@pytest.mark.parametrize(
    "name", ["a::b", "q#r?s%20", "file: x", "[a]*", "\u00fc{1,2}", "a,b", "s3:", "~"]
)
def test_tar_in_a_folder_of_any_name_is_read(name, tmp_path):
    (tmp_path / name).mkdir()
    with tarfile.open(tmp_path / name / "p.tar", "w") as tar:
        member = tarfile.TarInfo("0.png")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"image"))
    (url,) = expand(tmp_path / name / "p.tar")
    shard, faults = scan_shard(url)
    assert (shard.keys, faults) == (["0"], [])
    assert read_range(url, shard.offsets[0], shard.sizes[0]) == b"image"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("[v1] final/p-*.tar", ["[v1] final/p-0.tar", "[v1] final/p-1.tar"]),
        ("[v1] final/p-{0..1}.tar", ["[v1] final/p-0.tar", "[v1] final/p-1.tar"]),
        ("v{1}/p-{1,0}.tar", ["v{1}/p-1.tar", "v{1}/p-0.tar"]),
        ("v{1}/p-[01].tar", ["v{1}/p-0.tar", "v{1}/p-1.tar"]),
        ("v{1/*.tar", ["v{1/p.tar"]),
        ("plain/p[01].tar", ["plain/p0.tar", "plain/p1.tar"]),
        ("plain/p0.tar,v{1}/p-0.tar", ["plain/p0.tar", "v{1}/p-0.tar"]),
        ("{plain/p0,v{1}/p-1}.tar", ["plain/p0.tar", "v{1}/p-1.tar"]),
    ],
)
def test_pattern_below_folders_with_letters_of_patterns(pattern, names, folder):
    assert expand(pattern) == [str(folder / name) for name in names]


@pytest.mark.parametrize("pattern", ["none/*.tar", "[v2]/p-0.tar", "plain/p2.tar", "plain"])
def test_pattern_without_a_file_is_refused(pattern, folder):
    with pytest.raises(ConfigError, match="no such file"):
        expand(pattern)
