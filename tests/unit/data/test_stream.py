"""A rank's batches: pure functions of the plan, bad images keep their slot."""

import io
import multiprocessing
from contextlib import closing

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from moce_dist.config import DataConfig
from moce_dist.data.batches import BatchStream, stream
from moce_dist.data.plan import PADDING, Plan
from moce_dist.data.shards import write_index
from moce_dist.data.stream import StreamSpec
from moce_dist.data.table import sample_table
from moce_dist.data.writer import ShardWriter
from moce_dist.run.files import read_faults

DATA = DataConfig(image_size=16, loader_processes=0)


def some_image(draws):
    file = io.BytesIO()
    Image.fromarray(draws.integers(0, 255, (16, 16, 3), np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture
def index(tmp_path):
    draws, shards = np.random.default_rng(0), []
    for cluster in range(4):
        writer = ShardWriter(tmp_path, f"cluster-{cluster:05d}-000000.tar", cluster=cluster)
        for number in range(9):
            content = some_image(draws)
            if (cluster, number) == (2, 3):
                content = content[: len(content) // 2]
            writer.add(f"c{cluster}/{number}", {"jpg": content})
        shards.append(writer.close())
    return write_index(tmp_path, shards)


def spec(index, tmp_path, *, ranks=1, rank=0, data=DATA):
    plan = Plan(sample_table(index), 8, seed=0)
    return StreamSpec(plan, data, 4, ranks, rank, tmp_path / "faults.jsonl", "mae")


def alternating(clusters):
    return np.arange(len(clusters)) % 2


def one_group(clusters):
    return np.zeros(len(clusters), np.int64)


def test_loader_processes_do_not_change_batches(index, tmp_path):
    alone = list(stream(spec(index, tmp_path), one_group, start=0, stop=7))
    parallel = DataConfig(image_size=16, loader_processes=2, prefetch_batches=1)
    helped = stream(spec(index, tmp_path, data=parallel), one_group, start=0, stop=7)
    for a, b in zip(alone, helped, strict=True):
        assert a.keys == b.keys and a.step == b.step
        for name in ("images", "noise", "weights", "clusters", "cluster_counts"):
            assert getattr(a, name).equal(getattr(b, name)), name


def test_ranks_split_the_one_batch(index, tmp_path):
    whole = {b.step: b for b in stream(spec(index, tmp_path), one_group, start=0, stop=5)}
    parts = [
        list(stream(spec(index, tmp_path, ranks=4, rank=r), alternating, start=0, stop=5))
        for r in range(4)
    ]
    for step, batch in whole.items():
        mine = {k: p[step].images[i] for p in parts for i, k in enumerate(p[step].keys) if k}
        assert sorted(mine) == sorted(k for k in batch.keys if k)
        for i, key in enumerate(batch.keys):
            if key:
                assert batch.images[i].equal(mine[key])
        assert all(p[step].clusters.equal(parts[0][step].clusters) for p in parts)
        assert all(len(p[step].weights) == 2 for p in parts)


def test_starting_late_equals_having_read_all(index, tmp_path):
    everything = list(stream(spec(index, tmp_path), one_group, start=0, stop=9))
    late = list(stream(spec(index, tmp_path), one_group, start=6, stop=9))
    for a, b in zip(everything[6:], late, strict=True):
        assert a.keys == b.keys and a.images.equal(b.images) and a.noise.equal(b.noise)


def test_bad_image_keeps_its_slot_and_is_written_down(index, tmp_path):
    batches = list(stream(spec(index, tmp_path), one_group, start=0, stop=5))
    hits = [(b, i) for b in batches for i, key in enumerate(b.keys) if key == "c2/3"]
    assert len(hits) == 1
    batch, slot = hits[0]
    assert batch.weights[slot] == 0 and (batch.images[slot] == 0).all()
    assert batch.cluster_counts.sum() == 8
    (fault,) = read_faults(tmp_path / "faults.jsonl")
    assert fault["key"] == "c2/3" and fault["shard"].endswith("cluster-00002-000000.tar")
    assert "truncated" in fault["reason"].lower() and fault["step"] == batch.step


def test_last_step_is_padded_with_weight_zero(index, tmp_path):
    *_, last = stream(spec(index, tmp_path), one_group, start=0, stop=5)
    assert last.cluster_counts.sum() == 36 - 4 * 8
    assert last.keys.count("") == 4
    assert [w == 0 for w in last.weights.tolist()] == [k in ("", "c2/3") for k in last.keys]
    assert (last.clusters == PADDING).sum() == 4


def test_vanished_shard_is_a_fault_not_an_outage(index, tmp_path):
    (tmp_path / "cluster-00001-000000.tar").unlink()
    batches = list(stream(spec(index, tmp_path), one_group, start=0, stop=5))
    used = sum((b.weights > 0).sum().item() for b in batches)
    assert used == 36 - 9 - 1
    assert len(read_faults(tmp_path / "faults.jsonl")) == 10


def test_noise_is_uniform_and_changes_with_the_epoch(index, tmp_path):
    batches = list(stream(spec(index, tmp_path), one_group, start=0, stop=10))
    first = {k: n for b in batches[:5] for k, n in zip(b.keys, b.noise, strict=True) if k}
    second = {k: n for b in batches[5:] for k, n in zip(b.keys, b.noise, strict=True) if k}
    assert first.keys() == second.keys()
    assert not any(first[k].equal(second[k]) for k in first)
    everything = torch.stack([*first.values(), *second.values()])
    assert everything.min() >= 0 and everything.max() < 1


def in_intervals(index, tmp_path, processes):
    data = DataConfig(image_size=16, loader_processes=processes, prefetch_batches=2)
    batches = BatchStream(spec(index, tmp_path, ranks=2, data=data), start=1)
    taken = []
    for stop, group_of in ((4, alternating), (9, one_half_each), (10, alternating)):
        batches.extend(group_of, stop)
        taken.extend(batches)
        assert taken[-1].step == stop - 1
    batches.close()
    return taken


def one_half_each(clusters):
    return np.repeat([0, 1], len(clusters) // 2)


def test_loader_processes_that_live_on_hear_who_reads(index, tmp_path):
    alone, helped = (in_intervals(index, tmp_path, processes) for processes in (0, 2))
    assert [batch.step for batch in helped] == list(range(1, 10))
    for a, b in zip(alone, helped, strict=True):
        assert a.keys == b.keys and a.images.equal(b.images) and a.clusters.equal(b.clusters)
    # other readers read other samples
    fixed = stream(spec(index, tmp_path, ranks=2), alternating, start=1, stop=10)
    is_same = [a.keys == b.keys for a, b in zip(alone, fixed, strict=True)]
    assert all(is_same[:3]) and is_same[8] and not all(is_same[3:8])


def test_a_stream_that_is_left_early_ends_its_processes(index, tmp_path):
    data = DataConfig(image_size=16, loader_processes=2, prefetch_batches=1)
    batches = BatchStream(spec(index, tmp_path, data=data), start=0)
    batches.extend(one_group, 7)
    next(batches)
    assert len(multiprocessing.active_children()) >= 2
    batches.close()
    assert multiprocessing.active_children() == []


def test_a_stream_in_this_process_leaves_no_file_open(index, tmp_path):
    def open_tars():
        return [file.path for file in psutil.Process().open_files() if file.path.endswith(".tar")]

    before = open_tars()
    for stop in (5, 2):
        with closing(stream(spec(index, tmp_path), one_group, start=0, stop=5)) as batches:
            for batch in batches:
                if batch.step + 1 == stop:
                    break
        assert open_tars() == before
