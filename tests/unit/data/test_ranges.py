"""Samples are read in long ranges; what a server does wrong is repeated, then described."""

import errno
import os
import time

import numpy as np
import pytest
from botocore.exceptions import NoCredentialsError

from moce_dist.data import ranges
from moce_dist.data.cache import SampleCache, SampleRange
from moce_dist.data.ranges import Range, RangeReader, coalesce, is_transient


def test_neighbours_become_one_range_and_far_ones_do_not():
    near, far = 10_000, 1_000_000
    wanted = [
        SampleRange("b", 0, near),
        SampleRange("a", far, near),
        SampleRange("a", near + 512, near),
        SampleRange("a", 0, near),
    ]
    assert coalesce(wanted) == [
        Range("a", 0, 2 * near + 512, [3, 2]),
        Range("a", far, far + near, [1]),
        Range("b", 0, near, [0]),
    ]


def test_gap_larger_than_a_fifth_of_what_is_wanted_is_not_read():
    wanted = [SampleRange("a", 0, 100_000), SampleRange("a", 141_000, 100_000)]
    assert len(coalesce(wanted)) == 2
    assert len(coalesce([wanted[0], SampleRange("a", 139_000, 100_000)])) == 1


def test_ranges_are_bounded_and_waste_at_most_a_fifth():
    draws = np.random.default_rng(0)
    ends = np.cumsum(draws.integers(20_000, 200_000, 4000))
    rows = np.flatnonzero(draws.random(3999) < 0.5)
    wanted = [SampleRange("a", int(ends[i]), int(ends[i + 1] - ends[i] - 512)) for i in rows]
    found = coalesce(wanted)
    assert sorted(row for place in found for row in place.rows) == list(range(len(wanted)))
    assert max(place.stop - place.start for place in found) <= 8 * 2**20
    read = sum(place.stop - place.start for place in found)
    assert read <= 1.2 * sum(w.size for w in wanted)
    assert len(found) < 0.8 * len(wanted)


def test_samples_of_many_files_arrive_in_the_order_asked_with_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "MAX_OPEN_FILES", 3)
    contents = {str(tmp_path / f"{i}.tar"): os.urandom(50_000) for i in range(8)}
    for path, content in contents.items():
        (tmp_path / path).write_bytes(content)
    draws, reader = np.random.default_rng(1), RangeReader()
    wanted = [
        SampleRange(str(tmp_path / f"{draws.integers(8)}.tar"), int(draws.integers(40_000)), 3000)
        for _ in range(60)
    ]
    before = len(os.listdir("/proc/self/fd"))
    for w, content in zip(wanted, reader.read(wanted), strict=True):
        assert content == contents[w.url][w.offset : w.offset + w.size]
    assert len(os.listdir("/proc/self/fd")) - before <= 3
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_missing_and_short_files_are_faults_of_their_samples_only(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    a, gone = str(tmp_path / "a.tar"), str(tmp_path / "gone.tar")
    good, short, missing = RangeReader().read(
        [SampleRange(a, 0, 4), SampleRange(a, 8, 4), SampleRange(gone, 0, 1)]
    )
    assert good == b"0123"
    assert isinstance(short, OSError) and str(short) == "ends after 2 of 4 bytes"
    assert isinstance(missing, FileNotFoundError)


@pytest.mark.parametrize("behaviour", ["busy-twice", "stall-once", "cut-once"])
def test_passing_trouble_of_a_server_is_waited_out(range_server, behaviour):
    server = range_server({"/a.tar": (b"0123456789" * 500, behaviour)})
    reader = RangeReader(timeout_s=1, deadline_s=30)
    (content,) = reader.read([SampleRange(f"{server.url}/a.tar", 10, 4000)])
    assert content == (b"0123456789" * 500)[10:4010]
    assert server.requests["/a.tar"] > 1


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("busy", "the server answers with status 503"),
        ("forbidden", "the server answers with status 403"),
        ("missing", "no such file or object"),
        ("stall", "the server does not answer in time"),
    ],
)
def test_lasting_trouble_is_described_without_secrets(range_server, behaviour, reason):
    server = range_server({"/a.tar": (bytes(5000), behaviour), "/b.tar": (bytes(5000), "")})
    begin = time.monotonic()
    bad, good = RangeReader(timeout_s=0.5, deadline_s=2).read(
        [
            SampleRange(f"{server.url}/a.tar?key=SECRET", 0, 9),
            SampleRange(f"{server.url}/b.tar", 0, 9),
        ]
    )
    assert time.monotonic() - begin < 20
    assert good == bytes(9)
    assert isinstance(bad, OSError) and str(bad) == reason
    # what will not change is not asked again
    if behaviour in ("forbidden", "missing"):
        assert server.requests["/a.tar"] == 1


