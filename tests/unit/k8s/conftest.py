"""Everything is rendered once a session, whatever the number of test processes."""

import json

import filelock
import manifests
import pytest
import schemas


def once_a_session(tmp_path_factory, worker_id, name, make):
    """Make something in the first test process that wants it; the others read it."""
    root = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        root = root.parent
    path = root / f"{name}.json"
    with filelock.FileLock(f"{path}.lock"):
        if not path.exists():
            path.write_text(json.dumps(make()))
        return json.loads(path.read_text())


@pytest.fixture(scope="session")
def worker_id(request):
    """Name of the test process, as pytest-xdist gives it; `master` without it."""
    return getattr(request.config, "workerinput", {}).get("workerid", "master")


@pytest.fixture(scope="session")
def rendered(tmp_path_factory, worker_id):
    """Every setup, overlay and job with every set of components: {name: documents}."""
    return once_a_session(
        tmp_path_factory,
        worker_id,
        "rendered",
        lambda: manifests.render_all(tmp_path_factory.mktemp("rendered")),
    )


@pytest.fixture(scope="session")
def rays(rendered):
    """The RayCluster or RayJob of every overlay and job: {name: document}."""
    found = {}
    for name, documents in rendered.items():
        if name.startswith(("overlays", "jobs")):
            (found[name],) = documents
    return found


@pytest.fixture(scope="session")
def files(rendered):
    """The pod that files are copied through, with a volume of images and without: {name: pod}."""
    found = {}
    for name in ("files", "files+s3"):
        (found[name],) = rendered[name]
    return found


@pytest.fixture(scope="session")
def definitions():
    """Custom resource definitions by (apiVersion, kind)."""
    return schemas.read_definitions()
