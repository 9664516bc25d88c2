"""Compare exact balance with programs that solve it for features that fit in memory.

    k_means_constrained   KMeansConstrained, all sizes equal, from our first centroids
    moce_dist             our iterations and exact sizes, from the same centroids
    pot                   the optimal transport of all rows to the first centroids, ot.emd2
    moce_dist_settle      our exact sizes at the first centroids

All run in this process on one thread. Costs are mean squared distances: for the first two, to the
means of the clusters that they find; for the other two, to the first centroids.

Letters: n rows, D width, K clusters.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from benches.cluster import write_mixture
from benches.harness import Report, interleave
from benches.settings import BenchConfig
from moce_dist.arrays import Float64
from moce_dist.cluster.blocks import View, open_features, scan_files
from moce_dist.cluster.kmeans import Lloyd, State, draw_sample, kmeans, save_state, state_request
from moce_dist.cluster.matrix import Matrix
from moce_dist.cluster.settle import settle
from moce_dist.run.tasks import map_here

_PACKAGES = {"k_means_constrained": "k_means_constrained", "pot": "ot"}
_OURS = {"k_means_constrained": "moce_dist", "pot": "moce_dist_settle"}


@dataclass
class Bench:
    """The data, and what the variants' labels cost."""

    config: BenchConfig
    folder: Path
    costs: dict[str, float] = field(default_factory=dict)

    @cached_property
    def lloyd(self) -> Lloyd:
        """Our request."""
        files, cluster = open_features(self.folder / "features"), self.config.cluster
        view = View(scan_files(files).mean.astype(np.float32), normalise=False)
        matrix = Matrix(files, view, cluster.block_rows, map_here)
        file = self.folder / "sample.npy"
        return Lloyd(matrix, draw_sample(matrix, cluster.num_clusters, 0, file), cluster)

    @cached_property
    def rows(self) -> Float64:
        """All features minus their mean, (n, D)."""
        files, mean = self.lloyd.matrix.files, self.lloyd.matrix.view.mean
        return np.concatenate([np.load(path) for path in files.paths]) - mean.astype(np.float64)

    @cached_property
    def first(self) -> Float64:
        """Centroids that all start from, (K, D)."""
        return self.lloyd.first_state(self.config.seed).centroids

    def run_k_means_constrained(self) -> None:
        """Cluster into equal sizes."""
        size, rest = divmod(len(self.rows), len(self.first))
        judge = import_module("k_means_constrained").KMeansConstrained(
            len(self.first),
            size_min=size,
            size_max=size + bool(rest),
            init=self.first,
            n_init=1,
            max_iter=self.config.cluster.iterations,
            tol=0,
        )
        self._judge("k_means_constrained", judge.fit_predict(self.rows))

    def run_moce_dist(self) -> None:
        """Cluster into equal sizes by our iterations and exact sizes."""
        file, request = self.folder / "state.npz", state_request
        start = State(self.first, np.zeros(len(self.first)))
        save_state(file, start, request(self.lloyd.matrix, self.lloyd.config, self.config.seed))
        state = kmeans(self.lloyd, seed=self.config.seed, state_file=file)
        self._judge("moce_dist", settle(self.lloyd, state).labels)

    def _judge(self, name: str, labels: NDArray[Any]) -> None:
        cost = 0.0
        for cluster in range(len(self.first)):
            members = self.rows[labels == cluster]
            cost += float(np.square(members - members.mean(axis=0)).sum())
        self.costs[name] = cost / len(self.rows)

    def run_pot(self) -> None:
        """Transport all rows to the first centroids."""
        squares = np.square(self.rows).sum(axis=1)[:, None] + np.square(self.first).sum(axis=1)
        distances = squares - 2 * self.rows @ self.first.T
        self.costs["pot"] = float(import_module("ot").emd2([], [], distances, numItermax=10**7))

    def run_moce_dist_settle(self) -> None:
        """Find our exact sizes at the first centroids, from prices of 0."""
        labels = settle(self.lloyd, State(self.first, np.zeros(len(self.first)))).labels
        cost = float(np.square(self.rows - self.first[labels]).sum())
        self.costs["moce_dist_settle"] = cost / len(self.rows)


def run(config: BenchConfig) -> Report:
    """Measure all variants whose package is installed, interleaved."""
    report = Report("balance", config)
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        bench = Bench(config, Path(folder))
        (bench.folder / "features").mkdir()
        write_mixture(bench.folder / "features", config)
        # the common start is not timed
        _ = bench.first, bench.rows
        variants: dict[str, Callable[[], Any]] = {}
        for theirs, package in _PACKAGES.items():
            try:
                import_module(package)
            except ImportError:
                report.skipped[theirs] = f"{package} is not installed"
            else:
                variants[theirs] = getattr(bench, f"run_{theirs}")
            variants[_OURS[theirs]] = getattr(bench, f"run_{_OURS[theirs]}")
        rounds, warmup = config.bench.rounds, config.bench.warmup_rounds
        report.add_variants(interleave(variants, rounds=rounds, warmup=warmup))
    for theirs, ours in _OURS.items():
        report.add_ratio(ours, theirs)
        if theirs in bench.costs:
            report.figures[f"cost_over_{theirs}"] = bench.costs[ours] / bench.costs[theirs]
    return report
