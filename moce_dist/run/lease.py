"""One writer per folder: `FOLDER/lock` names the process that may write there.

The lock is a small file with host, process and start time; its modification time is the heartbeat.
It needs no `flock`, only operations that are atomic on NFS too: exclusive creation of a file
(`lock.new`, which exists only while its creator looks at `lock`), and rename.

    lock.new is created --nobody holds lock--> renamed to lock: the creator is the owner
                        --its owner lives----> removed: the creator is refused

An owner is dead when its process is gone, which can be seen on the same boot and in the same
container. Where it cannot be seen, or when the process is stopped, the owner is dead after
`STALE_S` without a heartbeat. A process that finds the lock of another host waits for a heartbeat,
so it knows within seconds that the owner lives. Ages are measured by the file server's clock, so
clocks of hosts need not agree.

A process that was stopped for that long and runs again may have been replaced. So an owner checks
the lock before it writes and every few seconds. If it was replaced, it exits at once, as if killed.
"""

import json
import logging
import os
import shlex
import socket
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from moce_dist.run.environment import is_first_process
from moce_dist.run.names import as_text
from moce_dist.settings import ConfigError

LOCK = "lock"
TAKING = "lock.new"
EVERY_S = 5.0
"""Seconds between two heartbeats."""
STALE_S = 60.0
"""Seconds without a heartbeat after which a lock may be taken over."""
_LOOK_S = 1.0
_LEAVES_S = 300.0
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable of a submitted job's driver, set by Ray."""
_LEAVING = threading.Lock()
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Claim:
    """What a lock says about its owner."""

    token: str = ""
    host: str = "?"
    pid: int = 0
    started: str = ""
    """When the process started, ticks since boot, because process ids are reused."""
    place: str = ""
    """Boot and container in which the process id is valid; "" if unknown."""
    since: str = "?"
    command: str = ""

    @classmethod
    def of_this_process(cls) -> "Claim":
        """Make a unique claim for this process."""
        pid = os.getpid()
        since = time.strftime("%F %T UTC", time.gmtime())
        command, token = shlex.join(sys.argv), uuid.uuid4().hex
        return cls(token, socket.gethostname(), pid, _process(pid)[1], _place(), since, command)

    def __str__(self) -> str:
        """Name the owner."""
        command = textwrap.shorten(self.command, 100, placeholder=" ...")
        return f"process {self.pid} on {self.host} ({command}) since {self.since}"

    def fate(self, silence_s: float) -> Literal["alive", "dead", "unknown"]:
        """Tell whether the owner lives, `silence_s` seconds after its last heartbeat."""
        is_silent = silence_s > STALE_S
        state = "hidden"
        if self.place and self.place == _place():
            state, started = _process(self.pid)
            if state in ("gone", "Z", "X") or (state != "hidden" and started != self.started):
                return "dead"
        if state == "hidden":
            return "dead" if is_silent else "unknown"
        is_stopped = state in ("T", "t")
        return "dead" if is_stopped and is_silent else "alive"


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process(pid: int) -> tuple[str, str]:
    """Return a process's state (Linux's letter, `gone` or `hidden`) and start time in ticks."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return "gone", ""
        except PermissionError:
            pass
        return "hidden", ""


def _read(path: Path) -> tuple[Claim, float] | None:
    """Read a claim and its heartbeat (file server's clock); None when there is none."""
    try:
        # opening the file makes an NFS client ask the server
        with path.open("rb") as file:
            text, beat = file.read(), os.fstat(file.fileno()).st_mtime
        return Claim(**json.loads(text)), beat
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        # truncated, or another kind of file: only its age can be judged
        return Claim(), beat


class Lease:
    """The right of one process to write into a folder, renewed in the background."""

    def __init__(self, folder: Path, token: str = "", *, renews: bool = True) -> None:
        """Make a claim of this process; without `renews`, watch another's claim, `token`."""
        self.folder, self._lock = folder, folder / LOCK
        self.claim = Claim.of_this_process() if renews else Claim(token)
        self._renews, self._seen = renews, time.monotonic()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._beat, name="lease", daemon=True)

    @property
    def _is_mine(self) -> bool:
        # a forked process has a copy of this lease but does not own it
        return self._renews and self.claim.pid == os.getpid()

    def take(self) -> None:
        """Become the owner, and renew the lock from then on.

        A job that was submitted to Ray waits for some minutes until the owner has left: it may be
        the driver that this one replaces, which still saves.

        Raises:
            ConfigError: another process is the owner, and lives.
            OSError: the folder cannot be written to.
        """
        first: tuple[Claim, float] | None = None
        begin = time.monotonic()
        wait_until = begin + (_LEAVES_S if SUBMITTED in os.environ else 0)
        while (holder := self._try(first, begin)) is not None:
            is_beating = first is not None and holder != first
            is_alive = holder[0].fate(0.0) == "alive" or is_beating
            if is_alive and time.monotonic() >= wait_until:
                raise ConfigError(
                    f"{self.folder}: is in use by {holder[0]}; wait for its end, or end it"
                )
            if first is None and is_alive:
                log.info("%s: is in use by %s; waiting for its end", self.folder, holder[0])
            elif first is None:
                log.info("%s: is %s alive? waiting for a heartbeat", self.folder, holder[0])
            if first is None:
                first = holder
            time.sleep(_LOOK_S)
        self.watch()

    def _try(
        self, first: tuple[Claim, float] | None = None, begin: float = 0.0
    ) -> tuple[Claim, float] | None:
        """Take the lock if it is free and return None; else return its claim and heartbeat.

        `first` is what was seen at `begin`: an owner has been silent since then if it is the same,
        even where its clock, ahead of this one, made the heartbeat.
        """
        taking = self.folder / TAKING
        while True:
            with suppress(FileExistsError):
                _create(taking, json.dumps(asdict(self.claim)))
                now, holder = taking.stat().st_mtime, _read(self._lock)
                if holder is not None:
                    watched = time.monotonic() - begin if holder == first else 0.0
                    if holder[0].fate(max(now - holder[1], watched)) != "dead":
                        taking.unlink(missing_ok=True)
                        return holder
                    log.info("%s: is free, was left by %s", self.folder, holder[0])
                with suppress(FileNotFoundError):
                    taking.rename(self._lock)
                # a process that was delayed in here may have been taken for dead: read back
                if (found := _read(self._lock)) and found[0].token == self.claim.token:
                    self._seen = time.monotonic()
                    return None
            _remove_left(taking)

    def watch(self) -> None:
        """Check the lock, and renew an own one, in the background until `end`."""
        self._watcher.start()

    def _beat(self) -> None:
        while not self._ended.wait(EVERY_S):
            # a lock that cannot be read now may be later; until then `check` prevents writing
            with suppress(OSError, ConfigError):
                self.check(older_than_s=0.0)
                if self._renews and not self._ended.is_set():
                    os.utime(self._lock)

    def check(self, *, older_than_s: float = _LOOK_S) -> None:
        """Check that the lock still has this claim, unless just checked; if not, exit.

        Raises:
            OSError: the lock cannot be read.
        """
        if self._ended.is_set() or time.monotonic() - self._seen < older_than_s:
            return
        found = _read(self._lock)
        if found is None and self._is_mine and not self._ended.is_set():
            # the lock was removed: it is made anew, if its folder exists
            found = self._try() or (self.claim, 0.0)
        if found is not None and found[0].token != self.claim.token:
            # of several threads that notice it, only one writes the message
            _LEAVING.acquire()
            sys.stderr.write(
                f"error: {self.folder}: was taken over by {found[0]}, as this process had given no "
                f"sign of life for {STALE_S:g} s; it stops without writing\n"
            )
            sys.stderr.flush()
            os._exit(1)
        self._seen = time.monotonic()

    def end(self) -> None:
        """Release the folder."""
        self._ended.set()
        self._watcher.join()
        found = _read(self._lock)
        if found is not None and found[0].token == self.claim.token:
            self._lock.unlink(missing_ok=True)


