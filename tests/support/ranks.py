"""Real processes for tests of many ranks: one warm pool per world size, gloo between them.

DeepSpeed and what comes with it take seconds to import, so that is done once, in a server that all
processes are forked from, and a pool lives for the whole session. A test names a function of
cases.py; every process of the pool calls it with the same arguments and returns a result.
"""

import importlib.util
import io
import multiprocessing
import os
import sys
import tempfile
import traceback
from multiprocessing import forkserver
from pathlib import Path

import pytest

TIMEOUT_S = 240
CASES = Path(__file__).parents[1] / "distributed" / "cases.py"
PRELOADED = (
    "moce_dist.train.loop",
    "moce_dist.cluster.kmeans",
    "segmentation_models_pytorch",
    "sklearn.linear_model",
)


def load_cases():
    spec = importlib.util.spec_from_file_location("moce_dist_cases", CASES)
    module = importlib.util.module_from_spec(spec)
    sys.modules["moce_dist_cases"] = module
    spec.loader.exec_module(module)
    return module


def _serve(rank, world_size, port, pipe):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        # gloo and CPU ranks on a machine with GPUs, too
        CUDA_VISIBLE_DEVICES="",
    )
    log = Path(tempfile.gettempdir()) / f"moce-pool-{os.getppid()}-{world_size}-{rank}.log"
    sys.stdout = sys.stderr = log.open("w")
    cases = load_cases()
    while True:
        name, arguments = pipe.recv()
        try:
            pipe.send((True, getattr(cases, name)(**arguments)))
        except BaseException:  # noqa: BLE001 - the test must hear of anything
            pipe.send((False, traceback.format_exc()))


def preloaded():
    """Return a context of processes forked from a server that has the heavy imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        forkserver.ensure_running()
    return context


class Pool:
    """Processes that form one gloo group; a failed or hung call ends them."""

    def __init__(self, world_size):
        from moce_dist.parallel.groups import free_port

        context = preloaded()
        port = free_port()
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, port, theirs), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, name, **arguments):
        """Call cases.NAME(**arguments) on every rank; results in rank order."""
        self.start(name, **arguments)
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_S):
                self.kill()
                pytest.fail(f"{name}: rank {rank} did not answer within {TIMEOUT_S} s")
            is_good, result = pipe.recv()
            if not is_good:
                self.kill()
                pytest.fail(f"{name}: rank {rank}:\n{result}")
            results.append(result)
        return results

    def start(self, name, **arguments):
        """Have every rank call cases.NAME(**arguments), and do not wait."""
        for pipe in self._pipes:
            pipe.send((name, arguments))

    def kill(self):
        """End all processes by SIGKILL."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    @property
    def is_alive(self):
        return all(process.is_alive() for process in self._processes)


@pytest.fixture(scope="session")
def pools():
    """Return a function: world size -> warm pool."""
    alive = {}

    def pool(world_size):
        if world_size not in alive or not alive[world_size].is_alive:
            alive[world_size] = Pool(world_size)
        return alive[world_size]

    yield pool
    for each in alive.values():
        each.kill()


def _some_image(draws):
    import numpy as np
    from PIL import Image

    colours = draws.integers(0, 255, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((32, 32), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def clustered_run(tmp_path_factory):
    """A run directory with 8 clusters of 20 or 21 images, ready for stage moce."""
    import numpy as np

    from moce_dist.data.shards import write_index
    from moce_dist.data.writer import ShardWriter

    root, draws = tmp_path_factory.mktemp("clustered"), np.random.default_rng(0)
    shards = []
    for cluster in range(8):
        writer = ShardWriter(root / "shards", f"cluster-{cluster:05d}-000000.tar", cluster=cluster)
        for number in range(20 + cluster % 2):
            writer.add(f"c{cluster}/{number:04d}", {"png": _some_image(draws)})
        shards.append(writer.close())
    write_index(root / "shards", shards)
    (root / "clusters").mkdir()
    np.save(root / "clusters" / "centroids.npy", draws.standard_normal((8, 32)).astype(np.float32))
    return root


@pytest.fixture(scope="session")
def cases():
    """The module that the pools run, loaded here."""
    return load_cases()


def fresh_run(clustered_run, folder):
    """A run directory of its own on the same shards and clusters."""
    folder.mkdir(exist_ok=True)
    for name in ("shards", "clusters"):
        (folder / name).symlink_to(clustered_run / name)
    return folder


@pytest.fixture
def own_run(clustered_run, tmp_path):
    return fresh_run(clustered_run, tmp_path)
