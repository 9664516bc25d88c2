"""An embedded cluster on a machine that is too busy: Ray itself waits no longer than 30 s."""

import time
from types import SimpleNamespace

import pytest
import ray
from ray._private import node, services

from moce_dist.config import ParallelConfig
from moce_dist.launch.tasks import connect


@pytest.fixture
def without_ray(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.shutdown()
    yield
    ray.shutdown()


def test_a_node_that_is_late_once_is_started_again(without_ray, monkeypatch, caplog):
    """Ray's own start; its first question for the node is refused, and 100 s seem to pass."""
    refused, get_node = [], services.get_node

    def late(*arguments):
        if not refused:
            refused.append("not there yet")
            raise RuntimeError(refused[0])
        return get_node(*arguments)

    def now():
        return time.monotonic() + 100 * len(refused)

    monkeypatch.setattr(services, "get_node", late)
    monkeypatch.setattr(node, "time", SimpleNamespace(**vars(time) | {"monotonic": now}))
    connect(ParallelConfig(num_workers=2))
    assert ray.is_initialized() and ray.cluster_resources()["CPU"] >= 2
    assert "was not there in 30 s; trying once more" in caplog.text


def test_any_other_error_of_the_start_is_raised_as_it_is(without_ray, monkeypatch):
    def broken(*_):
        raise ValueError("no port is free")

    monkeypatch.setattr(services, "get_node", broken)
    with pytest.raises(ValueError, match="no port is free"):
        connect(ParallelConfig(num_workers=2))
    assert not ray.is_initialized()
