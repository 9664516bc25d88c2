"""Workers with state: results in order, errors as they are, items of a worker that died."""

import os
import signal
import threading
import time
from functools import cached_property
from pathlib import Path

import pytest
import ray
import torch

from moce_dist.config import Config, ParallelConfig
from moce_dist.launch.actors import hold_actors
from moce_dist.launch.tasks import hold_tasks, map_tasks
from moce_dist.run.directory import Run
from moce_dist.settings import ConfigError
from moce_dist.transfer.request import Request
from moce_dist.transfer.suite import Order, TaskOutcome

ROOT = Path(__file__).parents[3]


class Shared:
    """Counts how often a worker has opened it."""

    def __init__(self, folder):
        self.folder = folder

    @cached_property
    def opened(self):
        (self.folder / f"opened-{os.getpid()}-{time.monotonic_ns()}").touch()
        return os.getpid()


def note(shared, item):
    (shared.folder / f"did-{item}-{shared.opened}").touch()
    return item, shared.opened


def slow_on_first(shared, item):
    if item % 2 == 0:
        time.sleep(0.3)
    return note(shared, item)


def refuse(shared, item):
    if item == 5:
        raise LookupError("row 5 of it")
    return item


def double(shared, item):
    return 2 * item


def die_once(shared, item):
    dead = shared.folder / "dead"
    if item == 4 and not dead.exists():
        dead.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return note(shared, item)[0]


def die(shared, item):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def two_cpus():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_more_workers_than_there_is_room_for_do_all_items(two_cpus, monkeypatch):
    monkeypatch.setattr("moce_dist.launch.actors._START_S", 3)
    # every third item is dealt to a worker that never comes, the first ones among them
    with hold_actors(ParallelConfig(num_workers=3, use_gpu=False)) as held:
        assert list(held.map_tasks(double, None, list(range(200)))) == list(range(0, 400, 2))


def fail_or_write(folder, item):
    if item == 0:
        raise LookupError("the first one")
    (folder / f"{item}.begun").touch()
    time.sleep(5)
    (folder / f"{item}.ended").touch()


def test_after_an_error_no_task_writes_any_more(two_cpus, tmp_path):
    found = map_tasks(ParallelConfig(num_workers=2), fail_or_write, tmp_path, range(4))
    with pytest.raises(LookupError, match="the first one"):
        list(found)
    time.sleep(6)
    assert not list(tmp_path.glob("*.ended"))


def interrupt_once_begun(folder):
    for _ in range(600):
        if list(folder.glob("*.begun")):
            break
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)


