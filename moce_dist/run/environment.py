"""Check the machine and its environment variables before a run; report a problem in one line.

RAY_ADDRESS may name a cluster that is gone, a batch system's TMPDIR may be too long for sockets,
and a host's own name may resolve to the loopback. Problems are corrected where possible, but a
user's own setting takes precedence. Others are refused with the name of the variable.
"""

import ipaddress
import multiprocessing.util
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moce_dist.run.names import as_path
from moce_dist.settings import ConfigError

RAY_ADDRESS = "RAY_ADDRESS"
_MAY_BE = (
    "it may be HOST:PORT of a cluster's head (often port 6379) or, on one of its nodes, auto; "
    "without it an embedded cluster is started"
)
_ANSWER_S = 10.0
_LOOK_S = 1.0
_SOCKET_BYTES = 107
_RAY_SOCKET = "/ray/session_2026-11-29_12-00-00_000000_4194304/sockets/plasma_store"
_MOST_BYTES = _SOCKET_BYTES - len(_RAY_SOCKET)
# reserved for documentation: connecting a UDP socket to it sends nothing and shows the own address
ELSEWHERE = "192.0.2.1"


def _refused(reason: str) -> ConfigError:
    """Make an error that says what is wrong with RAY_ADDRESS, and what it may be."""
    return ConfigError(f"{RAY_ADDRESS} = {os.environ.get(RAY_ADDRESS, '')}: {reason}; {_MAY_BE}")


def is_first_process() -> bool:
    """Tell whether this process acts for all: always, unless torchrun started several."""
    return os.environ.get("RANK", "0") == "0"


def usable_cores() -> int:
    """Count the cores that this process may use."""
    # macOS does not know a process's own cores
    knows = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if knows else os.cpu_count() or 1


@contextmanager
def joining_a_cluster() -> Iterator[None]:
    """Check RAY_ADDRESS, then let Ray join the cluster in the block; errors name the variable.

    Raises:
        ConfigError: no cluster answers there, or this machine is not a node of the cluster.
    """
    check_ray_address()
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise _refused(f"{error}") from None


def check_ray_address() -> None:
    """Check that a server answers at RAY_ADDRESS, if it names a host; Ray itself would wait long.

    Raises:
        ConfigError: it is not the address of a cluster, or nothing answers there.
    """
    address = os.environ.get(RAY_ADDRESS, "")
    if address in ("", "auto", "local"):
        return
    scheme, _, rest = address.rpartition("://")
    if scheme in ("http", "https"):
        raise _refused("is the address that `ray job submit` takes, not that of a cluster")
    if scheme:
        raise _refused("is of a kind that drivers of moce_dist do not use")
    host, _, port = rest.rpartition(":")
    if not host or not port.isdigit():
        raise _refused("is no HOST:PORT")
    end = time.monotonic() + _ANSWER_S
    while reason := _silence(host.strip("[]"), int(port), end - time.monotonic()):
        if time.monotonic() + _LOOK_S >= end:
            raise _refused(f"no cluster answers there ({reason})")
        time.sleep(_LOOK_S)


