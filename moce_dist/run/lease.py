"""One writer a folder: `FOLDER/lock` names the process that may write there.

The lock is a small file: host, process, since when; its time of change is the heartbeat. It needs
no `flock`, only what NFS keeps too: a file that one process alone can create (`lock.new`, there
for the instant in which its maker looks at `lock`), and a rename.

    lock.new is created --nobody holds lock--> renamed to lock, which is now ours
                        --its owner lives----> removed; we are refused

An owner is dead when its process is gone (looked up where its number means something: same boot,
same container), or when it gave no heartbeat for `STALE_S`. Whoever meets the lock of another host
waits for a heartbeat, so it knows within seconds that the owner lives. Ages are those of the file
server's clock; clocks of hosts need not agree.

A process that was stopped for so long, and runs on, may have been replaced: it looks before it
writes and every few seconds, and leaves at once, as if it had been killed.
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
FILES = (LOCK, TAKING)
EVERY_S = 5.0
"""Seconds between two heartbeats."""
STALE_S = 60.0
"""A lock without a heartbeat for so long is nobody's."""
_LOOK_S = 1.0
_LEAVING = threading.Lock()
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Claim:
    """What a lock says of its owner."""

    token: str = ""
    host: str = "?"
    pid: int = 0
    started: str = ""
    """When the process started, ticks since boot: numbers of processes are used again."""
    place: str = ""
    """Boot and container, inside which the number means something; "" where nobody can tell."""
    since: str = "?"
    command: str = ""

    @classmethod
    def of_this_process(cls) -> "Claim":
        """Make a claim like no other."""
        pid = os.getpid()
        since = time.strftime("%F %T UTC", time.gmtime())
        command, token = shlex.join(sys.argv), uuid.uuid4().hex
        return cls(token, socket.gethostname(), pid, _process(pid)[1], _place(), since, command)

    def __str__(self) -> str:
        """Name the owner."""
        command = textwrap.shorten(self.command, 100, placeholder=" ...")
        return f"process {self.pid} on {self.host} ({command}) since {self.since}"

    def fate(self, silence_s: float) -> Literal["alive", "dead", "unknown"]:
        """Judge the owner, `silence_s` seconds after its last heartbeat."""
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
    """State of a process (Linux's letter, `gone` or `hidden`), and when it started, ticks."""
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
    """Read a claim and its heartbeat, server's clock; None when there is none."""
    try:
        # opened, so that a client of NFS asks the server
        with path.open() as file:
            text, beat = file.read(), os.fstat(file.fileno()).st_mtime
        return Claim(**json.loads(text)), beat
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        # cut off, or not ours: only its age tells
        return Claim(), beat


class Lease:
    """The right of one process to write into a folder, renewed in the background."""

    def __init__(self, folder: Path, token: str = "", *, renews: bool = True) -> None:
        """Stand for the claim of that token, which another process may have made and renew."""
        self.folder, self._lock = folder, folder / LOCK
        self.claim = Claim.of_this_process() if renews else Claim(token)
        self._renews, self._seen = renews, time.monotonic()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._beat, name="lease", daemon=True)

    @property
    def _is_mine(self) -> bool:
        # a forked process has a copy
        return self._renews and self.claim.pid == os.getpid()

    def take(self) -> None:
        """Become the owner, and stay it.

        Raises:
            ConfigError: somebody else is, and lives; or the folder cannot be written.
        """
        first: tuple[Claim, float] | None = None
        while (holder := self._try()) is not None:
            is_beating = first is not None and holder != first
            if holder[0].fate(0.0) == "alive" or is_beating:
                raise ConfigError(
                    f"{self.folder}: is in use by {holder[0]}; wait for its end, or end it"
                )
            if first is None:
                log.info("%s: is %s alive? waiting for a heartbeat", self.folder, holder[0])
                first = holder
            time.sleep(_LOOK_S)
        self.watch()

    def _try(self) -> tuple[Claim, float] | None:
        """Take the lock if it is nobody's, else tell whose it is, and its heartbeat."""
        taking = self.folder / TAKING
        while True:
            with suppress(FileExistsError):
                _create(taking, json.dumps(asdict(self.claim)))
                now, holder = taking.stat().st_mtime, _read(self._lock)
                if holder is not None and holder[0].fate(now - holder[1]) != "dead":
                    taking.unlink(missing_ok=True)
                    return holder
                if holder is not None:
                    log.info("%s: is free, was left by %s", self.folder, holder[0])
                with suppress(FileNotFoundError):
                    taking.rename(self._lock)
                # who was held up in here may have been taken for dead
                if (found := _read(self._lock)) and found[0].token == self.claim.token:
                    self._seen = time.monotonic()
                    return None
            _remove_left(taking)

    def watch(self) -> None:
        """Look after the lock in the background until `end`."""
        self._watcher.start()

    def _beat(self) -> None:
        while not self._ended.wait(EVERY_S):
            # what cannot be read now may be read later; `check` lets nothing be written meanwhile
            with suppress(OSError, ConfigError):
                self.check(older_than_s=0.0)
                if self._renews and not self._ended.is_set():
                    os.utime(self._lock)

    def check(self, *, older_than_s: float = _LOOK_S) -> None:
        """Look whether the lock is still ours, unless that was done just now; else leave.

        Raises:
            OSError: nobody can tell.
        """
        if self._ended.is_set() or time.monotonic() - self._seen < older_than_s:
            return
        found = _read(self._lock)
        if found is None and self._is_mine and not self._ended.is_set():
            # somebody has removed it: it is made anew, if its folder is there
            found = self._try() or (self.claim, 0.0)
        if found is not None and found[0].token != self.claim.token:
            # of several threads that see it one speaks
            _LEAVING.acquire()
            sys.stderr.write(
                f"error: {self.folder}: was taken over by {found[0]}, as this process had given no "
                f"sign of life for {STALE_S:g} s; it stops without writing\n"
            )
            sys.stderr.flush()
            os._exit(1)
        self._seen = time.monotonic()

    def end(self) -> None:
        """Give the folder back."""
        self._ended.set()
        self._watcher.join()
        found = _read(self._lock)
        if found is not None and found[0].token == self.claim.token:
            self._lock.unlink(missing_ok=True)


def _create(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(descriptor, text.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_left(taking: Path) -> None:
    """Wait for whoever looks at the lock; remove what a dead one left."""
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
    """Be the only process that writes into these folders, which are made; removed locks are left.

    Of processes that torchrun started the first one holds for all. A folder that this process holds
    already is no matter.

    Raises:
        ConfigError: somebody else writes into one; or it cannot be written, or not by all
            libraries, which want UTF-8.
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
            # where nothing came of it; else they are not empty, and stay
            for made in new:
                made.rmdir()


def held() -> list[tuple[Path, str]]:
    """Leases of this process, for `watch` in processes that work for it."""
    return [(folder, lease.claim.token) for folder, lease in _LEASES.items()]


def watch(leases: Iterable[tuple[Path, str]]) -> None:
    """Leave, like their owner, when one of these leases is lost."""
    for folder, token in leases:
        _LEASES[folder] = Lease(folder, token, renews=False)
        _LEASES[folder].watch()


def check() -> None:
    """Leave at once if this process has lost a lease; to be called before something is written."""
    for lease in tuple(_LEASES.values()):
        lease.check()
