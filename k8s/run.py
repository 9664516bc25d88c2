"""Run a job's script, and let a wrong request end the RayJob for good.

    python /app/k8s/run.py /app/jobs/pretrain.py --config ...

KubeRay tries a failed Ray job again on a new cluster, whatever its exit status, and takes a stopped
one for complete. A request that is wrong (exit status 2, or no such script) is as wrong on the next
cluster, so its Ray job is stopped here: status STOPPED, the reason on the last line of its log.
Every other failure keeps its exit status and is tried again.
"""

import json
import os
import signal
import subprocess
import sys

WRONG_REQUEST = 2
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray tells a job its own name."""
_DASHBOARD = "http://127.0.0.1:8265"


def main(argv: list[str]) -> int:
    """Run a script and return its exit status; in a Ray job a wrong request does not return."""
    status = subprocess.call([sys.executable, *argv])
    if status == WRONG_REQUEST and _JOB in os.environ:
        end_for_good()
    return status


def end_for_good() -> None:
    """Stop the Ray job that this process belongs to, and wait to be stopped."""
    from ray.job_submission import JobSubmissionClient

    job = json.loads(os.environ[_JOB])["metadata"]["job_submission_id"]
    sys.stderr.write("the request is wrong, so the job is stopped and not tried again\n")
    sys.stderr.flush()
    JobSubmissionClient(os.environ.get("RAY_API_SERVER_ADDRESS", _DASHBOARD)).stop_job(job)
    signal.pause()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
