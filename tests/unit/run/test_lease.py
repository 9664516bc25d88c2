"""One writer a folder: real processes that meet, die, stand still, and run on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from in_process import load_script
from PIL import Image

from moce_dist.config import make_config
from moce_dist.run import lease
from moce_dist.run.directory import open_run, set_aside
from moce_dist.run.lease import LOCK, Claim, hold
from moce_dist.settings import ConfigError

JOBS = Path(__file__).parents[3] / "jobs"
# holds a folder and writes into it until its input ends
HOLDER = """
import sys, time
from pathlib import Path
from moce_dist.run import lease
from moce_dist.cli import run_job
from moce_dist.run.files import record_fault, write_atomic

lease.EVERY_S, lease.STALE_S, lease._LOOK_S = 0.2, 1.5, 0.2

def main(argv):
    folder, seconds = Path(argv[0]), float(argv[1])
    with lease.hold(folder):
        end, said = time.monotonic() + seconds, "held\\n"
        while time.monotonic() < end:
            write_atomic(folder / "state", argv[2])
            record_fault(folder / "faults.jsonl", writer=argv[2])
            sys.stdout.write(said)
            sys.stdout.flush()
            said = ""

run_job(main)
"""


@pytest.fixture
def start(tmp_path):
    script, running = tmp_path / "holder.py", []
    script.write_text(HOLDER)

    def begin(folder, name="a", seconds=60.0, env=None):
        process = subprocess.Popen(
            [sys.executable, script, folder, str(seconds), name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | (env or {}),
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def wait_for(process, word="held"):
    assert process.stdout.readline() == f"{word}\n", process.stderr.read()
    return process


def writers(folder):
    lines = (folder / "faults.jsonl").read_text().splitlines()
    return [json.loads(line)["writer"] for line in lines]


def test_one_of_many_that_start_together_gets_the_folder(tmp_path, start):
    folder = tmp_path / "run"
    processes = [start(folder, name, seconds=8.0) for name in "abcde"]
    ends = [(process.communicate(timeout=60), process.returncode) for process in processes]
    assert sorted(status for _, status in ends) == [0, 2, 2, 2, 2]
    (winner,) = [p for p, (_, status) in zip(processes, ends, strict=True) if status == 0]
    for (_, err), status in ends:
        if status == 2:
            assert err.count("\n") == 1 and f"{folder}: is in use by process {winner.pid} on" in err
    assert set(writers(folder)) == {"abcde"[processes.index(winner)]}
    assert {path.name for path in folder.iterdir()} == {"state", "faults.jsonl"}


def test_second_is_refused_at_once_naming_the_holder_and_since_when(tmp_path, start, monkeypatch):
    holder = wait_for(start(tmp_path / "run"))
    # whoever waits sleeps
    monkeypatch.setattr(lease.time, "sleep", lambda _: pytest.fail("it waited"))
    with pytest.raises(ConfigError) as caught, hold(tmp_path / "run"):
        pass
    since = json.loads((tmp_path / "run" / LOCK).read_text())["since"]
    assert f"process {holder.pid} on" in str(caught.value) and f"since {since}" in str(caught.value)
    assert "holder.py" in str(caught.value)


def test_lease_of_a_killed_process_is_taken_over_at_once(tmp_path, start):
    folder = tmp_path / "run"
    holder = wait_for(start(folder))
    holder.send_signal(signal.SIGKILL)
    # the parent has not asked for its status: it is a zombie
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    begin = time.monotonic()
    wait_for(start(folder, "b"))
    assert time.monotonic() - begin < 5
    holder.wait()


def test_terminated_process_gives_its_lease_back(tmp_path, start):
    holder = wait_for(start(tmp_path / "run"))
    holder.send_signal(signal.SIGINT)
    assert holder.wait(timeout=10) == 130
    assert not (tmp_path / "run" / LOCK).exists()


def test_stopped_process_that_was_replaced_leaves_without_writing(tmp_path, start):
    folder = tmp_path / "run"
    first = wait_for(start(folder, "a"))
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(ConfigError, match=f"process {first.pid}"), hold(folder):
        pass
    time.sleep(2.0)
    second = wait_for(start(folder, "b"))
    lines = len(writers(folder))
    first.send_signal(signal.SIGCONT)
    _, err = first.communicate(timeout=10)
    assert first.returncode == 1 and f"was taken over by process {second.pid}" in err
    assert err.count("\n") == 1
    assert "a" not in writers(folder)[lines:]
    assert second.poll() is None and (folder / "state").read_text() == "b"


def test_stopped_process_that_was_not_replaced_goes_on(tmp_path, start):
    first = wait_for(start(tmp_path / "run", seconds=4.0))
    first.send_signal(signal.SIGSTOP)
    time.sleep(2.0)
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=20) == 0


def claim_elsewhere(folder, **changes):
    other = replace(Claim.of_this_process(), host="node7", pid=1, place="another boot", **changes)
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(asdict(other)))
    return folder / LOCK


def test_lease_of_another_host_is_free_when_its_heartbeat_is_old(tmp_path):
    lock = claim_elsewhere(tmp_path)
    old = time.time() - lease.STALE_S - 1
    os.utime(lock, (old, old))
    with hold(tmp_path):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert not lock.exists()


def test_lease_of_another_host_is_refused_with_its_next_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_LOOK_S", 0.05)
    lock, looks = claim_elsewhere(tmp_path), []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            os.utime(lock)

    monkeypatch.setattr(lease.time, "sleep", sleep)
    with pytest.raises(ConfigError, match=r"process 1 on node7 .* since"), hold(tmp_path):
        pass
    assert len(looks) == 3


def test_a_submitted_job_waits_until_the_driver_before_it_has_left(tmp_path, start, monkeypatch):
    process = start(tmp_path)
    wait_for(process)
    monkeypatch.setenv(lease.SUBMITTED, "{}")
    monkeypatch.setattr(lease, "_LEAVES_S", 0.3)
    monkeypatch.setattr(lease, "_LOOK_S", 0.1)
    with pytest.raises(ConfigError, match="is in use by process"), hold(tmp_path):
        pass
    monkeypatch.setattr(lease, "_LEAVES_S", 60)
    asked = []

    def terminate():
        asked.append(process.poll())
        process.terminate()

    threading.Timer(0.5, terminate).start()
    with hold(tmp_path):
        # it lived until then, and gives its lock up shortly before its end
        assert asked == [None]
        process.wait(timeout=60)


def test_host_that_falls_silent_is_waited_for_and_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "STALE_S", 0.5)
    monkeypatch.setattr(lease, "_LOOK_S", 0.05)
    claim_elsewhere(tmp_path)
    begin = time.monotonic()
    with hold(tmp_path):
        assert 0.3 < time.monotonic() - begin < 5


def test_host_whose_clock_is_ahead_is_not_waited_for_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "STALE_S", 0.5)
    monkeypatch.setattr(lease, "_LOOK_S", 0.05)
    lock, ahead = claim_elsewhere(tmp_path), time.time() + 3600
    os.utime(lock, (ahead, ahead))
    begin = time.monotonic()
    with hold(tmp_path):
        assert 0.3 < time.monotonic() - begin < 5


def test_number_of_a_dead_process_that_another_one_has_now_is_no_owner(tmp_path):
    dead = replace(Claim.of_this_process(), pid=os.getppid(), started="1")
    (tmp_path / LOCK).write_text(json.dumps(asdict(dead)))
    with hold(tmp_path):
        pass


@pytest.mark.parametrize("left", ["", "{", "[1]", '{"token": "x"}'])
def test_unreadable_locks_are_judged_by_their_age(tmp_path, left):
    for name in (LOCK, lease.TAKING):
        (tmp_path / name).write_text(left)
        os.utime(tmp_path / name, (1, 1))
    with hold(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_removed_lock_is_made_again_unless_somebody_has_taken_it(tmp_path, start, monkeypatch):
    first = wait_for(start(tmp_path / "run"))
    (tmp_path / "run" / LOCK).unlink()
    end = time.monotonic() + 20
    while not (tmp_path / "run" / LOCK).exists() and time.monotonic() < end:
        time.sleep(0.05)
    with pytest.raises(ConfigError, match=f"process {first.pid}"), hold(tmp_path / "run"):
        pass


def test_ranks_of_torchrun_hold_once(tmp_path, start):
    folder = tmp_path / "run"
    wait_for(start(folder, "a", env={"RANK": "0"}))
    wait_for(start(folder, "b", env={"RANK": "1"}))
    second = start(folder, "c", env={"RANK": "0"})
    assert second.wait(timeout=20) == 2


def test_what_works_for_a_holder_leaves_with_it(tmp_path, start):
    folder = tmp_path / "run"
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\nfrom moce_dist.run import lease\n"
        "lease.EVERY_S = 0.2\nlease.watch([(Path(sys.argv[1]), sys.argv[2])])\n"
        "print('held', flush=True)\ntime.sleep(60)\n"
    )
    first = wait_for(start(folder))
    token = json.loads((folder / LOCK).read_text())["token"]
    worker = subprocess.Popen(
        [sys.executable, script, folder, token], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    wait_for(worker)
    first.kill()
    time.sleep(0.6)
    assert worker.poll() is None
    second = wait_for(start(folder, "b"))
    _, err = worker.communicate(timeout=10)
    assert worker.returncode == 1 and f"taken over by process {second.pid}" in err


def test_held_folder_is_held_once_in_a_process_and_emptied_by_a_fresh_start(tmp_path):
    folder = tmp_path / "run"
    with hold(folder), hold(folder, tmp_path / "out"):
        (folder / "old").write_text("old")
        set_aside(folder)
        assert [path.name for path in folder.iterdir()] == [LOCK]
        assert [path.name for path in tmp_path.glob("run.before-*/*")] == ["old"]
    # both came to nothing and were not there before
    assert not folder.exists() and not (tmp_path / "out").exists()


def test_folder_that_cannot_be_written_is_named_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file: is not a folder"), hold(tmp_path / "file"):
        pass
    with (
        pytest.raises(ConfigError, match=r"^/proc/none: cannot be written: "),
        hold(Path("/proc/none")),
    ):
        pass


def test_every_job_that_writes_is_refused_where_another_one_writes(tmp_path, start):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    Image.new("RGB", (9, 9)).save(images / "0.png")
    np.save(images / "0.npy", np.eye(3, dtype=np.float32))
    open_run(out, make_config({"data": {"source": f"folder:{images}"}}))
    wait_for(start(out))
    source, before = f"data.source=folder:{images}", (out / "provenance.json").read_bytes()
    for name, *argv in (
        ("pretrain", "--run", out, "--set", source),
        ("pretrain", "--run", out, "--set", source, "--fresh"),
        ("ingest", "--run", out, "--set", source),
        ("ingest", "--out", out, "--set", source),
        ("ingest", "--out", out, "--source", "sample:digits", "--fresh"),
        ("cluster", "--run", out),
        ("cluster", "--features", images, "--num-clusters", 2, "--out", out),
    ):
        with pytest.raises(ConfigError, match=rf"{out}.*: is in use by process"):
            load_script(JOBS / f"{name}.py").main([str(part) for part in argv])
    load_script(JOBS / "report.py").main([str(out)])
    assert (out / "report.html").is_file() and list(tmp_path.glob("out.before-*")) == []
    assert (out / "provenance.json").read_bytes() == before
