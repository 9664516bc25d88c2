"""The ranks of a start agree on a name, whatever an earlier start left in the store."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from moce_dist.parallel.rendezvous import agree, agree_on_device
from moce_dist.settings import ConfigError

SOON = timedelta(seconds=20)


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def names(store, ranks, world_size=3):
    """What each rank comes to; they arrive one after the other."""
    found = {}

    def come(rank):
        client = dist.TCPStore("127.0.0.1", store.port, is_master=False)
        found[rank] = agree(client, rank, world_size, SOON)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_every_start_has_a_name_that_all_of_its_ranks_know(store, order):
    seen = set()
    for _ in range(3):
        found = names(store, order)
        assert set(found) == {0, 1, 2} and len(set(found.values())) == 1
        assert not seen & set(found.values())
        seen |= set(found.values())


def test_ranks_that_were_lost_on_the_way_do_not_count(store):
    names(store, (0, 1, 2))
    # of the next start rank 2 came and was lost, of the one after it nobody
    store.set("hello/2", "somebody who is dead")
    found = names(store, (1, 0, 2))
    assert len(set(found.values())) == 1


def test_nobody_waits_for_ever(store):
    with pytest.raises(TimeoutError, match="waited in vain for the other ranks"):
        agree(store, 0, 2, timedelta(seconds=0.3))
    with pytest.raises(TimeoutError, match="waited in vain for rank 0"):
        agree(store, 1, 2, timedelta(seconds=0.3))


def kinds(store, *kind_of_rank):
    """What each rank is told when all compare their devices."""
    found = {}

    def come(rank, kind):
        client = dist.TCPStore("127.0.0.1", store.port, is_master=False)
        try:
            found[rank] = agree_on_device(client, len(kind_of_rank), kind)
        except ConfigError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=come, args=pair) for pair in enumerate(kind_of_rank)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(len(kind_of_rank))]


def test_ranks_with_and_without_a_gpu_do_not_wait_for_each_other(store):
    (said,) = set(kinds(store, "cuda", "cpu", "cuda"))
    assert said.startswith("parallel.use_gpu: 1 of 3 ranks have no GPU that torch can use, ")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_ranks_of_one_kind_go_on(store, kind):
    assert kinds(store, kind, kind) == [None, None]
