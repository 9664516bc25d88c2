"""The mapped index says what index.json says, and gives way where that was written anew."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from moce_dist.data.columns import open_index, open_table, write_columns
from moce_dist.data.shards import COLUMNS_NAME, Shard, write_index
from moce_dist.data.table import Runs, sample_table


def shard(number, keys, cluster):
    n = len(keys)
    starts = [2048 * (i + number) for i in range(n)]
    samples = zip(
        keys,
        starts,
        [start + 2048 for start in starts],
        [start + 512 * (i + 1) for i, start in enumerate(starts)],
        [100 + i for i in range(n)],
        strict=True,
    )
    entry = Shard(f"t{number}.tar", bytes=2048 * n, sha256=f"digest {number}", cluster=cluster)
    return entry.with_samples(samples)


@pytest.fixture
def index(tmp_path):
    shards = [shard(0, ["a", "b"], 1), shard(1, ["\u00e9", "d", "e"], 0), shard(2, ["f"], 1)]
    return write_index(tmp_path, shards)


def assert_same(one, other):
    rows = np.arange(other.num_samples)
    assert list(one.keys) == list(other.keys) and one.keys[2] == other.keys[2]
    for name in ("shard", "cluster", "offset", "size", "before", "after"):
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


def test_mapped_shards_equal_those_of_the_index(index, tmp_path, monkeypatch):
    said = open_index(tmp_path)
    write_columns(index)
    monkeypatch.setattr("moce_dist.data.columns.read_index", None)
    mapped = open_index(tmp_path)
    assert mapped.shards == said.shards == index.shards
    assert mapped.shards[1] != said.shards[0]
    assert mapped.shards[1].keys[1] == "d" and mapped.shards[1].sizes[-1] == 102
    assert mapped.shards[1].take([2, 0]) == index.shards[1].take([2, 0])
    with pytest.raises(TypeError):  # nothing is there but the index itself
        (tmp_path / COLUMNS_NAME).unlink()
        open_index(tmp_path)


def test_a_mapped_shard_is_sent_with_its_own_samples_only(index, tmp_path):
    write_columns(index)
    sent = pickle.loads(pickle.dumps(open_index(tmp_path).shards[1]))
    assert sent == index.shards[1] and isinstance(sent.keys, list)
    many = [shard(n, [f"{n}-{i}" for i in range(50)], n) for n in range(200)]
    write_columns(write_index(tmp_path, many))
    assert len(pickle.dumps(open_index(tmp_path).shards[7])) < 3000


@pytest.mark.parametrize("damage", [b"", b"half of it", None])
def test_damaged_columns_are_named_and_the_index_is_read(index, tmp_path, caplog, damage):
    write_columns(index)
    path = tmp_path / COLUMNS_NAME
    path.write_bytes(path.read_bytes()[:700] if damage is None else damage)
    assert open_index(tmp_path).shards == index.shards
    assert open_table(tmp_path).num_samples == 6
    assert f"{path}: is not used, index.json is read instead" in caplog.text


def test_columns_are_not_written_for_what_they_cannot_hold(index, tmp_path):
    for end in (2**33, 0):
        odd = replace(index.shards[0], ends=[index.shards[0].ends[0], end])
        write_columns(write_index(tmp_path, [odd]))
        assert not (tmp_path / COLUMNS_NAME).exists()
        assert open_index(tmp_path).shards == [odd]


def test_members_of_clusters_that_lie_apart(index):
    table = sample_table(index)
    clusters, places = np.array([1, 0, 1, 1, 0]), np.array([2, 0, 0, 1, 2])
    assert table.members(clusters, places).tolist() == [5, 2, 0, 1, 4]
    rows = np.arange(6)
    by_sample = sample_table(index).__class__(
        *(table.urls, table.keys, table.shard, table.offset, table.size, table.before, table.after),
        table.cluster[rows],
    )
    assert by_sample.members(clusters, places).tolist() == [5, 2, 0, 1, 4]
    assert Runs(np.array([7, 8]), np.array([2, 1]))[np.array([0, 1, 2])].tolist() == [7, 7, 8]
