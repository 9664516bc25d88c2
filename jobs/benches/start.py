"""Time the start: from the command to the first step, and from one stage to the next.

Every round runs `jobs/pretrain.py` as a user does, on a few images that were ingested before. It
observes from outside when the job's processes and the files of its run appear.

    command_s    the command itself, until it starts Ray: interpreter, imports, checks
    ray_s        until the first worker has a process: search for nodes, Ray Train
    worker_s     until that worker knows its rank and begins the stage's log
    engine_s     until model and engine are built: imports, process group, first weights
    step_s       until the first step is in metrics.jsonl

first_step is their sum, for stage mae. next_stage lasts from the marker of stage moce to the first
step of stage control, which trains on the same workers. after_shards lasts from the marker of the
shards to the first step of stage moce; before that marker the workers did other work. With
`bench.against`, another copy of the project runs the same in alternation. interpreter_s and
imports_s are processor seconds of separate processes: Python alone, and what a worker imports.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from benches.harness import Report, interleave
from benches.settings import BenchConfig
from moce_dist.settings import ConfigError, flatten

ROOT = Path(__file__).parents[2]
_IMAGES = 128
_LOOK_S = 0.02
_TIMEOUT_S = 900.0
_PARTS = ("command_s", "ray_s", "worker_s", "engine_s", "step_s")
_WAYS = ("first_step", "next_stage", "after_shards")


def run(config: BenchConfig) -> Report:
    """Start the command once per round, and that of the other copy, if one is named."""
    others = {} if config.bench.against is None else {"_against": Path(config.bench.against)}
    copies = {"": ROOT, **others}
    for copy in copies.values():
        if not (copy / "jobs" / "pretrain.py").is_file():
            raise ConfigError(f"bench.against ({copy}): holds no jobs/pretrain.py")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in copies}
    bench = config.bench
    with tempfile.TemporaryDirectory() as folder:
        ready = _ingested(config, Path(folder))
        turns = {name: _turn(copy, ready, found[name]) for name, copy in copies.items()}
        interleave(turns, rounds=bench.rounds, warmup=bench.warmup_rounds)
    report = Report("start", config)
    for name, rounds in found.items():
        counted = rounds[bench.warmup_rounds :]
        report.add_variants({way + name: [r[way] for r in counted] for way in _WAYS})
        report.figures |= {part + name: _median(counted, part) for part in _PARTS}
        report.figures |= _imports(copies[name], name)
    report.figures |= {f"{way}_s": report.variants[way]["median"] for way in _WAYS}
    for way in _WAYS if others else ():
        report.add_ratio(way, f"{way}_against")
    return report


def _median(rounds: list[dict[str, float]], name: str) -> float:
    return statistics.median(each[name] for each in rounds)


def _ingested(config: BenchConfig, folder: Path) -> list[str]:
    """Make images and ingest them; return the arguments of a run on them."""
    draws, images = np.random.default_rng(0), folder / "images"
    images.mkdir()
    size = config.data.image_size
    for number in range(_IMAGES):
        pixels = draws.integers(0, 255, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{number:04d}.png")
    given, defaults = (flatten(c.model_dump(mode="json")) for c in (config, BenchConfig()))
    sets = {k: v for k, v in given.items() if v != defaults.get(k) and not k.startswith("bench.")}
    flags = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    index = folder / "index"
    command = [sys.executable, f"{ROOT}/jobs/ingest.py", "--source", f"folder:{images}"]
    # one worker needs no Ray; ingest is not measured here
    alone = ["--out", str(index), *flags, "--set", "parallel.num_workers=1"]
    done = subprocess.run([*command, *alone], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"jobs/ingest.py: {done.stderr.strip().splitlines()[-1]}")
    return [*flags, "--set", f"data.source=index:{index}"]


def _turn(copy: Path, flags: list[str], found: list[dict[str, float]]) -> Callable[[], None]:
    def turn() -> None:
        with tempfile.TemporaryDirectory() as folder:
            found.append(_start(copy, flags, Path(folder) / "run"))

    return turn


def _start(copy: Path, flags: list[str], run_folder: Path) -> dict[str, float]:
    """Run all stages; return the seconds of the parts."""
    config = run_folder.parent / "empty.yaml"
    config.write_text("{}\n")
    command = [sys.executable, f"{copy}/jobs/pretrain.py", "--config", str(config)]
    # Ray's workers import first from the folder where the command was started
    variables = os.environ | {"PYTHONPATH": str(copy)}
    begin = time.time()
    process = subprocess.Popen(
        [*command, "--run", str(run_folder), *flags],
        env=variables,
        cwd=copy,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        seen = _watch(process, run_folder)
        said, _ = process.communicate(timeout=_TIMEOUT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise RuntimeError(f"{copy}: {said.strip().splitlines()[-1]}")
    moments = [begin, *(seen[name] for name in ("raylet", "worker", "log", "built", "mae"))]
    parts = {part: b - a for part, (a, b) in zip(_PARTS, pairwise(moments), strict=True)}
    return parts | {
        "first_step": seen["mae"] - begin,
        "after_shards": seen["moce"] - (run_folder / "shards" / "COMPLETE").stat().st_mtime,
        "next_stage": seen["control"] - (run_folder / "moce" / "COMPLETE").stat().st_mtime,
    }


def _watch(process: "subprocess.Popen[str]", run_folder: Path) -> dict[str, float]:
    """Wait for every moment of a run; return their times, seconds since 1970."""
    mae, seen = run_folder / "mae", dict[str, float]()
    files: dict[str, Callable[[], bool]] = {
        "log": (mae / "log.txt").exists,
        "built": (mae / "metrics.jsonl").exists,
        **{stage: _has_lines(run_folder / stage) for stage in ("mae", "moce", "control")},
    }
    end = time.time() + _TIMEOUT_S
    while process.poll() is None and len(seen) < len(files) + 2 and time.time() < end:
        for name, has_come in files.items():
            if name not in seen and has_come():
                seen[name] = time.time()
        if "worker" not in seen:
            seen |= _created(process.pid)
        time.sleep(_LOOK_S)
    return seen


def _has_lines(folder: Path) -> Callable[[], bool]:
    path = folder / "metrics.jsonl"
    return lambda: path.exists() and path.stat().st_size > 0


def _created(parent: int) -> dict[str, float]:
    """Return when the processes of Ray's node and of the first worker began, if they have."""
    names = {"raylet": "/raylet", "worker": "RayTrainWorker"}
    found: dict[str, float] = {}
    try:
        for child in psutil.Process(parent).children(recursive=True):
            command = " ".join(child.cmdline()[:1])
            for name, said in names.items():
                if said in command:
                    found[name] = min(child.create_time(), found.get(name, np.inf))
    except psutil.Error:
        return {}
    return found


def _imports(copy: Path, suffix: str) -> dict[str, float]:
    """Measure processor seconds of Python alone, and of what a worker imports."""
    return {
        f"{name}{suffix}": min(_cpu_s(copy, code) for _ in range(3))
        for name, code in {
            "interpreter_s": "pass",
            "imports_s": "import moce_dist.train.loop, torch._dynamo",
        }.items()
    }


def _cpu_s(copy: Path, code: str) -> float:
    said = "import resource; used = resource.getrusage(resource.RUSAGE_SELF)"
    code = f"{code}; {said}; print(used.ru_utime + used.ru_stime)"
    variables = os.environ | {"PYTHONPATH": str(copy), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    return float(done.stdout)
