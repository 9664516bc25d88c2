"""Run Lloyd's iterations under balance; `settle.py` then finds the final labels.

    for each iteration:  prices that balance a sample between the centroids   (balance.py)
                         one sweep over all rows under the prices             (matrix.py)
                         centroids = means
    at the end:          exact sizes at the least cost                        (exact.py)

The state is written to disk after every iteration; a restart of the same request continues from it,
bit for bit. Everything but the sweeps happens in the calling process on one thread, and on a sample
that depends on the seed alone, so no result depends on the number of workers.

k-means++ chooses the first centroids from a sample. Its time grows with the number of clusters
times the number of rows to choose from. So above 1,024 clusters k-means|| narrows the choice first:
five rounds draw 4 K rows, all rows of a round at once, with probabilities proportional to the
squared distance to the nearest row of the earlier rounds. The workers do these searches. k-means++
then chooses K of the drawn rows, each weighted by the number of sample rows nearest to it. Above
8,192 clusters only K rows are drawn, and these are the centroids.

Letters: n rows, s sampled rows, D width, K clusters, m candidates.

Source: splitting of empty clusters as in facebookresearch/faiss Clustering.cpp (split_clusters);
k-means||, Bahmani et al. 2012, "Scalable k-means++".
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from moce_dist.arrays import Float32, Float64, Int64
from moce_dist.cluster.balance import allowed_sizes, ascend
from moce_dist.cluster.blocks import FeatureFiles, View, open_array
from moce_dist.cluster.matrix import Matrix
from moce_dist.config import ClusterConfig
from moce_dist.data.progress import track
from moce_dist.run.artefacts import fingerprint
from moce_dist.run.files import naming, replacing

_log = logging.getLogger(__name__)
_SAMPLE_PER_CLUSTER, _MIN_SAMPLE, _MAX_SAMPLE = 256, 16_384, 131_072
_FEWEST_PER_CLUSTER = 3.5
"""Not a whole number, so that the cluster sizes in a sample have some room."""
_SAMPLE_BLOCK_ROWS = 2048
"""Small, because a sample has few rows and all workers share its search."""
PRICE_ROUNDS, _PRICE_CANDIDATES = 20, 32
_SAMPLE_SEARCHES, _SMALLEST, _MANY_ROWS = 16, 0.9, 16
"""Most searches of a sample; share of the smallest size that every cluster must reach in it; the
smallest size from which on that is asked, because below it chance decides.
"""
_CLOSE, _FINEST = 0.01, 0.001
"""Shares of a sample's rows beyond the sizes at which prices are good enough, and very good."""
_SPLIT = 1 / 1024
_NOT_OF_CLUSTERS = {"encoder", "feature_block", "batch_size", "with_prices", "border_rows"}
"""Settings that do not change a clustering of given features: how features are made, how clusters
are used, memory."""


@dataclass(frozen=True)
class State:
    """All that the next iteration depends on: centroids (K, D), prices (K,), and the progress."""

    centroids: Float64
    prices: Float64
    iteration: int = 0
    objective: float = float("inf")
    is_done: bool = False


def state_request(matrix: Matrix, config: ClusterConfig, seed: int) -> str:
    """Fingerprint all inputs of a result: features and keys, their view, config, seed."""
    files, view = matrix.files, matrix.view
    names = [path.name for path in files.paths]
    # left out at its default, so that fingerprints from before the setting existed stay valid
    not_asked = {"source"} if config.source == "features" else set()
    return fingerprint(
        {
            **({} if matrix.content is None else {"content": matrix.content}),
            "files": list(zip(names, files.rows, strict=True)),
            "mean": view.mean.tobytes().hex(),
            "normalise": view.normalise,
            "centre": view.centre,
            "config": config.model_dump(exclude=_NOT_OF_CLUSTERS | not_asked),
            "seed": seed,
        }
    )


def save_state(path: Path, state: State, request: str) -> None:
    """Write the state of `request` atomically: a reader sees all of it or the previous one."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            allow_pickle=False,
            request=request,
            centroids=state.centroids,
            prices=state.prices,
            scalars=np.array([state.iteration, state.objective, state.is_done]),
        )


def load_state(path: Path, request: str) -> State | None:
    """Read the state of `request`; None where there is none or it is another request's."""
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as stored:
        if str(stored["request"]) != request:
            return None
        iteration, objective, is_done = stored["scalars"].tolist()
        return State(
            stored["centroids"], stored["prices"], int(iteration), objective, bool(is_done)
        )


