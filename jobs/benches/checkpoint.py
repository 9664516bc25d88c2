"""Time what saving costs a training: a save in the background, and one that all wait for.

    without    N steps
    with       save, N steps, wait for what is left of the save
    blocking   save, wait

save_stall is `with` minus `without`. So it contains the copy, the time that the writer takes from
the steps, and what is left of the save after them. save_blocking is the same save of the same state
with nothing beside it. N is `checkpoint.every_steps`, or more if steps are short: N steps last at
least four blocking saves, because saves are rarer than that in any training. There are two gloo
ranks, or one rank on a GPU. Where all cores train, no stall is below `save_cpu_s`, the processor
time of a rank's save (copies into the page cache, sha256), however long it is put off.

The model, its batch and its step are those of synthetic.py.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benches.harness import Report, interleave, run_ranks
from benches.settings import BenchConfig
from benches.synthetic import synthetic_batches, synthetic_state
from moce_dist.model.device import choose_device
from moce_dist.train.checkpoint import complete_checkpoints
from moce_dist.train.loop import settle, train_step
from moce_dist.train.saver import Saver

_STRETCH_OVER_SAVE = 4


def run(config: BenchConfig) -> Report:
    """Measure on `parallel.num_workers` processes, or on one if there is a GPU to use."""
    if config.parallel.use_gpu and torch.cuda.is_available():
        parallel = config.parallel.model_copy(update={"num_workers": 1})
        config = config.model_copy(update={"parallel": parallel})
    measured = run_ranks("checkpoint:measure", config)
    stalls = [w - wo for w, wo in zip(measured["with"], measured["without"], strict=True)]
    report = Report("checkpoint", config)
    report.add_variants({"save_blocking": measured["blocking"], "save_stall": stalls})
    report.figures |= {name: measured[name] for name in ("state_gib", "steps", "step_s")}
    report.figures["save_cpu_s"] = measured["save_cpu_s"]
    blocking = report.variants["save_blocking"]["median"]
    report.figures["save_cpu_over_blocking"] = measured["save_cpu_s"] / blocking
    return report.add_ratio("save_stall", "save_blocking")


def measure(config: BenchConfig) -> dict[str, Any]:
    """Time saves and steps on this rank; collective over all ranks."""
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared, 0)
        measured = _measure(_Training(config, Path(shared[0])), config)
        # rank 0 removes the folder, which others may not have read yet
        dist.barrier()
        return measured


def _measure(training: "_Training", config: BenchConfig) -> dict[str, Any]:
    # the first step creates the moments, and the first save the host buffers
    training.steps(1)
    training.blocking()
    save_s, step_s = (
        _seconds(action) for action in (training.blocking, partial(training.steps, 1))
    )
    needed = math.ceil(_STRETCH_OVER_SAVE * save_s / step_s)
    count = [max(config.checkpoint.every_steps, needed)]
    dist.broadcast_object_list(count, 0)
    variants: dict[str, Callable[[], None]] = {
        "without": partial(training.steps, count[0]),
        "with": partial(training.steps, count[0], is_saving=True),
        "blocking": training.blocking,
    }
    bench = config.bench
    times = interleave(variants, rounds=bench.rounds, warmup=bench.warmup_rounds)
    step_s = min(times["without"]) / count[0]
    figures = {"steps": count[0], "step_s": step_s, "state_gib": training.state_gib()}
    return {**times, **figures, "save_cpu_s": statistics.median(training.saves_cpu_s)}


def _seconds(action: Callable[[], None]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


class _Training:
    """A model that trains on one synthetic batch, and a saver; timed calls end with a barrier."""

    def __init__(self, config: BenchConfig, folder: Path) -> None:
        self._state = synthetic_state(config, choose_device(config.parallel))
        self._state.saver = Saver(folder, self._state.topology, keep=1)
        self._folder = folder
        (self._batch,) = synthetic_batches(self._state, 1)
        self.saves_cpu_s: list[float] = []

    def steps(self, count: int, *, is_saving: bool = False) -> None:
        """Take steps; with `is_saving`, begin a save before the first and end it after the last."""
        if is_saving:
            self._save()
        for number in range(count):
            outcome = train_step(self._state, self._batch)
            self._state.step += 1
            settle(self._state, outcome, at_once=number == count - 1)
        self._end()

    def blocking(self) -> None:
        """Save, and wait until the save has ended."""
        begin = time.process_time()
        self._save()
        self._end()
        self.saves_cpu_s.append(time.process_time() - begin)

    def state_gib(self) -> float:
        """Return the size of the checkpoint on disk, GiB."""
        newest, *_ = complete_checkpoints(self._folder)
        return sum(file.stat().st_size for file in newest.iterdir()) / 2**30

    def _save(self) -> None:
        state = self._state
        state.saver.save(state.engine, state.naming, {"step": state.step})

    def _end(self) -> None:
        self._state.saver.wait()
        if self._state.engine.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
