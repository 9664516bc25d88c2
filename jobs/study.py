"""Compare arms over seeds and tasks: make or resume every run, then write a table and a page.

python jobs/study.py --config configs/studies/small.yaml --data /data/study --out small --jobs 2
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import interpreter  # noqa: F401 - says which Python to take

from moce_dist.cli import job_parser, quiet_libraries, run_job
from moce_dist.run.directory import set_aside
from moce_dist.run.environment import local_path
from moce_dist.run.files import write_atomic
from moce_dist.run.lease import hold
from moce_dist.run.names import and_more
from moce_dist.settings import ConfigError, dump_yaml
from moce_dist.study.forecast import forecast
from moce_dist.study.plan import Planner, wanted_sources
from moce_dist.study.request import Split, StudyConfig, read_study
from moce_dist.study.sources import LISTED, count_sources, list_tasks, make_sources


def parse(argv: Sequence[str]) -> Any:
    """Parse the command line."""
    parser = job_parser(
        "Compare arms over seeds and tasks; --set overrides fields of the study's file.",
        "python jobs/study.py --config configs/studies/tiny.yaml --out runs/tiny",
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the study and of all its runs")
    parser.add_argument("--data", metavar="DIR", help="folder of the data, instead of `data`")
    parser.add_argument(
        "--jobs", metavar="N", type=int, default=1, help="pieces side by side, without Ray"
    )
    parser.add_argument(
        "--final", action="store_true", help="evaluate on test images; default: validation"
    )
    return parser.parse_args(argv)


def carry_out(
    study: StudyConfig, out: Path, split: Split, jobs: int, listed: dict[str, int]
) -> None:
    """Make every run that is missing, evaluate it, write `study.json` and `study.html`.

    `listed` is noted for the next start, see `list_tasks`.

    Raises:
        ConfigError: the data is wrong.
        RuntimeError: naming the pieces that failed; the others are done and reported.
        StoppedError: SIGTERM came; what was running has saved its state.
    """
    quiet_libraries()
    from moce_dist.study.page import render
    from moce_dist.study.results import collect
    from moce_dist.study.runner import Runner

    write_atomic(out / "study.yaml", dump_yaml(study.model_dump(mode="json")))
    write_atomic(out / LISTED, json.dumps(listed, indent=1))
    sources = make_sources(wanted_sources(study), out)
    plan = Planner(study, sources, out, split).plan()

    def report() -> None:
        found = collect(runner, split)
        write_atomic(out / "study.json", json.dumps(found, indent=1))
        write_atomic(out / "study.html", render(found))

    runner = Runner(plan, out, report)
    runner.run(jobs)
    report()
    if runner.failed:
        named = "; ".join(f"{piece} ({why})" for piece, why in runner.failed.items())
        raise RuntimeError(f"{len(runner.failed)} of {len(plan.pieces)} pieces failed: {named}")


def main(argv: Sequence[str]) -> None:
    """Check the request, then carry the study out."""
    args = parse(argv)
    if not args.config or not args.out:
        raise ConfigError(f"{'--out' if args.config else '--config'}: is missing")
    if args.run:
        raise ConfigError("--run: a study has many runs; name its folder with --out")
    if "RANK" in os.environ:
        raise ConfigError("jobs/study.py: not under torchrun; it starts its own processes")
    if args.jobs < 1:
        raise ConfigError(f"--jobs {args.jobs}: must be at least 1")
    study, out = (
        read_study(Path(args.config), args.overrides, args.data),
        local_path(args.out, "--out").resolve(),
    )
    split: Split = "test" if args.final else "val"
    listed = list_tasks(study, split, out)
    if args.dry_run:
        sources = count_sources(wanted_sources(study), out, study.num_images)
        lines = forecast(Planner(study, sources, out, split).plan())
        print("\n".join([*lines, *(f"not here   {line}" for line in listed.missing)]))
        return
    if lacking := listed.missing:
        raise ConfigError(f"{lacking[0]}{and_more(lacking)}")
    with hold(out):
        if args.fresh:
            set_aside(out)
        carry_out(study, out, split, args.jobs, listed.times)
    print(f"done: {out / 'study.html'}")


if __name__ == "__main__":
    run_job(main)
