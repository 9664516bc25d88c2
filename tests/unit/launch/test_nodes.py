"""Where workers go, spelt out; and what a loss costs."""

import asyncio
import errno
import os
import signal
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from moce_dist.cli import FinalError
from moce_dist.config import ParallelConfig, make_config
from moce_dist.launch.job import Failure, Follower, failure_of, heed_sigterm, short_stop
from moce_dist.launch.nodes import Host, Requirements, seats, wait_for_seats
from moce_dist.launch.status import LossBudget, Sign, StatusBoard, cause_of
from moce_dist.launch.training import hold_crew, train
from moce_dist.parallel.groups import Topology
from moce_dist.run.directory import Run, StoppedError
from moce_dist.settings import ConfigError
from moce_dist.train.job import TooManyFaultsError
from moce_dist.train.pulse import Beat
from moce_dist.transfer.request import Request
from moce_dist.transfer.suite import FitsJob


def hosts(*slots_by_label):
    return [
        Host(f"n{i}", f"10.0.0.{i}", label, slots)
        for i, (label, slots) in enumerate(slots_by_label)
    ]


def wanted(batch_size=64, **parallel):
    return Requirements("moce", ParallelConfig(**parallel), batch_size, "CPU")


def never():
    return False


def test_labels_are_places_and_their_ranks_are_neighbours():
    cluster = hosts(("g10", 2), ("g2", 1), ("g2", 1))
    found = seats(cluster, Topology(4, 2), one_place_a_label=True)
    assert found == ["g2", "g2", "g10", "g10"]


def test_every_label_needs_room_for_all_ranks_of_its_place():
    cluster = hosts(("g0", 3), ("g1", 1))
    assert seats(cluster, Topology(4, 2), one_place_a_label=True) is None
    assert seats(cluster, Topology(2, 2), one_place_a_label=True) == ["g0", "g1"]


def test_smaller_starts_put_several_places_on_a_label():
    cluster = hosts(("g0", 2), ("g1", 2), ("g3", 2))
    assert seats(cluster, Topology(4, 4), one_place_a_label=False) == ["g0", "g0", "g1", "g3"]
    # the two ranks of a place share a label, so three labels of three slots hold three places
    cluster = hosts(("g0", 3), ("g1", 3), ("g3", 3))
    assert seats(cluster, Topology(8, 4), one_place_a_label=False) is None
    assert seats(cluster, Topology(2, 4), one_place_a_label=False) == ["g0", "g1"]


def test_without_labels_room_is_counted_over_all_nodes():
    cluster = hosts(("", 3), ("", 1))
    assert seats(cluster, Topology(4, 2), one_place_a_label=True) == [""] * 4
    assert seats(cluster, Topology(8, 2), one_place_a_label=True) is None


def test_what_is_missing_is_the_least_legal_number():
    # of 5, 6, 7 and 8 workers, only 8 fit 4 groups
    least = wanted(num_workers=8, num_groups=4, min_workers=5)
    assert least.best_seats(hosts(("", 6))) is None
    assert least.missing(hosts(("", 6))).startswith("8 workers need a free CPU each")


@pytest.mark.parametrize(("slots", "count"), [(9, 8), (7, 4), (3, 2), (1, None), (0, None)])
def test_the_largest_legal_number_within_the_bounds_is_taken(slots, count):
    found = wanted(num_workers=8, num_groups=4, min_workers=2).best_seats(hosts(("", slots)))
    assert (len(found) if found else None) == count


def test_a_run_that_is_not_elastic_takes_all_or_nothing():
    fixed = wanted(num_workers=4, num_groups=4)
    assert fixed.best_seats(hosts(("", 3))) is None
    assert len(fixed.best_seats(hosts(("", 4)))) == 4


def test_labels_without_a_place_are_refused_not_ignored():
    cluster = hosts(("g0", 4), ("g1", 4), ("g2", 4))
    message = r"needs 2 values of the node label .*\['g0', 'g1', 'g2'\]"
    with pytest.raises(ConfigError, match=message):
        wanted(num_workers=4, num_groups=2).best_seats(cluster)


