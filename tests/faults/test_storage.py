"""S3 that is gone for a while under a run that trains from it: no image is lost, nothing restarts.

The server is moto's in this process, so that it comes back with its objects.
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
    """A server that is gone for `seconds` once it has answered `after` requests of the run."""

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
    seconds, start, arguments, finished, tmp_path, monkeypatch, read_metrics
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
        data, run = tmp_path / "data", tmp_path / "run"
        data.mkdir()
        (data / "index.json").write_text(json.dumps(index))
        assert read_index(data).shards[0].path.startswith("s3://")
        # one sample after the other, so that the outage falls into the training
        alone = ("parallel.num_workers=1", "mae.epochs=8", "data.loader_processes=1")
        command = (*arguments(run, *alone, source=f"index:{data}"), "--stage", "mae")
        job = start("pretrain", *command)
        metrics = run / "mae" / "metrics.jsonl"
        job.wait_until(lambda: metrics.exists() and metrics.read_text(), "a step")
        outage.begin()
        result = job.finish().assert_done()
    finally:
        outage.stop()
    assert "resuming" not in result.err and not (run / "faults.jsonl").exists()
    mine, whole = read_metrics(run / "mae"), read_metrics(finished / "mae")
    assert len(mine) == 8 * len(whole) // 20
    assert mine[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-4)
