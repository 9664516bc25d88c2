"""The doctor on this machine, and on ones that lack something."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from in_process import run_here

from moce_dist import doctor
from moce_dist.config import Config, load_config, make_config

ROOT = Path(__file__).parents[2]


def run(*flags, **environment):
    return subprocess.run(
        [sys.executable, "-m", "moce_dist", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        check=False,
    )


def levels(check, config=None):
    return [(finding.level, finding.name) for finding in doctor.examine(check, config)]


def test_healthy_machine_passes_every_check():
    done = run()
    assert done.returncode == 0, done.stdout
    assert "fail" not in done.stdout.split()
    for name in ("packages", "torch", "faiss", "GPUs", "memory", "disk", "network", "compilers"):
        assert f" {name} " in done.stdout


def test_gpu_that_is_asked_for_and_missing_fails_with_advice(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("parallel: {use_gpu: true, num_workers: 2, num_groups: 4, compile: true}")
    done = run("--config", str(config), CUDA_VISIBLE_DEVICES="", PATH="/nowhere")
    assert done.returncode == 1
    assert "fail  GPUs" in done.stdout and "set auto or false" in done.stdout
    assert "warn  compilers" in done.stdout


def test_a_cluster_is_not_judged_by_this_machine(monkeypatch):
    large = make_config({"parallel": {"num_workers": 4096, "num_groups": 8, "use_gpu": True}})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (here,) = doctor.examine(doctor.cores, large)
    assert (
        here.level == "warn"
        and f"ranks want {4096 * (1 + large.data.loader_processes)}" in here.seen
    )
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    for check in (doctor.devices, doctor.cores):
        (there,) = doctor.examine(check, large)
        assert there.level == "ok" and "RAY_ADDRESS were not looked at" in there.seen


def test_sockets_of_many_ranks_need_more_open_files(monkeypatch):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (1024, 4096))
    for workers, level in ((64, "ok"), (128, "ok"), (256, "warn")):
        config = make_config({"parallel": {"num_workers": workers, "num_groups": 8}})
        assert levels(doctor.open_files, config) == [(level, "open files")]


def test_wrong_config_is_2_with_one_line(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("parallel: {workers: 2}")
    done = run_here("moce_dist", "--config", config)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: parallel.workers = 2: unknown key\n"


def test_package_that_cannot_be_imported_is_a_finding(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert ("fail", "faiss") in levels(doctor.frameworks)
    assert levels(doctor.memory) == [("fail", "memory")]


def test_package_of_a_wrong_version_is_named(monkeypatch):
    wanted = [
        "deepspeed==0.0.1",
        "numpy>=2",
        "no-such-package>=1",
        "x; python_version<'3'",
    ]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    (finding,) = doctor.packages(make_config({}))
    assert finding.level == "fail" and "1 of 3 fit" in finding.seen
    assert "deepspeed==0.0.1 (0." in finding.advice and "no-such-package" in finding.advice


def test_host_name_that_does_not_resolve_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor.socket, "gethostname", lambda: "no-such-host.invalid")
    assert levels(doctor.network) == [("ok", "network"), ("warn", "network")]


def test_host_whose_name_is_the_loopback_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor.socket, "gethostname", lambda: "localhost")
    *_, last = doctor.network(make_config({}))
    assert last.level == "warn" and "stands for 127.0.0.1 in /etc/hosts" in last.seen


def test_folder_without_room_or_rights_fails(monkeypatch, tmp_path):
    config = make_config({"run": {"root": str(tmp_path / "a" / "b")}})
    assert levels(doctor.disk, config)[0][1] == "disk"
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert levels(doctor.disk, config)[-1] == ("fail", "disk")


@pytest.mark.parametrize(
    ("workers", "rows"),
    [
        (8, ("  rank   0 1   2 3   4 5   6 7", "  group  g0    g1    g2    g3")),
        (2, ("  rank   0       1", "  group  g0 g1   g2 g3")),
        (1, ("  rank   0", "  group  g0 g1 g2 g3")),
    ],
)
def test_ranks_are_shown_over_their_groups(workers, rows):
    config = make_config({"parallel": {"num_workers": workers, "num_groups": 4}})
    assert tuple(doctor.topology_lines(config)[1:3]) == rows


def test_legal_numbers_of_ranks_reach_the_configured_one_and_suit_both_stages():
    for path in sorted((ROOT / "configs" / "pretrain").glob("*.yaml")):
        config = load_config(path)
        legal = json.loads(doctor.topology_lines(config)[3].partition("ranks: ")[2])
        assert config.parallel.num_workers in legal, path.name
    both = {"parallel": {"num_workers": 2}, "mae": {"batch_size": 8}, "moce": {"batch_size": 12}}
    assert doctor.topology_lines(make_config(both))[3].endswith("ranks: [1, 2, 4]")


def test_memory_is_that_of_the_container(monkeypatch, tmp_path):
    files = {"memory.max": 8 << 30, "memory.current": 7 << 30, "memory.stat": 1 << 28}
    for name, value in files.items():
        (tmp_path / name).write_text(
            f"{'inactive_file ' if name == 'memory.stat' else ''}{value}\n"
        )
    machine = SimpleNamespace(total=64 << 30, available=50 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(doctor, "_CGROUP", tmp_path)
    (found,) = doctor.memory(make_config({}))
    assert (found.level, found.seen) == ("warn", "1.2 GiB free of 8.0")
    (tmp_path / "memory.max").write_text("max\n")
    (found,) = doctor.memory(make_config({}))
    assert (found.level, found.seen) == ("ok", "50.0 GiB free of 64.0")
    (tmp_path / "memory.max").unlink()
    assert next(doctor.memory(make_config({}))) == found


def test_lines_name_the_smaller_starts_of_an_elastic_run():
    parallel = {"num_workers": 8, "num_groups": 4, "min_workers": 2}
    lines = doctor.topology_lines(make_config({"parallel": parallel}))
    smaller = "with nodes missing: 4 (micro-batches 2), 2 (micro-batches 4)"
    assert lines[-2:] == [f"  mae {smaller}", f"  moce {smaller}"]
    fixed = doctor.topology_lines(make_config({"parallel": {"num_workers": 8, "num_groups": 4}}))
    assert "legal numbers of ranks" in fixed[-1]


def test_schema_for_editors_is_the_one_of_the_code():
    printed = run_here("moce_dist", "schema")
    assert printed.returncode == 0 and json.loads(printed.stdout) == Config.model_json_schema()
    committed = (ROOT / "configs" / "schema.json").read_text()
    assert committed == printed.stdout, "renew it with: make schema"


def test_changed_fields_are_those_that_are_checked():
    done = run_here(
        "moce_dist", "--set", "parallel.num_groups=4", "--set", "parallel.num_workers=3"
    )
    assert done.returncode == 2 and "parallel.num_workers (3) must be a multiple" in done.stderr


def test_wrong_flag_is_one_line():
    done = run_here("moce_dist", "--sett")
    assert (done.returncode, done.stderr) == (2, "error: unrecognized arguments: --sett\n")
