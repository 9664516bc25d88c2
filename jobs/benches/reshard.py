"""Compare rewriting tars by cluster with copying the same tars (`jobs/bench.py reshard`).

The samples hold about 110 kB of noise each, which is ImageNet's mean, and are in random clusters.
Both variants begin without page cache and end when everything is on the disk. The copy is Python's
`shutil.copyfile`, file by file. Ours reads by range, writes, parses what it wrote, and compares.
"""

import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benches.harness import Report, interleave
from benches.settings import BenchConfig
from moce_dist.data.reshard import reshard
from moce_dist.data.shards import ShardIndex, write_index
from moce_dist.data.writer import ShardSeries

_SAMPLE_BYTES = 110_000
_Action = Callable[[ShardIndex, Path], None]


def run(config: BenchConfig) -> Report:
    """Measure a copy and a reshard of `bench.reshard_gib` GiB, in MiB of the source per second."""
    report, bench = Report("reshard", config), config.bench
    with tempfile.TemporaryDirectory(dir=bench.folder) as temporary:
        folder = Path(temporary)
        index = _make_tars(folder / "tars", config)
        workers = _Workers(config.parallel.num_workers)
        actions: dict[str, _Action] = {"copy": _copy, "reshard": _Resharding(config, workers)}
        variants: dict[str, Callable[[], float]] = {
            name: _on_cold_files(index, folder / name, action) for name, action in actions.items()
        }
        seconds = interleave(variants, rounds=bench.rounds, warmup=bench.warmup_rounds)
        workers.close()
    mebibytes = sum(shard.bytes for shard in index.shards) / 2**20
    rates = {name: [mebibytes / s for s in series] for name, series in seconds.items()}
    report.add_variants(rates, unit="MiB/s").add_ratio("reshard", "copy")
    report.figures["peak_rss_gib_of_a_worker"] = workers.peak_kib / 2**20
    report.figures["samples"] = index.num_samples
    return report


def _make_tars(folder: Path, config: BenchConfig) -> ShardIndex:
    count = int(config.bench.reshard_gib * 2**30 / _SAMPLE_BYTES)
    draws = np.random.default_rng(config.seed)
    # a window into noise is as incompressible as noise, and costs nothing
    noise = draws.bytes(64 * 2**20)
    series = ShardSeries(folder, "train", config.data.shard_bytes)
    for number in range(count):
        start = int(draws.integers(len(noise) - _SAMPLE_BYTES))
        size = int(draws.integers(_SAMPLE_BYTES // 2, _SAMPLE_BYTES * 3 // 2))
        series.writer(size).add(f"{number:08d}", {"jpg": noise[start : start + size], "cls": b"0"})
    return write_index(folder, series.close())


def _on_cold_files(index: ShardIndex, out: Path, action: _Action) -> Callable[[], float]:
    def measure() -> float:
        os.sync()
        for shard in index.shards:
            file = os.open(index.url(shard), os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
        begin = time.perf_counter()
        action(index, out)
        os.sync()
        seconds = time.perf_counter() - begin
        shutil.rmtree(out)
        return seconds

    return measure


def _copy(index: ShardIndex, out: Path) -> None:
    out.mkdir()
    for shard in index.shards:
        shutil.copyfile(index.url(shard), out / shard.path)


class _Resharding:
    def __init__(self, config: BenchConfig, workers: "_Workers") -> None:
        self._config, self._workers = config, workers

    def __call__(self, index: ShardIndex, out: Path) -> None:
        draws = np.random.default_rng(self._config.seed)
        clusters = draws.integers(self._config.cluster.num_clusters, size=index.num_samples)
        reshard(
            index,
            clusters.astype(np.int32),
            out,
            self._config.data,
            inputs={},
            map_tasks=self._workers,
        )


class _Workers:
    """Processes that map as Ray's workers do; `peak_kib` is the peak memory of any one."""

    def __init__(self, count: int) -> None:
        self._pool = multiprocessing.get_context("spawn").Pool(count)
        self.peak_kib = 0

    def __call__(
        self, function: Callable[[Any, Any], Any], shared: Any, items: Sequence[Any], /
    ) -> Iterable[Any]:
        calls = ((function, shared, item) for item in items)
        for result, peak_kib in self._pool.imap(_call, calls):
            self.peak_kib = max(self.peak_kib, peak_kib)
            yield result

    def close(self) -> None:
        """End the processes."""
        self._pool.close()
        self._pool.join()


def _call(call: tuple[Callable[[Any, Any], Any], Any, Any]) -> tuple[Any, int]:
    function, shared, item = call
    return function(shared, item), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
