"""The table of assignments joined with an index, against a dictionary of all keys."""

import json

import numpy as np
import pytest

from moce_dist.cluster import assignments
from moce_dist.cluster.assignments import (
    count_assignments,
    read_assignments,
    read_labels,
    read_rows,
    write_assignments,
)
from moce_dist.cluster.blocks import open_features
from moce_dist.data.columns import open_index, write_columns
from moce_dist.data.shards import Shard, write_index
from moce_dist.features.extract import feature_names
from moce_dist.settings import ConfigError

SIZES = (5, 1, 40, 7)
PATHS = ("b/part.tar", "a/part.tar", "z-first.tar", "caf\\xe9.tar")


@pytest.fixture(params=[True, False])
def joined(tmp_path, request, monkeypatch):
    """An index whose shards are not in the order of the table, which has held-out rows too."""
    monkeypatch.setattr(assignments, "_TABLE_ROWS", 9)
    index = write_index(
        tmp_path / "data",
        [
            Shard(path).with_samples((f"{path}/{i}", i, i + 1, i, 1) for i in range(size))
            for path, size in zip(PATHS, SIZES, strict=True)
        ],
    )
    if request.param:
        write_columns(index)
    named = [*zip(feature_names(index), index.shards, strict=True)]
    held = Shard("other.tar").with_samples((f"other/{i}", i, i + 1, i, 1) for i in range(4))
    folder = tmp_path / "features"
    folder.mkdir()
    for name, shard in [*named, ("other", held)]:
        np.save(folder / f"{name}.npy", np.zeros((shard.num_samples, 2), np.float16))
        (folder / f"{name}.keys.json").write_text(json.dumps(list(shard.keys)))
    files = open_features(folder)
    clusters = np.random.default_rng(0).integers(6, size=files.num_rows)
    path = tmp_path / "assignments.parquet"
    write_assignments(path, files, clusters, np.arange(files.num_rows) / 2)
    keys = [key for _, key in files.keys()]  # noqa: SIM118 - no dictionary
    return open_index(tmp_path / "data"), path, dict(zip(keys, clusters.tolist(), strict=True))


def test_labels_are_those_of_the_keys(joined):
    index, path, known = joined
    keys = [key for shard in index.shards for key in shard.keys]
    assert read_labels(path, index).tolist() == [known[key] for key in keys]
    assert read_assignments(path) == known


def test_a_sample_that_the_table_lacks_has_no_label(joined):
    index, path, known = joined
    shards = [*index.shards[:2], Shard("new.tar").with_samples([("new", 0, 1, 0, 1)])]
    more = index.shards[2].with_samples([("absent", 0, 1, 0, 1), (f"{PATHS[2]}/3", 0, 1, 0, 1)])
    labels = read_labels(path, type(index)(index.root, [*shards, more]))
    assert labels[:6].tolist() == [known[key] for shard in shards[:2] for key in shard.keys]
    assert labels[6:].tolist() == [-1, -1, known[f"{PATHS[2]}/3"]]


def test_counts_and_rows(joined):
    _, path, known = joined
    expected = np.bincount(list(known.values()), minlength=9)
    assert count_assignments(path, 9).tolist() == expected.tolist()
    assert count_assignments(path, 1).tolist() == expected[: 1 + max(known.values())].tolist()
    keys, rows = list(known), np.array([50, 3, 8, 9, 17])
    found = read_rows(path, rows)
    assert [key for _, key in found] == [keys[row] for row in rows]
    assert all(key.startswith((shard.split("-")[0], "a", "b", "z")) for shard, key in found)


@pytest.mark.parametrize("read", [read_assignments, lambda path: count_assignments(path, 1)])
def test_no_table_is_one_line(tmp_path, read):
    path = tmp_path / "assignments.parquet"
    with pytest.raises(ConfigError, match="is no readable table of assignments"):
        read(path)
    path.write_bytes(b"none")
    with pytest.raises(ConfigError, match="is no readable table of assignments"):
        read(path)
