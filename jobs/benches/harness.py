"""Interleaved measurement: every variant runs once per round, so disturbances affect all alike.

    times = interleave({"dense": run_dense, "cluster": run_cluster}, rounds=8, warmup=2)
    Report("step", config).add_variants(times).add_ratio("cluster", "dense")

`interleave` measures in one process. When several ranks measure together, rank 0's clock counts,
and every timed function ends with a barrier. `Report.skipped` names what could not be measured, and
why; no value is ever made up.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benches.settings import BenchConfig
from moce_dist.cost.budget import read_terms
from moce_dist.parallel.groups import free_port
from moce_dist.run.environment import usable_cores
from moce_dist.run.files import write_atomic
from moce_dist.settings import flatten

_RANK_TIMEOUT_S = 600.0


@dataclass
class Report:
    """What a benchmark prints: one JSON object."""

    name: str
    config: BenchConfig
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    terms: dict[str, float] = field(default_factory=dict)
    """Measured fields of `hardware`, from which budgets for such machines are computed."""

    def add_variants(self, values: Mapping[str, Sequence[float]], unit: str = "s") -> "Report":
        """Record the values of variants, one per round, in `unit`."""
        for name, series in values.items():
            self.variants[name] = {
                "median": statistics.median(series),
                "min": min(series),
                "max": max(series),
                "unit": unit,
                "runs": len(series),
            }
        return self

    def add_ratio(self, over: str, under: str) -> "Report":
        """Record the ratio of two medians; skip it if a variant was not measured."""
        name = f"{over}/{under}"
        missing = [v for v in (over, under) if v not in self.variants]
        if missing:
            self.skipped[name] = f"{missing[0]} was not measured"
        else:
            self.ratios[name] = self.variants[over]["median"] / self.variants[under]["median"]
        return self

    def write_terms(self, path: Path) -> None:
        """Add the measured terms to a file, and keep those of other benchmarks in it.

        Raises:
            ConfigError: the file holds something other than terms.
        """
        known = read_terms(path) if path.exists() else {}
        write_atomic(path, json.dumps(known | self.terms, indent=1))

    def to_json(self) -> str:
        """Return one line of JSON, whose `config` holds what differs from the defaults."""
        given, defaults = (flatten(c.model_dump(mode="json")) for c in (self.config, BenchConfig()))
        document = {
            "bench": self.name,
            "machine": machine(),
            "config": {k: v for k, v in given.items() if v != defaults.get(k)},
            "variants": self.variants,
            "ratios": self.ratios,
            "figures": self.figures,
            "skipped": self.skipped,
        }
        return json.dumps(document)


def machine() -> dict[str, Any]:
    """Describe this machine: processor, cores, memory in GiB, GPU, versions."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_gib": round(memory, 1),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def interleave(
    variants: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Run every variant once per round; return the seconds of the counted rounds per variant.

    The order rotates by one each round, so that no variant always follows the same other one. A
    variant that returns a float has timed itself, and that float counts.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(warmup + rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin = time.perf_counter()
            result = variants[name]()
            elapsed = time.perf_counter() - begin
            if turn >= warmup:
                times[name].append(result if isinstance(result, float) else elapsed)
    return times


def child_environment() -> dict[str, str]:
    """Return the environment for a child process that runs a module of `benches`."""
    jobs = str(Path(__file__).parents[1])
    known = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": f"{jobs}{os.pathsep}{known}" if known else jobs}


def run_fresh(module: str, *arguments: object) -> dict[str, float]:
    """Run a module of the benchmarks in a new process, and return the figures that it prints.

    Raises:
        RuntimeError: the process failed; the message holds the last line of its stderr.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    process = subprocess.run(
        command, env=child_environment(), capture_output=True, text=True, check=False
    )
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit {process.returncode}"]
        raise RuntimeError(f"{module}: {lines[-1]}")
    result: dict[str, float] = json.loads(process.stdout)
    return result


def run_ranks(
    function: str,
    config: BenchConfig,
    *,
    prefixes: Sequence[Sequence[str]] | None = None,
    master: str = "127.0.0.1",
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Call `benches.MODULE:FUNCTION(config)` on `num_workers` processes; return rank 0's result.

    `function` is, for example, `"step:measure"`; the result is a JSON object. `prefixes[r]` is put
    before the command of rank r, for example to enter a network namespace.

    Raises:
        RuntimeError: a rank failed; the message holds the last line of the first one that did.
    """
    size = config.parallel.num_workers
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        processes, logs = [], []
        for rank in range(size):
            variables = child_environment() | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": master,
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": str(config.parallel.threads_per_worker),
                **(environment or {}),
            }
            command = [sys.executable, "-m", "benches.rank", function, str(out)]
            logs.append(Path(folder) / f"rank{rank}.log")
            with logs[-1].open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [*(prefixes[rank] if prefixes else ()), *command],
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=variables,
                        text=True,
                    )
                )
        try:
            _feed(processes, config)
            _wait(processes, logs)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        result: dict[str, Any] = json.loads(out.read_text())
    return result


def _feed(processes: Sequence["subprocess.Popen[str]"], config: BenchConfig) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(config.model_dump_json())
        process.stdin.close()


def _wait(processes: Sequence["subprocess.Popen[str]"], logs: Sequence[Path]) -> None:
    deadline = time.monotonic() + _RANK_TIMEOUT_S
    waiting = dict(enumerate(processes))
    while waiting:
        for rank, process in list(waiting.items()):
            if (status := process.poll()) is None:
                continue
            del waiting[rank]
            if status:
                lines = logs[rank].read_text(errors="replace").strip().splitlines()
                raise RuntimeError(
                    f"rank {rank} of the benchmark: {lines[-1] if lines else status}"
                )
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(waiting)} took longer than {_RANK_TIMEOUT_S:.0f} s")
        time.sleep(0.1)
