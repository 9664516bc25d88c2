"""Resharding by cluster keeps the multiset of (key, bytes): law 3, its first part."""

import errno
import os
import resource
import subprocess
import sys
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import webdataset

from moce_dist.config import DataConfig
from moce_dist.data import ranges
from moce_dist.data.ranges import RangeReader
from moce_dist.data.reshard import reshard
from moce_dist.data.shards import read_index, read_range, scan_shard, write_index
from moce_dist.run.artefacts import is_complete
from moce_dist.settings import ConfigError

INPUTS = {"clusters": "abc"}
SMALL, LARGE = (DataConfig().model_copy(update={"shard_bytes": n}) for n in (6000, 10**6))


def members(paths):
    """Multiset of (member name, bytes) of some tars, read by Python's own tarfile."""
    found = Counter()
    for path in paths:
        with tarfile.open(path) as tar:
            found.update((member.name, tar.extractfile(member).read()) for member in tar)
    return found


@pytest.fixture
def index(tmp_path, three_tars):
    shards = [scan_shard(str(path))[0] for path in three_tars]
    return write_index(tmp_path / "ingested", shards)


@pytest.fixture
def clusters(index):
    keys = [key for shard in index.shards for key in shard.keys]
    return {key: number * 7 % 4 for number, key in enumerate(keys)}


def labels(index, clusters):
    """Cluster of every sample in the order of the index; -1 without one."""
    keys = (key for shard in index.shards for key in shard.keys)
    return np.array([clusters.get(key, -1) for key in keys], np.int32)


def test_resharding_keeps_the_multiset_of_keys_and_bytes(tmp_path, index, clusters, three_tars):
    out = tmp_path / "shards"
    resharded = reshard(index, labels(index, clusters), out, SMALL, inputs=INPUTS)
    tars = sorted(out.glob("*.tar"))
    assert members(tars) == members(three_tars)
    assert [shard.path for shard in resharded.shards] == [path.name for path in tars]
    assert len(tars) > 4
    for shard in resharded.shards:
        assert shard.path.startswith(f"cluster-{shard.cluster:05d}-")
        assert {clusters[key] for key in shard.keys} == {shard.cluster}
    for cluster in range(4):
        kept = [key for s in resharded.shards if s.cluster == cluster for key in s.keys]
        assert kept == [key for key in clusters if clusters[key] == cluster]
    # a tar is full: the first sample of the next one would not have fitted
    for one, other in pairwise(resharded.shards):
        assert one.num_samples == 1 or one.ends[-1] <= SMALL.shard_bytes
        if one.cluster == other.cluster:
            assert one.ends[-1] + other.ends[0] > SMALL.shard_bytes
    assert resharded == read_index(out)
    assert {shard.cluster for shard in resharded.shards} == {0, 1, 2, 3}
    assert is_complete(out, INPUTS)


