"""Whatever is rendered is what an API server would take, and a mistake is not."""

import copy
import json
import re

import kubernetes_validate
import pytest
from manifests import is_custom, templates

VERSIONS = ("1.33", "1.37")


@pytest.fixture(scope="session")
def built_in(rendered):
    """Objects of built-in kinds and pods of the custom ones: [(where, document)].

    Once for those that differ in numbers only.
    """
    found = {}

    def add(where, document):
        shape = re.sub(r"\d+", "0", json.dumps(document, sort_keys=True))
        found.setdefault(shape, (where, document))

    for name, documents in rendered.items():
        for document in documents:
            if not is_custom(document):
                add(name, document)
            elif document["kind"].startswith("Ray"):
                for group, template in templates(document):
                    add(f"{name} {group}", {"apiVersion": "v1", "kind": "Pod", **template})
    return list(found.values())


def refusals(document, version):
    """Say what an API server of a version has against a built-in kind."""
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{error.path}: {error.message}"
    return ""


@pytest.mark.parametrize("version", VERSIONS)
def test_built_in_kinds_and_pods_are_strictly_valid(built_in, version):
    assert len(built_in) > 40
    found = [(where, refusals(document, version)) for where, document in built_in]
    assert [(where, refusal) for where, refusal in found if refusal] == []


def test_custom_resources_are_strictly_valid(rendered, definitions):
    for name, documents in rendered.items():
        for document in filter(is_custom, documents):
            definition = definitions[document["apiVersion"], document["kind"]]
            assert definition.errors(document) == [], name


def test_overlays_hold_a_cluster_and_jobs_a_job_alone(rendered):
    for name, documents in rendered.items():
        kinds = [document["kind"] for document in documents]
        if name.startswith("overlays"):
            assert kinds == ["RayCluster"], name
        elif name.startswith("jobs"):
            assert kinds == ["RayJob"], name
        else:
            assert not {"RayCluster", "RayJob"} & set(kinds), name


def test_cluster_wide_objects_are_in_no_namespace_and_the_others_in_ours(rendered, definitions):
    wide = {"Namespace", "PriorityClass"}
    wide |= {kind for (_, kind), found in definitions.items() if found.scope == "Cluster"}
    for name, documents in rendered.items():
        for document in documents:
            expected = None if document["kind"] in wide else "moce"
            assert document["metadata"].get("namespace") == expected, (name, document["kind"])


def worker(spec):
    return spec["rayClusterSpec"]["workerGroupSpecs"][0]


def pod(spec):
    return worker(spec)["template"]["spec"]


PLANTED = {
    "entrypont": lambda spec: spec.update(entrypont=spec.pop("entrypoint")),
    "nodeselector": lambda spec: pod(spec).update(nodeselector={"a": "b"}),
    "imagePullPolice": lambda spec: pod(spec)["containers"][0].update(imagePullPolice="Always"),
    "groupName": lambda spec: worker(spec).pop("groupName"),
    "replicas": lambda spec: worker(spec).update(replicas="one"),
    "managedBy": lambda spec: spec.update(managedBy="somebody"),
    "deletionStrategy requires": lambda spec: spec.update(deletionStrategy={"onSuccess": {}}),
    "tmp.* stands twice": lambda spec: pod(spec)["volumes"].append({"name": "tmp"}),
}


@pytest.mark.parametrize("words", PLANTED)
def test_planted_mistakes_of_a_job_are_caught(rendered, definitions, words):
    (job,) = copy.deepcopy(rendered["jobs/pretrain"])
    PLANTED[words](job["spec"])
    (found, *_) = definitions["ray.io/v1", "RayJob"].errors(job)
    assert re.search(words, found)


def planted(rendered, name, kind):
    document = next(d for d in rendered[name] if d["kind"] == kind)
    return copy.deepcopy(document)


def test_planted_mistakes_of_queues_and_monitors_are_caught(rendered, definitions):
    queue = planted(rendered, "setup/kueue", "ClusterQueue")
    queue["spec"]["resourceGroups"][0]["flavors"][0]["resources"].pop()
    (found,) = definitions["kueue.x-k8s.io/v1beta2", "ClusterQueue"].errors(queue)
    assert "must match" in found or "resources" in found
    monitor = planted(rendered, "setup/monitoring", "PodMonitor")
    monitor["spec"]["podMetricsEndpoints"][0]["prot"] = "metrics"
    assert "prot" in str(definitions["monitoring.coreos.com/v1", "PodMonitor"].errors(monitor))


def test_planted_mistakes_of_built_in_kinds_are_caught(rendered, built_in):
    claim = planted(rendered, "setup", "PersistentVolumeClaim")
    claim["spec"]["accessMode"] = claim["spec"].pop("accessModes")
    assert "accessMode" in refusals(claim, "1.33")
    _, found = next(entry for entry in built_in if entry[1]["kind"] == "Pod")
    broken = copy.deepcopy(found)
    broken["spec"]["terminationGracePeriod"] = 30
    assert "terminationGracePeriod" in refusals(broken, "1.37")
