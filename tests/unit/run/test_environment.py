"""What machines and their variables do to a run, and the line that says so."""

import http.server
import importlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image

from moce_dist.config import make_config
from moce_dist.data.sources import expand_shards, parse_source
from moce_dist.run import environment
from moce_dist.run.directory import open_run
from moce_dist.run.environment import bind_ranks, check_ray_address, local_path, ray_folder
from moce_dist.settings import ConfigError

ROOT = Path(__file__).parents[3]


def refused(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("moce_dist.run.environment._ANSWER_S", 1.0)
    with pytest.raises(ConfigError) as caught:
        check_ray_address()
    message = str(caught.value)
    assert message.startswith(f"RAY_ADDRESS = {address}: ") and "HOST:PORT" in message
    return message


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://127.0.0.1:8265", "ray job submit"),
        ("https://head", "ray job submit"),
        ("ray://127.0.0.1:10001", "do not use"),
        ("127.0.0.1", "is no HOST:PORT"),
        ("head:", "is no HOST:PORT"),
        ("127.0.0.1:99999", "no cluster answers"),
        ("no-such-host.invalid:6379", "no cluster answers"),
    ],
)
def test_address_that_is_none_is_refused_saying_what_it_may_be(address, reason, monkeypatch):
    assert reason in refused(monkeypatch, address)


def test_port_without_a_cluster_is_refused(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert "refused" in refused(monkeypatch, f"127.0.0.1:{port}")


def test_server_of_another_kind_is_not_taken_for_a_cluster(monkeypatch):
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert "is not Ray" in refused(monkeypatch, f"127.0.0.1:{server.server_port}")
    server.shutdown()


def test_cluster_that_answers_is_taken(monkeypatch):
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    for address in (f"127.0.0.1:{port}", f"localhost:{port}", "auto", "local", ""):
        monkeypatch.setenv("RAY_ADDRESS", address)
        check_ray_address()
    server.stop(None)


def test_sockets_of_ray_get_a_short_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    long = tmp_path / ("x" * 90)
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/job")
    assert ray_folder() is None
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert ray_folder() == "/tmp"
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"TMPDIR = .*x: is too long .* RAY_TMPDIR"):
        ray_folder()
    monkeypatch.setenv("RAY_TMPDIR", "/scratch/me")
    assert ray_folder() == "/scratch/me"
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(ConfigError, match=r"RAY_TMPDIR = .*x: is too long"):
        ray_folder()


LOADER = """
import torch
from torch.utils.data import DataLoader
from moce_dist.cli import quiet_libraries
quiet_libraries()
batches = list(DataLoader([torch.ones(3)] * 4, batch_size=None, num_workers=1, timeout=20))
print(torch.stack(batches).sum())
"""


def test_loader_processes_hand_batches_on_under_a_long_tmpdir(tmp_path):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LOADER], capture_output=True, text=True, check=False,
        env=os.environ | {"TMPDIR": str(long)},
    )  # fmt: skip
    assert done.stdout == "tensor(12.)\n", done.stderr
    assert list(long.iterdir()) == []


