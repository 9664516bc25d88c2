"""Law 3 for the stream alone: killed 20 times, on other numbers of ranks, every sample once."""

import io
import json
import multiprocessing
import os
import signal
import time
import zlib
from collections import Counter

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from moce_dist.config import DataConfig
from moce_dist.data.batches import stream
from moce_dist.data.plan import Plan
from moce_dist.data.shards import write_index
from moce_dist.data.stream import StreamSpec
from moce_dist.data.table import sample_table
from moce_dist.data.writer import ShardWriter
from moce_dist.run.files import write_atomic

SAMPLES, BATCH, KILLS = 1199, 12, 20
RANKS = (1, 2, 4, 3)
DATA = DataConfig(image_size=16, loader_processes=1, prefetch_batches=1, read_ahead_bytes=20_000)


@pytest.fixture
def plan(tmp_path):
    draws, shards = np.random.default_rng(0), []
    for cluster, rows in enumerate(np.array_split(np.arange(SAMPLES), 5)):
        writer = ShardWriter(tmp_path, f"cluster-{cluster}.tar", cluster=cluster)
        for row in rows:
            file = io.BytesIO()
            Image.fromarray(draws.integers(0, 255, (20, 20, 3), np.uint8)).save(file, "JPEG")
            writer.add(f"{row}", {"jpg": file.getvalue()})
        shards.append(writer.close())
    return Plan(sample_table(write_index(tmp_path, shards)), BATCH, seed=3)


def run_rank(plan, folder, rank, ranks, start):
    """Stream to the end of the epoch; every step leaves a file of (key, checksum of the sample)."""
    torch.set_num_threads(1)
    spec = StreamSpec(plan, DATA, 4, ranks, rank, folder / "faults.jsonl", "mae")
    for batch in stream(spec, one_group, start=start, stop=plan.steps_per_epoch):
        sums = [
            zlib.crc32(np.ascontiguousarray(image).tobytes() + noise.numpy().tobytes())
            for image, noise in zip(batch.images, batch.noise, strict=True)
        ]
        used = [[k, s] for k, s in zip(batch.keys, sums, strict=True) if k]
        write_atomic(folder / f"{batch.step:04d}.{rank}-{ranks}", json.dumps(used))
        time.sleep(0.01)


def one_group(clusters):
    return np.zeros(len(clusters), np.int64)


def next_step(folder, plan):
    """Count the steps that all their ranks have finished; drop what was begun after them."""
    step = 0
    while step < plan.steps_per_epoch:
        files = list(folder.glob(f"{step:04d}.*"))
        if not files or len(files) != int(files[0].name.rpartition("-")[2]):
            break
        step += 1
    for late in range(step, plan.steps_per_epoch):
        for file in folder.glob(f"{late:04d}.*"):
            file.unlink()
    return step


def start_ranks(plan, folder, ranks, start):
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=run_rank, args=(plan, folder, rank, ranks, start))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def kill(processes):
    """Kill the ranks; their loader processes die by themselves."""
    loaders = [child for p in processes for child in psutil.Process(p.pid).children()]
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()
    _, alive = psutil.wait_procs(loaders, timeout=10)
    assert not alive
    return len(loaders)


def samples_of(folder):
    return [
        tuple(pair) for f in sorted(folder.glob("[0-9]*")) for pair in json.loads(f.read_text())
    ]


@pytest.mark.long
@pytest.mark.timeout(400)
def test_killed_stream_uses_every_sample_exactly_once(plan, tmp_path):
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    folder.mkdir()
    whole.mkdir()
    draws, interrupted, loaders = np.random.default_rng(7), [], 0
    while len(interrupted) < KILLS:
        ranks = RANKS[len(interrupted) % len(RANKS)]
        start = next_step(folder, plan)
        assert start < plan.steps_per_epoch, (
            "the epoch ended before it was interrupted often enough"
        )
        processes = start_ranks(plan, folder, ranks, start)
        target = start + int(draws.integers(0, 2 * plan.steps_per_epoch // (3 * KILLS)))
        deadline = time.monotonic() + 60
        while not any(folder.glob(f"{target:04d}.*")) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draws.uniform(0, 0.02))
        loaders += kill(processes)
        interrupted.append(start)
    assert loaders >= KILLS and interrupted[-1] > 0
    for process in start_ranks(plan, folder, 2, next_step(folder, plan)):
        process.join()
        assert process.exitcode == 0
    used = samples_of(folder)
    assert Counter(key for key, _ in used) == Counter(str(row) for row in range(SAMPLES))
    run_rank(plan, whole, 0, 1, 0)
    assert sorted(used) == sorted(samples_of(whole))