def test_fits_have_one_group(tmp_path):
    config = make_config({"parallel": {"num_workers": 4, "num_groups": 4}})
    job = FitsJob(Run(tmp_path), config, Request("digits", None, ("moce",), ("finetune",), 1, None))
    # `live_hosts` leaves labels out then
    assert job.parallel.num_groups == 1 and config.parallel.num_groups == 4
    assert job.parallel.num_workers == 4


def test_counts_follow_batch_groups_and_bounds():
    parallel = ParallelConfig(num_workers=64, num_groups=4, min_workers=4)
    assert parallel.worker_counts(4096) == [64, 32, 16, 8, 4]
    assert parallel.worker_counts(48 * 64) == [64, 48, 32, 24, 16, 12, 8, 4]
    assert ParallelConfig(num_workers=8, num_groups=4).worker_counts(4096) == [8]


def test_fewer_ranks_hold_no_more_images_at_a_time():
    parallel = ParallelConfig(num_workers=8, num_groups=4, micro_batches=2)
    for batch_size in (64, 4096, 48 * 16):
        most = batch_size // 8 // 2
        for ranks in (8, 4, 2, 1):
            micro_batches = parallel.micro_batches_on(ranks, batch_size)
            images, rest = divmod(batch_size // ranks, micro_batches)
            assert rest == 0 and images <= most
    assert [parallel.micro_batches_on(r, 64) for r in (8, 4, 2, 1)] == [2, 4, 8, 16]
    # 3 ranks of 16 images: 8 of 3 at a time would do, 16 do not divide by it
    assert ParallelConfig(num_workers=4, num_groups=1, micro_batches=3).micro_batches_on(3, 48) == 4


def test_full_room_is_taken_at_once_and_less_only_after_some_time():
    spec = wanted(num_workers=2, min_workers=1, start_timeout_s=4)
    begin = time.monotonic()
    assert len(wait_for_seats(spec, lambda: hosts(("", 2)), never)) == 2
    assert time.monotonic() - begin < 1
    looks = iter([hosts(("", 1)), hosts(("", 2))])
    assert len(wait_for_seats(spec, lambda: next(looks), never)) == 2
    assert len(wait_for_seats(spec, lambda: hosts(("", 1)), never)) == 1


def test_waiting_ends_with_what_was_needed_and_what_there_is():
    spec = wanted(num_workers=4, num_groups=2, start_timeout_s=0.5)
    with pytest.raises(RuntimeError) as caught:
        wait_for_seats(spec, lambda: hosts(("g1", 2), ("g0", 1)), never)
    label = "moce.dist/expert-group"
    assert str(caught.value) == (
        "moce: no room within parallel.start_timeout_s (0.5 s): "
        f"2 values of the node label {label} are needed, each with 2 free CPU; "
        f"{label}=g0 on 10.0.0.1 has 1 free CPU; {label}=g1 on 10.0.0.0 has 2 free CPU"
    )


def test_unlabelled_nodes_never_replace_labelled_ones():
    looks = iter([hosts(("g0", 0), ("", 9))] + [hosts(("", 9))] * 9)
    with pytest.raises(RuntimeError, match="no room"):
        wait_for_seats(wanted(start_timeout_s=1.5), lambda: next(looks), never)


def test_waiting_heeds_a_wish_to_stop():
    with pytest.raises(StoppedError, match="while waiting for nodes"):
        wait_for_seats(wanted(num_workers=2), lambda: [], lambda: True)


def test_failures_and_preemptions_have_budgets_of_their_own():
    budgets = LossBudget("mae", ParallelConfig(max_failures=1, max_preemptions=2))
    for _ in range(2):
        budgets.charge(is_preemption=True, cause="node gone", reached={})
    said = budgets.charge(is_preemption=False, cause="killed", reached={})
    assert said == "mae: failure 1 of at most 1: killed"
    with pytest.raises(RuntimeError, match=r"2 failures, more than parallel\.max_failures \(1\)"):
        budgets.charge(is_preemption=False, cause="killed", reached={"mae": 1})
    with pytest.raises(RuntimeError, match=r"3 preemptions, .*parallel\.max_preemptions \(2\)"):
        budgets.charge(is_preemption=True, cause="node gone", reached={})


def test_the_same_cause_twice_at_the_same_step_is_not_tried_again():
    budgets = LossBudget("mae", ParallelConfig(max_failures=9))
    budgets.charge(is_preemption=False, cause="worker 1: port 4711", reached={"mae": 5})
    # a step further, then one of another kind, then a lost node
    budgets.charge(is_preemption=False, cause="worker 0: port 4712", reached={"mae": 6})
    budgets.charge(is_preemption=False, cause="out of memory", reached={"mae": 6})
    budgets.charge(is_preemption=True, cause="out of memory", reached={"mae": 6})
    budgets.charge(is_preemption=False, cause="worker 0: port 1", reached={"mae": 400})
    # trained again from a checkpoint, and lost at another step of it: by chance
    budgets.charge(is_preemption=False, cause="worker 1: port 2", reached={"mae": 390})
    with pytest.raises(RuntimeError, match=r"mae: twice at the same step: worker 1: port"):
        budgets.charge(is_preemption=False, cause="worker 1: port 3", reached={"mae": 388})
    # nor one that comes before the first step
    budgets = LossBudget("mae", ParallelConfig(max_failures=9))
    budgets.charge(is_preemption=False, cause="no memory", reached={})
    with pytest.raises(RuntimeError, match="twice at the same step"):
        budgets.charge(is_preemption=False, cause="no memory", reached={})


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/metrics.jsonl")


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (FULL, FinalError, "[Errno 28] No space left on device: '/data/metrics.jsonl'"),
        (RuntimeError("Caught OSError:\n No space left on device"), FinalError, "No space left"),
        (
            FloatingPointError("mae: loss is nan at step 3"),
            FinalError,
            "mae: loss is nan at step 3",
        ),
        (ConfigError("a.b = 3: must be 4"), ConfigError, "a.b = 3: must be 4"),
        (TooManyFaultsError("9 of 10"), FinalError, "9 of 10"),
        (KeyError("x"), RuntimeError, "KeyError: 'x'"),
        (MemoryError("3 GiB"), RuntimeError, "3 GiB"),
        (OSError(errno.EMFILE, "Too many open files", "/data/a"), RuntimeError, "/data/a"),
        (ConnectionResetError("gone"), None, "gone"),
        (TimeoutError("waited in vain"), None, "waited in vain"),
        (OSError(errno.ESTALE, "Stale file handle", "/nfs/a"), None, "/nfs/a"),
        (RuntimeError("Gloo connectFullMesh failed"), None, "connectFullMesh"),
    ],
)
def test_errors_that_another_try_would_not_cure_are_told_apart(error, kind, said):
    failure = failure_of(error)
    assert failure.kind is kind
    assert said in failure.text and "\n" not in failure.text


