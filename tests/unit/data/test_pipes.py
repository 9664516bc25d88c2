"""Shards that commands write: same data as the tars, nothing run unasked, nothing run twice."""

import contextlib
import multiprocessing
import tarfile
import time

import pytest
from tars import read_members

from moce_dist.config import DataConfig
from moce_dist.data.ingest import ingest
from moce_dist.data.packing import PipedTar, write_piped
from moce_dist.data.shards import HOLDOUT, read_index
from moce_dist.settings import ConfigError

CONFIG = DataConfig(holdout_fraction=0.0, allow_pipes=True)


@pytest.fixture
def tars(tmp_path, some_image):
    """Two tars of six samples, and their folder."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"part-{number}.tar", "w") as tar:
            for row in range(6):
                path = tmp_path / f"{number}-{row}.png"
                path.write_bytes(some_image(10 * number + row))
                tar.add(path, path.name)
    return folder


def run(source, out, config=CONFIG):
    return ingest(source, out, config, out / "faults.jsonl")


def contents(*indices):
    return {
        key: read_members(index.url(shard), start, end)
        for index in indices
        for shard in index.shards
        for key, start, end in zip(shard.keys, shard.starts, shard.ends, strict=True)
    }


def test_commands_give_what_their_tars_hold(tmp_path, tars):
    piped = run(f"shards:pipe:cat {tars}/part-{{0..1}}.tar", tmp_path / "piped")
    assert [shard.num_samples for shard in piped.shards] == [6, 6]
    assert contents(piped) == contents(run(f"shards:{tars}/*.tar", tmp_path / "direct"))
    # the tars may go: what was written is kept
    for path in tars.iterdir():
        path.unlink()
    assert len(contents(read_index(tmp_path / "piped"))) == 12


def test_braces_pipelines_files_and_a_held_out_part_go_together(tmp_path, tars):
    out, half = tmp_path / "out", DataConfig(holdout_fraction=0.4, allow_pipes=True)
    run(f"shards:{tars}/part-0.tar,pipe:gzip -c {tars}/part-1.tar | gunzip", out, half)
    parts = [read_index(out), read_index(out / HOLDOUT)]
    assert [len(part.shards) for part in parts] == [1, 1]
    assert contents(*parts) == contents(run(f"shards:{tars}/*.tar", tmp_path / "direct"))


@pytest.mark.parametrize(
    ("command", "error", "message"),
    [
        ("cat {d}/none.tar", RuntimeError, "ended with status 1"),
        ("cat {d}/none.tar | cat", RuntimeError, "ended with status 1"),
        ("head -c 700 {d}/part-0.tar; exit 3", RuntimeError, "ended with status 3"),
        ("echo no tar", ConfigError, "pipe:echo no tar: writes no uncompressed tar"),
        (" ", ConfigError, "names nothing"),
        ("curl -H 'Authorization: Bearer abc'", ConfigError, "a command carries credentials"),
        ("aws --password abc", ConfigError, "a command carries credentials"),
    ],
)
def test_failing_command_is_an_error_and_nothing_is_left(
    tmp_path, tars, capfd, command, error, message
):
    source = f"shards:pipe:{command.format(d=tars)}"
    with pytest.raises(error, match=message) as raised:
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "abc" not in str(raised.value)


def test_cut_off_tar_is_a_fault_like_any_other(tmp_path, tars):
    config = DataConfig(holdout_fraction=0.0, allow_pipes=True, max_fault_fraction=0.5)
    index = run(f"shards:pipe:head -c 5000 {tars}/part-0.tar", tmp_path / "out", config)
    assert 0 < index.num_samples < 6
    assert "cut off" in (tmp_path / "out" / "faults.jsonl").read_text()


def test_commands_are_not_run_unless_allowed(tmp_path):
    trace = tmp_path / "trace"
    with pytest.raises(ConfigError, match=r"commands run only with data\.allow_pipes=true"):
        run(f"shards:pipe:touch {trace}", tmp_path / "out", DataConfig())
    assert not trace.exists()


def test_interrupted_ingest_runs_only_the_commands_that_had_not_ended(tmp_path, tars):
    trace, out = tmp_path / "trace", tmp_path / "out"
    # every number with every tar: four commands, each with keys of its own
    renamed = "tar -cf - --transform s:^:k{0..1}:"
    source = f"shards:pipe:echo x >> {trace}; cd {tars}/part-{{0..1}} && {renamed} *.png"
    for number in range(2):
        with tarfile.open(tars / f"part-{number}.tar") as tar:
            tar.extractall(tars / f"part-{number}", filter="data")
    config = DataConfig(holdout_fraction=0.0, allow_pipes=True)

    def interrupted(function, shared, items):
        for number, item in enumerate(items):
            if number == 2:
                raise KeyboardInterrupt
            yield function(shared, item)

    with pytest.raises(KeyboardInterrupt):
        ingest(source, out, config, out / "faults.jsonl", interrupted)
    assert len(trace.read_text().split()) == 2
    index = run(source, out, config)
    assert len(trace.read_text().split()) == 4
    assert index.num_samples == 24
    # and a complete one runs none
    run(source, out, config)
    assert len(trace.read_text().split()) == 4


def test_commands_that_have_ended_are_not_run_again_after_an_error(tmp_path, tars):
    trace, out, there = tmp_path / "trace", tmp_path / "out", tmp_path / "there"
    good = f"pipe:echo 0 >> {trace}; cat {tars}/part-0.tar"
    late = f"pipe:echo 1 >> {trace}; test -e {there} && cat {tars}/part-1.tar"
    with pytest.raises(RuntimeError, match="ended with status 1"):
        run(f"shards:{good},{late}", out)
    there.touch()
    assert run(f"shards:{good},{late}", out).num_samples == 12
    assert trace.read_text().split() == ["0", "1", "1"]


def lost(out, go):
    """What a worker does that was given up: it still writes, and then fails."""
    late = f"while [ ! -e {go} ]; do sleep 0.05; done; echo late; exit 3"
    with contextlib.suppress(RuntimeError):
        write_piped(out, PipedTar("pipe-000000.tar", f"pipe:{late}"))


def test_a_lost_worker_does_not_write_into_the_tar_of_its_successor(tmp_path, tars):
    out, go = tmp_path / "out", tmp_path / "go"
    out.mkdir()
    worker = multiprocessing.get_context("fork").Process(target=lost, args=(out, go))
    worker.start()
    while not list(out.glob(".pipe-*")):
        assert worker.is_alive()
        time.sleep(0.02)
    shard, _ = write_piped(out, PipedTar("pipe-000000.tar", f"pipe:cat {tars}/part-0.tar"))
    go.touch()
    worker.join()
    assert (out / shard.path).read_bytes() == (tars / "part-0.tar").read_bytes()