@dataclass(frozen=True)
class Lloyd:
    """One request: the matrix of all rows, the matrix of the seeded sample, the settings."""

    matrix: Matrix
    sample: Matrix
    config: ClusterConfig

    def first_state(self, seed: int) -> State:
        """Choose centroids from the sample; prices are 0."""
        num_clusters = self.config.num_clusters
        centroids = choose_centroids(self.sample, num_clusters, seed)
        return State(centroids, np.zeros(num_clusters))

    def prices(self, centroids: Float64, prices: Float64) -> Float64:
        """Find prices (K,) that balance the sample between the centroids, starting at `prices`."""
        if self.config.balance == "off":
            return prices
        num = min(len(centroids), _PRICE_CANDIDATES)
        num_rows = self.sample.files.num_rows
        sizes = allowed_sizes(num_rows, len(centroids), self.config)
        for _ in range(_SAMPLE_SEARCHES):
            found = self.sample.nearest(centroids, prices, num)
            done = ascend(found, prices, sizes, rounds=PRICE_ROUNDS, close=_FINEST)
            prices = done.prices
            # a single cluster far from all rows hardly counts in the excess but must get its rows
            is_large = sizes.smallest >= _MANY_ROWS
            has_all = not is_large or done.least >= _SMALLEST * sizes.smallest
            # only a search under the new prices shows their true sizes: judge the old ones
            if done.excess_before <= (_CLOSE if has_all else _FINEST) * num_rows:
                break
        return prices

    def iterate(self, state: State) -> State:
        """Run one iteration: prices, a sweep over all rows, means (empty clusters split)."""
        prices = self.prices(state.centroids, state.prices)
        sums = self.matrix.sums(state.centroids, prices)
        objective = self.matrix.objective(sums, state.centroids)
        centroids = sums.means(state.centroids)
        if self.config.balance == "off":
            centroids = split_empty(centroids, sums.counts)
        if self.config.spherical:
            centroids = directions(centroids)
        _log.info(
            "k-means iteration %d: mean squared distance %.6g, largest over mean size %.3f",
            state.iteration + 1,
            objective / self.matrix.files.num_rows,
            sums.counts.max() / sums.counts.mean(),
        )
        is_done = abs(state.objective - objective) <= self.config.tolerance * abs(objective)
        return State(centroids, prices, state.iteration + 1, objective, is_done)


def draw_sample(matrix: Matrix, num_clusters: int, seed: int, file: Path) -> Matrix:
    """Write rows drawn by the seed, transformed by the view, to `file`; all rows if they are few.

    Workers read the sample from there like any file of features.
    """
    num_rows = matrix.files.num_rows
    wanted = np.clip(_SAMPLE_PER_CLUSTER * num_clusters, _MIN_SAMPLE, _MAX_SAMPLE)
    size = min(num_rows, max(int(wanted), int(_FEWEST_PER_CLUSTER * num_clusters)))
    chosen = np.sort(np.random.default_rng(seed).choice(num_rows, size, replace=False))
    rows = matrix.files.take(chosen, matrix.view)[:, :-1]
    with naming(file):
        np.save(file, rows, allow_pickle=False)
    return replace(
        matrix,
        files=FeatureFiles((file,), (size,), matrix.files.dim, rows.nbytes),
        view=View(np.zeros(matrix.files.dim, np.float32), normalise=False),
        block_rows=min(matrix.block_rows, _SAMPLE_BLOCK_ROWS),
    )


def directions(centroids: Float64) -> Float64:
    """Scale centroids to length 1; those of length 0 stay zero."""
    lengths = np.linalg.norm(centroids, axis=1, keepdims=True)
    return centroids / np.where(lengths > 0, lengths, 1)


