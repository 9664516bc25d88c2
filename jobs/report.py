"""Write the report of a run as one HTML page, and print a summary.

The job reads what RUN holds and says what is missing. Neither the job nor the page needs a network.
With OTHER, another run, the job writes RUN/report-beside-OTHER.html, which compares the two.
"""

from collections.abc import Sequence
from pathlib import Path

import interpreter  # noqa: F401 - says which Python to take

from moce_dist.cli import job_parser, run_job
from moce_dist.config import Config, load_config
from moce_dist.run.directory import find_run
from moce_dist.run.environment import check_writable, local_path
from moce_dist.settings import ConfigError


def main(argv: Sequence[str]) -> None:
    """Check the request, then write the page and print the summary."""
    parser = job_parser(
        "Write RUN/report.html and print a summary.", "python jobs/report.py runs/quickstart"
    )
    parser.add_argument("where", nargs="?", metavar="RUN", help="run directory, as --run")
    parser.add_argument("other", nargs="?", metavar="OTHER", help="run directory to compare with")
    parser.add_argument("--out", metavar="FILE", help="page to write; default in RUN")
    args = parser.parse_args(argv)
    named = args.where or args.run
    if named is None:
        raise ConfigError("RUN: name a run directory")
    if args.fresh:
        raise ConfigError("--fresh: a report is always made anew")
    config = load_config(args.config, args.overrides)
    root = _run_root(named, config, "RUN")
    other = _run_root(args.other, config, "OTHER") if args.other else None
    name = f"report-beside-{other.name}.html" if other else "report.html"
    out = local_path(args.out, "--out").resolve() if args.out else root / name
    if args.dry_run:
        print(f"would write {out}")
        return
    check_writable(out.parent, "name another file with --out")
    _report(root, out, other)


def _run_root(named: str, config: Config, what: str) -> Path:
    root = find_run(named, config, what)
    if not (root / "config.yaml").is_file():
        raise ConfigError(f"{root}: is not a run directory (no config.yaml)")
    return root


def _report(root: Path, path: Path, other: Path | None) -> None:
    from moce_dist.report.page import write_report
    from moce_dist.report.summary import summary_lines

    write_report(root, path, other)
    print("\n".join(summary_lines(root)))
    print(f"open {path} in a browser")


if __name__ == "__main__":
    run_job(main)