def test_after_an_interruption_no_task_writes_any_more(two_cpus, tmp_path):
    parallel = ParallelConfig(num_workers=2)
    found = map_tasks(parallel, fail_or_write, tmp_path, range(1, 4))
    # in the middle of the first task, whose result is waited for
    threading.Thread(target=interrupt_once_begun, args=(tmp_path,), daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        next(found)
    assert list(tmp_path.glob("*.begun"))
    found.close()
    time.sleep(6)
    assert not list(tmp_path.glob("*.ended"))


def test_futures_of_tasks_fail_alone_and_end_with_their_block(two_cpus, tmp_path):
    with hold_tasks(ParallelConfig(num_workers=2), fail_or_write, tmp_path) as start:
        failed, slow = start(0), start(1)
        with pytest.raises(LookupError, match="the first one"):
            failed.result(timeout=60)
        for _ in range(600):
            if begun := (tmp_path / "1.begun").exists():
                break
            time.sleep(0.1)
        assert begun and not slow.done()
    time.sleep(6)
    assert not list(tmp_path.glob("*.ended"))


def test_a_task_of_a_suite_whose_process_dies_stops_nobody_else(two_cpus, tmp_path, monkeypatch):
    # workers import this module, and know nothing of pytest's paths
    from in_process import load_script

    suite = load_script(ROOT / "jobs" / "transfer.py")

    def attempt(run, order):
        if order.request.name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return TaskOutcome(order.request.name, {})

    monkeypatch.setattr(suite, "attempt", attempt)
    requests = [Request("digits", None, (), (), 1, None, name) for name in ("one", "dies", "two")]
    orders = [Order(request, Config()) for request in requests]
    found = list(suite.attempts(ParallelConfig(num_workers=2), Run(tmp_path), orders))
    assert [(each.name, each.metrics) for each in found] == [
        ("one", {}),
        ("dies", None),
        ("two", {}),
    ]
    assert "WorkerCrashedError" in found[1].failure


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_process_does_not_do_without_the_gpu_that_was_asked_for():
    parallel = ParallelConfig(num_workers=1, use_gpu=True)
    with pytest.raises(ConfigError, match=r"parallel\.use_gpu"), hold_actors(parallel):
        pass


@pytest.fixture(scope="module")
def workers(two_cpus):
    with hold_actors(ParallelConfig(num_workers=2, use_gpu=False)) as held:
        assert list(held.map_tasks(refuse, None, [1, 2])) == [1, 2]
        yield held


def test_blocks_go_to_the_same_worker_which_opens_what_is_shared_once(workers, tmp_path):
    shared = Shared(tmp_path)
    first = dict(workers.map_tasks(note, shared, list(range(4))))
    assert list(first) == [0, 1, 2, 3] and len(set(first.values())) == 2
    assert first[0] == first[2] != first[1] == first[3]
    assert len(list(tmp_path.glob("opened-*"))) == 2
    assert dict(workers.map_tasks(note, shared, list(range(4)))) == first
    assert workers.device == "cpu"


def test_who_is_done_takes_what_another_has_left(workers, tmp_path):
    done = dict(workers.map_tasks(slow_on_first, Shared(tmp_path), list(range(20))))
    assert list(done) == list(range(20))
    slow, fast = done[0], done[1]
    assert slow != fast and done[18] == fast


def test_an_error_is_raised_as_it_was_and_the_crew_goes_on(workers, tmp_path):
    with pytest.raises(LookupError, match="row 5 of it"):
        list(workers.map_tasks(refuse, None, list(range(9))))
    assert list(workers.map_tasks(refuse, None, [1, 2, 3])) == [1, 2, 3]


def test_results_that_nobody_waits_for_disturb_no_later_ones(workers, tmp_path):
    begun = workers.map_tasks(slow_on_first, Shared(tmp_path), list(range(9)))
    assert next(iter(begun))[0] == 0
    assert list(workers.map_tasks(refuse, None, [7, 8])) == [7, 8]


def test_items_of_a_worker_that_died_are_done_by_another(workers, tmp_path):
    assert list(workers.map_tasks(die_once, Shared(tmp_path), list(range(9)))) == list(range(9))
    assert (tmp_path / "dead").exists()
    assert {int(path.name.split("-")[1]) for path in tmp_path.glob("did-*")} == set(range(9))


def test_a_crew_for_which_there_is_no_room_is_an_error(workers):
    # the first one holds all CPUs
    parallel = ParallelConfig(num_workers=2, use_gpu=False, start_timeout_s=2)
    with (
        hold_actors(parallel) as held,
        pytest.raises(RuntimeError, match=r"no worker has started in 2 s; each needs a CPU"),
    ):
        list(held.map_tasks(refuse, None, [1]))


def test_one_worker_is_this_process(tmp_path):
    with hold_actors(ParallelConfig(num_workers=1, use_gpu=False)) as held:
        assert list(held.map_tasks(refuse, None, [1, 2])) == [1, 2]
        assert [pid for _, pid in held.map_tasks(note, Shared(tmp_path), [3])] == [os.getpid()]


def test_workers_that_die_again_and_again_end_the_work(workers):
    with pytest.raises(RuntimeError, match="workers died"):
        list(workers.map_tasks(die, None, [1, 2, 3]))