def _silence(host: str, port: int, within_s: float) -> str:
    """Return why no gRPC server answers; "" when one does."""
    try:
        socket.create_connection((host, port), timeout=max(1.0, within_s)).close()
    except (OSError, OverflowError) as error:
        return f"{error}"
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return ""
    import grpc

    with grpc.insecure_channel(f"{host if ':' not in host else f'[{host}]'}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=max(1.0, min(5.0, within_s)))
        except grpc.FutureTimeoutError:
            return "what listens there is not Ray"
    return ""


def ray_folder() -> str | None:
    """Return a folder for an embedded cluster, short enough for its sockets; None: Ray's default.

    Raises:
        ConfigError: RAY_TMPDIR is too long, or TMPDIR is too long and there is no other folder.
    """
    if given := os.environ.get("RAY_TMPDIR"):
        if not _is_short(given):
            raise ConfigError(
                f"RAY_TMPDIR = {given}: is too long for Ray's sockets, whose paths have at most "
                f"{_SOCKET_BYTES} bytes; name a folder of {_MOST_BYTES} bytes at most"
            )
        return given
    return None if _is_short(tempfile.gettempdir()) else _short_folder()


def shorten_sockets() -> None:
    """Choose a folder with a short path for the sockets that loader processes send batches over.

    Raises:
        ConfigError: TMPDIR is too long for sockets, and there is no other folder.
    """
    before = tempfile.tempdir
    if not _is_short(tempfile.gettempdir()):
        tempfile.tempdir = _short_folder()
        try:
            # multiprocessing remembers this folder, and its processes inherit it
            multiprocessing.util.get_temp_dir()
        finally:
            tempfile.tempdir = before


def _short_folder() -> str:
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):  # noqa: S108 - folders of our own in there
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise ConfigError(
        f"TMPDIR = {tempfile.gettempdir()}: is too long for sockets; set it, or RAY_TMPDIR, to a "
        f"folder of {_MOST_BYTES} bytes at most"
    )


def _is_short(folder: str) -> bool:
    return len(os.fsencode(folder)) <= _MOST_BYTES


def local_path(path: str | Path, named: str, other: str = "") -> Path:
    """Return a given path, called `named` in errors; `other` says what else can make it absolute.

    Text that stands for bytes is converted, see `names.as_path`.

    Raises:
        ConfigError: the path is relative inside a job that was submitted to Ray.
    """
    if not Path(path).is_absolute() and os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        raise ConfigError(
            f"{named} {path}: a submitted job needs an absolute path{other}; "
            "relative ones end up in the job's temporary copy on one node"
        )
    return as_path(path)


def check_writable(folder: Path, advice: str) -> None:
    """Check that a folder can be written to, or the nearest parent that exists.

    Raises:
        ConfigError: it cannot; the message ends with `advice`.
    """
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        is_fixed = os.statvfs(folder).f_flag & os.ST_RDONLY
        what = "lies in a read-only file system" if is_fixed else "is read-only for this user"
        raise ConfigError(f"{folder}: {what}; {advice}")


def check_url(url: str) -> None:
    """Check that the package that reads a URL is installed.

    Raises:
        ConfigError: it is not, naming what to install; or the kind of URL is unknown.
    """
    import fsspec

    scheme = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        known = "pip install -e '.[s3]'" if scheme in ("s3", "s3a") else f"{error}"
        raise ConfigError(
            f"{url}: {scheme}:// needs a package that is not there: {known}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{url}: {error}") from None


def bind_ranks(master: str) -> None:
    """Let gloo and NCCL use the interface through which this host reaches the first rank.

    By default gloo takes the address of the host's own name, which Debian and Ubuntu set to
    127.0.1.1. A GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME that the user has set is kept.
    """
    address = _own_address(master)
    if _is_loopback(address) and master != "localhost" and not master.startswith("127."):
        # this is the first rank's host, under its own name
        import psutil

        every = (found for each in psutil.net_if_addrs().values() for found in each)
        own = (found.address for found in every if found.family == socket.AF_INET)
        outer = (found for found in own if not _is_loopback(found))
        # without a default route, take any interface that is not the loopback
        address = _own_address(ELSEWHERE) or next(outer, address)
    name = interface_of(address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if not _is_loopback(address):
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def _own_address(other: str) -> str:
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))
        return str(probe.getsockname()[0])
    return ""


def _is_loopback(address: str) -> bool:
    return not address or ipaddress.ip_address(address).is_loopback


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has an address; None when none has."""
    import psutil

    return next(
        (
            name
            for name, addresses in psutil.net_if_addrs().items()
            if any(found.address == address for found in addresses)
        ),
        None,
    )


def loopback_of(name: str) -> str | None:
    """Return the address of a host's name if it is a loopback, as in Debian's /etc/hosts."""
    address = socket.gethostbyname(name)
    return address if _is_loopback(address) else None
