"""The wrapper of a job's command: outside of a Ray job exit statuses pass.

Inside of one: tests/end_to_end/test_submitted.py.
"""

import os
import subprocess
import sys

import pytest
from manifests import K8S

RUN = K8S / "run.py"


def run(*words, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | variables
    return subprocess.run(
        [sys.executable, RUN, *words], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize("status", [0, 1, 2, 130, 143])
def test_outside_of_a_ray_job_every_status_passes(tmp_path, status):
    script = tmp_path / "job.py"
    script.write_text(f"import sys; sys.exit({status})")
    assert run(script).returncode == status
