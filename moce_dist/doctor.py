"""The doctor: check whether this machine can run a request, before hours are spent on it.

The checks are independent: a missing component is a finding, never a crash.
"""

import importlib
import os
import platform
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from moce_dist.config import Config
from moce_dist.run.environment import loopback_of, usable_cores
from moce_dist.run.names import one_line

_GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")
_IN_PLACE_OF = {"faiss-gpu": "faiss-cpu"}


class Check(NamedTuple):
    """One finding: its level, what was checked, what was seen, and advice."""

    level: Literal["ok", "warn", "fail"]
    name: str
    seen: str
    advice: str = ""

    def line(self) -> str:
        """Write the finding as one line; advice follows on a second unless the level is ok."""
        advice = f"\n      {'':15}{self.advice}" if self.advice and self.level != "ok" else ""
        return f"{self.level:4}  {self.name:15}{self.seen}{advice}"


def packages(_: Config) -> Iterator[Check]:
    """Compare what is installed with what pyproject.toml asks for."""
    from packaging.requirements import Requirement

    wrong = []
    requirements = [Requirement(text) for text in metadata.requires("moce-dist") or []]
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in needed:
        version = _version(requirement.name)
        if version == "not installed" or version not in requirement.specifier:
            wrong.append(f"{requirement.name}{requirement.specifier} ({version})")
    seen = f"Python {platform.python_version()}, {len(needed) - len(wrong)} of {len(needed)} fit"
    level: Literal["ok", "fail"] = "fail" if wrong else "ok"
    yield Check(level, "packages", seen, f"install: {', '.join(wrong)}")


def _version(name: str) -> str:
    for installed in (name, _IN_PLACE_OF.get(name, name)):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(installed)
    return "not installed"


def frameworks(_: Config) -> Iterator[Check]:
    """Import the compiled libraries, which fail late and obscurely when builds do not match."""
    for name in ("torch", "torchvision", "timm", "faiss"):
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            advice = "reinstall torch and torchvision together, so that pip picks matching builds"
            yield Check("fail", name, one_line(error)[:200], advice)
        else:
            yield Check("ok", name, str(module.__version__))


def devices(config: Config) -> Iterator[Check]:
    """Count GPUs and compare them with the ranks, unless these run elsewhere."""
    if os.environ.get("RAY_ADDRESS"):
        seen = "those of the cluster at RAY_ADDRESS were not looked at"
        yield Check("ok", "GPUs", seen)
        return
    import torch

    workers = config.parallel.num_workers
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        names = {torch.cuda.get_device_name(i) for i in range(count)}
        level: Literal["ok", "warn"] = "ok" if count >= workers else "warn"
        advice = f"parallel.num_workers ({workers}) wants one GPU each: join a Ray cluster that has"
        yield Check(level, "GPUs", f"{count} x {', '.join(sorted(names))}", advice)
    elif shutil.which("nvidia-smi") and config.parallel.use_gpu is not False:
        advice = f"this torch was built for CUDA {torch.version.cuda}: is the driver new enough?"
        yield Check("fail", "GPUs", "nvidia-smi is there, but torch sees no GPU", advice)
    elif config.parallel.use_gpu is True:
        yield Check("fail", "GPUs", "none", "parallel.use_gpu is true; set auto or false")
    else:
        yield Check("ok", "GPUs", "none: workers compute on the CPU and talk over gloo")


def cores(config: Config) -> Iterator[Check]:
    """Compare cores with threads and loader processes of the ranks, unless these run elsewhere."""
    if os.environ.get("RAY_ADDRESS"):
        yield Check("ok", "cores", "those of the cluster at RAY_ADDRESS were not looked at")
        return
    count, parallel = usable_cores(), config.parallel
    wanted = parallel.num_workers * (parallel.threads_per_worker + config.data.loader_processes)
    level: Literal["ok", "warn"] = "ok" if count >= wanted else "warn"
    yield Check(level, "cores", f"{count}, ranks want {wanted}", "ranks will take turns on a core")


def memory(_: Config) -> Iterator[Check]:
    """Measure the memory that this process may use, a container's limit included."""
    import psutil

    machine = psutil.virtual_memory()
    limit, free = machine.total, machine.available
    if (most := _CGROUP / "memory.max").is_file() and (text := most.read_text().strip()).isdigit():
        limit = min(limit, int(text))
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        # as Kubernetes counts: files that were read and can be dropped are free
        dropped = next((int(x.split()[1]) for x in lines if x.startswith("inactive_file ")), 0)
        used = int((_CGROUP / "memory.current").read_text()) - dropped
        free = min(free, max(0, limit - used))
    level: Literal["ok", "warn", "fail"] = (
        "ok" if free >= 4 * _GIB else "warn" if free >= _GIB else "fail"
    )
    seen = f"{free / _GIB:.1f} GiB free of {limit / _GIB:.1f}"
    yield Check(level, "memory", seen, "the quickstart wants 4 GiB")


def disk(config: Config) -> Iterator[Check]:
    """Measure the free disk space under `run.root`."""
    folder = Path(config.run.root).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / _GIB
    level: Literal["ok", "warn", "fail"] = "ok" if free >= 20 else "warn" if free >= 2 else "fail"
    advice = "a run holds its tars twice, its features, checkpoint.keep + 1 checkpoints a stage "
    advice += "and one more during a save"
    yield Check(level, "disk", f"{free:.0f} GiB free for {config.run.root}", advice)
    if not os.access(folder, os.W_OK):
        yield Check("fail", "disk", f"{folder} cannot be written", "set run.root")