def test_reads_go_on_where_the_kernel_stopped(tmp_path, monkeypatch):
    path, whole, read = tmp_path / "a.tar", os.urandom(5000), os.pread
    path.write_bytes(whole)
    # as at 2 GiB, or on some file systems
    monkeypatch.setattr(os, "pread", lambda file, size, at: read(file, min(size, 700), at))
    found, cut = RangeReader().read(
        [SampleRange(str(path), 10, 4000), SampleRange(str(path), 4500, 900)]
    )
    assert bytes(found) == whole[10:4010] and "ends after 500 of 900 bytes" in str(cut)


def test_a_bad_sector_costs_the_samples_that_lie_on_it(tmp_path, monkeypatch):
    path, whole, read = tmp_path / "a.tar", os.urandom(8000), os.pread
    path.write_bytes(whole)

    def broken(file, size, at):
        if at <= 5000 < at + size:
            raise OSError(errno.EIO, "Input/output error")
        return read(file, size, at)

    monkeypatch.setattr(os, "pread", broken)
    wanted = [SampleRange(str(path), start, 2000) for start in range(0, 8000, 2000)]
    assert len(coalesce(wanted)) == 1
    found = RangeReader().read(wanted)
    assert [isinstance(each, OSError) for each in found] == [False, False, True, False]
    assert bytes(found[3]) == whole[6000:]


def test_a_response_that_is_no_range_is_an_error_and_not_kept(tmp_path, file_server):
    content = os.urandom(100_000)
    # a proxy that ignores the range of the first request
    server = file_server({"/a.tar": content}, lambda n: "whole" * (n == 1))
    url = f"{server.url}/a.tar"
    wanted = [SampleRange(url, 5000, 1000)]
    reader = RangeReader(cache=SampleCache(tmp_path / "cache", {url: "sha"}, 1.0))
    (bad,) = reader.read(wanted)
    assert isinstance(bad, OSError) and str(bad) == "the server ignores byte ranges"
    assert len(server.asked) == 1
    for _ in range(2):
        assert reader.read(wanted) == [content[5000:6000]]
    assert len(server.asked) == 2
    # a range that is the whole file may come as the whole file
    whole = file_server({"/a.tar": content}, lambda n: "whole")
    assert RangeReader().read([SampleRange(f"{whole.url}/a.tar", 0, 100_000)]) == [content]


def test_the_deadline_is_that_of_all_requests_together(range_server):
    server = range_server({"/a.tar": (bytes(10**8), "stall")})
    # six rounds of 64 requests
    wanted = [SampleRange(f"{server.url}/a.tar", row * 200_000, 9) for row in range(384)]
    begin = time.monotonic()
    found = RangeReader(timeout_s=1, deadline_s=1.5).read(wanted)
    assert time.monotonic() - begin < 4
    assert {str(error) for error in found} == {"the server does not answer in time"}


def test_what_the_server_said_before_the_deadline_is_the_reason(file_server):
    def busy_then_slow(number):
        time.sleep(3 * (number > 1))
        return "busy"

    server = file_server({"/a.tar": bytes(5000)}, busy_then_slow)
    reader = RangeReader(timeout_s=5, deadline_s=2)
    (error,) = reader.read([SampleRange(f"{server.url}/a.tar", 0, 9)])
    assert str(error) == "the server answers with status 503" and len(server.asked) == 2


def test_lack_of_credentials_is_not_waited_out():
    assert not is_transient(NoCredentialsError())
    assert is_transient(ConnectionResetError())


def test_storage_that_cannot_even_be_opened_is_an_error_of_the_range():
    # the constructor of this file system connects
    (found,) = RangeReader(deadline_s=1).read([SampleRange("ftp://127.0.0.1:1/a.tar", 0, 10)])
    assert isinstance(found, OSError) and "ConnectionRefused" in str(found)
