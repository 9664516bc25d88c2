"""Ingest: folders, existing tars, hold-out, faults, completion, and the job's exit statuses."""

import gzip
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torchvision
import webdataset
from in_process import run_here
from PIL import Image
from tars import read_members

from moce_dist.config import DataConfig
from moce_dist.data import ingest as module
from moce_dist.data import packing
from moce_dist.data.ingest import ingest
from moce_dist.data.shards import read_index
from moce_dist.data.sources import expand_shards, list_folder, parse_source
from moce_dist.run.directory import load_run
from moce_dist.run.files import read_faults
from moce_dist.samples import sets
from moce_dist.settings import ConfigError

ROOT = Path(__file__).parents[3]
CONFIG = DataConfig(holdout_fraction=0.0)


def run(source, out, config=CONFIG):
    return ingest(source, out, config, out / "faults.jsonl", mix=sets.pretrain)


def contents(folder):
    """Everything that an index leads to, {key: members}."""
    index = read_index(folder)
    return {
        key: read_members(index.url(shard), start, end)
        for shard in index.shards
        for key, start, end in zip(shard.keys, shard.starts, shard.ends, strict=True)
    }


def job(*flags):
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs/ingest.py"), *map(str, flags)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


# folders


def test_folder_keeps_bytes_keys_and_classes_of_torchvision(tmp_path, image_folder):
    run(f"folder:{image_folder}", tmp_path / "out")
    found = contents(tmp_path / "out")
    expected = torchvision.datasets.ImageFolder(str(image_folder))
    assert len(found) == len(expected.samples) == 12
    for path, label in expected.samples:
        key = str(Path(path).relative_to(image_folder).with_suffix(""))
        extension = Path(path).suffix[1:].lower()
        assert found[key] == {extension: Path(path).read_bytes(), "cls": str(label).encode()}
    assert list(found) == sorted(found)
    assert "owl/deep/05" in found


def test_plain_webdataset_reads_ingested_tars(tmp_path, image_folder):
    out = tmp_path / "out"
    index = run(f"folder:{image_folder}", out)
    urls = [index.url(shard) for shard in index.shards]
    decoded = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in decoded] == list(contents(out))
    assert {next(s[e] for e in ("png", "jpg") if e in s).shape for s in decoded} == {(16, 16, 3)}
    assert Counter(sample["cls"] for sample in decoded) == {0: 4, 1: 4, 2: 4}


def test_flat_folder_has_no_classes_and_dots_become_underscores(tmp_path, some_image):
    root = tmp_path / "flat"
    root.mkdir()
    for name in ("b.v2.png", "a.PNG", "notes.txt", ".hidden.png"):
        (root / name).write_bytes(some_image(1))
    run(f"folder:{root}", tmp_path / "out")
    assert contents(tmp_path / "out") == {
        "a": {"png": some_image(1)},
        "b_v2": {"png": some_image(1)},
    }


def test_shards_are_closed_at_their_size(tmp_path, image_folder):
    config = DataConfig(holdout_fraction=0.0, shard_bytes=2**16)
    for number in range(200):
        (image_folder / "cat" / f"x{number}.png").write_bytes(
            (image_folder / "cat" / "00.png").read_bytes()
        )
    index = run(f"folder:{image_folder}", tmp_path / "out", config)
    names = [path.name for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert names == [f"train-{n:06d}.tar" for n in range(len(index.shards))]
    assert len(names) > 3
    assert all(shard.bytes <= 2**16 + 1024 for shard in index.shards)


def test_whole_tars_held_out_of_few_are_a_warning(tmp_path, three_tars, caplog):
    pattern = f"shards:{three_tars[0].parent}/part-*.tar"
    few = run(pattern, tmp_path / "few", DataConfig(holdout_fraction=0.01))
    held = read_index(tmp_path / "few" / "holdout").num_samples
    assert (few.num_samples, held) == (10, 5)
    assert "33 % of the images are held out: existing tars are held out whole" in caplog.text
    caplog.clear()
    run(pattern, tmp_path / "as_asked", DataConfig(holdout_fraction=0.3))
    assert "held out" not in caplog.text


def test_same_folder_gives_the_same_bytes(tmp_path, image_folder):
    config = DataConfig(holdout_fraction=0.3)
    outs = [tmp_path / "one", tmp_path / "two"]
    run(f"folder:{image_folder}", outs[0], config)
    for path in image_folder.rglob("*.png"):
        os.utime(path, (1, 1))
    run(f"folder:{image_folder}", outs[1], config)
    files = [
        sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.suffix in (".tar", ".json"))
        for out in outs
    ]
    assert files[0] == files[1]
    assert all((outs[0] / f).read_bytes() == (outs[1] / f).read_bytes() for f in files[0])


