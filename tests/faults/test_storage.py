"""S3 that is gone for a while under a run that trains from it: no image is lost, nothing restarts.

What is learned equals that of the run with the same command and no outage, bit for bit. The server
is moto's in this process, so that it comes back with its objects.
"""

import json
import threading
import time

import fsspec
import pytest

from moce_dist.data.shards import read_index

motos = pytest.importorskip("moto.server", reason="NOT TESTED: moto is not installed")
pytest.importorskip("s3fs", reason="NOT TESTED: s3fs is not installed")

KEYS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}


class Outage:
    """A server that answers until `begin`, and again `seconds` after it."""

    def __init__(self, seconds):
        self._seconds = seconds
        self._server = motos.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        host, self._port = self._server.get_host_and_port()
        self.url = f"http://{host}:{self._port}"
        self._thread = None

    def begin(self):
        self._thread = threading.Thread(target=self._pass)
        self._thread.start()

    def _pass(self):
        self._server.stop()
        time.sleep(self._seconds)
        self._server = motos.ThreadedMotoServer("127.0.0.1", self._port, verbose=False)
        self._server.start()

    def stop(self):
        if self._thread is not None:
            self._thread.join()
        self._server.stop()


@pytest.mark.many
@pytest.mark.parametrize("seconds", [4, 60])
def test_images_behind_an_outage_are_read_after_it(
    seconds, start, run_job, arguments, finished, tmp_path, monkeypatch, learned, read_metrics
):
    outage = Outage(seconds)
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": outage.url}.items():
        monkeypatch.setenv(name, value)
    try:
        store = fsspec.filesystem("s3", skip_instance_cache=True)
        # the server's objects outlive it in this process
        bucket = f"shards-{seconds}"
        store.mkdir(bucket)
        index = json.loads((finished / "ingested" / "index.json").read_text())
        for shard in index["shards"]:
            store.put(str(finished / "ingested" / shard["path"]), f"{bucket}/{shard['path']}")
            shard["path"] = f"s3://{bucket}/{shard['path']}"
        data, run, whole = (tmp_path / name for name in ("data", "run", "whole"))
        data.mkdir()
        (data / "index.json").write_text(json.dumps(index))
        assert read_index(data).shards[0].path.startswith("s3://")
        # one sample after the other, so that the outage falls into the training
        alone = ("parallel.num_workers=1", "mae.epochs=8", "data.loader_processes=1")
        flags = {
            root: (*arguments(root, *alone, source=f"index:{data}"), "--stage", "mae")
            for root in (run, whole)
        }
        run_job("pretrain", *flags[whole]).assert_done()
        job = start("pretrain", *flags[run])
        metrics = run / "mae" / "metrics.jsonl"
        job.wait_until(lambda: metrics.exists() and metrics.read_text(), "a step")
        outage.begin()
        result = job.finish().assert_done()
    finally:
        outage.stop()
    assert "resuming" not in result.err and not (run / "faults.jsonl").exists()
    # the first step waits for the loader's start; a loader reads ahead, and so waits for longer
    waits = [metrics["data_wait_s"] for metrics in read_metrics(run / "mae")[1:]]
    assert max(waits) >= seconds - 2
    assert learned(run / "mae") == learned(whole / "mae")
