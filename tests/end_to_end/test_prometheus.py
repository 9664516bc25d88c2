"""Prometheus beside a run: every series of the Grafana dashboard has data.

The server is a real one (Debian's package `prometheus`), and so is the run.
"""

import json
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
from ray.cluster_utils import Cluster
from started import ROOT

from moce_dist.parallel.groups import free_port

DASHBOARD = ROOT / "k8s" / "setup" / "monitoring" / "dashboard.json"
READY = ("ingested", "mae", "features", "clusters", "shards")
TIMEOUT_S = 300

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs Prometheus (apt install prometheus)"
)


@pytest.fixture
def node(monkeypatch):
    """A Ray node that answers on a metrics port; (cluster, port)."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    port = free_port()
    head = {
        "num_cpus": 2,
        "include_dashboard": True,
        "dashboard_port": free_port(),
        "dashboard_agent_listen_port": free_port(),
        "metrics_export_port": port,
        "_system_config": {"metrics_report_interval_ms": 1000},
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster, port
    cluster.shutdown()


@pytest.fixture
def prometheus(node, tmp_path):
    """A Prometheus that scrapes the node every second; a function that asks it."""
    port, config = free_port(), tmp_path / "prometheus.yml"
    target = f"127.0.0.1:{node[1]}"
    config.write_text(
        "scrape_configs: [{job_name: ray, scrape_interval: 1s, scrape_timeout: 1s, "
        f"static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    command = ["prometheus", f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port}"]
    process = subprocess.Popen(
        [*command, f"--storage.tsdb.path={tmp_path / 'tsdb'}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def ask(expression):
        query = urllib.parse.urlencode({"query": expression})
        url = f"http://127.0.0.1:{port}/api/v1/query?{query}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            pytest.fail(f"{expression}: {error.read().decode()}")
        except OSError:
            # it has only begun to start
            return []

    yield ask
    process.terminate()
    process.wait()


@pytest.mark.long
def test_every_series_of_the_dashboard_has_data(node, prometheus, start, arguments, part_of):
    cluster, _ = node
    run = part_of(*READY)
    # one image at a time makes steps slow, so that there is time to be looked at
    command = (*arguments(run, "parallel.micro_batches=16"), "--stage", "moce")
    job = start("pretrain", *command, env={"RAY_ADDRESS": cluster.address})
    panels = json.loads(DASHBOARD.read_text())["panels"]
    shown = [target["expr"] for panel in panels for target in panel["targets"]]
    # what was there within the hour counts: a run may end before the last question
    asked = {
        expression: re.sub(
            r"(ray_moce_\w+){[^}]*}", rf'last_over_time(\1{{run="{run.name}"}}[1h])', expression
        )
        for expression in shown
    }
    missing, end = dict(asked), time.monotonic() + TIMEOUT_S
    while missing and time.monotonic() < end:
        missing = {e: query for e, query in missing.items() if not prometheus(query)}
        time.sleep(0.5)
    if job.process.poll() is None:
        job.process.send_signal(signal.SIGTERM)
    result = job.finish()
    assert not missing, (missing, result.err)
    experts = prometheus(f'last_over_time(ray_moce_images_per_expert{{run="{run.name}"}}[1h])')
    places = {(s["metric"]["layer"], s["metric"]["expert"]) for s in experts}
    assert places == {(str(layer), str(expert)) for layer in range(2) for expert in range(4)}
    assert sum(float(series["value"][1]) for series in experts) > 0
    assert prometheus(f'ray_moce_no_such_series{{run="{run.name}"}}') == []
