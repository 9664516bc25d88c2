"""Looking at ingested data: planted faults and planted copies are found, and nothing else."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from in_process import run_here
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from moce_dist.config import DataConfig
from moce_dist.data.audit import find_copies, verify
from moce_dist.data.shards import scan_shard, write_index
from moce_dist.run.files import read_faults
from moce_dist.settings import ConfigError

ROOT = Path(__file__).parents[3]
DATA = DataConfig()


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pieces():
    """Twenty different pieces of real photographs."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    boxes = [(x, y, x + 120, y + 100) for x in range(0, 500, 110) for y in (20, 220)]
    return [photograph.crop(box) for photograph in photographs for box in boxes]


def indexed(folder, tar_of, members):
    return write_index(folder, [scan_shard(str(tar_of(folder / "a.tar", members)))[0]])


# verify


def test_whole_data_has_no_faults(tmp_path, three_tars):
    index = write_index(tmp_path, [scan_shard(str(path))[0] for path in three_tars])
    assert list(verify(index, DATA)) == []


def test_every_planted_fault_is_found_and_named(tmp_path, three_tars, tar_of, some_image):
    damaged = bytearray(some_image(1, "JPEG", side=64))
    damaged[len(damaged) // 2 :] = b""
    odd = tar_of(
        tmp_path / "odd.tar",
        [("a.png", some_image(0)), ("cut.jpg", bytes(damaged)), ("text.png", b"no image")],
    )
    index = write_index(tmp_path, [scan_shard(str(path))[0] for path in (*three_tars, odd)])
    three_tars[0].unlink()
    with three_tars[1].open("r+b") as file:
        # inside the padding behind a member: no image is hurt, but it is not what was indexed
        file.seek(index.shards[1].offsets[0] + index.shards[1].sizes[0])
        file.write(b"x")
    faults = [(Path(f.shard).name, f.key) for f in verify(index, DATA)]
    assert faults == [
        ("part-0.tar", None), ("part-1.tar", None), ("odd.tar", "cut"), ("odd.tar", "text"),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["cut", "busy"])
def test_a_passing_error_of_remote_storage_is_no_fault(tmp_path, tar_of, file_server, pieces, kind):
    path = tar_of(tmp_path / "a.tar", [(f"{n}.png", encoded(p)) for n, p in enumerate(pieces)])
    shard, _ = scan_shard(str(path))
    for failing in (1, 2):
        server = file_server({"/a.tar": path.read_bytes()}, lambda n, f=failing: kind * (n == f))
        index = write_index(tmp_path, [replace(shard, path=f"{server.url}/a.tar")])
        assert list(verify(index, DATA)) == []


def test_lasting_errors_of_remote_storage_are_faults(tmp_path, tar_of, file_server, pieces):
    path = tar_of(tmp_path / "a.tar", [("a.png", encoded(pieces[0]))])
    server = file_server({"/a.tar": path.read_bytes()}, lambda n: "forbidden")
    url = f"{server.url}/a.tar"
    index = write_index(tmp_path, [replace(scan_shard(str(path))[0], path=url)])
    (fault,) = verify(index, DATA)
    assert fault == (url, None, f"{url}: the server answers with status 403")


# copies


def test_planted_copies_are_found_and_nothing_else(tmp_path, tar_of, pieces):
    task = tmp_path / "task"
    task.mkdir()
    for number, piece in enumerate(pieces[:12]):
        piece.save(task / f"{number:02d}.png")
    planted = {
        "bytes": (task / "00.png").read_bytes(),
        "jpeg": encoded(pieces[1], "JPEG", quality=50),
        "small": encoded(pieces[2].resize((50, 42), Image.Resampling.BICUBIC)),
        "mirrored": encoded(ImageOps.mirror(pieces[3]), "JPEG", quality=85),
        "brighter": encoded(pieces[4].point(lambda v: min(255, int(v * 1.1)))),
    }
    others = {f"other{n}": encoded(piece) for n, piece in enumerate(pieces[12:])}
    plain = {"plain": encoded(Image.new("RGB", (60, 60), (9, 9, 9)))}
    members = [(f"{k}.png", content) for k, content in (planted | others | plain).items()]
    index = indexed(tmp_path, tar_of, members)
    copies = {copy.key: copy for copy in find_copies([index], task, DATA)}
    assert copies.keys() == planted.keys()
    assert [Path(copies[key].file).stem for key in planted] == ["00", "01", "02", "03", "04"]
    assert [key for key, copy in copies.items() if copy.kind == "exact"] == ["bytes"]


def test_images_of_noise_are_no_copies(tmp_path, tar_of, some_image):
    task = tmp_path / "task"
    task.mkdir()
    for number in range(40):
        (task / f"{number}.png").write_bytes(some_image(number, side=32))
    members = [(f"{n}.png", some_image(1000 + n, side=32)) for n in range(200)]
    assert list(find_copies([indexed(tmp_path, tar_of, members)], task, DATA)) == []


def test_every_image_of_the_folder_is_compared_whatever_its_name(tmp_path, tar_of, pieces, caplog):
    task = tmp_path / "task" / "class"
    task.mkdir(parents=True)
    pieces[0].save(task / "1.jpg")
    pieces[1].save(task / "1.png")
    (task / "1.gif").write_bytes(b"no image")
    (task / "2.png").write_bytes(b"")
    (task / "3.png").symlink_to(task / "nowhere.png")
    index = indexed(tmp_path, tar_of, [("a.png", encoded(pieces[1]))])
    (copy,) = find_copies([index], tmp_path / "task", DATA)
    assert copy.file == str(task / "1.png")
    assert f"{tmp_path / 'task'}: 3 of its images cannot be read or decoded" in caplog.text


def test_images_that_cannot_be_read_are_not_said_to_be_no_copies(tmp_path, tar_of, pieces, caplog):
    (tmp_path / "task").mkdir()
    pieces[0].save(tmp_path / "task" / "1.png")
    members = [("a.png", encoded(pieces[0])), ("b.png", encoded(pieces[1]))]
    index = indexed(tmp_path, tar_of, members)
    with (tmp_path / "a.tar").open("r+b") as file:
        file.truncate(index.shards[0].offsets[1])
    with pytest.raises(RuntimeError, match="1 of 2 images of the data cannot be read"):
        list(find_copies([index], tmp_path / "task", DATA))
    half = DataConfig(max_fault_fraction=0.5)
    assert [copy.key for copy in find_copies([index], tmp_path / "task", half)] == ["a"]
    assert "1 of 2 images of the data cannot be read" in caplog.text


# the job


def test_job_verifies_compares_and_exits_with_one_over_the_limit(
    tmp_path, image_folder, some_image
):
    content = some_image(5, "JPEG", side=64)
    (image_folder / "owl" / "cut.jpg").write_bytes(content[: len(content) // 2])
    task = tmp_path / "task"
    task.mkdir()
    (task / "leak.png").write_bytes((image_folder / "cat" / "00.png").read_bytes())
    out = tmp_path / "out"
    command = [
        sys.executable, ROOT / "jobs/ingest.py", "--source", f"folder:{image_folder}",
        "--out", out, "--verify", "--against", task, "--set", "parallel.num_workers=1",
    ]  # fmt: skip
    for _ in range(2):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stderr
        assert "1 faults in 13 images, over data.max_fault_fraction" in done.stderr
        assert "copies   1 exact, 0 near, of 1 images of" in done.stdout
        (copy,) = map(json.loads, (out / "copies.jsonl").read_text().splitlines())
        assert (copy["key"], copy["kind"]) == ("cat/00", "exact")
        # once, however often it is met
        (fault,) = read_faults(out / "faults.jsonl")
        assert (fault["stage"], fault["key"]) == ("verify", "owl/cut")
    roomy = [*map(str, command), "--set", "data.max_fault_fraction=0.5"]
    done = subprocess.run(roomy, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "verified 13 images, 1 faults" in done.stdout


def test_mean_of_thumbnails_does_not_count():
    """Images that differ in brightness and contrast only are alike."""
    from moce_dist.data.audit import thumbnail

    pixels = np.random.default_rng(0).uniform(0, 100, (64, 64)).astype(np.float32)
    assert float(thumbnail(pixels) @ thumbnail(2 * pixels + 30)) > 0.9999


def test_a_file_that_cannot_be_read_is_counted_and_not_compared(
    tmp_path, tar_of, some_image, monkeypatch, caplog
):
    index = indexed(tmp_path, tar_of, [("a.png", some_image(0))])
    (tmp_path / "task").mkdir()
    for name in ("bad", "good"):
        (tmp_path / "task" / f"{name}.png").write_bytes(some_image(0))
    whole = Path.read_bytes

    def read_bytes(path):
        if path.stem == "bad":
            raise OSError(5, "Input/output error")
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    (copy,) = find_copies([index], tmp_path / "task", DATA)
    assert Path(copy.file).stem == "good" and "1 of its images cannot be read" in caplog.text


def test_a_folder_to_compare_with_may_have_any_name(tmp_path, image_folder, some_image):
    task = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    task.mkdir()
    (task / "leak.png").write_bytes((image_folder / "cat" / "00.png").read_bytes())
    source, out = f"folder:{image_folder}", tmp_path / "out"
    named = f"{tmp_path}/caf\\xe9"
    done = run_here("ingest", "--source", source, "--out", out, "--against", named)
    assert done.returncode == 0 and "copies   1 exact" in done.stdout, done.stderr


def test_a_folder_of_empty_files_alone_is_refused_by_name(tmp_path, tar_of, some_image):
    index = indexed(tmp_path, tar_of, [("a.png", some_image(0))])
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "b.png").write_bytes(b"")
    with pytest.raises(ConfigError, match="task: no image of it can be read"):
        list(find_copies([index], tmp_path / "task", DATA))
