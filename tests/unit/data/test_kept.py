"""Samples kept in memory: the same batches to the bit, faults as often, and no tar read twice."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moce_dist.config import DataConfig
from moce_dist.data.batches import stream
from moce_dist.data.images import Decoded, Jpeg, decode_image, open_croppable
from moce_dist.data.kept import KeptSamples, open_kept
from moce_dist.data.plan import Plan
from moce_dist.data.shards import write_index
from moce_dist.data.stream import StreamSpec
from moce_dist.data.table import sample_table
from moce_dist.data.writer import ShardWriter
from moce_dist.run.files import read_faults

EPOCHS, STEPS = 3, 5
NUM_IMAGES = 36


def one_group(clusters):
    return np.zeros(len(clusters), np.int64)


@pytest.fixture
def index(tmp_path):
    """JPEG, small PNG, a PNG too large to be kept decoded, and a cut JPEG and PNG."""
    draws, writer = np.random.default_rng(0), ShardWriter(tmp_path, "a.tar", cluster=0)
    for number in range(NUM_IMAGES):
        kind, side = ("jpeg", 40) if number % 2 else ("png", 40 if number % 8 else 400)
        file = io.BytesIO()
        Image.fromarray(draws.integers(0, 255, (side, 48, 3), np.uint8)).save(file, kind)
        content = file.getvalue()
        is_cut = number in (4, 5)
        content = content[: len(content) // 2] if is_cut else content
        writer.add(str(number), {{"jpeg": "jpg"}.get(kind, kind): content})
    return write_index(tmp_path, [writer.close()])


def batches(index, ledger, *, kept=None, first=0, last=EPOCHS * STEPS, **fields):
    data = DataConfig(image_size=16, **({"loader_processes": 0} | fields))
    plan = Plan(sample_table(index), 8, seed=0)
    spec = StreamSpec(plan, data, 4, 1, 0, ledger, "mae", kept)
    return list(stream(spec, one_group, start=first, stop=last))


def assert_same(some, others):
    for one, other in zip(some, others, strict=True):
        assert one.keys == other.keys
        for name in ("images", "noise", "weights", "clusters", "cluster_counts"):
            assert getattr(one, name).equal(getattr(other, name)), name


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("keep_bytes", [2**20, 30_000, 1])
def test_batches_and_faults_are_those_of_reading(index, tmp_path, processes, keep_bytes):
    read = batches(index, tmp_path / "read.jsonl")
    data = DataConfig(keep="memory", keep_bytes=keep_bytes)
    kept = open_kept(data, NUM_IMAGES)
    # two streams after each other, as intervals of a stage are
    first, second = (
        batches(
            index,
            tmp_path / "kept.jsonl",
            kept=kept,
            first=begin,
            last=end,
            loader_processes=processes,
        )
        for begin, end in ((0, 7), (7, EPOCHS * STEPS))
    )
    assert_same(read, first + second)
    faults = [
        sorted((f["key"], f["step"]) for f in read_faults(tmp_path / f"{name}.jsonl"))
        for name in ("read", "kept")
    ]
    assert faults[0] == faults[1] and len(faults[0]) == 2 * EPOCHS
    num_kept = int(kept.has(np.arange(NUM_IMAGES)).sum())
    # of the cut ones the JPEG shows its damage only when it is decoded
    assert num_kept == {2**20: NUM_IMAGES - 1, 1: 0}.get(keep_bytes, num_kept)
    assert keep_bytes != 30_000 or 0 < num_kept < NUM_IMAGES - 1


@pytest.mark.parametrize("processes", [0, 2])
def test_what_one_process_read_no_process_reads_again(index, tmp_path, processes):
    kept = KeptSamples(NUM_IMAGES, 2**20)
    fields = {"kept": kept, "loader_processes": processes}
    batches(index, tmp_path / "faults.jsonl", last=STEPS, **fields)
    read = batches(index, tmp_path / "faults.jsonl", first=STEPS)
    (tmp_path / "a.tar").unlink()
    again = batches(index, tmp_path / "faults.jsonl", first=STEPS, **fields)
    assert_same(read, again)


def test_a_sample_is_kept_once_and_as_it_is(index):
    table = sample_table(index)
    tar = Path(table.urls[0]).read_bytes()
    contents = [
        tar[start : start + size] for start, size in zip(table.offset, table.size, strict=True)
    ]
    kept = KeptSamples(3, 2**20)
    for _ in range(2):
        for sample_id, content in enumerate((contents[2], contents[0], contents[1])):
            kept.keep(sample_id, open_croppable(content), content)
    small, large, jpeg = (kept.get(sample_id) for sample_id in range(3))
    assert isinstance(small, Decoded) and (small.pixels == decode_image(contents[2])).all()
    assert isinstance(large, Decoded) and (large.pixels == decode_image(contents[0])).all()
    assert isinstance(jpeg, Jpeg) and bytes(jpeg.content) == contents[1]
    sizes = (small.pixels.nbytes, len(contents[0]), len(contents[1]))
    assert int(kept._end[0]) == sum(sizes)
    assert KeptSamples(3, 10).get(1) is None
