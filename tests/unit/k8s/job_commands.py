"""The commands of the jobs, and the configurations that they run with."""

import itertools
import re
import shlex
import tempfile
from pathlib import Path

import yaml
from manifests import JOBS, K8S, ROOT

from moce_dist.config import load_config, to_yaml
from moce_dist.transfer.request import open_request_run

TRAINING = [job for job in JOBS if job.startswith(("pretrain", "quickstart"))]


def words_of(document):
    """Words of a job's entrypoint, with the image's paths as those of the project."""
    words = shlex.split(document["spec"]["entrypoint"])
    return [re.sub(r"^/app/", f"{ROOT}/", word) for word in words]


def run_config(name):
    """Return the configuration that a run of that name was made with, by the job that makes it."""
    for job in TRAINING:
        entry = yaml.safe_load((K8S / "jobs" / job / "kustomization.yaml").read_text())
        words = shlex.split(re.search(r"python /app/[^\"]+", entry["patches"][0]["patch"])[0])
        if words[words.index("--run") + 1] == name:
            return job_config(words)
    raise AssertionError(f"no job makes {name}")


def job_config(words):
    """Return the configuration that a job's command runs with."""
    words = [re.sub(r"^/app/", f"{ROOT}/", word) for word in words]
    sets = [value for flag, value in itertools.pairwise(words) if flag == "--set"]
    config = words[words.index("--config") + 1] if "--config" in words else None
    if f"{ROOT}/jobs/pretrain.py" in words:
        return load_config(config, sets)
    # the other jobs lay recipe and overrides over the configuration of their run
    with tempfile.TemporaryDirectory() as folder:
        made_with = run_config(words[words.index("--run") + 1])
        Path(folder, "config.yaml").write_text(to_yaml(made_with))
        return open_request_run(Path(folder), config, sets)[1]
