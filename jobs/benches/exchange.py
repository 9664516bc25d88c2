"""Time dense, MoCE and token-routed steps of two hosts that are joined by a slow link.

Two network namespaces joined by a veth pair act as two hosts with a link of a chosen speed. On GPUs
NCCL is told to use this link alone, though both ranks are on one machine. First, the token-routed
step's compute is timed on the unthrottled link. The link is then slowed, in two attempts, until the
step's all-to-alls take `bench.communication_over_compute` times its compute, as on fast GPUs with a
slow network. Then all variants are timed. Let a be the time of the all-to-alls and r that of the
gradients' all-reduce, both over the compute. If neither overlaps with it, a system that exchanges
nothing can be faster by (1 + a + r) / (1 + r).

This needs root and iproute2; without them, the report names what was not measured.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from benches.harness import Report, interleave, run_ranks
from benches.peaks import finish
from benches.settings import BenchConfig
from benches.step import BASELINES, KINDS, baseline_stepper, stepper, variant
from benches.synthetic import synthetic_state
from moce_dist.cost.sizes import element_size, num_visible
from moce_dist.model.device import choose_device
from moce_dist.parallel.token import token_bytes_exchanged
from moce_dist.settings import ConfigError
from moce_dist.train.setup import TrainState

_FIGURES = ("link_mbit", "token_communication_over_compute", "allreduce_over_compute")
_RATIOS = (("token", "cluster"), ("cluster", "dense"), *(("dense", name) for name in BASELINES))
_VARIANTS = (*KINDS, *BASELINES)
_NETWORK = "10.77.0"
_BY_LINK = {
    "GLOO_SOCKET_IFNAME": "eth0",
    "NCCL_SOCKET_IFNAME": "eth0",
    # the ways that NCCL has between two GPUs of one machine, and over InfiniBand
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_NET": "Socket",
}
"""Environment in which every byte between the ranks passes through the link."""


def run(config: BenchConfig) -> Report:
    """Measure on two namespaces, one rank each.

    Raises:
        ConfigError: `parallel.num_workers` is not 2.
    """
    if config.parallel.num_workers != 2:
        raise ConfigError(
            f"parallel.num_workers ({config.parallel.num_workers}): exchange is for 2 hosts"
        )
    report = Report("exchange", config)
    if reason := missing():
        report.skipped = dict.fromkeys((*_VARIANTS, *_FIGURES), reason)
        for over, under in _RATIOS:
            report.add_ratio(over, under)
        return report
    with two_hosts() as hosts:
        free = hosts.run("exchange:calibrate", config)
        wanted_s = config.bench.communication_over_compute * free["compute_s"]
        rate = free["sent_bytes"] * 8 / wanted_s
        hosts.limit(rate)
        # a slow link carries less than its rate: headers, windows, packets sent again
        rate *= hosts.run("exchange:communicate", config)["all_to_all_s"] / wanted_s
        hosts.limit(rate)
        result = hosts.run("exchange:measure", config)
    report.add_variants(result["times"])
    for over, under in _RATIOS:
        report.add_ratio(over, under)
    report.figures = {
        "link_mbit": rate / 1e6,
        "token_communication_over_compute": result["all_to_all_s"] / free["compute_s"],
        "allreduce_over_compute": result["all_reduce_s"] / free["compute_s"],
    }
    a, r = (report.figures[name] for name in _FIGURES[1:])
    report.figures["bound"] = (1 + a + r) / (1 + r)
    return report


def missing() -> str | None:
    """Say what the benchmark lacks on this machine; None when it can run."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"needs {absent[0]} (iproute2)" if absent else None