def shared_memory(_: Config) -> Iterator[Check]:
    """Measure /dev/shm, through which loaders, Ray's object store and NCCL pass data."""
    folder = Path("/dev") / "shm"
    if not folder.is_dir():
        yield Check(
            "warn", "shared memory", "is not there", "loaders fall back to files; set TMPDIR"
        )
        return
    size = shutil.disk_usage(folder).total / _GIB
    level: Literal["ok", "warn"] = "ok" if size >= 1 else "warn"
    advice = "containers give 64 MiB: mount a memory volume, or set data.loader_processes to 0"
    yield Check(level, "shared memory", f"{size:.1f} GiB", advice)


def _reach(address: str) -> bool:
    with (
        socket.create_server((address, 0)) as server,
        socket.create_connection(server.getsockname()[:2], timeout=5) as client,
    ):
        client.sendall(b"x")
        connection, _ = server.accept()
        with connection:
            return connection.recv(1) == b"x"


def network(_: Config) -> Iterator[Check]:
    """Bind a port and connect to it, on the loopback and under the host's own name."""
    for name, advice in (
        ("127.0.0.1", "ranks and Ray need free ports on the loopback: is there a firewall?"),
        (socket.gethostname(), "name this host in /etc/hosts, or set GLOO_SOCKET_IFNAME"),
    ):
        try:
            reached = _reach(socket.gethostbyname(name))
        except OSError as error:
            yield Check("fail" if name == "127.0.0.1" else "warn", "network", f"{error}", advice)
        else:
            yield Check("ok" if reached else "warn", "network", f"{name} answers", advice)
            if name != "127.0.0.1" and (address := loopback_of(name)):
                yield Check(
                    *("warn", "network", f"{name} stands for {address} in /etc/hosts"),
                    "one host is enough for that; among several, ranks take the interface by which "
                    "they reach each other, other programs may not",
                )


def compilers(config: Config) -> Iterator[Check]:
    """Look for the compiler that torch.compile needs; nothing else is built at run time."""
    is_there = shutil.which("c++") is not None
    level: Literal["ok", "warn"] = "ok" if is_there or not config.parallel.compile else "warn"
    seen = "c++" if is_there else "c++ not found"
    yield Check(level, "compilers", seen, "parallel.compile builds kernels when it starts")


def open_files(config: Config) -> Iterator[Check]:
    """Read the limit on open files: a rank has about four sockets for every other rank."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(1024, 512 + 4 * config.parallel.num_workers)
    level: Literal["ok", "warn"] = "ok" if soft >= wanted else "warn"
    yield Check(level, "open files", str(soft), "raise it: ulimit -n 65536")


CHECKS: tuple[Callable[[Config], Iterator[Check]], ...] = (
    packages,
    frameworks,
    devices,
    cores,
    memory,
    disk,
    shared_memory,
    network,
    compilers,
    open_files,
)


def topology_lines(config: Config) -> list[str]:
    """Draw the layout of ranks and expert groups, as in `parallel/groups.py`."""
    from moce_dist.parallel.groups import Topology

    workers, groups = config.parallel.num_workers, config.parallel.num_groups
    topology = Topology(workers, groups)
    places = range(topology.ep_size)
    ranks = [
        " ".join(map(str, topology.replica_ranks(place * topology.num_replicas)))
        for place in places
    ]
    hosted = [" ".join(f"g{g}" for g in topology.hosted_groups(place)) for place in places]
    width = max(map(len, ranks + hosted)) + 3
    exchange = topology.expert_parallel_ranks(0)
    per_group = config.moe.num_experts // groups
    held = f"a group holds {per_group} of the {config.moe.num_experts} experts of each of "
    layers = f"{held}{len(config.moe_layers)} layers" if config.moe_layers else "no experts"
    parallel, smaller = config.parallel, []
    legal = [
        ranks
        for ranks in parallel.legal_worker_counts(config.mae.batch_size)
        if ranks in parallel.legal_worker_counts(config.moce.batch_size)
    ]
    if parallel.fewest_workers < parallel.num_workers:
        for name, stage in (("mae", config.mae), ("moce", config.moce)):
            starts = ", ".join(
                f"{ranks} (micro-batches {parallel.micro_batches_on(ranks, stage.batch_size)})"
                for ranks in parallel.worker_counts(stage.batch_size)[1:]
            )
            found = starts or "no legal number of ranks"
            smaller.append(f"  {name} with nodes missing: {found}")
    return [
        f"{workers} rank(s), {groups} expert group(s); {layers}",
        "  rank   " + "".join(text.ljust(width) for text in ranks).rstrip(),
        "  group  " + "".join(text.ljust(width) for text in hosted).rstrip(),
        f"  rank 0 exchanges images with {exchange}; legal numbers of ranks: {legal}",
        *smaller,
    ]


def examine(check: Callable[[Config], Iterator[Check]], config: Config) -> Iterator[Check]:
    """Run one check; an ImportError or OSError becomes its finding."""
    try:
        yield from check(config)
    except (ImportError, OSError) as error:
        reason = one_line(error)[:200]
        yield Check("fail", check.__name__, reason, "install what pyproject.toml names")


def diagnose(config: Config) -> Iterator[Check]:
    """Run all checks, one after the other."""
    for check in CHECKS:
        yield from examine(check, config)
