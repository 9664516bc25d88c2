"""Groups are places: two nodes with labels, workers started in a mixed order."""

import json

import pytest
import ray
import ray.train
from ray.cluster_utils import Cluster
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from moce_dist.config import ParallelConfig
from moce_dist.launch import training
from moce_dist.launch.nodes import GROUP_LABEL, Requirements
from moce_dist.launch.worker import join
from moce_dist.settings import ConfigError


@pytest.fixture(scope="module")
def two_nodes():
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    for group in ("g1", "g0"):
        cluster.add_node(num_cpus=2, labels={GROUP_LABEL: group})
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()


def test_live_nodes_are_seen_with_label_and_room(two_nodes):
    groups = ParallelConfig(num_workers=4, num_groups=2)
    found = sorted((host.group, host.slots) for host in training.live_hosts("CPU", groups))
    assert found == [("", 0), ("g0", 2), ("g1", 2)]
    # fits of a task have one group: they go wherever there is room
    alone = Requirements("fits", ParallelConfig(num_workers=4), 64, "CPU")
    hosts = training.live_hosts("CPU", alone.parallel)
    assert sorted((host.group, host.slots) for host in hosts) == [("", 0), ("", 2), ("", 2)]
    assert alone.best_seats(hosts) == [""] * 4 and "label" not in alone.missing(hosts)


def test_every_worker_is_asked_onto_its_group(two_nodes):
    wanted = Requirements("mae", ParallelConfig(num_workers=4, num_groups=2), 64, "CPU")
    found = wanted.best_seats(training.live_hosts("CPU", wanted.parallel))
    assert found == ["g0", "g0", "g1", "g1"]


def test_labels_that_do_not_fit_the_groups_are_refused(two_nodes):
    wanted = Requirements("mae", ParallelConfig(num_workers=1, num_groups=2), 64, "CPU")
    with pytest.raises(ConfigError, match=r"needs 1 values of the node label.*\['g0', 'g1'\]"):
        wanted.best_seats(training.live_hosts("CPU", wanted.parallel))


def test_ranks_follow_labels_not_the_order_of_starting(two_nodes, tmp_path):
    def report(config):
        import os
        from pathlib import Path

        import torch.distributed as dist

        join(60)
        dist.init_process_group("gloo")
        label = ray.get_runtime_context().get_node_labels()[GROUP_LABEL]
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, label)
        entry = {"label": label, "all": gathered}
        Path(config["out"], os.environ["RANK"]).write_text(json.dumps(entry))

    mixed = [{GROUP_LABEL: group} for group in ("g1", "g0", "g1", "g0")]
    DataParallelTrainer(
        report,
        train_loop_config={"out": str(tmp_path)},
        scaling_config=ray.train.ScalingConfig(num_workers=4, label_selector=mixed),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path / "ray")),
    ).fit()
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(4)]
    assert [entry["label"] for entry in found] == ["g0", "g0", "g1", "g1"]
    assert all(entry["all"] == ["g0", "g0", "g1", "g1"] for entry in found)