def test_large_images_are_stored_smaller_and_upright(tmp_path):
    source, side = tmp_path / "images", 64
    source.mkdir()
    draws = np.random.default_rng(0)
    wide = Image.fromarray(draws.integers(0, 255, (3, 5, 3), np.uint8)).resize((200, 120))
    turned = Image.Exif()
    turned[0x0112] = 6  # shown after a quarter turn to the right
    wide.save(source / "wide.jpg", quality=95)
    wide.save(source / "turned.jpg", quality=95, exif=turned)
    wide.resize((64, 38)).save(source / "small.png")
    config = DataConfig(holdout_fraction=0, store_side=side)
    run(f"folder:{source}", tmp_path / "out", config)
    members = contents(tmp_path / "out")
    assert members["small"] == {"png": (source / "small.png").read_bytes()}
    found = {key: Image.open(io.BytesIO(members[key]["jpg"])) for key in ("wide", "turned")}
    assert found["wide"].size == (64, 38) and found["turned"].size == (38, 64)
    upright = np.asarray(found["turned"].transpose(Image.Transpose.ROTATE_90), np.float32)
    expected = np.asarray(wide.resize((64, 38), Image.Resampling.BICUBIC), np.float32)
    for pixels in (upright, np.asarray(found["wide"], np.float32)):
        assert np.abs(pixels - expected).mean() < 6
    for key in found:
        assert len(members[key]["jpg"]) < (source / f"{key}.jpg").stat().st_size
    with pytest.raises(ConfigError, match="holds other data"):
        run(f"folder:{source}", tmp_path / "out")


def test_tars_are_not_stored_smaller(tmp_path, three_tars):
    with pytest.raises(ConfigError, match=r"data\.store_side \(64\): is for images of a folder"):
        run(f"shards:{three_tars[0]}", tmp_path / "out", DataConfig(store_side=64))


def test_symlink_loop_ends_and_nothing_is_read_twice(tmp_path, image_folder):
    (image_folder / "cat" / "loop").symlink_to(image_folder)
    (image_folder / "dog" / "self").symlink_to("self")
    (image_folder / "zoo").symlink_to(image_folder / "cat")
    assert len(list_folder(image_folder).files) == 12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "no such folder"),
        (lambda root: root.mkdir(), "is empty"),
        (lambda root: root.write_text("file"), "is not a folder"),
        (lambda root: (root / "deep").mkdir(parents=True), "holds no images"),
        (lambda root: (root.mkdir(), (root / "a.txt").touch()), "holds no images"),
    ],
)
def test_folder_without_images_is_refused_by_name(tmp_path, make, message):
    root = tmp_path / "images"
    make(root)
    with pytest.raises(ConfigError, match=message) as caught:
        run(f"folder:{root}", tmp_path / "out")
    assert str(root) in str(caught.value)
    assert not (tmp_path / "out").exists()


def planted(root, some_image):
    """Damage of every kind; returns what must be said of each file."""
    (root / "cat" / "empty.png").touch()
    (root / "cat" / "cut.jpg").write_bytes(some_image(3, "JPEG")[:40])
    (root / "dog" / "text.png").write_text("no image")
    (root / "dog" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "owl" / "02.gif").write_bytes(some_image(4))
    os.mkfifo(root / "owl" / "pipe.png")
    return {
        "cat/empty": "file is empty",
        "cat/cut": "header of the image cannot be read: Truncated File Read",
        "dog/text": "header of the image cannot be read: is no image of a known format",
        "dog/gone": "cannot be read: No such file or directory",
        "owl/02": "key is taken by 02.gif",
        "owl/pipe": "is not a regular file",
    }


