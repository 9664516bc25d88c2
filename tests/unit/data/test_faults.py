"""Eight kinds of broken data, 5 % each: no crash, no hang, each in the ledger once."""

import io
import struct
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from moce_dist.config import DataConfig
from moce_dist.data.batches import stream
from moce_dist.data.plan import Plan
from moce_dist.data.shards import write_index
from moce_dist.data.stream import StreamSpec
from moce_dist.data.table import sample_table
from moce_dist.data.writer import ShardWriter
from moce_dist.run.files import read_faults

PER_TAR, TARS = 10, 20
SAMPLE_FAULTS = ("truncated JPEG", "zero bytes", "wrong type", "bomb")
SHARD_FAULTS = ("truncated tar", "vanished", "busy", "stall")
DATA = DataConfig(
    image_size=16,
    loader_processes=2,
    stall_timeout_s=120,
    read_timeout_s=1.5,
    read_deadline_s=4.5,
)


def photograph(draws):
    file = io.BytesIO()
    Image.fromarray(draws.integers(0, 255, (24, 24, 3), np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def png_bomb():
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(kind, content):
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))


def spoilt(kind, content):
    return {
        "truncated JPEG": content[: len(content) // 2],
        "zero bytes": bytes(len(content)),
        "wrong type": b"to be or not to be, " * 20,
        "bomb": png_bomb(),
    }[kind]


def make_tar(folder, tar, kind):
    draws, writer = (
        np.random.default_rng(tar),
        ShardWriter(folder, f"t{tar:02d}.tar", cluster=tar % 4),
    )
    for row in range(PER_TAR):
        content = photograph(draws)
        writer.add(
            f"{tar}/{row}", {"jpg": spoilt(kind, content) if kind in SAMPLE_FAULTS else content}
        )
    return writer.close()


def injected(tmp_path, range_server):
    """Tars 0-3 hold spoilt samples, 4-7 fail as a whole, the rest is good; returns the index."""
    kinds = dict(enumerate(SAMPLE_FAULTS + SHARD_FAULTS))
    shards = [make_tar(tmp_path, tar, kinds.get(tar, "")) for tar in range(TARS)]
    (tmp_path / "t04.tar").write_bytes((tmp_path / "t04.tar").read_bytes()[:700])
    (tmp_path / "t05.tar").unlink()
    server = range_server(
        {f"/t{tar:02d}.tar": ((tmp_path / f"t{tar:02d}.tar").read_bytes(), kinds.get(tar, ""))
         for tar in (6, 7, 8)}
    )  # fmt: skip
    for tar in (6, 7, 8):
        shards[tar] = replace(shards[tar], path=f"{server.url}/t{tar:02d}.tar")
    return write_index(tmp_path, shards)


def one_group(clusters):
    return np.zeros(len(clusters), np.int64)


@pytest.mark.timeout(180)
def test_every_fault_keeps_its_slot_and_stands_in_the_ledger_once(tmp_path, range_server):
    index = injected(tmp_path, range_server)
    plan, ledger = Plan(sample_table(index), 20, seed=0), tmp_path / "faults.jsonl"
    spec = StreamSpec(plan, DATA, 4, 1, 0, ledger, "mae")
    batches = list(stream(spec, one_group, start=0, stop=10))
    used = Counter(key for batch in batches for key in batch.keys)
    assert used == Counter(f"{tar}/{row}" for tar in range(TARS) for row in range(PER_TAR))
    bad = {key for b in batches for key, w in zip(b.keys, b.weights, strict=True) if w == 0}
    expected = {f"{tar}/{row}" for tar in range(8) for row in range(PER_TAR)}
    assert bad == expected
    faults = read_faults(ledger)
    assert Counter(fault["key"] for fault in faults) == Counter(expected)
    reasons = {fault["key"].partition("/")[0]: fault["reason"] for fault in faults}
    for tar, part in enumerate(
        ("truncated", "no image", "no image", "3600000000 pixels",
         "ends after", "no such file", "status 503", "in time")
    ):  # fmt: skip
        assert part in reasons[str(tar)].lower(), reasons[str(tar)]
    for batch in batches:
        assert all((batch.images[slot] == 0).all() for slot in np.flatnonzero(batch.weights == 0))
