"""What a person sees of a job: exit status, one line on stderr, --help with an example."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moce_dist.cli import job_parser
from moce_dist.settings import ConfigError

ROOT = Path(__file__).parents[2]
JOBS = [p for p in sorted((ROOT / "jobs").glob("*.py")) if p.name != "interpreter.py"]

JOB = """
import sys, time
from moce_dist.cli import job_parser, run_job
from moce_dist.config import load_config
from moce_dist.settings import ConfigError

def main(argv):
    args = job_parser("Try.", "try.py --config x").parse_args(argv)
    load_config(args.config, args.overrides)
    if args.run == "broken":
        raise OSError("disk\\n  is   full")
    if args.run == "slow":
        print("ready", flush=True)
        time.sleep(30)
    print("done")

run_job(main)
"""


def run(path, *flags, debug=False):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({"MOCE_DEBUG": "1"} if debug else {})
    return subprocess.run(
        [sys.executable, path, *flags], capture_output=True, text=True, env=environment, check=False
    )


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "job.py"
    path.write_text(JOB)
    return path


def test_success_is_0(job):
    done = run(job)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "mae.epoch=1"], "error: mae.epoch = 1: unknown key\n"),
        (["--config", "/none.yaml"], "error: --config /none.yaml: No such file or directory\n"),
        (["--speed"], "error: unrecognized arguments: --speed\n"),
        (["--run"], "error: argument --run: expected one argument\n"),
    ],
)
def test_wrong_request_is_2_with_one_line(job, flags, message):
    done = run(job, *flags)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_failure_is_1_with_one_line_and_a_traceback_on_request(job):
    done = run(job, "--run", "broken")
    assert (done.returncode, done.stderr) == (1, "error: OSError: disk is full\n")
    assert "Traceback" in run(job, "--run", "broken", debug=True).stderr


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [(signal.SIGINT, 130, "interrupted; "), (signal.SIGTERM, 143, "stopped: SIGTERM; ")],
)
def test_signals_have_statuses_and_one_line(job, sent, status, said):
    process = subprocess.Popen(
        [sys.executable, job, "--run", "slow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        # a shell has its background jobs ignore it, and what they start as well
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == status
    assert stderr.startswith(said) and stderr.count("\n") == 1


def test_set_can_be_repeated_and_flags_have_one_meaning():
    args = job_parser("Try.", "x").parse_args(["--set", "a=1", "--set", "b=2", "--dry-run"])
    assert (args.overrides, args.dry_run, args.fresh) == (["a=1", "b=2"], True, False)
    with pytest.raises(ConfigError):
        job_parser("Try.", "x").parse_args(["--dry"])


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_job_explains_itself_with_an_example(path):
    done = run(path, "--help")
    assert done.returncode == 0
    assert "example:" in done.stdout and f"jobs/{path.name}" in done.stdout
    for flag in ("--config", "--set", "--run", "--fresh", "--dry-run"):
        assert flag in done.stdout


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_job_refuses_an_unknown_field_before_anything_heavy(path, tmp_path):
    started = time.monotonic()
    where = ["--run", str(tmp_path / "run")]
    tiny = ROOT / "configs" / "studies" / "tiny.yaml"
    flags = {
        "bench.py": ["step", *where],
        "study.py": ["--config", str(tiny), "--out", str(tmp_path / "run")],
    }
    # a study has fields of its own beside the configuration's
    prefix = "config." if path.name == "study.py" else ""
    done = run(path, *flags.get(path.name, where), "--set", f"{prefix}mae.epoch=1")
    assert done.returncode == 2
    assert "mae.epoch" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - started < 60
