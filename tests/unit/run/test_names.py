"""Names are bytes: what is no UTF-8 is read, hashed, written and shown on any locale."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from moce_dist.cluster.assignments import read_assignments, write_assignments
from moce_dist.cluster.blocks import open_features
from moce_dist.config import DataConfig
from moce_dist.data.images import sample_generator
from moce_dist.data.ingest import ingest
from moce_dist.data.packing import share
from moce_dist.data.shards import read_index, scan_shard
from moce_dist.run.files import read_faults, record_fault, write_atomic
from moce_dist.run.names import as_path, as_text, json_line, open_output, read_names
from moce_dist.transfer.classification.task import Classification
from moce_dist.transfer.commands import list_named
from moce_dist.transfer.segmentation.task import Segmentation

ROOT = Path(__file__).resolve().parents[3]
LATIN = "caf\udce9"
LOCALES = {
    "ascii output": {"PYTHONIOENCODING": "ascii"},
    "strict UTF-8": {"PYTHONIOENCODING": "utf-8:strict"},
    "C": {"LC_ALL": "C"},
    "C without UTF-8": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


def png(number):
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two class folders, one and some files of both named in Latin-1, one in Cyrillic."""
    root = tmp_path / "photos"
    for label, name in enumerate((LATIN, "cat")):
        (root / name).mkdir(parents=True)
        for number, stem in enumerate(("0", LATIN, "кот")):
            (root / name / f"{stem}.png").write_bytes(png(10 * label + number))
    return root


def test_text_of_a_name():
    names = {
        "cat": "cat",
        "кот": "кот",
        LATIN: r"caf\xe9",
        b"caf\xe9": r"caf\xe9",
        "\ud800": r"\xed\xa0\x80",
    }
    assert {name: as_text(name) for name in names} == names
    for text in names.values():
        text.encode()


def test_path_of_such_a_text_is_found_again(tmp_path):
    there = tmp_path / LATIN
    there.mkdir()
    said = as_text(there)
    assert as_path(said) == there and as_path(f"{said}/*.tar") == there / "*.tar"
    assert as_path(f"{said}/new") == there / "new"
    for text in ("plain", r"C:\xe9", f"{tmp_path}/caf\\x41"):
        assert as_path(text) == Path(text)
    Path(said).mkdir()
    assert as_path(said) == Path(said)


def test_keys_of_bytes_are_hashed_and_text_keeps_its_draws():
    assert share(LATIN) == share(r"caf\xe9")
    draws = [sample_generator(0, 1, key).random() for key in (LATIN, r"caf\xe9", "cat")]
    assert draws[0] == draws[1] != draws[2]


def test_a_folder_is_packed_verified_and_found_again(folder, tmp_path):
    config = DataConfig(holdout_fraction=0.0)
    ingest(f"folder:{folder}", tmp_path / "out", config, tmp_path / "faults.jsonl")
    (shard,) = read_index(tmp_path / "out").shards
    assert set(shard.keys) == {
        f"{c}/{n}" for c in (r"caf\xe9", "cat") for n in ("0", r"caf\xe9", "кот")
    }
    with tarfile.open(tmp_path / "out" / shard.path) as tar:
        contents = {m.name: tar.extractfile(m).read() for m in tar}
    assert contents[r"caf\xe9/caf\xe9.png"] == (folder / LATIN / f"{LATIN}.png").read_bytes()
    before = (tmp_path / "out" / "COMPLETE").stat().st_mtime_ns
    ingest(f"folder:{folder}", tmp_path / "out", config, tmp_path / "faults.jsonl")
    assert (tmp_path / "out" / "COMPLETE").stat().st_mtime_ns == before


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_tars_of_such_names_are_read(folder, tmp_path, form):
    path = tmp_path / f"{LATIN}.tar"
    subprocess.run(
        ["tar", "--sort=name", f"--format={form}", "-cf", path, "."], cwd=folder, check=True
    )
    shard, faults = scan_shard(str(path))
    assert (len(shard.keys), faults) == (6, [])
    assert r"./caf\xe9/caf\xe9" in shard.keys
    json.dumps(shard.keys, ensure_ascii=False).encode()


