"""The wrapper of a job's command: outside of a Ray job exit statuses pass.

Inside of one: tests/end_to_end/test_submitted.py.
"""

import os
import subprocess
import sys

import pytest
from in_process import load_script
from manifests import K8S, ROOT

RUN = K8S / "run.py"


def run(*words, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | variables
    return subprocess.run(
        [sys.executable, RUN, *words], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize("status", [0, 1, 2, 3, 130, 143])
def test_outside_of_a_ray_job_every_status_passes(tmp_path, status):
    script = tmp_path / "job.py"
    script.write_text(f"import sys; sys.exit({status})")
    assert run(script).returncode == status


RAISES = """
from moce_dist.cli import run_job
from {module} import {error}

def main(argv):
    raise {error}("loss is nan")

run_job(main)
"""


@pytest.mark.parametrize(
    ("module", "error", "is_for_good"),
    [
        ("moce_dist.settings", "ConfigError", True),
        ("moce_dist.cli", "FinalError", True),
        ("moce_dist.run.directory", "StoppedError", False),
        ("builtins", "RuntimeError", False),
    ],
)
def test_errors_that_no_restart_cures_have_the_statuses_that_end_a_job(
    tmp_path, module, error, is_for_good
):
    script = tmp_path / "job.py"
    script.write_text(RAISES.format(module=module, error=error))
    status = run(script, PYTHONPATH=str(ROOT)).returncode
    assert (status in load_script(RUN).FOR_GOOD) == is_for_good