class Hosts:
    """Two network namespaces with a link between them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def limit(self, rate: float) -> None:
        """Let the link carry `rate` bits a second in each direction."""
        for name in self.names:
            shape = f"root tbf rate {int(rate)}bit burst 128kb latency 50ms"
            _call(f"ip netns exec {name} tc qdisc replace dev eth0 {shape}")

    def run(self, function: str, config: BenchConfig) -> dict[str, Any]:
        """Run a function of a benchmark with one rank on each host."""
        return run_ranks(
            function,
            config,
            prefixes=[["ip", "netns", "exec", name] for name in self.names],
            master=f"{_NETWORK}.1",
            environment=_BY_LINK,
        )


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make two namespaces and their link; remove them at the end."""
    names = [f"moce-{os.getpid()}-{number}" for number in (1, 2)]
    links = [f"mv{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            _call(f"ip netns add {name}")
        _call(f"ip link add {links[0]} type veth peer name {links[1]}")
        for number, (name, link) in enumerate(zip(names, links, strict=True), start=1):
            _call(f"ip link set {link} netns {name}")
            _call(f"ip -n {name} link set {link} name eth0")
            _call(f"ip -n {name} addr add {_NETWORK}.{number}/24 dev eth0")
            _call(f"ip -n {name} link set eth0 up")
            _call(f"ip -n {name} link set lo up")
        yield Hosts(names)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _call(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")


def calibrate(config: BenchConfig) -> dict[str, Any]:
    """Time the token-routed step's compute; count the bytes that its all-to-alls send per rank."""
    state = _state(config, "token")
    times = _timed({"token": stepper(state, _count(config))}, config)["token"]
    communication = _timed({"all": _all_to_alls(state)}, config)["all"]
    reduction = _timed({"all": _all_reduce(state)}, config)["all"]
    # the link is not slowed yet, but gloo takes time on any link
    compute = min(times) - min(communication) - min(reduction)
    return {"compute_s": compute, "sent_bytes": _sent_bytes(state)}


def communicate(config: BenchConfig) -> dict[str, Any]:
    """Time the all-to-alls of a token-routed step by themselves."""
    exchange = _all_to_alls(_state(config, "token"))
    exchange()
    return {"all_to_all_s": min(interleave({"all": exchange}, rounds=2, warmup=0)["all"])}


def measure(config: BenchConfig) -> dict[str, Any]:
    """Time all variants, and the collectives of the token-routed one by themselves."""
    states = {kind: _state(config, kind) for kind in KINDS}
    count = _count(config)
    steps: dict[str, Callable[[], None]] = {k: stepper(s, count) for k, s in states.items()}
    for baseline in BASELINES:
        steps[baseline], _ = baseline_stepper(states["dense"], count, baseline)
    times = _timed(steps, config)
    token = states["token"]
    alone = _timed({"all_to_all": _all_to_alls(token), "all_reduce": _all_reduce(token)}, config)
    return {
        "times": times,
        "all_to_all_s": min(alone["all_to_all"]),
        "all_reduce_s": min(alone["all_reduce"]),
    }


def _state(config: BenchConfig, kind: Any) -> TrainState:
    return synthetic_state(
        variant(config, kind, config.parallel.precision), choose_device(config.parallel)
    )


def _count(config: BenchConfig) -> int:
    return config.bench.rounds + config.bench.warmup_rounds


def _timed(variants: dict[str, Any], config: BenchConfig) -> dict[str, list[float]]:
    return interleave(variants, rounds=config.bench.rounds, warmup=config.bench.warmup_rounds)


def _sent_bytes(state: TrainState) -> int:
    config, ranks = state.job.config, state.topology.num_ranks
    tokens = state.plan.batch_size // ranks * num_visible(config)
    return token_bytes_exchanged(
        config, state.topology.ep_size, tokens=tokens, element_size=element_size(config)
    )


def _all_to_alls(state: TrainState) -> Any:
    # as many and as large as those of a token-routed step; half of every buffer stays local
    calls = 4 * len(state.job.config.moe_layers)
    size = 2 * _sent_bytes(state) // calls
    buffer = torch.zeros(size, dtype=torch.uint8, device=state.engine.device)
    out = torch.empty_like(buffer)

    def exchange() -> None:
        for _ in range(calls):
            dist.all_to_all_single(out, buffer, group=state.engine.expert_group)
        finish(buffer.device)

    return exchange


def _all_reduce(state: TrainState) -> Any:
    # gradients of shared parameters; those of an expert stay where it lives
    shared = sum(
        p.numel() for n, p in state.model.named_parameters() if "deepspeed_experts" not in n
    )
    gradients = torch.zeros(shared, device=state.engine.device)

    def reduce() -> None:
        dist.all_reduce(gradients)
        finish(gradients.device)

    return reduce
