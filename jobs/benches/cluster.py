"""Compare our k-means on several workers with `faiss.Kmeans` on all points in one process.

    faiss_N_threads   Kmeans.train on the float32 matrix in memory, N threads
    moce_dist_off     our iterations from the same centroids, reading float16 files; Ray is running
    moce_dist_exact   a whole request: scan, k-means++, iterations, exact finish, result on disk

The objectives of FAISS and of `moce_dist_off` are computed by the same sweep over all points, from
the last centroids; that of `moce_dist_exact` is the one in its summary. The memory of a worker is
what it holds itself: anonymous and shared pages, but not the page cache behind mapped files.

Letters: n rows, D width, K clusters.
"""

import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import psutil

from benches.harness import Report, interleave
from benches.settings import BenchConfig
from moce_dist.arrays import Float32, Float64
from moce_dist.cluster.assign import run_clustering
from moce_dist.cluster.blocks import View, open_features, scan_files
from moce_dist.cluster.kmeans import Lloyd, State, draw_sample, kmeans, save_state, state_request
from moce_dist.cluster.matrix import Matrix
from moce_dist.config import ClusterConfig
from moce_dist.launch.actors import hold_actors
from moce_dist.run.tasks import Workers
from moce_dist.settings import ConfigError

_ROWS_AT_ONCE, _NUM_FILES, _GROUPS_PER_CLUSTER = 16_384, 10, 2
_SPREAD = 0.5
_THREADS = (1, 2)
_FAISS = {"faiss_1_thread", "faiss_2_threads"}
_VARIANTS = (*sorted(_FAISS), "moce_dist_off", "moce_dist_exact")


def write_mixture(folder: Path, config: BenchConfig) -> None:
    """Write a seeded mixture of Gaussians of unequal weights as (n, D) float16 in ten files."""
    draws = np.random.default_rng(config.seed)
    dim, groups = config.bench.dim, _GROUPS_PER_CLUSTER * config.cluster.num_clusters
    weights = draws.dirichlet(np.ones(groups))
    centres = _SPREAD * draws.standard_normal((groups, dim), np.float32)
    for number, rows in enumerate(np.array_split(np.arange(config.bench.rows), _NUM_FILES)):
        path = folder / f"part-{number}.npy"
        array = np.lib.format.open_memmap(path, "w+", np.float16, (len(rows), dim))
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = array[start : start + _ROWS_AT_ONCE]
            chosen = centres[draws.choice(groups, len(part), p=weights)]
            part[...] = chosen + draws.standard_normal(part.shape, np.float32)
        array.flush()


@dataclass
class Bench:
    """The data, and the results of the variants."""

    config: BenchConfig
    folder: Path
    workers: Workers
    objectives: dict[str, float] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def off(self) -> ClusterConfig:
        """Plain k-means with a fixed number of iterations."""
        return self.config.cluster.model_copy(update={"balance": "off", "tolerance": 0.0})

    @cached_property
    def lloyd(self) -> Lloyd:
        """Our request without balance."""
        files = open_features(self.folder / "features")
        mean = scan_files(files, self.workers.map_tasks).mean.astype(np.float32)
        matrix = Matrix(
            files,
            View(mean, normalise=False),
            self.off.block_rows,
            self.workers.map_tasks,
            device=self.workers.device,
        )
        sample = draw_sample(
            matrix, self.off.num_clusters, self.config.seed, self.folder / "sample.npy"
        )
        return Lloyd(matrix, sample, self.off)

    @cached_property
    def first(self) -> State:
        """Centroids that FAISS and `moce_dist_off` start from."""
        return self.lloyd.first_state(self.config.seed)

    @cached_property
    def rows(self) -> Float32:
        """All features in memory, as FAISS takes them."""
        return np.concatenate(
            [np.load(p).astype(np.float32) for p in self.lloyd.matrix.files.paths]
        )

    def judge(self, name: str, centroids: Float64) -> None:
        """Keep the mean squared distance of all rows to the nearest of `centroids`."""
        matrix = self.lloyd.matrix
        sums = matrix.sums(centroids, np.zeros(len(centroids)))
        self.objectives[name] = matrix.objective(sums, centroids) / matrix.files.num_rows

    def run_faiss(self, threads: int) -> Float64:
        """Train FAISS from the first centroids; return its last ones, moved to our origin."""
        mean = self.lloyd.matrix.view.mean.astype(np.float64)
        trainer = faiss.Kmeans(
            self.rows.shape[1],
            self.off.num_clusters,
            niter=self.off.iterations,
            max_points_per_centroid=len(self.rows),
            min_points_per_centroid=1,
        )
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(threads)
        try:
            trainer.train(self.rows, init_centroids=(self.first.centroids + mean).astype("f4"))
        finally:
            faiss.omp_set_num_threads(before)
        return np.asarray(trainer.centroids, np.float64) - mean

    def run_off(self) -> Float64:
        """Iterate from the first centroids; return the last ones."""
        file = self.folder / "state.npz"
        save_state(file, self.first, state_request(self.lloyd.matrix, self.off, self.config.seed))
        return kmeans(self.lloyd, seed=self.config.seed, state_file=file).centroids

    def run_exact(self) -> None:
        """Run a whole balanced request into a new folder."""
        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            self.summary = run_clustering(
                self.folder / "features",
                Path(out) / "clusters",
                self.off.model_copy(update={"balance": "exact"}),
                seed=self.config.seed,
                subtract_mean=False,
                workers=self.workers,
            )


