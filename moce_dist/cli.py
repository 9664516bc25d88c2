"""What all jobs share: common flags, one-line errors, exit status, quiet libraries.

Exit status: 0 done; 2 the request is wrong (`ConfigError`, raised before anything heavy is
imported, or by a rank); 3 training on Ray's workers failed in a way that no restart cures
(`FinalError`); 1 it failed while running; 130 interrupted; 143 stopped by SIGTERM.
An error is one line on stderr that names the field or file and the rule; set MOCE_DEBUG=1 for the
traceback.
"""

import argparse
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from moce_dist.run.directory import StoppedError
from moce_dist.run.environment import shorten_sockets
from moce_dist.run.files import READER, WRITER
from moce_dist.run.names import as_text, one_line, open_output, typed
from moce_dist.settings import ConfigError

_QUIET = (
    "ray",
    "DeepSpeed",
    "deepspeed",
    "timm",
    "matplotlib",
    "PIL",
    "fsspec",
    "torch.distributed",
    "faiss",
)


class FinalError(RuntimeError):
    """A failure on Ray's workers that a restart, also on other machines, would not cure."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, like those of any wrong request."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(message)


def job_parser(description: str, example: str) -> argparse.ArgumentParser:
    """Parser with the flags that every job takes: --config, --set, --run, --fresh, --dry-run."""
    parser = Parser(
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with what differs from the defaults"
    )
    add_overrides(parser)
    parser.add_argument(
        "--run", metavar="DIR", help="run directory; a relative one lies in run.root"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="set an existing run aside and start anew"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved plan and stop")
    return parser


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Let --set, which may be repeated, override a field; `overrides` lists them as A.B=VALUE."""
    parser.add_argument(
        "--set",
        metavar="A.B=VALUE",
        type=as_text,
        action="append",
        default=[],
        dest="overrides",
        help="override a field",
    )


def command_parser(name: str, description: str | None, example: str) -> argparse.ArgumentParser:
    """Parser of a command of `python -m moce_dist`."""
    return Parser(
        prog=f"python -m moce_dist {name}",
        description=(description or "").split("\n\n", maxsplit=1)[0],
        epilog=f"example:\n  python -m moce_dist {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def quiet_libraries() -> None:
    """Set up logging and environment: moce_dist logs from INFO, libraries only errors."""
    # otherwise DeepSpeed probes for an accelerator when imported, and warns on standard output
    accelerator = "cuda" if os.path.exists("/dev/nvidiactl") else "cpu"
    os.environ.setdefault("DS_ACCELERATOR", accelerator)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # after an interruption, a call to Ray must not start a second cluster
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    shorten_sockets()
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def _interrupt_at_sigterm() -> list[int]:
    """Let SIGTERM interrupt this process like SIGINT; return a list that then holds its number."""
    # no Event: a handler that interrupts itself would wait for its lock
    came: list[int] = []
    own = os.getpid()

    def end(*_: object) -> None:
        if os.getpid() == own:
            came.append(signal.SIGTERM)
            # Ray would replace an exception of another type by this one
            raise KeyboardInterrupt
        # a forked process, such as a loader, just ends
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    return came


def run_job(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Run a job's `main(argv)` and exit with the status that this module documents."""
    open_output()
    came = _interrupt_at_sigterm()
    try:
        main(sys.argv[1:])
        status = 0
    except ConfigError as error:
        status = _fail(error, 2)
    except FinalError as error:
        status = _fail(error, 3)
    except KeyboardInterrupt:
        why, status = "interrupted", 130
        if came:
            why, status = "stopped: SIGTERM", 128 + signal.SIGTERM
        sys.stderr.write(f"{why}; the same command continues from what was finished\n")
    except StoppedError as error:
        sys.stderr.write(f"stopped: {error}; the same command continues\n")
        status = 128 + signal.SIGTERM
    except Exception as error:  # noqa: BLE001 - the one place where a failure becomes an exit status
        status = _fail(error, 1)
    # all is said; a second signal need not interrupt the end
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout.flush()
    if any(thread.name.startswith((WRITER, READER)) for thread in threading.enumerate()):
        # do not wait for the disk or the network: a save in flight is lost, and the next start
        # removes its files
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _fail(error: BaseException, status: int) -> int:
    if os.environ.get("MOCE_DEBUG"):
        traceback.print_exc()
    said = (isinstance(error, ConfigError) and one_line(error)) or typed(error)
    sys.stderr.write(f"error: {said}\n")
    return status