@pytest.fixture
def no_interfaces(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        # set first, so that what the code sets is undone
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_ranks_of_one_host_meet_on_the_loopback(no_interfaces):
    bind_ranks("127.0.0.1")
    name = os.environ["GLOO_SOCKET_IFNAME"]
    assert environment.interface_of("127.0.0.1") == name
    assert "NCCL_SOCKET_IFNAME" not in os.environ


def test_interface_that_a_user_names_stays(no_interfaces):
    no_interfaces.setenv("GLOO_SOCKET_IFNAME", "ib0")
    no_interfaces.setenv("NCCL_SOCKET_IFNAME", "ib1")
    bind_ranks("127.0.0.1")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("ib0", "ib1")


def test_host_whose_name_is_the_loopback_is_reached_by_its_other_interface(no_interfaces):
    own = {"debian": "127.0.0.1", environment.ELSEWHERE: "10.0.0.7"}
    no_interfaces.setattr(environment, "_own_address", own.get)
    no_interfaces.setattr(environment, "interface_of", {"10.0.0.7": "eth0", "127.0.0.1": "lo"}.get)
    bind_ranks("debian")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=eth0"


def test_relative_paths_of_a_submitted_job_are_refused_by_every_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_path("out", "--out") == Path("out")
    np.save(tmp_path / "0.npy", np.eye(3, dtype=np.float32))
    Image.new("RGB", (9, 9)).save(tmp_path / "0.png")
    root = open_run(tmp_path / "run", make_config({})).root
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    absolute = ("--set", f"data.source=folder:{tmp_path}")
    for job, *argv in (
        ("ingest", "--out", "out", *absolute),
        ("ingest", "--out", tmp_path / "out", "--source", "folder:photos"),
        ("ingest", "--out", tmp_path / "out", "--source", "shards:/a.tar,b.tar"),
        ("ingest", "--out", tmp_path / "out", *absolute, "--against", "task"),
        ("pretrain", "--run", tmp_path / "quickstart", "--set", "data.source=folder:photos"),
        ("pretrain", "--run", tmp_path / "quickstart", "--set", "data.source=index:shards"),
        ("pretrain", "--run", "quickstart", *absolute),
        ("cluster", "--features", "rows", "--num-clusters", 2, "--out", tmp_path / "out"),
        ("cluster", "--features", tmp_path, "--num-clusters", 2, "--out", "out"),
        ("transfer", "--run", root, "--task", "imagefolder", "--data", "task"),
        ("transfer", "--run", root, "--task", "digits", "--out", "out"),
        ("report", root, "--out", "page.html"),
    ):
        with pytest.raises(ConfigError, match="a submitted job needs an absolute path"):
            importlib.import_module(job).main([str(part) for part in argv])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.npy", "0.png", "run"]
    assert parse_source("shards:s3://bucket/a.tar") == ("shards", "s3://bucket/a.tar")


def test_url_without_its_package_names_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "s3fs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", raising=False)
    with pytest.raises(ConfigError, match=r"s3://b/a.tar: .* pip install -e '.\[s3\]'"):
        expand_shards("s3://b/a.tar")
    with pytest.raises(ConfigError, match=r"foo://b/a.tar: Protocol not known"):
        expand_shards("foo://b/a.tar")


READ_ONLY = """
mount -t tmpfs tmpfs {folder} && cp -r {run} {folder}/run && mount -o remount,ro {folder} || exit 77
cd {root}
{python} jobs/report.py {folder}/run; echo status $?
{python} jobs/report.py {folder}/run --out {out}/page.html > /dev/null; echo status $?
{python} jobs/transfer.py --run {folder}/run --task digits --backbone random; echo status $?
{python} jobs/ingest.py --source sample:digits --out {folder}/digits; echo status $?
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_run_on_a_read_only_file_system_is_reported_elsewhere(tmp_path):
    root = open_run(tmp_path / "run", make_config({})).root
    (tmp_path / "fixed").mkdir()
    script = READ_ONLY.format(
        folder=tmp_path / "fixed", run=root, root=ROOT, python=sys.executable, out=tmp_path
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no mounts here")
    assert [line for line in done.stdout.splitlines() if line.startswith("status")] == [
        "status 2", "status 0", "status 2", "status 2",
    ]  # fmt: skip
    assert (tmp_path / "page.html").is_file()
    lines = done.stderr.splitlines()
    assert len(lines) == 3 and all(f"{tmp_path / 'fixed'}" in line for line in lines)
    assert all("read-only file system" in line and ".tmp" not in line for line in lines)
    assert all("--out" in line for line in lines[:2])


def test_job_that_the_wrong_python_starts_says_which_one_to_take():
    for job in sorted((ROOT / "jobs").glob("*.py")):
        if job.name == "interpreter.py":
            continue
        # without its packages, as the system's own
        done = subprocess.run(
            [sys.executable, "-S", job, "--help"], capture_output=True, text=True, check=False,
            cwd="/",
        )  # fmt: skip
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"error: {sys.executable} has no package moce_dist; ")
        assert done.stderr.count("\n") == 1 and ".venv" in done.stderr