class Memory:
    """Record the peak memory of this process, and of any Ray worker below it, while open.

    `private_gib` is a worker's peak without pages of Ray's object store. All processes of a node
    share these pages, and they grow with what passes through the store.
    """

    def __init__(self) -> None:
        self.worker_gib = self.private_gib = self.driver_gib = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._closing.wait(0.5):
            this = psutil.Process()
            self.driver_gib = max(self.driver_gib, sum(_own_gib(this)))
            for process in this.children(recursive=True):
                if _is_worker(process):
                    private, shared = _own_gib(process)
                    self.private_gib = max(self.private_gib, private)
                    self.worker_gib = max(self.worker_gib, private + shared)


def _is_worker(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[0].startswith("ray::")
    except (psutil.Error, IndexError):
        return False


def _own_gib(process: psutil.Process) -> tuple[float, float]:
    # returns anonymous pages and shared ones
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    kib = {name: int(line.split()[1]) for line in lines for name in _OWN if line.startswith(name)}
    private, shared = (kib.get(name, 0) / 2**20 for name in _OWN)
    return private, shared


_OWN = ("RssAnon:", "RssShmem:")


def run(config: BenchConfig) -> Report:
    """Measure the variants that are asked for, interleaved.

    Raises:
        ConfigError: `bench.variants` names an unknown one.
    """
    report, asked = Report("cluster", config), _asked(config.bench.variants)
    with tempfile.TemporaryDirectory() as folder, hold_actors(config.parallel) as workers:
        bench = Bench(config, Path(folder), workers)
        last: dict[str, Float64] = {}
        variants: dict[str, Callable[[], Any]] = {
            f"faiss_{n}_thread{'s' * (n > 1)}": partial(_keep, last, "faiss", bench.run_faiss, n)
            for n in _THREADS
        }
        variants["moce_dist_off"] = partial(_keep, last, "off", bench.run_off)
        variants["moce_dist_exact"] = bench.run_exact
        (bench.folder / "features").mkdir()
        write_mixture(bench.folder / "features", config)
        if asked != ["moce_dist_exact"]:
            # the common start of the other variants is not timed
            _ = bench.first, bench.rows, bench.lloyd.matrix.squares
        with Memory() as memory:
            times = interleave(
                {name: variants[name] for name in asked},
                rounds=config.bench.rounds,
                warmup=config.bench.warmup_rounds,
            )
        for name, centroids in last.items():
            bench.judge(name, centroids)
    for name in sorted(variants.keys() - set(asked)):
        report.skipped[name] = "bench.variants does not name it"
    return _report(report.add_variants(times), bench, memory)


def _asked(named: Sequence[str]) -> list[str]:
    if unknown := sorted(set(named) - set(_VARIANTS)):
        raise ConfigError(f"bench.variants ({unknown[0]}) must be of {', '.join(_VARIANTS)}")
    return [name for name in _VARIANTS if name in named] if named else list(_VARIANTS)


def _keep(
    kept: dict[str, Float64], name: str, function: Callable[..., Float64], *given: Any
) -> None:
    kept[name] = function(*given)


def _report(report: Report, bench: Bench, memory: Memory) -> Report:
    medians = {name: variant["median"] for name, variant in report.variants.items()}
    faiss, objectives, figures = medians.keys() & _FAISS, bench.objectives, report.figures
    if faiss and "off" in objectives:
        best = min(medians[name] for name in faiss)
        report.ratios["moce_dist_off/faiss"] = medians["moce_dist_off"] / best
        figures["objective_off_over_faiss"] = objectives["off"] / objectives["faiss"]
    if faiss == _FAISS:
        one, two = (medians[name] for name in sorted(_FAISS))
        figures["faiss_thread_scaling"] = one / two
    if summary := bench.summary:
        if faiss:
            found = summary["mean_squared_distance"]
            figures["objective_exact_over_faiss"] = found / objectives["faiss"]
        figures["size_max_minus_min"] = summary["size_max"] - summary["size_min"]
    if not faiss:
        # with FAISS, this process holds all features
        figures["peak_rss_gib_of_driver"] = memory.driver_gib
    if memory.worker_gib:
        figures["peak_rss_gib_per_worker"] = memory.worker_gib
        figures["peak_private_gib_per_worker"] = memory.private_gib
    else:
        report.skipped["peak_rss_gib_per_worker"] = "no workers of Ray's below this process"
    return report