def split_empty(centroids: Float64, counts: Float64) -> Float64:
    """Give every empty cluster half of the largest: both centroids move a little, opposite ways."""
    centroids, counts = centroids.copy(), counts.copy()
    sides = np.where(np.arange(centroids.shape[1]) % 2, -_SPLIT, _SPLIT)
    sides *= np.sqrt(np.square(centroids).mean())
    for empty in np.flatnonzero(counts == 0):
        largest = int(counts.argmax())
        centroids[empty] = centroids[largest] + sides
        centroids[largest] = centroids[largest] - sides
        counts[empty] = counts[largest] = counts[largest] / 2
    return centroids


def kmeans(lloyd: Lloyd, *, seed: int, state_file: Path) -> State:
    """Iterate until the objective settles or the iterations are used up.

    Continues from a state of the same request in `state_file`, and writes it after every iteration.
    """
    request = state_request(lloyd.matrix, lloyd.config, seed)
    state = load_state(state_file, request) or lloyd.first_state(seed)
    left = range(state.iteration, lloyd.config.iterations)
    for _ in track(left, "k-means iterations at most", total=len(left)):
        if state.is_done:
            break
        state = lloyd.iterate(state)
        save_state(state_file, state, request)
    return state


_ROWS_PER_CLUSTER, _FEWEST_ROWS = 64, 16_384
"""Rows that k-means++ chooses from, at least, if the sample has more: per cluster, and in all."""
_FEW, _MANY = 1024, 8192
"""Most clusters that k-means++ chooses from the sample directly, and from drawn rows."""
_ROUNDS, _OVERSAMPLED = 5, 4
"""Rounds of drawing; drawn rows per cluster where k-means++ chooses among them."""


def choose_centroids(sample: Matrix, num_clusters: int, seed: int) -> Float64:
    """Choose the first centroids, (K, D), among the rows of a sample, which is one file."""
    rows = open_array(sample.files.paths[0])
    if num_clusters <= _FEW:
        rows = rows[:: max(len(rows) // max(_ROWS_PER_CLUSTER * num_clusters, _FEWEST_ROWS), 1)]
        return _plus_plus(rows, num_clusters, seed)
    times = _OVERSAMPLED if num_clusters <= _MANY else 1
    num = min(times * num_clusters, len(rows))
    drawn = np.asarray(rows[draw_rows(sample, num, seed)], np.float64)
    if num == num_clusters:
        return drawn
    weights = np.bincount(sample.labels(drawn, np.zeros(num)), minlength=num)
    return _plus_plus(drawn, num_clusters, seed, weights.astype(np.float64))


def draw_rows(sample: Matrix, num: int, seed: int) -> Int64:
    """Draw the numbers of `num` rows by k-means||, which favours rows far from those drawn."""
    rows, draws = open_array(sample.files.paths[0]), np.random.default_rng(seed)
    everyone = np.arange(len(rows))
    drawn = draws.integers(len(rows), size=1)
    squares = _squares(sample, rows[drawn])
    for share in np.array_split(np.arange(num - 1), _ROUNDS):
        left = np.setdiff1d(np.flatnonzero(squares), drawn)
        if not len(left) or not len(share):
            break
        chances = squares[left] / squares[left].sum()
        new = draws.choice(left, min(len(share), len(left)), replace=False, p=chances)
        drawn = np.append(drawn, new)
        squares = np.minimum(squares, _squares(sample, rows[new]))
    # too few are drawn where nearly all rows are equal: fill up with any others
    rest = draws.permutation(np.setdiff1d(everyone, drawn))[: num - len(drawn)]
    return np.append(drawn, rest)


def _squares(sample: Matrix, points: Float32) -> Float64:
    centroids = points.astype(np.float64)
    everyone = np.arange(sample.files.num_rows)
    found = sample.candidates(centroids, np.zeros(len(points)), 1, everyone)
    return found.distances[:, 0].astype(np.float64)


def _plus_plus(
    rows: Float32 | Float64, num: int, seed: int, weights: Float64 | None = None
) -> Float64:
    # imported late: it takes a second, and training only reads clusters
    from sklearn.cluster import kmeans_plusplus

    with threadpool_limits(1):
        chosen, _ = kmeans_plusplus(rows, num, sample_weight=weights, random_state=seed % 2**32)
    return np.asarray(chosen, np.float64)
