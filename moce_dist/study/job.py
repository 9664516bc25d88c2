"""A study from its data to its page; only one study at a time runs in a folder."""

import json
import logging
from pathlib import Path

from moce_dist.run.files import write_atomic
from moce_dist.run.lease import hold
from moce_dist.settings import dump_yaml
from moce_dist.study.page import render
from moce_dist.study.plan import Planner, wanted_sources
from moce_dist.study.request import Split, StudyConfig
from moce_dist.study.results import collect
from moce_dist.study.runner import Runner
from moce_dist.study.sources import make_sources

log = logging.getLogger(__name__)


def carry_out(study: StudyConfig, out: Path, split: Split, jobs: int) -> None:
    """Make every run that is missing, evaluate it, write `study.json` and `study.html`.

    Raises:
        ConfigError: the data is wrong, or `out` is in use.
        RuntimeError: naming the pieces that failed; the others are done and reported.
        StoppedError: SIGTERM came; what was running has saved its state.
    """
    with hold(out):
        write_atomic(out / "study.yaml", dump_yaml(study.model_dump(mode="json")))
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