def test_the_desk_passes_on_what_ranks_say():
    desk = StatusBoard()
    for rank in (0, 1):
        desk.join(rank, Sign(f"n{rank}", f"10.0.0.{rank}", 70 + rank, 0.0))
    assert not desk.beat(0, Beat("mae", 7, 0.1, 0.1))
    desk.leave(1, Failure("connection closed", None))
    assert desk.failure() is None
    desk.leave(0, Failure("no space", FinalError))
    desk.stop()
    # a beat that was on its way does not bring a rank back
    assert desk.beat(0, Beat("mae", 8, 0.1, 0.1))
    assert desk.failure().text == "no space" and desk.reached() == {"mae": 8}
    assert desk.standing_still(0.0) == []


def test_jobs_follow_each_other_on_the_board():
    async def work(board, rank, done):
        number = 0
        while (job := await board.next_job(number)) is not None:
            board.leave(rank, Failure(f"{job} of {rank}", FinalError))
            done.append((job, rank))
            board.finish(rank)
            number += 1

    async def drive(board):
        done = []
        ranks = [asyncio.create_task(work(board, rank, done)) for rank in (0, 1)]
        for job in ("mae", "moce"):
            await board.carry_out(job)
            assert sorted(done[-2:]) == [(job, 0), (job, 1)]
            # what failed in the job before is not this one's
            assert board.failure().text.startswith(job)
            board.stop()
        await asyncio.sleep(0)
        assert not any(rank.done() for rank in ranks)
        board.dismiss()
        await asyncio.gather(*ranks)
        assert len(done) == 4

    asyncio.run(drive(StatusBoard(2)))


