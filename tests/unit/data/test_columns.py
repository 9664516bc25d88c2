"""The mapped index says what index.json says, and gives way where that was written anew."""

import numpy as np
import pytest

from moce_dist.data.columns import open_shards, open_table, write_columns
from moce_dist.data.shards import COLUMNS_NAME, Shard, write_index
from moce_dist.data.table import Runs, sample_table


def shard(number, keys, cluster):
    n = len(keys)
    places = [512 * (i + number) for i in range(n)]
    ends = [place + 512 for place in places]
    return Shard(
        f"t{number}.tar", n, 512 * n, f"digest {number}", cluster, keys, places, ends, places,
        [100 + i for i in range(n)],
    )  # fmt: skip


@pytest.fixture
def index(tmp_path):
    shards = [shard(0, ["a", "b"], 1), shard(1, ["\u00e9", "d", "e"], 0), shard(2, ["f"], 1)]
    return write_index(tmp_path, shards)


def assert_same(one, other):
    rows = np.arange(other.num_samples)
    assert list(one.keys) == list(other.keys) and one.keys[2] == other.keys[2]
    for name in ("shard", "cluster", "offset", "size"):
        assert getattr(one, name)[rows].tolist() == getattr(other, name)[rows].tolist(), name
    assert (one.urls, one.digests, one.num_bytes) == (other.urls, other.digests, other.num_bytes)
    assert one.cluster_sizes.tolist() == other.cluster_sizes.tolist()


def test_columns_are_the_index(index, tmp_path):
    write_columns(index)
    mapped = open_table(tmp_path, 4)
    assert mapped.known_bytes is not None
    assert not mapped.offset.flags.owndata
    assert_same(mapped, sample_table(index, 4))


def test_an_index_without_columns_is_read(index, tmp_path):
    assert open_table(tmp_path).known_bytes is None
    assert_same(open_table(tmp_path), sample_table(index))


def test_columns_of_another_index_are_not_used(index, tmp_path):
    write_columns(index)
    kept = (tmp_path / COLUMNS_NAME).read_bytes()
    other = write_index(tmp_path, index.shards[:2])
    assert not (tmp_path / COLUMNS_NAME).exists()
    (tmp_path / COLUMNS_NAME).write_bytes(kept)
    assert_same(open_table(tmp_path), sample_table(other))


def test_shards_are_said_without_reading_the_index(index, tmp_path, monkeypatch):
    said = [(s.path, s.num_samples, s.sha256, s.cluster) for s in open_shards(tmp_path)]
    write_columns(index)
    monkeypatch.setattr("moce_dist.data.columns.read_index", None)
    assert [(s.path, s.num_samples, s.sha256, s.cluster) for s in open_shards(tmp_path)] == said
    assert said[0] == ("t0.tar", 2, "digest 0", 1)
    with pytest.raises(TypeError):  # nothing is there but the index itself
        (tmp_path / COLUMNS_NAME).unlink()
        open_shards(tmp_path)


def test_members_of_clusters_that_lie_apart(index):
    table = sample_table(index)
    clusters, places = np.array([1, 0, 1, 1, 0]), np.array([2, 0, 0, 1, 2])
    assert table.members(clusters, places).tolist() == [5, 2, 0, 1, 4]
    rows = np.arange(6)
    by_sample = sample_table(index).__class__(
        table.urls, table.keys, table.shard, table.offset, table.size, table.cluster[rows]
    )
    assert by_sample.members(clusters, places).tolist() == [5, 2, 0, 1, 4]
    assert Runs(np.array([7, 8]), np.array([2, 1]))[np.array([0, 1, 2])].tolist() == [7, 7, 8]