def test_plain_webdataset_reads_resharded_tars(tmp_path, index, clusters):
    out = tmp_path / "shards"
    reshard(index, labels(index, clusters), out, LARGE, inputs=INPUTS)
    urls = [str(path) for path in sorted(out.glob("*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert Counter(sample["__key__"] for sample in found) == Counter(clusters.keys())


def test_same_input_gives_the_same_bytes(tmp_path, index, clusters):
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        reshard(index, labels(index, clusters), out, SMALL, inputs=INPUTS)
    files = [sorted(path.name for path in out.iterdir()) for out in outs]
    assert files[0] == files[1]
    assert all((outs[0] / f).read_bytes() == (outs[1] / f).read_bytes() for f in files[0])


def test_complete_result_is_not_made_again(tmp_path, index, clusters):
    out = tmp_path / "shards"
    first = reshard(index, labels(index, clusters), out, SMALL, inputs=INPUTS)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert reshard(index, labels(index, clusters), out, SMALL, inputs=INPUTS) == first
    assert times == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    # other clusters: made anew, nothing of the old one stays
    one = reshard(index, np.zeros(15, np.int32), out, LARGE, inputs={"clusters": 2})
    assert [path.name for path in out.glob("*.tar")] == [one.shards[0].path]


def test_sample_without_assignment_is_named(tmp_path, index, clusters):
    del clusters["t1/3"]
    with pytest.raises(ConfigError, match=r"part-1\.tar: sample 't1/3' has no assignment"):
        reshard(index, labels(index, clusters), tmp_path / "shards", SMALL, inputs=INPUTS)
    assert not (tmp_path / "shards").exists()


@pytest.fixture
def assert_continued(tmp_path, index, clusters):
    """What was finished in `out` is not written again, and the result is that of one attempt."""

    def check(out):
        kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
        assert kept and not is_complete(out, INPUTS) and not (out / "index.json").exists()
        for folder in (out, tmp_path / "whole"):
            reshard(index, labels(index, clusters), folder, SMALL, inputs=INPUTS)
        assert kept.items() <= {p: p.stat().st_mtime_ns for p in out.glob("*.tar")}.items()
        files = [{p.name: p.read_bytes() for p in f.iterdir()} for f in (out, tmp_path / "whole")]
        assert files[0] == files[1]

    return check


def test_source_cut_off_since_it_was_indexed_is_an_error(
    tmp_path, index, clusters, three_tars, assert_continued
):
    content = three_tars[1].read_bytes()
    os.truncate(three_tars[1], index.shards[1].ends[2])
    with pytest.raises(RuntimeError, match=r"part-1\.tar: sample 't1/\d' cannot be read"):
        reshard(index, labels(index, clusters), tmp_path / "shards", SMALL, inputs=INPUTS)
    three_tars[1].write_bytes(content)
    assert_continued(tmp_path / "shards")


def test_source_replaced_since_it_was_indexed_is_an_error(
    tmp_path, index, clusters, three_tars, assert_continued
):
    content = three_tars[1].read_bytes()
    three_tars[1].write_bytes(three_tars[2].read_bytes())
    with pytest.raises(RuntimeError, match="a source has changed"):
        reshard(index, labels(index, clusters), tmp_path / "shards", SMALL, inputs=INPUTS)
    three_tars[1].write_bytes(content)
    assert_continued(tmp_path / "shards")


class Careless:
    """A file that loses, doubles or alters one of the samples that are written to it."""

    def __init__(self, file, mistake, victim):
        self.file, self.mistake, self.victim = file, mistake, victim

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        content = bytes(content)
        if content == self.victim:
            altered = content[:600] + bytes([content[600] ^ 1]) + content[601:]
            content = {"lost": b"", "doubled": 2 * content, "altered": altered}[self.mistake]
        self.file.write(content)


@pytest.mark.parametrize("mistake", ["lost", "doubled", "altered"])
def test_wrong_copy_is_noticed(tmp_path, index, clusters, monkeypatch, mistake, assert_continued):
    """Plant a mistake between reading and the disk: the look at the tar has to find it."""
    shard = index.shards[1]
    victim = read_range(index.url(shard), shard.starts[2], shard.ends[2] - shard.starts[2])
    original, victims = Path.open, []

    def careless(path, mode="r", *rest, **named):
        file = original(path, mode, *rest, **named)
        if mode != "wb" or not path.name.startswith(".cluster-"):
            return file
        victims.append(path)
        return Careless(file, mistake, victim)

    monkeypatch.setattr(Path, "open", careless)
    with pytest.raises(RuntimeError, match="differs from what was planned"):
        reshard(index, labels(index, clusters), tmp_path / "shards", SMALL, inputs=INPUTS)
    assert victims
    monkeypatch.undo()
    assert_continued(tmp_path / "shards")


def test_after_a_kill_finished_tars_stay_and_the_rest_is_the_same(
    tmp_path, index, clusters, assert_continued
):
    out = tmp_path / "out"

    def dying(function, shared, items):
        for number, item in enumerate(items):
            if number == 3:
                raise SystemExit
            yield function(shared, item)

    with pytest.raises(SystemExit):
        reshard(index, labels(index, clusters), out, SMALL, inputs=INPUTS, map_tasks=dying)
    # what a killed worker leaves: a part of a tar, and a tar that nobody noted
    (out / ".cluster-00003-000000.tar.1.tmp").write_bytes(b"half")
    (out / ".index.arrow.1.tmp").write_bytes(b"half")
    (out / ".finished" / ".cluster-00003-000000.tar.json.1.tmp").write_bytes(b"half")
    assert len(list(out.glob("*.tar"))) == 3
    assert_continued(out)


def test_a_tar_that_nobody_noted_is_written_again(tmp_path, index, clusters):
    whole, out = tmp_path / "whole", tmp_path / "out"

    def dying(function, shared, items):
        yield function(shared, items[0])
        (out / items[1].name).write_bytes(b"half")
        raise SystemExit

    with pytest.raises(SystemExit):
        reshard(index, labels(index, clusters), out, SMALL, inputs=INPUTS, map_tasks=dying)
    for folder in (out, whole):
        reshard(index, labels(index, clusters), folder, SMALL, inputs=INPUTS)
    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (whole, out)]
    assert files[0] == files[1]


@pytest.mark.parametrize("error", [OSError("lost"), RuntimeError("lost"), TimeoutError()])
def test_an_error_costs_the_unfinished_tars_alone(
    tmp_path, index, clusters, assert_continued, error
):
    def failing(function, shared, items):
        for number in range(3):
            yield function(shared, items[number])
        raise error

    out = tmp_path / "out"
    with pytest.raises(type(error)):
        reshard(index, labels(index, clusters), out, SMALL, inputs=INPUTS, map_tasks=failing)
    assert len(list(out.glob("*.tar"))) == 3
    assert_continued(out)


@pytest.mark.parametrize(
    ("error", "said"),
    [(OSError(errno.ENOSPC, "full"), "no space left"), (ConfigError("refused"), "refused")],
)
def test_a_full_disk_and_a_refusal_leave_nothing(tmp_path, index, clusters, error, said):
    def failing(function, shared, items):
        yield function(shared, items[0])
        raise error

    out = tmp_path / "out"
    with pytest.raises(Exception, match=said):
        reshard(index, labels(index, clusters), out, SMALL, inputs=INPUTS, map_tasks=failing)
    assert not out.exists()


def test_temporary_files_of_others_stay(tmp_path, index, clusters):
    out = tmp_path / "out"
    others = [out / ".notes.tmp", out / "mine" / ".cache.tmp", out / ".cluster.tmp"]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    reshard(index, labels(index, clusters), out, SMALL, inputs=INPUTS)
    reshard(index, labels(index, clusters), out, LARGE, inputs={"clusters": "other"})
    assert all(path.read_text() == "mine" for path in others)


def test_other_clusters_use_nothing_of_an_attempt_before(tmp_path, index, clusters):
    def dying(function, shared, items):
        yield function(shared, items[0])
        raise SystemExit

    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        reshard(index, labels(index, clusters), out, SMALL, inputs=INPUTS, map_tasks=dying)
    other = {key: 1 - cluster % 2 for key, cluster in clusters.items()}
    resharded = reshard(index, labels(index, other), out, SMALL, inputs={"clusters": "other"})
    for shard in resharded.shards:
        assert {other[key] for key in shard.keys} == {shard.cluster}


def test_more_clusters_than_file_descriptors(tmp_path, tar_of, some_image):
    path = tar_of(tmp_path / "many.tar", [(f"{n:04d}.png", some_image(0)) for n in range(300)])
    write_index(tmp_path, [scan_shard(str(path))[0]])
    code = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from moce_dist.config import DataConfig\n"
        "from moce_dist.data.reshard import reshard\n"
        "from moce_dist.data.shards import read_index\n"
        "index = read_index(sys.argv[1]); keys = index.shards[0].keys\n"
        "out = Path(sys.argv[1]) / 'out'\n"
        "clusters = np.arange(len(keys))\n"
        "print(len(reshard(index, clusters, out, DataConfig(), inputs={}).shards))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    )
    assert (done.returncode, done.stdout) == (0, "300\n"), done.stderr


def test_full_disk_is_one_clear_line_and_leaves_nothing(small_disk, tmp_path, tar_of, some_image):
    members = [(f"{n}.png", some_image(n, side=64)) for n in range(40)]
    index = write_index(tmp_path, [scan_shard(str(tar_of(tmp_path / "a.tar", members)))[0]])
    clusters = {key: row % 3 for row, key in enumerate(index.shards[0].keys)}
    with pytest.raises(RuntimeError, match="no space left on the device"):
        reshard(index, labels(index, clusters), small_disk / "out", LARGE, inputs=INPUTS)
    assert list(small_disk.iterdir()) == []


def test_large_tars_are_read_in_portions(tmp_path, index, clusters, monkeypatch):
    one = reshard(index, labels(index, clusters), tmp_path / "one", LARGE, inputs=INPUTS)
    sizes, original = [], RangeReader.read

    def noted(self, wanted):
        sizes.append(len(wanted))
        return original(self, wanted)

    monkeypatch.setattr(ranges, "_PORTION_BYTES", 2 * index.shards[0].ends[0])
    monkeypatch.setattr(RangeReader, "read", noted)
    assert (
        reshard(index, labels(index, clusters), tmp_path / "two", LARGE, inputs=INPUTS).shards
        == one.shards
    )
    assert max(sizes) <= 2 and sum(sizes) == 15


def test_a_member_that_ingest_reported_travels_with_its_sample(tmp_path, tar_of, some_image):
    names = ["cat.jpg", "cat.2.jpg", "dog.jpg"]
    path = tar_of(tmp_path / "odd.tar", [(name, some_image(0)) for name in names])
    shard, faults = scan_shard(str(path))
    assert len(faults) == 1 and shard.num_samples == 2
    index = write_index(tmp_path, [shard])
    found = reshard(index, np.array([1, 0]), tmp_path / "out", DataConfig(), inputs={})
    assert sorted(key for each in found.shards for key in each.keys) == ["cat", "dog"]