def test_tables_of_features_and_clusters_hold_such_names(tmp_path):
    np.save(tmp_path / f"{LATIN}.npy", np.zeros((2, 4), np.float32))
    (tmp_path / f"{LATIN}.keys.json").write_text(json.dumps(["a", LATIN]))
    files = open_features(tmp_path)
    write_assignments(tmp_path / "a.parquet", files, np.zeros(2, int), np.zeros(2))
    assert read_assignments(tmp_path / "a.parquet") == {"a": 0, r"caf\xe9": 0}
    assert pq.read_table(tmp_path / "a.parquet")["shard"].to_pylist() == [r"caf\xe9"] * 2


def test_tasks_have_names_that_can_be_shown(folder, tmp_path):
    data = tmp_path / "task"
    for split in ("train", "test"):
        (data / split).parent.mkdir(exist_ok=True)
        (data / split).symlink_to(folder)
    task = Classification.open("imagefolder", data)
    assert task.classes == [r"caf\xe9", "cat"] or task.classes == ["cat", r"caf\xe9"]
    assert r"train/cat/caf\xe9.png" in [item.key for item in task.train]
    assert len(task.fingerprint()) == 64
    assert all(item.read() for item in task.train)
    assert r"caf\xe9.png" in [item.key for item in list_named([str(folder / "cat")])]


def test_lists_of_classes_in_any_encoding(folder, tmp_path):
    data = tmp_path / "ade"
    for kind in ("images", "annotations"):
        for split in ("training", "validation"):
            (data / kind).mkdir(parents=True, exist_ok=True)
            (data / kind / split).symlink_to(folder / "cat")
    (data / "classes.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9\r\n\r\nkot\n")
    scenes = Segmentation.read("ade20k", data)
    assert scenes.classes == [r"caf\xe9", "kot"] == read_names(data / "classes.txt")
    assert len(scenes.fingerprint()) == 64


def test_ledger_and_pages_take_any_path(tmp_path):
    record_fault(tmp_path / "faults.jsonl", stage="ingest", shard=LATIN)
    assert read_faults(tmp_path / "faults.jsonl")[0]["shard"] == LATIN
    write_atomic(tmp_path / "page.html", f"<p>{LATIN} кот</p>")
    assert (tmp_path / "page.html").read_bytes().decode() == r"<p>caf\udce9 кот</p>"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_lines_of_json_are_json_on_any_output(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    open_output()
    line = {"image": f"{LATIN}.png", "name": "кот"}
    sys.stdout.write(json_line(line) + "\n" + LATIN + "\n")
    stream.flush()
    shown, plain, _ = stream.buffer.getvalue().decode(encoding).split("\n")
    assert json.loads(shown) == line
    assert plain == r"caf\udce9"


@pytest.mark.parametrize("locale", LOCALES)
def test_ingest_runs_on_any_locale(folder, tmp_path, locale):
    (folder / "cat" / f"gone{LATIN}.png").symlink_to("nowhere")
    old = ("LC_", "LANG", "PYTHON")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(old)}
    words = ["--source", f"folder:{folder}", "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "jobs/ingest.py", *words],
        cwd=ROOT,
        env={**environment, **LOCALES[locale]},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert rb"caf\xe9 3" in done.stdout and b"faults   1" in done.stdout
    keys = [key for shard in read_index(tmp_path / "out").shards for key in shard.keys]
    assert r"cat/caf\xe9" in keys and "cat/кот" in keys


@pytest.mark.parametrize("locale", ["strict UTF-8", "C without UTF-8"])
def test_sources_lie_in_folders_of_any_name_and_what_is_written_in_utf8(folder, tmp_path, locale):
    tar = folder / LATIN / "a.tar"
    with tarfile.open(tar, "w") as made:
        made.add(folder / "cat", "cat")
    pattern, where = os.fsencode(tar.parent) + b"/*.tar", os.fsencode(tar.parent)
    for source, number in ((b"shards:" + pattern, 3), (b"folder:" + where, 3)):
        for flag in (b"--source=" + source, b"--set=data.source=" + source):
            status, output, error = ingest_job(tmp_path / f"{number}", locale, flag, "--dry-run")
            assert status == 0 and f"{number}" in output, error
    status, _, error = ingest_job(tar.parent / "out", locale, b"--source=folder:" + where)
    assert status == 2 and r"caf\xe9/out: is no UTF-8" in error and len(error.splitlines()) == 1


def ingest_job(out, locale, *flags):
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / "ingest.py", "--out", out, *flags],
        env=os.environ | LOCALES[locale],
        capture_output=True,
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()