def test_every_unusable_file_is_one_line_in_the_ledger(tmp_path, image_folder, some_image):
    said = planted(image_folder, some_image)
    config = DataConfig(holdout_fraction=0.0, max_fault_fraction=0.5)
    index = run(f"folder:{image_folder}", tmp_path / "out", config)
    faults = read_faults(tmp_path / "out" / "faults.jsonl")
    assert {fault["key"]: fault["reason"] for fault in faults} == said
    assert len(faults) == len(said)
    assert all(fault["stage"] == "ingest" for fault in faults)
    assert all(str(image_folder) in fault["shard"] for fault in faults)
    assert index.num_samples == 12


def test_too_many_unusable_files_are_refused_before_anything_is_written(
    tmp_path, image_folder, some_image
):
    planted(image_folder, some_image)
    with pytest.raises(ConfigError, match=r"6 of 18 samples cannot be used.*faults\.jsonl"):
        run(f"folder:{image_folder}", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["faults.jsonl"]
    # the same again does not say it twice
    with pytest.raises(ConfigError):
        run(f"folder:{image_folder}", tmp_path / "out")
    assert len(read_faults(tmp_path / "out" / "faults.jsonl")) == 6


def test_a_single_fault_never_stops_a_small_data_set(tmp_path, image_folder):
    (image_folder / "cat" / "empty.png").touch()
    assert run(f"folder:{image_folder}", tmp_path / "out").num_samples == 12
    strict = DataConfig(holdout_fraction=0.0, max_fault_fraction=0.0)
    with pytest.raises(ConfigError, match="1 of 13 samples cannot be used"):
        run(f"folder:{image_folder}", tmp_path / "strict", strict)


def test_data_too_large_to_scan_first_fails_while_running(
    tmp_path, image_folder, some_image, monkeypatch
):
    monkeypatch.setattr(module, "_SCAN_FIRST_BYTES", 0)
    for number in range(3):
        (image_folder / "owl" / f"z{number}.png").write_text("no image")
    out, small = tmp_path / "out", {"holdout_fraction": 0.0, "shard_bytes": 2**16}
    for number in range(100):
        (image_folder / "cat" / f"a{number}.png").write_bytes(some_image(number, side=32))
    with pytest.raises(RuntimeError, match="3 of 115 samples cannot be used"):
        run(f"folder:{image_folder}", out, DataConfig(**small))
    # the limit may be a matter of opinion: what is packed need not be packed again
    kept = {path: path.stat().st_mtime_ns for path in out.glob("train-*.tar")}
    assert len(kept) > 3 and not (out / "index.json").exists()
    index = run(f"folder:{image_folder}", out, DataConfig(**small, max_fault_fraction=0.1))
    assert index.num_samples == 112 and len(read_faults(out / "faults.jsonl")) == 3
    assert kept.items() <= {p: p.stat().st_mtime_ns for p in out.glob("*.tar")}.items()


# existing tars


def test_tars_are_indexed_where_they_lie(tmp_path, three_tars):
    before = [path.read_bytes() for path in three_tars]
    index = run(f"shards:{three_tars[0].parent}/part-{{0..2}}.tar", tmp_path / "out")
    assert [shard.path for shard in index.shards] == [str(path) for path in three_tars]
    assert [path.read_bytes() for path in three_tars] == before
    assert not list((tmp_path / "out").glob("*.tar"))
    for path in three_tars:
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                expected = tar.extractfile(member).read()
                assert contents(tmp_path / "out")[key][extension] == expected


def test_tars_are_scanned_by_other_processes_with_the_same_index(tmp_path, tar_of, some_image):
    tars = [tar_of(tmp_path / f"{n:02d}.tar", [(f"{n}.png", some_image(n))]) for n in range(33)]
    source = f"shards:{tmp_path}/*.tar"
    ledger, sent = tmp_path / "faults.jsonl", []

    def map_elsewhere(function, shared, items):
        sent.extend(items)
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(partial(function, shared), items)

    here = run(source, tmp_path / "here")
    there = ingest(source, tmp_path / "there", CONFIG, ledger, map_elsewhere)
    assert len(sent) > 1 and sorted(url for urls in sent for url in urls) == sorted(map(str, tars))
    assert there.num_samples == here.num_samples == 33
    indices = [(tmp_path / name / "index.json").read_bytes() for name in ("here", "there")]
    assert indices[0] == indices[1]


def test_patterns(three_tars, monkeypatch):
    folder = three_tars[0].parent
    every = [str(path) for path in three_tars]
    for pattern in (
        "part-{0..2}.tar",
        "*.tar",
        "part-0.tar,part-{1,2}.tar",
        "part-[0-1].tar,*2.tar",
    ):
        parts = pattern if "," not in pattern else pattern.replace(",p", f",{folder}/p")
        parts = parts.replace(",*", f",{folder}/*")
        assert expand_shards(f"{folder}/{parts}") == every, pattern
    monkeypatch.chdir(folder)
    assert expand_shards(parse_source("shards:part-{0..1}.tar,./part-2.tar")[1]) == every
    urls = [f"memory://bucket/{n:02d}.tar" for n in range(3)]
    assert expand_shards("memory://bucket/{00..02}.tar") == urls


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{d}/part-{{0..2.tar", "braces are not balanced"),
        ("{d}/part-{{0..3}}.tar", r"part-3\.tar: no such file"),
        ("{d}/none-*.tar", r"none-\*\.tar: no such file"),
        ("{d}", "no such file"),
        ("pipe:cat {d}/part-0.tar", "commands run only with data.allow_pipes=true"),
        ("{d}/*.tar,{d}/part-1.tar", r"part-1\.tar 2 times"),
        ("{d}/text.tar", r"text\.tar: is not an uncompressed tar file"),
        ("{d}/part-0.tar.gz", r"part-0\.tar\.gz: is not an uncompressed tar file"),
    ],
)
def test_bad_pattern_is_refused_by_name(tmp_path, three_tars, pattern, message):
    folder = three_tars[0].parent
    if "text" in pattern:
        (folder / "text.tar").write_text("no tar" * 200)
    if "gz" in pattern:
        (folder / "part-0.tar.gz").write_bytes(gzip.compress(three_tars[0].read_bytes()))
    with pytest.raises(ConfigError, match=message):
        run(f"shards:{pattern.format(d=folder)}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_remote_tars_are_indexed_by_their_urls(tmp_path, three_tars):
    import fsspec

    for path in three_tars:
        fsspec.filesystem("memory").pipe(f"/ingest/{path.name}", path.read_bytes())
    run("shards:memory://ingest/part-{0..2}.tar", tmp_path / "out")
    run(f"shards:{three_tars[0].parent}/*.tar", tmp_path / "local")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_cut_off_tar_and_odd_samples_are_faults(tmp_path, tar_of, some_image):
    cut = tar_of(tmp_path / "cut.tar", [(f"c{n}.png", some_image(n)) for n in range(4)])
    os.truncate(cut, 512 + 1024 + 512 + 1024 + 700)
    odd = tar_of(
        tmp_path / "odd.tar", [("a.png", some_image(0)), ("b.cls", b"1"), ("c1.png", b"x")]
    )
    config = DataConfig(holdout_fraction=0.0, max_fault_fraction=0.9)
    index = run(f"shards:{cut},{odd}", tmp_path / "out", config)
    assert [shard.keys for shard in index.shards] == [["c0", "c1"], ["a"]]
    faults = read_faults(tmp_path / "out" / "faults.jsonl")
    assert [(fault["shard"], fault["key"]) for fault in faults] == [
        (str(cut), None),
        (str(odd), "b"),
        (str(odd), "c1"),
    ]
    assert faults[2]["reason"] == "key was used before"


def test_the_number_of_tars_that_were_cut_off_is_said(tmp_path, three_tars, caplog):
    source = f"shards:{three_tars[0].parent}/*.tar"
    run(source, tmp_path / "whole")
    assert "end mark" not in caplog.text
    for path in three_tars[:2]:
        os.truncate(path, 6000)
    config = DataConfig(holdout_fraction=0.0, max_fault_fraction=0.5)
    assert run(source, tmp_path / "out", config).num_samples == 9
    assert len(read_faults(tmp_path / "out" / "faults.jsonl")) == 2
    assert "2 of 3 tars have no end mark; each counts as one fault" in caplog.text


def test_first_of_equal_keys_stays(tmp_path, tar_of, some_image):
    first = tar_of(tmp_path / "0.tar", [("a.png", some_image(0)), ("a.png", some_image(1))])
    second = tar_of(tmp_path / "1.tar", [("b.png", some_image(2)), ("a.png", some_image(3))])
    config = DataConfig(holdout_fraction=0.0, max_fault_fraction=0.9)
    run(f"shards:{first},{second}", tmp_path / "out", config)
    assert contents(tmp_path / "out") == {"a": {"png": some_image(0)}, "b": {"png": some_image(2)}}
    named = [(f["shard"], f["key"]) for f in read_faults(tmp_path / "out" / "faults.jsonl")]
    assert named == [(str(first), "a"), (str(second), "a")]


def test_too_many_faults_in_tars_are_refused(tmp_path, tar_of, some_image):
    path = tar_of(
        tmp_path / "0.tar",
        [("a.png", some_image(0)), ("b.cls", b"1"), ("c.txt", b""), ("d.png", b"")],
    )
    with pytest.raises(ConfigError, match=r"3 of 4 samples.*max_fault_fraction = 0\.01"):
        run(f"shards:{path}", tmp_path / "out")
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == [".scans.jsonl", "faults.jsonl"]


def test_tar_without_samples_is_refused(tmp_path, tar_of):
    path = tar_of(tmp_path / "0.tar", [])
    with pytest.raises(ConfigError, match="no sample can be read"):
        run(f"shards:{path}", tmp_path / "out")
    (fault,) = read_faults(tmp_path / "out" / "faults.jsonl")
    assert (fault["shard"], fault["reason"]) == (str(path), "holds no samples")


# hold-out


def test_held_out_images_are_disjoint_and_independent_of_order(tmp_path, some_image):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    for number in range(300):
        (tmp_path / "one" / f"{number}.png").write_bytes(some_image(number % 5))
        if number % 3:
            (tmp_path / "two" / f"{number}.png").write_bytes(some_image(number % 5))
    config = DataConfig(holdout_fraction=0.2)
    held = {}
    for name in ("one", "two"):
        out = tmp_path / f"out-{name}"
        run(f"folder:{tmp_path / name}", out, config)
        train, holdout = set(contents(out)), set(contents(out / "holdout"))
        assert not train & holdout
        assert train | holdout == {path.stem for path in (tmp_path / name).iterdir()}
        held[name] = holdout
    assert 40 <= len(held["one"]) <= 80
    assert held["two"] == {key for key in held["one"] if int(key) % 3}


def test_no_holdout_folder_without_a_fraction(tmp_path, image_folder, three_tars):
    run(f"folder:{image_folder}", tmp_path / "folder")
    run(f"shards:{three_tars[0].parent}/*.tar", tmp_path / "tars")
    assert not (tmp_path / "folder" / "holdout").exists()
    assert not (tmp_path / "tars" / "holdout").exists()


@pytest.mark.parametrize(("fraction", "expected"), [(0.01, 1), (0.4, 2), (0.49, 2)])
def test_whole_shards_are_held_out(tmp_path, three_tars, fraction, expected):
    config = DataConfig(holdout_fraction=fraction)
    out = tmp_path / "out"
    train = run(f"shards:{three_tars[0].parent}/*.tar", out, config)
    holdout = read_index(out / "holdout")
    assert (len(train.shards), len(holdout.shards)) == (3 - expected, expected)
    paths = {shard.path for shard in (*train.shards, *holdout.shards)}
    assert paths == {str(path) for path in three_tars}


def test_only_shard_is_trained_on_and_that_is_said(tmp_path, three_tars, caplog):
    config = DataConfig(holdout_fraction=0.4)
    assert run(f"shards:{three_tars[0]}", tmp_path / "out", config).num_samples == 5
    assert not (tmp_path / "out" / "holdout").exists()
    assert "nothing is held out" in caplog.text


def test_training_needs_an_image(tmp_path, some_image):
    root = tmp_path / "images"
    root.mkdir()
    # the hash of this key lies below one half
    (root / "b.png").write_bytes(some_image(0))
    with pytest.raises(ConfigError, match="holds out every image"):
        run(f"folder:{root}", tmp_path / "out", DataConfig(holdout_fraction=0.49))
    assert not (tmp_path / "out").exists()


# completion


def test_complete_data_is_not_read_again(tmp_path, image_folder):
    out = tmp_path / "out"
    first = run(f"folder:{image_folder}", out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (image_folder / "cat" / "00.png").unlink()
    assert run(f"folder:{image_folder}", out) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


def test_lost_tar_is_made_again(tmp_path, image_folder):
    out = tmp_path / "out"
    first = run(f"folder:{image_folder}", out)
    (out / "train-000000.tar").unlink()
    assert run(f"folder:{image_folder}", out) == first
    assert len(contents(out)) == 12


def test_other_data_in_the_folder_is_refused(tmp_path, image_folder, three_tars):
    out = tmp_path / "out"
    run(f"folder:{image_folder}", out)
    with pytest.raises(ConfigError, match="holds other data"):
        run(f"shards:{three_tars[0]}", out)
    assert len(contents(out)) == 12


def test_tars_that_lie_in_the_output_folder_survive(tmp_path, three_tars):
    out = three_tars[0].parent
    precious = out / "train-000000.tar"
    three_tars[0].rename(precious)
    with pytest.raises(ConfigError, match=r"holds train-000000\.tar already"):
        run(f"shards:{precious}", out)
    assert precious.exists()


class Counting:
    """`read_image_file` that counts, and meets something at the seventh image."""

    def __init__(self, original, seventh=None):
        self.original, self.seventh, self.paths = original, seventh, []

    def __call__(self, file):
        self.paths.append(file.path)
        if len(self.paths) == 7 and self.seventh:
            self.seventh()
        return self.original(file)


def interrupt():
    raise KeyboardInterrupt


def test_interruption_of_the_first_tar_leaves_nothing(tmp_path, image_folder, monkeypatch):
    monkeypatch.setattr(packing, "read_image_file", Counting(packing.read_image_file, interrupt))
    with pytest.raises(KeyboardInterrupt):
        run(f"folder:{image_folder}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_after_an_interruption_finished_tars_are_not_packed_again(
    tmp_path, image_folder, monkeypatch
):
    small = CONFIG.model_copy(update={"shard_bytes": 8000})
    out, whole = tmp_path / "out", tmp_path / "whole"
    run(f"folder:{image_folder}", whole, small)
    original = packing.read_image_file
    monkeypatch.setattr(packing, "read_image_file", Counting(original, interrupt))
    with pytest.raises(KeyboardInterrupt):
        run(f"folder:{image_folder}", out, small)
    assert not (out / "COMPLETE").exists() and list(out.glob("train-*.tar"))
    again = Counting(original)
    monkeypatch.setattr(packing, "read_image_file", again)
    run(f"folder:{image_folder}", out, small)
    assert 0 < len(again.paths) < 12
    assert tree(out) == tree(whole)
    # a folder that has changed since: all tars anew
    monkeypatch.setattr(packing, "read_image_file", Counting(original, interrupt))
    with pytest.raises(KeyboardInterrupt):
        run(f"folder:{image_folder}", tmp_path / "other", small)
    (image_folder / "cat" / "00.png").unlink()
    anew = Counting(original)
    monkeypatch.setattr(packing, "read_image_file", anew)
    assert run(f"folder:{image_folder}", tmp_path / "other", small).num_samples == 11
    assert len(anew.paths) == 11


def test_a_finished_tar_that_lost_its_content_is_packed_again(tmp_path, image_folder, monkeypatch):
    small = CONFIG.model_copy(update={"shard_bytes": 8000})
    out, whole = tmp_path / "out", tmp_path / "whole"
    run(f"folder:{image_folder}", whole, small)
    original = packing.read_image_file
    monkeypatch.setattr(packing, "read_image_file", Counting(original, interrupt))
    with pytest.raises(KeyboardInterrupt):
        run(f"folder:{image_folder}", out, small)
    # as after a crash of the host: the name is there, the bytes are not
    for path in out.glob("train-*.tar"):
        os.truncate(path, 0)
    monkeypatch.setattr(packing, "read_image_file", original)
    run(f"folder:{image_folder}", out, small)
    assert tree(out) == tree(whole)


def test_a_tar_of_which_no_key_is_new_is_refused_however_small(tmp_path, tar_of, some_image):
    many = tar_of(tmp_path / "many.tar", [(f"{n}.png", some_image(0)) for n in range(300)])
    few = tar_of(tmp_path / "few.tar", [(f"{n}.png", some_image(n)) for n in range(2)])
    config = DataConfig(holdout_fraction=0.0)
    with pytest.raises(ConfigError, match=r"few\.tar: earlier tars have all its keys"):
        run(f"shards:{many},{few}", tmp_path / "out", config)
    assert not (tmp_path / "out" / "index.json").exists()


def tree(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_killed_process_leaves_no_mark_and_the_next_attempt_succeeds(tmp_path, image_folder):
    out = tmp_path / "out"
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from moce_dist.config import DataConfig\n"
        "from moce_dist.data import packing\n"
        "from moce_dist.data.ingest import ingest\n"
        "original, calls = packing.read_image_file, []\n"
        "def read(file):\n"
        "    calls.append(file)\n"
        "    if len(calls) == 7: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(file)\n"
        "packing.read_image_file = read\n"
        "out = Path(sys.argv[2])\n"
        "config = DataConfig(holdout_fraction=0.0).model_copy(update={'shard_bytes': 8000})\n"
        "ingest(sys.argv[1], out, config, out / 'f.jsonl')\n"
    )
    command = [sys.executable, "-c", code, f"folder:{image_folder}", str(out)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (out / "COMPLETE").exists()
    small = CONFIG.model_copy(update={"shard_bytes": 8000})
    assert run(f"folder:{image_folder}", out, small).num_samples == 12
    run(f"folder:{image_folder}", tmp_path / "whole", small)
    assert tree(out) == tree(tmp_path / "whole")


def test_full_disk_is_one_clear_line_and_leaves_nothing(small_disk, tmp_path, some_image):
    root = tmp_path / "images"
    root.mkdir()
    for number in range(40):
        (root / f"{number}.png").write_bytes(some_image(number, side=64))
    out = small_disk / "out"
    done = job("--source", f"folder:{root}", "--out", out)
    assert done.returncode == 1
    assert "no space left on the device" in done.stderr.splitlines()[-1]
    assert str(out) in done.stderr
    assert not out.exists()
    assert os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize > 190_000


# the job


def test_job_prints_a_summary_and_exits_with_zero(tmp_path, image_folder):
    out = tmp_path / "out"
    (image_folder / "cat" / "empty.png").touch()
    flags = ("--source", f"folder:{image_folder}", "--out", out, "--set", "data.holdout_fraction=0")
    done = job(*flags)
    assert done.returncode == 0, done.stderr
    assert "images   12 for training, 0 held out" in done.stdout
    assert "domains  3: cat 4, dog 4, owl 4" in done.stdout
    assert "faults   1" in done.stdout
    assert str(out / "index.json") in done.stdout
    again = job(*flags)
    assert (again.returncode, again.stdout) == (0, done.stdout)


def test_job_says_that_the_source_has_changed_since(tmp_path, image_folder):
    out = tmp_path / "out"
    flags = ("--source", f"folder:{image_folder}", "--out", out, "--set", "data.holdout_fraction=0")
    assert "--fresh" not in job(*flags).stderr
    assert "--fresh" not in job(*flags).stderr
    shutil.copy(image_folder / "cat" / "00.png", image_folder / "cat" / "new.png")
    done = job(*flags)
    assert done.returncode == 0 and "images   12 for training" in done.stdout
    assert "was made from 12 files of" in done.stderr and "which has 13 now" in done.stderr


def test_job_says_that_a_pattern_matches_other_tars_since(tmp_path, three_tars):
    folder = three_tars[0].parent
    flags = ("--source", f"shards:{folder}/*.tar", "--out", tmp_path / "out")
    assert "--fresh" not in job(*flags).stderr
    assert "--fresh" not in job(*flags).stderr
    shutil.copy(three_tars[0], folder / "part-9.tar")
    assert "was made from 3 files of" in job(*flags).stderr


def test_job_dry_run_writes_nothing(tmp_path, image_folder):
    done = run_here(
        "ingest", "--source", f"folder:{image_folder}", "--out", tmp_path / "out", "--dry-run"
    )
    assert done.returncode == 0, done.stderr
    assert "12 images" in done.stdout
    assert not (tmp_path / "out").exists()


def test_job_fresh_sets_the_old_data_aside(tmp_path, image_folder):
    out = tmp_path / "out"
    flags = ("--source", f"folder:{image_folder}", "--out", out, "--set", "data.holdout_fraction=0")
    assert job(*flags).returncode == 0
    (image_folder / "cat" / "00.png").unlink()
    assert job(*flags, "--fresh").returncode == 0
    (aside,) = tmp_path.glob("out.before-*")
    assert (len(contents(out)), len(contents(aside))) == (11, 12)


def test_job_fresh_sets_the_run_and_its_data_aside(tmp_path, image_folder, three_tars):
    out, run_folder = tmp_path / "out", tmp_path / "run"
    flags = ("--out", out, "--run", run_folder, "--set", "data.holdout_fraction=0")
    assert job("--source", f"folder:{image_folder}", *flags).returncode == 0
    done = job("--source", f"shards:{three_tars[0]}", *flags, "--fresh")
    assert done.returncode == 0, done.stderr
    (aside,) = tmp_path.glob("out.before-*")
    assert (len(contents(out)), len(contents(aside))) == (5, 12)
    assert len(list(tmp_path.glob("run.before-*"))) == 1
    # data inside of the run are moved with it
    inside = ("--run", run_folder, "--set", "data.holdout_fraction=0")
    for number in (1, 2):
        assert job("--source", f"shards:{three_tars[0]}", *inside, "--fresh").returncode == 0
        assert not list(run_folder.glob("ingested.before-*"))
        assert len(list(tmp_path.glob("run.before-*"))) == 1 + number


@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_job_fresh_does_not_set_the_source_aside(tmp_path, image_folder, three_tars, kind):
    source = three_tars[0] if kind == "shards" else image_folder
    out = Path(source).parent
    flags = ("--source", f"{kind}:{source}", "--out", out, "--set", "data.holdout_fraction=0")
    if kind == "shards":
        assert job(*flags).returncode == 0
    done = job(*flags, "--fresh")
    assert done.returncode == 2 and f"{out} holds the source {source}" in done.stderr
    assert Path(source).exists()


def test_job_writes_into_a_run(tmp_path, image_folder):
    run_folder = tmp_path / "run"
    (image_folder / "cat" / "empty.png").touch()
    done = job("--source", f"folder:{image_folder}", "--run", run_folder)
    assert done.returncode == 0, done.stderr
    assert load_run(run_folder)[1].data.source == f"folder:{image_folder}"
    assert (run_folder / "ingested" / "COMPLETE").exists()
    assert len(read_faults(run_folder / "faults.jsonl")) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--source", "folder:/nowhere", "--out", "o"), "folder:/nowhere: no such folder"),
        (("--source", "shards:/nowhere-{0..3.tar", "--out", "o"), "braces are not balanced"),
        (("--source", "pipe:cat x", "--out", "o"), "must be folder:PATH, shards:PATTERN"),
        (
            ("--source", "shards:pipe:cat x", "--out", "o"),
            "commands run only with data.allow_pipes",
        ),
        (("--source", "sample:nothing", "--out", "o"), "no such set"),
        (("--out", "o"), "data.source = ''"),
        (("--source", "folder:."), "folder:"),
        (("--source", "sample:pretrain"), "--out: is missing"),
        (("--source", "sample:pretrain", "--out", "s3://b/x"), "must be a local folder"),
        (("--source", "sample:pretrain", "--out", "o", "--set", "data.nope=1"), "data.nope"),
    ],
)
def test_wrong_request_exits_with_two_and_one_line(tmp_path, flags, message):
    done = run_here("ingest", *flags, folder=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", ["", "folder", "folder:", "http://x", "index:/data"])
def test_source_of_unknown_kind_is_refused(source):
    with pytest.raises(ConfigError, match=r"data\.source"):
        parse_source(source)


@pytest.mark.parametrize(
    "url",
    [
        "https://user:SECRET@example.org/a.tar",
        "https://example.org/a.tar?X-Amz-Signature=SECRET",
        "https://example.org/a.tar?sv=1&sig=SECRET",
    ],
)
def test_url_with_credentials_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError, match="carries credentials") as refusal:
        expand_shards(url)
    assert "SECRET" not in str(refusal.value)


def test_url_without_credentials_is_taken():
    assert expand_shards("s3://bucket/a@b.tar") == ["s3://bucket/a@b.tar"]


def test_every_sample_of_a_repeated_key_counts(tmp_path, tar_of, some_image):
    path = tar_of(tmp_path / "0.tar", [("image.png", some_image(n)) for n in range(9)])
    with pytest.raises(ConfigError, match="8 of 9 samples cannot be used"):
        run(f"shards:{path}", tmp_path / "out")
    faults = read_faults(tmp_path / "out" / "faults.jsonl")
    assert [fault["key"] for fault in faults] == ["image"] * 8
    with pytest.raises(ConfigError, match="8 of 9"):
        run(f"shards:{path}", tmp_path / "out")
    assert read_faults(tmp_path / "out" / "faults.jsonl") == faults