def test_the_worker_that_died_is_named_before_what_its_neighbours_met():
    death = type("WorkerHealthCheckFailedError", (Exception,), {})("Info\nexit 9 " + "x" * 900)
    lost = RuntimeError("Training failed\nTraceback ...")
    lost.worker_failures = {0: RuntimeError("connection\nclosed"), 3: death}
    assert cause_of(lost) == "worker 3 died: exit 9 ..."
    lost.worker_failures = {0: RuntimeError("connection\nclosed")}
    assert cause_of(lost) == "worker 0: RuntimeError: connection closed"
    assert cause_of(TimeoutError("no\nroom")) == "TimeoutError: no room"


def test_a_submitted_job_says_when_a_stop_would_kill_it_too_soon():
    submitted = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    assert short_stop({}) == "" and short_stop({"RAY_JOB_STOP_WAIT_TIME_S": "3"}) == ""
    assert short_stop(submitted).startswith("RAY_JOB_STOP_WAIT_TIME_S (3) is less than 60 s")
    assert "(a while)" in short_stop(submitted | {"RAY_JOB_STOP_WAIT_TIME_S": "a while"})
    assert short_stop(submitted | {"RAY_JOB_STOP_WAIT_TIME_S": "120"}) == ""


@pytest.fixture
def handled(monkeypatch):
    """The signals that reach the handler around a job, which interrupts like that of a command."""
    came = []

    def interrupt(number, _):
        came.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    yield came
    signal.signal(signal.SIGTERM, before)


def test_sigterm_becomes_a_question_and_then_reaches_the_old_handler(handled):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), heed_sigterm() as is_terminated:
        assert not is_terminated()
        os.kill(os.getpid(), signal.SIGTERM)
        assert is_terminated() and not handled
    assert handled == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_that_a_block_has_heeded_is_not_passed_on(handled):
    with pytest.raises(StoppedError), heed_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        raise StoppedError("state saved")
    assert not handled


def test_sigterm_inside_of_two_questions_answers_both(handled):
    with pytest.raises(StoppedError), heed_sigterm() as outer:
        with heed_sigterm() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner() and not outer()
        assert outer()
        raise StoppedError("state saved")
    assert not handled


@dataclass
class LateJob:
    """A job without Ray that gets SIGTERM after its last step."""

    parallel: ParallelConfig
    runs: int = 0

    def run(self, pulse):
        self.runs += 1
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_at_the_end_of_a_job_lets_it_end_and_no_other_begins(monkeypatch, handled):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    job = LateJob(ParallelConfig(num_workers=1, num_groups=1))
    for run in (hold_and_train_twice, train_twice):
        job.runs = 0
        with pytest.raises(KeyboardInterrupt):
            run(job)
        assert job.runs == 1
    assert handled == [signal.SIGTERM] * 2


def hold_and_train_twice(job):
    with hold_crew() as crew:
        crew.train(job)
        crew.train(job)


def train_twice(job):
    train(job)
    train(job)


def test_progress_is_told_once_and_never_as_an_empty_line(tmp_path, monkeypatch, caplog):
    now, said = [0.0], [""]
    job = SimpleNamespace(folder=tmp_path, progress=lambda: said[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    follower = Follower(job)
    # a worker is lost after the first line, and all steps are repeated
    for turn, text in enumerate(["step 1", "step 1", "", "step 1", "step 2"], start=1):
        now[0], said[0] = 60 * turn, text
        with caplog.at_level("INFO"):
            follower.report()
    assert caplog.messages == ["step 1", "step 2"]
