"""Run a job's script, and end the RayJob for good if another try would fail as well.

    python /app/k8s/run.py /app/jobs/pretrain.py --config ...

KubeRay retries a failed Ray job on a new cluster, whatever its exit status, and treats a stopped
job as complete. A wrong request (exit status 2, or no such script) would fail on the next cluster
too, and so would training that failed for a reason in itself or in its storage (3). So this wrapper
stops its Ray job. The status is then STOPPED; the last line of the log says so, and the line above
it gives the reason. Every other failure keeps its exit status and is retried.
"""

import json
import os
import signal
import subprocess
import sys

FOR_GOOD = {2: "the request is wrong", 3: "another try would fail in the same way"}
"""Exit statuses that end a job for good (`moce_dist/cli.py`), and why."""
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray tells a job its own name."""
_DASHBOARD = "http://127.0.0.1:8265"


def main(argv: list[str]) -> int:
    """Run a script and return its exit status; in a Ray job do not return if that is for good."""
    status = subprocess.call([sys.executable, *argv])
    if status in FOR_GOOD and _JOB in os.environ:
        end_for_good(FOR_GOOD[status])
    return status


def end_for_good(reason: str) -> None:
    """Stop the Ray job that this process belongs to, and wait to be stopped."""
    from ray.job_submission import JobSubmissionClient

    job = json.loads(os.environ[_JOB])["metadata"]["job_submission_id"]
    sys.stderr.write(f"{reason}, so the job is stopped and not tried again\n")
    sys.stderr.flush()
    JobSubmissionClient(os.environ.get("RAY_API_SERVER_ADDRESS", _DASHBOARD)).stop_job(job)
    signal.pause()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
