"""Commands run inside the process of a test: exit status and output without a new interpreter.

For requests that are refused, planned or explained; what trains is started as a user starts it.
"""

import contextlib
import importlib.util
import io
import logging
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]


def load_script(path):
    """Import a script by its path."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_here(command, *arguments, folder=ROOT):
    """Run `jobs/COMMAND.py`, or `python -m moce_dist`, in `folder`; return what it said."""
    words = [str(ROOT / "jobs" / f"{command}.py"), *map(str, arguments)]
    out, err, root = io.StringIO(), io.StringIO(), logging.getLogger()
    argv, environment, handlers, level = sys.argv, dict(os.environ), root.handlers[:], root.level
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(folder),
        warnings.catch_warnings(),
    ):
        sys.argv, status = words, 0
        os.environ.pop("RAY_ADDRESS", None)
        try:
            if command == "moce_dist":
                runpy.run_module(command, run_name="__main__")
            else:
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        finally:
            # logging and libraries are set up anew for people
            sys.argv = argv
            os.environ.clear()
            os.environ.update(environment)
            root.handlers[:] = handlers
            root.setLevel(level)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())
