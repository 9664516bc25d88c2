"""The cache of remote samples: same batches, nothing asked twice, bounded, never stale."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moce_dist.config import DataConfig
from moce_dist.data.batches import stream
from moce_dist.data.cache import SampleRange
from moce_dist.data.plan import Plan
from moce_dist.data.ranges import RangeReader
from moce_dist.data.shards import write_index
from moce_dist.data.stream import StreamSpec, open_cache
from moce_dist.data.table import sample_table
from moce_dist.data.writer import ShardWriter

PER_TAR, TARS, BATCH = 25, 4, 10


def some_image(draws):
    file = io.BytesIO()
    Image.fromarray(draws.integers(0, 255, (16, 16, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def index(tmp_path):
    draws, shards = np.random.default_rng(0), []
    for tar in range(TARS):
        writer = ShardWriter(tmp_path / "tars", f"part-{tar}.tar", cluster=tar % 2)
        for number in range(PER_TAR):
            writer.add(f"{tar}/{number}", {"png": some_image(draws)})
        shards.append(writer.close())
    return write_index(tmp_path / "tars", shards)


@pytest.fixture
def remote(index, range_server):
    """The same shards on a server, and the server."""
    contents = {f"/{s.path}": (Path(index.url(s)).read_bytes(), "") for s in index.shards}
    server = range_server(contents)
    return replace(index, root=server.url), server


def batches(index, tmp_path, epoch=0, **data):
    """All batches of an epoch."""
    plan = Plan(sample_table(index), BATCH, seed=0)
    config = DataConfig(**{"image_size": 8, "loader_processes": 0, **data})
    spec = StreamSpec(plan, config, 4, 1, 0, tmp_path / "faults.jsonl", "mae")
    steps = plan.steps_per_epoch
    one_group = np.zeros_like
    return list(stream(spec, one_group, start=epoch * steps, stop=(epoch + 1) * steps))


def assert_same(some, others):
    for a, b in zip(some, others, strict=True):
        assert a.keys == b.keys and torch.equal(a.images, b.images)
        assert a.weights.all() and b.weights.all()


def kept(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_second_epoch_asks_for_nothing_and_sees_the_same(index, remote, tmp_path):
    far, server = remote
    cache = str(tmp_path / "cache")
    assert_same(batches(far, tmp_path, cache=cache), batches(index, tmp_path))
    asked = sum(server.requests.values())
    assert asked > 0
    assert_same(batches(far, tmp_path, epoch=1, cache=cache), batches(index, tmp_path, epoch=1))
    assert sum(server.requests.values()) == asked
    # other processes of the node find them too
    assert_same(batches(far, tmp_path, cache=cache, loader_processes=2), batches(index, tmp_path))
    assert sum(server.requests.values()) == asked


def test_cache_stays_within_its_bytes_and_keeps_the_same_samples(remote, tmp_path):
    far, server = remote
    total = sum(size for shard in far.shards for size in shard.sizes)
    cache = tmp_path / "cache"
    batches(far, tmp_path, cache=str(cache), cache_bytes=total // 2)
    first = sorted(kept(cache))
    assert 0.3 * TARS * PER_TAR < len(first) < 0.7 * TARS * PER_TAR
    before = sum(server.requests.values())
    batches(far, tmp_path, epoch=1, cache=str(cache), cache_bytes=total // 2)
    assert sorted(kept(cache)) == first
    assert sum(server.requests.values()) > before


def test_damaged_entry_is_read_again(index, remote, tmp_path):
    far, server = remote
    cache = tmp_path / "cache"
    batches(far, tmp_path, cache=str(cache))
    flipped, short, *_ = kept(cache)
    content = flipped.read_bytes()
    flipped.write_bytes(content[:9] + bytes([content[9] ^ 1]) + content[10:])
    short.write_bytes(short.read_bytes()[:-7])
    before = sum(server.requests.values())
    assert_same(batches(far, tmp_path, cache=str(cache)), batches(index, tmp_path))
    assert sum(server.requests.values()) == before + 2
    assert flipped.read_bytes() == content


def test_what_a_killed_process_left_is_written_over(index, remote, tmp_path):
    far, _ = remote
    cache = tmp_path / "cache"
    batches(far, tmp_path, cache=str(cache))
    entry, *_ = kept(cache)
    half = entry.with_name(f".{entry.name}.tmp")
    half.write_bytes(entry.read_bytes()[:9])
    entry.unlink()
    assert_same(batches(far, tmp_path, cache=str(cache)), batches(index, tmp_path))
    assert entry.exists() and not half.exists()


def test_shard_of_other_content_is_never_taken_for_the_old_one(remote, tmp_path):
    far, _ = remote
    data = DataConfig(cache=str(tmp_path / "cache"))
    place = SampleRange(far.url(far.shards[0]), far.shards[0].offsets[0], far.shards[0].sizes[0])
    old = RangeReader(cache=open_cache(data, sample_table(far)))
    (content,) = old.read([place])
    assert old.cache.get(place) == content
    changed = [replace(far.shards[0], sha256="0" * 64), *far.shards[1:]]
    assert open_cache(data, sample_table(replace(far, shards=changed))).get(place) is None


def test_local_shards_are_not_kept_twice(index, tmp_path):
    batches(index, tmp_path, cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_full_disk_costs_the_cache_and_nothing_else(index, remote, tmp_path, small_disk, caplog):
    far, _ = remote
    (small_disk / "filler").write_bytes(bytes(180 * 1024))
    assert_same(batches(far, tmp_path, cache=str(small_disk)), batches(index, tmp_path))
    said = [record.message for record in caplog.records]
    assert said == [f"data.cache ({small_disk}): takes no more samples: No space left on device"]


def test_a_cache_folder_that_is_none_costs_the_cache_alone(index, remote, tmp_path):
    far, _ = remote
    (tmp_path / "file").write_bytes(b"")
    with_cache = batches(far, tmp_path, cache=str(tmp_path / "file" / "cache"))
    assert_same(with_cache, batches(index, tmp_path))
