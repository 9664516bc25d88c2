"""Whatever is rendered is what an API server would take, and a mistake is not."""

import copy
import json
import re

import kubernetes_validate
import pytest
from manifests import is_custom, templates
from plants import unplanted

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


def misplaced(name, documents, definitions):
    """Yield objects that do not belong into a rendering, or not into their namespace."""
    wide = {"Namespace", "PriorityClass"}
    wide |= {kind for (_, kind), found in definitions.items() if found.scope == "Cluster"}
    kinds = [document["kind"] for document in documents]
    alone = {"overlays": ["RayCluster"], "jobs": ["RayJob"], "files": ["Pod"]}.get(
        re.split("[/+]", name)[0]
    )
    if alone and kinds != alone:
        yield f"{kinds}: one cluster, job or pod is applied alone"
    if not alone and {"RayCluster", "RayJob"} & set(kinds):
        yield f"{kinds}: a setup starts nothing"
    for document in documents:
        kind, namespace = document["kind"], document["metadata"].get("namespace")
        if kind in wide and namespace is not None:
            yield f"{kind}: is cluster-wide"
        if kind not in wide and namespace != "moce":
            yield f"{kind}: is not in our namespace"


def test_every_object_is_where_it_belongs(rendered, definitions):
    for name, documents in rendered.items():
        assert list(misplaced(name, documents, definitions)) == [], name


MISPLACED = {
    "applied alone": ("jobs/pretrain", lambda documents: documents.append(documents[0])),
    "starts nothing": ("setup", lambda documents: documents[0].update(kind="RayJob")),
    "is cluster-wide": (
        "setup/kueue",
        lambda documents: documents[0]["metadata"].update(namespace="moce"),
    ),
    "not in our namespace": (
        "setup/data",
        lambda documents: documents[0]["metadata"].update(namespace="default"),
    ),
}


@pytest.mark.parametrize("words", MISPLACED)
def test_misplaced_objects_are_caught(rendered, definitions, words):
    name, change = MISPLACED[words]
    documents = copy.deepcopy(rendered[name])
    change(documents)
    assert any(words in found for found in misplaced(name, documents, definitions))
    assert unplanted(MISPLACED, misplaced) == []


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


def quotas(queue):
    return queue["spec"]["resourceGroups"][0]["flavors"][0]["resources"]


# of every kind but RayJob, of which there are more above: rendering, mistake, what is said of it
KINDS = {
    "RayCluster": ("overlays/gpu", lambda d: d["spec"].update(rayVersio="2.60.0"), "rayVersio"),
    "ClusterQueue": ("setup/kueue", lambda d: quotas(d).pop(), "must match|resources"),
    "LocalQueue": ("setup/kueue", lambda d: d["spec"].update(clusterQueue=["moce"]), "clusterQ"),
    "ResourceFlavor": ("setup/kueue", lambda d: d.update(spec={"nodeLabel": {}}), "nodeLabel"),
    "WorkloadPriorityClass": ("setup/kueue", lambda d: d.update(value="high"), "value"),
    "PodMonitor": (
        "setup/monitoring",
        lambda d: d["spec"]["podMetricsEndpoints"][0].update(prot="metrics"),
        "prot",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_planted_mistakes_of_every_kind_are_caught(rendered, definitions, kind):
    name, change, words = KINDS[kind]
    document = planted(rendered, name, kind)
    change(document)
    assert re.search(words, str(definitions[document["apiVersion"], kind].errors(document)))


def test_every_kind_has_a_planted_mistake(rendered):
    custom = {d["kind"] for documents in rendered.values() for d in documents if is_custom(d)}
    assert custom == {*KINDS, "RayJob"}


def test_planted_mistakes_of_built_in_kinds_are_caught(rendered, built_in):
    claim = planted(rendered, "setup", "PersistentVolumeClaim")
    claim["spec"]["accessMode"] = claim["spec"].pop("accessModes")
    assert "accessMode" in refusals(claim, "1.33")
    _, found = next(entry for entry in built_in if entry[1]["kind"] == "Pod")
    broken = copy.deepcopy(found)
    broken["spec"]["terminationGracePeriod"] = 30
    assert "terminationGracePeriod" in refusals(broken, "1.37")
