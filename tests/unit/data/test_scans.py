"""Scans of existing tars: what an error leaves to the next attempt."""

import json
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from moce_dist.config import DataConfig
from moce_dist.data.ingest import ingest
from moce_dist.run.tasks import map_here
from moce_dist.settings import ConfigError

NOTES = ".scans.jsonl"


@pytest.fixture
def tars(tmp_path, tar_of, some_image):
    (tmp_path / "tars").mkdir()

    def make(number, seed):
        return tar_of(tmp_path / f"tars/{number}.tar", [(f"{number}.png", some_image(seed))])

    paths = [make(number, number) for number in range(3)]
    paths.append(tmp_path / "tars/3.tar")
    return paths, make


class Attempts:
    """Ingest into a folder; `scanned` are the tars that the last attempt read."""

    def __init__(self, source, out):
        self.source, self.out = source, out

    def run(self, config=None):
        self.scanned = []

        def map_tasks(function, shared, items):
            self.scanned += [url.rpartition("/")[2] for urls in items for url in urls]
            return map_here(function, shared, items)

        config = config or DataConfig(holdout_fraction=0.0)
        return ingest(self.source, self.out, config, self.out / "faults.jsonl", map_tasks)


def is_as_made_afresh(attempts, tmp_path):
    fresh = Attempts(attempts.source, tmp_path / "fresh")
    fresh.run()
    names = ("index.json", "COMPLETE")
    first, second = (json.loads((each.out / names[0]).read_text()) for each in (attempts, fresh))
    return first == second and not (attempts.out / NOTES).exists()


def test_after_a_bad_tar_only_this_one_is_scanned(tmp_path, tars):
    paths, make = tars
    paths[3].write_bytes(b"no tar" * 1000)
    attempts = Attempts(f"shards:{tmp_path}/tars/*.tar", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"3\.tar: is not an uncompressed tar"):
        attempts.run()
    assert attempts.scanned == ["0.tar", "1.tar", "2.tar", "3.tar"]
    make(3, 3)
    assert attempts.run().num_samples == 4
    assert attempts.scanned == ["3.tar"]
    assert is_as_made_afresh(attempts, tmp_path)


def test_without_the_bad_tar_none_is_scanned_again(tmp_path, tars):
    paths, _ = tars
    paths[3].write_bytes(b"no tar" * 1000)
    attempts = Attempts(f"shards:{tmp_path}/tars/*.tar", tmp_path / "out")
    with pytest.raises(ConfigError):
        attempts.run()
    paths[3].unlink()
    assert attempts.run().num_samples == 3
    assert not attempts.scanned
    assert is_as_made_afresh(attempts, tmp_path)


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_tar_that_has_changed_is_scanned_again(tmp_path, tars, tar_of, some_image, change):
    paths, make = tars
    paths[3].write_bytes(b"no tar" * 1000)
    attempts = Attempts(f"shards:{tmp_path}/tars/*.tar", tmp_path / "out")
    with pytest.raises(ConfigError):
        attempts.run()
    make(3, 3)
    before = paths[1].stat()
    if change == "size":
        # tars grow in records of 10 KiB
        tar_of(paths[1], [("1.png", some_image(8)), ("1.txt", bytes(20_000))])
        assert paths[1].stat().st_size > before.st_size
        os.utime(paths[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        content = bytearray(paths[1].read_bytes())
        content[600] ^= 1
        paths[1].write_bytes(content)
    attempts.run()
    assert attempts.scanned == ["1.tar", "3.tar"]
    assert is_as_made_afresh(attempts, tmp_path)


def test_too_many_faults_cost_no_second_scan(tmp_path, tars, tar_of):
    paths, _ = tars
    tar_of(paths[3], [("a.cls", b"1"), ("b.cls", b"2")])
    attempts = Attempts(f"shards:{tmp_path}/tars/*.tar", tmp_path / "out")
    with pytest.raises(ConfigError, match="2 of 5 samples cannot be used"):
        attempts.run()
    allowed = DataConfig(holdout_fraction=0.0, max_fault_fraction=0.5)
    assert attempts.run(allowed).num_samples == 3
    assert not attempts.scanned
    faults = (tmp_path / "out/faults.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in faults] == ["a", "b"]


def test_a_note_that_a_kill_cut_off_does_not_count(tmp_path, tars):
    paths, make = tars
    paths[3].write_bytes(b"no tar" * 1000)
    attempts = Attempts(f"shards:{tmp_path}/tars/*.tar", tmp_path / "out")
    with pytest.raises(ConfigError):
        attempts.run()
    notes = tmp_path / "out" / NOTES
    notes.write_bytes(notes.read_bytes()[:-20])
    with pytest.raises(ConfigError):
        attempts.run()
    assert attempts.scanned == ["2.tar", "3.tar"]
    make(3, 3)
    attempts.run()
    assert attempts.scanned == ["3.tar"]
    assert is_as_made_afresh(attempts, tmp_path)


@pytest.mark.parametrize("has_tags", [True, False])
def test_remote_tars_are_known_by_their_tag(tmp_path, tars, has_tags):
    paths, make = tars

    class Handler(SimpleHTTPRequestHandler):
        def end_headers(self):
            path = tmp_path / "tars" / self.path.rpartition("/")[2]
            if has_tags and path.exists():
                self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
            super().end_headers()

        def log_message(self, *_):
            pass

    paths[3].write_bytes(b"no tar" * 1000)
    handler = partial(Handler, directory=tmp_path / "tars")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = f"shards:http://127.0.0.1:{server.server_port}/{{0..3}}.tar"
        attempts = Attempts(source, tmp_path / "out")
        with pytest.raises(ConfigError, match=r"3\.tar: is not an uncompressed tar"):
            attempts.run()
        make(3, 3)
        make(1, 8)
        attempts.run()
        others = ["1.tar"] if has_tags else ["0.tar", "1.tar", "2.tar"]
        assert attempts.scanned == [*others, "3.tar"]
        assert is_as_made_afresh(attempts, tmp_path)
        server.shutdown()
