"""What the operator and Kueue would refuse, which the schema does not hold."""

import copy

import operator_rules
import pytest


def test_operator_accepts_everything(rays):
    for name, document in rays.items():
        assert list(operator_rules.errors(document)) == [], name


def group(spec):
    return spec["rayClusterSpec"]["workerGroupSpecs"][0]


def cluster(spec):
    return spec["rayClusterSpec"]


def head(spec):
    return spec["rayClusterSpec"]["headGroupSpec"]


def many_groups(spec):
    cluster(spec)["workerGroupSpecs"] = [
        group(spec) | {"groupName": f"g{number}"} for number in range(18)
    ]


PLANTED = {
    "is unknown": lambda spec: spec.update(submissionMode="K8SJobMode"),
    "SidecarMode takes": lambda spec: spec.update(submissionMode="SidecarMode"),
    "ttlSecondsAfterFinished needs": lambda spec: spec.update(shutdownAfterJobFinishes=False),
    "suspend needs": lambda spec: spec.update(shutdownAfterJobFinishes=False),
    "Kueue needs": lambda spec: spec.update(shutdownAfterJobFinishes=False),
    "preRunningDeadlineSeconds": lambda spec: spec.update(preRunningDeadlineSeconds=0),
    "backoffLimit": lambda spec: spec.update(backoffLimit=-1),
    "runtimeEnvYAML": lambda spec: spec.update(runtimeEnvYAML="pip"),
    "upgradeStrategy": lambda spec: cluster(spec).update(upgradeStrategy={}),
    "token authentication": lambda spec: cluster(spec).update(rayVersion="2.50.0"),
    "networkPolicy: needs": lambda spec: cluster(spec).update(networkPolicy={}),
    "Kueue takes no autoscaling": lambda spec: cluster(spec).update(enableInTreeAutoscaling=True),
    "Kueue suspends the job": lambda spec: cluster(spec).update(suspend=True),
    "at most 17": many_groups,
    "out of order": lambda spec: group(spec).update(maxReplicas=0),
    "must be set": lambda spec: group(spec).pop("minReplicas"),
    "of autoscaler v2": lambda spec: group(spec).update(idleTimeoutSeconds=60),
    "is no label": lambda spec: group(spec).update(labels={"moce.dist/expert-group": "g$(N)"}),
    "labels is not": lambda spec: group(spec).update(rayStartParams={"labels": "a=b"}),
    "both say": lambda spec: head(spec).update(rayStartParams={"num-cpus": "1"}),
}


@pytest.mark.parametrize("words", PLANTED)
def test_planted_breaches_are_caught(rendered, words):
    (job,) = copy.deepcopy(rendered["jobs/pretrain+kueue"])
    PLANTED[words](job["spec"])
    assert any(words in found for found in operator_rules.errors(job))


@pytest.mark.parametrize("name", ["9lives", "m" * 48, "moce-", "moce_job"])
def test_names_that_the_operator_refuses_are_caught(rendered, name):
    (job,) = copy.deepcopy(rendered["jobs/pretrain"])
    job["metadata"]["name"] = name
    assert any(name in found for found in operator_rules.errors(job))


def test_state_in_redis_is_set_by_the_operator_alone(rendered):
    (document,) = copy.deepcopy(rendered["overlays/gpu+gcs-ft"])
    (container,) = document["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    container["env"].append({"name": "REDIS_PASSWORD", "value": "secret"})
    assert any("REDIS_PASSWORD" in found for found in operator_rules.errors(document))
