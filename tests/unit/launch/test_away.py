"""A driver without a GPU has a worker with one do its part. The GPU is only said to be there."""

import logging
import os
import signal
from types import SimpleNamespace

import pytest
import ray
from ray.cluster_utils import Cluster

from moce_dist.config import ParallelConfig
from moce_dist.launch.away import call_away, lacks_gpu
from moce_dist.run import lease
from moce_dist.settings import ConfigError


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs, and a node that says that it has a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        ray.shutdown()
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        with pytest.MonkeyPatch.context() as visible:
            visible.setenv("CUDA_VISIBLE_DEVICES", "0")
            nodes.add_node(num_cpus=2, num_gpus=1)
        patch.setenv("RAY_ADDRESS", nodes.address)
        yield nodes
        ray.shutdown()
        nodes.shutdown()


@pytest.fixture
def job(cluster, tmp_path):
    parallel = ParallelConfig(num_workers=2, num_groups=1, start_timeout_s=60)
    return SimpleNamespace(
        name="away", folder=tmp_path / "task", parallel=parallel, progress=lambda: ""
    )


def look(folder, name):
    """Say where this is, and who holds the folder."""
    logging.getLogger("moce_dist.far").info("greetings of %s", name)
    with lease.hold(folder):
        holder = (folder / lease.LOCK).read_text()
    return os.getpid(), ray.get_runtime_context().get_assigned_resources().get("GPU"), holder


def refuse(name):
    raise ConfigError(f"{name} = 3: must be 4")


def die_once(folder):
    if not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "again"


def test_a_worker_with_a_gpu_does_it_under_the_drivers_lock(job, caplog):
    assert lacks_gpu(job.parallel)
    assert not lacks_gpu(job.parallel.model_copy(update={"use_gpu": False}))
    caplog.set_level("INFO")
    with lease.hold(job.folder):
        lock = (job.folder / lease.LOCK).read_text()
        process, gpus, holder = call_away(job, look, job.folder, "a worker")
        assert holder == lock == (job.folder / lease.LOCK).read_text()
        # the GPU is free again, for the ranks
        assert call_away(job, look, job.folder, "another")[0] != process
    assert process != os.getpid() and gpus == 1
    said = [line for line in caplog.messages if "greetings" in line]
    assert said == ["greetings of a worker", "greetings of another"]


def test_its_error_is_the_drivers_and_a_death_is_not_the_end(job):
    with pytest.raises(ConfigError, match=r"^a\.b = 3: must be 4$"):
        call_away(job, refuse, "a.b")
    job.folder.mkdir(exist_ok=True)
    assert call_away(job, die_once, job.folder) == "again"


class Taker:
    def is_here(self):
        return True


def test_a_gpu_that_stays_taken_is_not_waited_for_for_ever(job):
    job.parallel = job.parallel.model_copy(update={"start_timeout_s": 2})
    taken = ray.remote(num_gpus=1)(Taker).remote()
    assert ray.get(taken.is_here.remote())
    with pytest.raises(RuntimeError, match="no worker has started in 2 s; each needs a CPU and a"):
        call_away(job, refuse, "a.b")
    ray.kill(taken)
