"""The files of the example Secret lead to a bucket, with nothing else in the environment."""

import fsspec
import manifests
import pytest
import yaml
from moto.server import ThreadedMotoServer


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def test_mounted_files_name_endpoint_and_keys(endpoint, rays, tmp_path, monkeypatch):
    example = manifests.K8S / "setup" / "s3" / "secret.example.yaml"
    written = yaml.safe_load(example.read_text())["stringData"]
    for name, text in written.items():
        (tmp_path / name).write_text(text.replace("https://minio.example.org:9000", endpoint))
    (container,) = dict(manifests.templates(rays["jobs/pretrain-s3"]))["experts"]["spec"][
        "containers"
    ]
    for name, value in manifests.environment(container).items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value.replace("/etc/moce/s3", str(tmp_path)))
    bucket = fsspec.filesystem("s3", skip_instance_cache=True)
    bucket.mkdir("images")
    bucket.pipe("images/train-000.tar", b"tar")
    assert bucket.cat("images/train-000.tar") == b"tar"