def is_own(path: Path) -> bool:
    """Tell whether a file of a folder belongs to its lock; others that wait for it leave some."""
    return path.name in (LOCK, TAKING) or path.name.startswith(f".{TAKING}.")


def _create(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(descriptor, text.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_left(taking: Path) -> None:
    """Wait for the process that is looking at the lock; remove its file if it is dead."""
    found = _read(taking)
    if found is None:
        return
    probe = taking.with_name(f".{TAKING}.{uuid.uuid4().hex}.tmp")
    _create(probe, "")
    silence_s = probe.stat().st_mtime - found[1]
    probe.unlink()
    if found[0].fate(silence_s) == "dead":
        taking.unlink(missing_ok=True)
    time.sleep(0.05)


_LEASES: dict[Path, Lease] = {}


@contextmanager
def hold(*folders: Path) -> Iterator[None]:
    """Be the only process that writes into these folders, which are created if missing.

    Under torchrun the first process holds them for all. A folder that this process already holds
    is skipped. At the end the locks are removed, and so are new folders that stayed empty.

    Raises:
        ConfigError: another process writes into one; or it cannot be written to; or its path is
            not UTF-8, which some libraries require.
    """
    with ExitStack() as stack:
        for folder in map(Path.resolve, folders):
            if as_text(folder) != str(folder):
                raise ConfigError(
                    f"{as_text(folder)}: is no UTF-8; images may lie in folders of any name, but "
                    "what writes into one, TensorBoard and Arrow among others, takes UTF-8 alone"
                )
            if folder not in _LEASES and is_first_process():
                stack.enter_context(_held(folder))
        yield


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    lease, new = Lease(folder), [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lease.take()
    except FileExistsError:
        raise ConfigError(f"{folder}: is not a folder") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"{folder}: cannot be written: {reason}") from None
    _LEASES[folder] = lease
    try:
        yield
    finally:
        with suppress(OSError):
            _LEASES.pop(folder).end()
            # new folders that stayed empty; removing any other fails, and it stays
            for made in new:
                made.rmdir()


def held() -> list[tuple[Path, str]]:
    """Return the leases of this process, for `watch` in processes that work for it."""
    return [(folder, lease.claim.token) for folder, lease in _LEASES.items()]


def watch(leases: Iterable[tuple[Path, str]]) -> None:
    """Exit, like their owner, when one of these leases is lost."""
    for folder, token in leases:
        _LEASES[folder] = Lease(folder, token, renews=False)
        _LEASES[folder].watch()


def check() -> None:
    """Exit at once if this process has lost a lease; call it before writing something."""
    for lease in tuple(_LEASES.values()):
        lease.check()
