"""Measure what a large index costs a rank: to start, to plan a step, to resume, to save.

The samples are made up, and their columns are written as `jobs/ingest.py` writes them. Once per
round, a fresh process opens them. Its private memory is what it holds beside the file that all
processes of a node map. For some of the clusters it checks that every sample is planned once.

For a tenth of the samples, drawn into clusters, it also measures what the driver does before it
reshards: join the table of assignments with the index, and divide the samples into tars.

Letters: K clusters, n samples.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benches.harness import Report, run_fresh
from benches.settings import BenchConfig
from moce_dist.cluster.assignments import SCHEMA as ASSIGNMENTS
from moce_dist.cluster.assignments import read_labels
from moce_dist.data.columns import open_index, open_table, write_table
from moce_dist.data.plan import Plan, keys_of, permuted
from moce_dist.data.reshard import TarPlans
from moce_dist.data.shards import COLUMNS_NAME, INDEX_NAME, Shard

_KEY_BYTES = 12
_PORTION = 2**20
_STEPS = 20
_CHECKED_CLUSTERS = 8
_JOIN_TARS, _TABLE = 1000, "assignments.parquet"


def run(config: BenchConfig) -> Report:
    """Measure on one process; figures are medians over the rounds."""
    report, count = Report("index", config), config.bench.index_samples
    with tempfile.TemporaryDirectory(dir=config.bench.folder) as folder:
        size = make_columns(Path(folder), count, config.cluster.num_clusters)
        rounds = config.bench.warmup_rounds + config.bench.rounds
        numbers = config.cluster.num_clusters, config.moce.batch_size, config.seed
        figures = [run_fresh("benches.index", "stage", folder, *numbers) for _ in range(rounds)]
    joined = measure_join(config, count // 10, rounds)[config.bench.warmup_rounds :]
    figures = figures[config.bench.warmup_rounds :]
    for name in ("start", "resume", "plan_step", "save"):
        report.add_variants({name: [f[f"{name}_s"] for f in figures]})
    report.figures = {
        "samples": count,
        "start_s": report.variants["start"]["median"],
        "plan_step_ms": 1000 * report.variants["plan_step"]["median"],
        # beside wall-clock times, which other processes of a shared machine lengthen
        "start_cpu_s": min(f["start_cpu_s"] for f in figures),
        "plan_step_cpu_ms": 1000 * min(f["plan_step_cpu_s"] for f in figures),
        "private_bytes": max(f["private_bytes"] for f in figures),
        "shared_bytes_per_sample": size / count,
        "join_us_per_sample": 1e6 * min(f["join_s"] for f in joined),
        "divide_us_per_sample": 1e6 * min(f["divide_s"] for f in joined),
        "reshard_bytes_per_sample": max(f["private_bytes"] for f in joined),
    }
    return report


def measure_join(config: BenchConfig, count: int, rounds: int) -> list[dict[str, float]]:
    """Measure the join of an index with its assignments; return figures per sample."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory(dir=config.bench.folder) as folder:
        make_columns(Path(folder), count, _JOIN_TARS)
        draws = np.random.default_rng(config.seed)
        index = open_index(folder)
        names = [Path(shard.path).stem for shard in index.shards]
        with pq.ParquetWriter(Path(folder) / _TABLE, ASSIGNMENTS) as writer:
            for name, shard in zip(names, index.shards, strict=True):
                clusters = draws.integers(config.cluster.num_clusters, size=shard.num_samples)
                columns = [
                    pa.array(shard.keys, pa.string()),
                    pa.array([name] * shard.num_samples).dictionary_encode(),
                    pa.array(clusters, pa.int32()),
                    pa.array(np.zeros(shard.num_samples), pa.float32()),
                ]
                writer.write_table(pa.table(columns, schema=ASSIGNMENTS))
        rest = config.data.shard_bytes
        found = [run_fresh("benches.index", "join", folder, rest) for _ in range(rounds)]
    return [{name: value / count for name, value in figures.items()} for figures in found]


