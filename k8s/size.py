"""Print an overlay for the ranks and groups of a configuration, on nodes of one size.

    python k8s/size.py --config configs/pretrain/vit_large_512.yaml --gpus 8

There are min(workers, groups) places of expert groups. Each place is one replica of the worker
group, and takes as many whole nodes as its ranks need. The files overlays/*/kustomization.yaml are
output of this script, except that of overlays/head.
"""

import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from moce_dist.cli import run_job
from moce_dist.config import load_config
from moce_dist.parallel.groups import Topology
from moce_dist.settings import ConfigError

_OVERLAY = """\
# python k8s/size.py {command}
# {ranks} ranks, {groups} expert groups: {places} places of {hosts} node(s), {slots} ranks on each.
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources:
  - ../../base
patches:
  - target: {{kind: RayCluster}}
    patch: |
"""
_WORKERS = "workerGroupSpecs/0"
_POD = f"{_WORKERS}/template/spec"
_TOLERATION = "{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}"


def main(argv: Sequence[str]) -> None:
    """Print the overlay.

    Raises:
        ConfigError: a place does not fill whole nodes.
    """
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="whose parallel section is placed")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=VALUE")
    parser.add_argument("--gpus", type=int, default=0, help="of a node; 0: a rank for every CPU")
    parser.add_argument(
        "--cpus",
        type=int,
        help="that a pod asks its node for (for each GPU data.loader_processes, at least 8)",
    )
    parser.add_argument("--memory", type=int, help="the same, GiB (64 for each GPU, 8 for a CPU)")
    parser.add_argument("--disk", type=int, help="of a pod's /tmp, GiB (8 for a rank, 16 at least)")
    args = parser.parse_args(argv)
    config = load_config(args.config, args.overrides)
    parallel = config.parallel
    topology = Topology(parallel.num_workers, parallel.num_groups)
    cpus = args.cpus or max(1, args.gpus * max(8, config.data.loader_processes))
    slots = args.gpus or cpus
    if topology.num_replicas % slots:
        given = f"--gpus {args.gpus}" if args.gpus else f"--cpus {cpus}"
        raise ConfigError(
            f"{given}: {topology.num_replicas} ranks of a place must fill whole nodes"
        )
    places, hosts = topology.ep_size, topology.num_replicas // slots
    memory = args.memory or (64 * args.gpus or 8 * cpus)
    disk = args.disk or max(16, 8 * slots)
    shm = max(1, memory // 8)
    head = _resources(16, 64, 20) if places * hosts > 8 else _resources(2, 8, 20)
    changes = {
        "headGroupSpec/template/spec/containers/0/resources": head,
        f"{_WORKERS}/replicas": places,
        f"{_WORKERS}/minReplicas": places,
        f"{_WORKERS}/maxReplicas": places,
        f"{_WORKERS}/numOfHosts": hosts,
        f"{_WORKERS}/rayStartParams/object-store-memory": f'"{shm * 2**30 // 4}"',
        f"{_POD}/containers/0/resources": _resources(cpus, memory, disk + 4, args.gpus),
        f"{_POD}/volumes/1/emptyDir/sizeLimit": f"{disk}Gi",
        f"{_POD}/volumes/2/emptyDir/sizeLimit": f"{shm}Gi",
    }
    if args.gpus:
        changes[f"{_POD}/tolerations"] = f"[{_TOLERATION}]"
    sys.stdout.write(
        _OVERLAY.format(
            command=shlex.join(argv),
            ranks=topology.num_ranks,
            groups=topology.num_groups,
            places=places,
            hosts=hosts,
            slots=slots,
        )
    )
    # `add` also replaces an existing value
    for path, value in changes.items():
        sys.stdout.write(f"      - {{op: add, path: /spec/{path}, value: {value}}}\n")


def _resources(cpus: int, memory: int, disk: int, gpus: int = 0) -> str:
    amounts = f'cpu: "{cpus}", memory: {memory}Gi, ephemeral-storage: {disk}Gi'
    if gpus:
        amounts += f', nvidia.com/gpu: "{gpus}"'
    return f"{{requests: {{{amounts}}}, limits: {{{amounts}}}}}"


if __name__ == "__main__":
    run_job(main)
