"""Prove and measure the training step on one bare machine, in at most ten minutes.

    python tests/gpu/prove.py [--out proof.json] [--terms terms.json] [--wheels FOLDER]
                              [--only step,grouped] [--minutes 10]

Needs torch, timm and torchvision. What else a section needs (no Ray) may lie as wheels in FOLDER
(`pip wheel --no-deps ...`):

    ceilings, grouped, collectives   nothing else
    step, repeatable, loop           deepspeed einops hjson msgpack ninja psutil py-cpuinfo pydantic
                                     pydantic-core annotated-types typing-inspection scipy tenacity
                                     numba llvmlite
    decode                           pydantic (with its three) simplejpeg nvidia-nvimgcodec-cu13
                                     nvidia-nvjpeg
    clustering                       pydantic (with its three) for the parts that are torch's; for
                                     the whole also faiss-gpu numba llvmlite pyarrow scikit-learn
                                     scipy joblib narwhals threadpoolctl

Every section is a process with a limit on its time, at which it is killed; --minutes scales all
limits. Each finding is printed as one JSON line as soon as it is there, and is in the file at once,
so a kill loses nothing. With --terms, a file for `hardware.terms` of budgets (`--dry-run`) gets
what was measured on a GPU.

The exit status is 1 if a section failed, or if one of NEEDED was asked for and could not run.
Without a GPU everything runs on the CPU at a tiny size, so that the script is known to work.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
MINUTES = 10
INSTALL_S = 60
# the module of each section, and its limit in seconds of ten minutes; the rest is for the wheels
SECTIONS = {
    "ceilings": ("prove_parts", 30),
    "grouped": ("prove_parts", 30),
    "collectives": ("prove_parts", 30),
    "step": ("prove_training", 210),
    "repeatable": ("prove_training", 70),
    "loop": ("prove_training", 50),
    "decode": ("prove_parts", 30),
    "clustering": ("prove_parts", 80),
}
NEEDED = {"step", "grouped", "repeatable"}


def main():
    """Run the sections in order, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("proof.json"))
    parser.add_argument("--terms", type=Path)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--packages", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.section is not None:
        run_section(arguments.section, arguments.packages)
    asked = arguments.only.split(",")
    if not SECTIONS.keys() >= set(asked):
        parser.error(f"--only takes some of {','.join(SECTIONS)}")
    # so that a section ends with this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begin, proof = time.monotonic(), Proof(arguments.out, arguments.terms)
    with tempfile.TemporaryDirectory(prefix="prove-") as packages:
        install(arguments.wheels, packages, proof)
        for name in SECTIONS:
            if name in asked:
                left_s = 60 * arguments.minutes - (time.monotonic() - begin)
                limit_s = SECTIONS[name][1] * arguments.minutes / MINUTES
                supervise(name, min(limit_s, left_s), packages, proof)
    return proof.status()


def install(wheels, packages, proof):
    """Install the wheels of a folder, if one was given, into the folder `packages`."""
    found = [] if wheels is None else [*map(str, wheels.glob("*.whl"))]
    if not found:
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--target", packages, *found]
    try:
        subprocess.run(command, check=True, timeout=INSTALL_S, stderr=subprocess.PIPE, text=True)
    except subprocess.SubprocessError as error:
        # sections that need none of them can run all the same
        proof.note("wheels", "error", [str(error), str(error.stderr or "")[-500:]])


class Proof:
    """What was found; every finding is printed and written at once."""

    def __init__(self, out, terms):
        self._out, self._terms = out, terms
        self._lock = threading.Lock()
        self._document = {"machine": {}, "terms": {}, "sections": {}}

    def note(self, section, name, value):
        """Note a finding of a section; `machine` and `terms` belong to all of them."""
        with self._lock:
            if name in ("machine", "terms"):
                self._document[name].update(value)
            else:
                self._document["sections"].setdefault(section, {})[name] = value
                print(json.dumps({section: {name: value}}), flush=True)
            write(self._out, self._document)
            if self._terms is not None and name == "terms":
                known = json.loads(self._terms.read_text()) if self._terms.exists() else {}
                write(self._terms, known | value)

    def status(self):
        """Return the exit status."""
        sections = self._document["sections"]
        failed = {name for name, found in sections.items() if "error" in found}
        skipped = {name for name, found in sections.items() if "skipped" in found}
        return 1 if failed or skipped & NEEDED else 0


def write(path, document):
    """Write JSON whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(document, indent=1))
    temporary.replace(path)


def supervise(name, limit_s, packages, proof):
    """Run a section in a process of its own, and kill it after `limit_s` seconds."""
    begin = time.monotonic()
    if limit_s < 1:
        proof.note(name, "skipped", "no time left")
        return
    command = [sys.executable, __file__, "--section", name, "--packages", packages]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def listen():
        # the last line of a killed process may be cut off
        with contextlib.suppress(ValueError):
            for line in process.stdout:
                proof.note(name, *json.loads(line))

    listener, status = threading.Thread(target=listen, daemon=True), None
    listener.start()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(limit_s)
    finally:
        # with all that it has started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        listener.join(5)
    if status is None:
        proof.note(name, "error", f"killed after {limit_s:.0f} s")
    elif status:
        proof.note(name, "error", f"exit status {status}")
    proof.note(name, "seconds", round(time.monotonic() - begin, 1))


def run_section(name, packages):
    """Run a section in this process, write its findings to standard output, and exit."""
    findings = os.fdopen(os.dup(1), "w")
    # what libraries print goes to standard error
    os.dup2(2, 1)

    def say(key, value):
        print(json.dumps([key, value]), file=findings, flush=True)

    sys.path[:0] = [str(ROOT), str(ROOT / "jobs")]
    sys.path.append(packages)
    # read once, at the first product on the device; `repeatable` needs it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    # DeepSpeed says what it finds, unless it is told
    os.environ.setdefault("DS_ACCELERATOR", kind)
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    named = torch.cuda.get_device_name(device) if kind == "cuda" else "cpu"
    say("machine", {"torch": torch.__version__, "device": named})
    try:
        module = importlib.import_module(SECTIONS[name][0])
        for key, value in getattr(module, name)(device):
            say(key, value)
    except ImportError as error:
        say("skipped", str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
        say("error", [repr(error), *traceback.format_exc().strip().splitlines()[-3:]])
    # a thread or library that does not end must not cost the rest of the section's time
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