def join_here(folder: str, shard_bytes: int) -> dict[str, float]:
    """Join and divide in this process; return seconds and private memory in bytes."""
    import pyarrow  # noqa: F401 - a library's own memory is not the index's

    before, marks = private_bytes(), [time.perf_counter()]
    index = open_index(folder)
    labels = read_labels(Path(folder) / _TABLE, index)
    marks.append(time.perf_counter())
    plans = TarPlans(index, labels, shard_bytes)
    marks.append(time.perf_counter())
    assert labels.min() >= 0 and plans[0].parts and plans[len(plans) - 1].parts
    join, divide = np.diff(marks).tolist()
    return {"join_s": join, "divide_s": divide, "private_bytes": private_bytes() - before}


def make_columns(folder: Path, count: int, num_clusters: int) -> int:
    """Write columns of `count` samples in as many tars as clusters; return their bytes."""
    import pyarrow as pa

    sizes = np.full(num_clusters, count // num_clusters)
    sizes[: count % num_clusters] += 1
    shards = [
        Shard(
            f"cluster-{number:05d}-000000.tar", int(size), cluster=number, sha256=f"{number:064d}"
        )
        for number, size in enumerate(sizes)
    ]
    text = np.empty((count, _KEY_BYTES), np.uint8)
    for first in range(0, count, _PORTION):
        part = text[first : first + _PORTION]
        left = np.arange(first, first + len(part))
        for digit in reversed(range(_KEY_BYTES)):
            left, part[:, digit] = np.divmod(left, 10)
    text += ord("0")
    ends = np.arange(0, (count + 1) * _KEY_BYTES, _KEY_BYTES)
    keys = pa.LargeStringArray.from_buffers(count, pa.py_buffer(ends), pa.py_buffer(text))
    # the index is not parsed if there are columns
    (folder / INDEX_NAME).write_text("{}")
    size, before, after = (np.full(count, n, np.uint32) for n in (1500, 512, 36))
    write_table(folder, shards, keys, np.arange(count) * 2048 + 512, size, before, after)
    return (folder / COLUMNS_NAME).stat().st_size


def measure_here(folder: str, num_clusters: int, batch_size: int, seed: int) -> dict[str, Any]:
    """Open, plan, resume and save in this process; return seconds and private memory in bytes."""
    import pyarrow  # noqa: F401 - a library's own memory is not the index's

    before, marks, begin_cpu = private_bytes(), [time.perf_counter()], time.process_time()
    plan = Plan(open_table(folder, num_clusters), batch_size, seed)
    first = plan.step_ids(0)
    assert all(plan.table.keys[row] for row in first)
    start_cpu = time.process_time() - begin_cpu
    marks.append(time.perf_counter())
    middle = plan.steps_per_epoch // 2
    cursors = plan.cursors(middle)
    marks.append(time.perf_counter())
    begin_cpu = time.process_time()
    for step in range(middle, middle + _STEPS):
        ids = plan.step_ids(step)
        assert len(np.unique(ids)) == batch_size
        _ = plan.table.offset[ids], plan.table.size[ids], plan.table.shard[ids]
    steps_cpu = time.process_time() - begin_cpu
    marks.append(time.perf_counter())
    json.dumps({"cursors": plan.cursors(middle + _STEPS)})
    marks.append(time.perf_counter())
    assert sum(cursors) == middle * batch_size
    private = private_bytes() - before
    for cluster, size in enumerate(plan.table.cluster_sizes[:_CHECKED_CLUSTERS]):
        places, sizes = np.arange(size), np.full(size, size)
        keys = np.repeat(keys_of(seed, 0, cluster), size)
        assert len(np.unique(permuted(places, sizes, keys))) == size
    start, resume, steps, save = np.diff(marks).tolist()
    return {
        "start_s": start,
        "start_cpu_s": start_cpu,
        "resume_s": resume,
        "plan_step_s": steps / _STEPS,
        "plan_step_cpu_s": steps_cpu / _STEPS,
        "save_s": save,
        "private_bytes": private,
    }


def private_bytes() -> int:
    """Return the memory of this process that no file backs, bytes."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    what, path, *rest = sys.argv[1:]
    measure: Callable[..., dict[str, Any]] = join_here if what == "join" else measure_here
    sys.stdout.write(json.dumps(measure(path, *map(int, rest))))
