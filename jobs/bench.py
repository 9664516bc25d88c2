"""Measure a part of the system, interleaved with its baselines; print one JSON object.

python jobs/bench.py step
python jobs/bench.py placement --set bench.rounds=3
"""

import importlib
from collections.abc import Sequence
from pathlib import Path

import interpreter  # noqa: F401 - says which Python to take
from benches.settings import load_bench_config

from moce_dist.cli import job_parser, quiet_libraries, run_job

BENCHES = (
    "step", "exchange", "placement", "checkpoint", "decode", "stream", "reshard", "cluster",
    "balance", "start", "index", "routing",
)  # fmt: skip
CONFIGS = Path(__file__).parent.parent / "configs" / "bench"


def main(argv: Sequence[str]) -> None:
    """Parse the request and run one benchmark."""
    parser = job_parser(
        "Measure one part of the system against its baselines.", "python jobs/bench.py step"
    )
    parser.add_argument("name", metavar="NAME", choices=BENCHES, help=", ".join(BENCHES))
    parser.add_argument(
        "--terms", metavar="FILE", help="add what was measured to this file of hardware.terms"
    )
    arguments = parser.parse_args(argv)
    path = Path(arguments.config or CONFIGS / f"{arguments.name}.yaml")
    config = load_bench_config(path, arguments.overrides)
    if arguments.dry_run:
        print(f"bench      {arguments.name}, {config.bench.rounds} rounds, {path}")
        return
    quiet_libraries()
    bench = importlib.import_module(f"benches.{arguments.name}")
    report = bench.run(config)
    if arguments.terms is not None:
        report.write_terms(Path(arguments.terms))
    print(report.to_json())


if __name__ == "__main__":
    run_job(main)
