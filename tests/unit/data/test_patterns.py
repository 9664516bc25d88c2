"""What is there is a path before it is a pattern."""

import pytest

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
