"""What the operator and Kueue would refuse, which the schema does not hold."""

import copy

import operator_rules
import pytest
from plants import unplanted


def test_operator_accepts_everything(rays):
    for name, document in rays.items():
        assert list(operator_rules.errors(document)) == [], name


def cluster(spec):
    return spec["rayClusterSpec"]


def group(spec):
    return cluster(spec)["workerGroupSpecs"][0]


def head(spec):
    return cluster(spec)["headGroupSpec"]


def many_groups(spec):
    cluster(spec)["workerGroupSpecs"] = [
        group(spec) | {"groupName": f"g{number}"} for number in range(18)
    ]


def grow(spec):
    cluster(spec).update(enableInTreeAutoscaling=True, autoscalerOptions={"version": "v2"})


def keep_state_in_redis(spec, **options):
    cluster(spec)["gcsFaultToleranceOptions"] = {"redisAddress": "redis:6379", **options}


def set_variable(spec, name):
    head(spec)["template"]["spec"]["containers"][0]["env"].append({"name": name, "value": "a"})


def restart(spec):
    grow(spec)
    group(spec)["template"]["spec"]["restartPolicy"] = "Always"


def redis_variable(name):
    def change(spec):
        keep_state_in_redis(spec)
        set_variable(spec, name)

    return change


def redis_parameter(spec):
    keep_state_in_redis(spec)
    head(spec)["rayStartParams"]["redis-password"] = "a"


def select(spec, name="moce", **fields):
    spec.update(clusterSelector={"ray.io/cluster": name}, **fields)


def delete_by_rules(spec, **fields):
    rule = {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED"}}
    spec.update(deletionStrategy={"deletionRules": [rule]}, **fields)


# in a job with every setting of Kueue
PLANTED = {
    "is unknown": lambda spec: spec.update(submissionMode="K8SJobMode"),
    "SidecarMode takes": lambda spec: spec.update(submissionMode="SidecarMode"),
    "InteractiveMode is": lambda spec: spec.update(submissionMode="InteractiveMode"),
    "ttlSecondsAfterFinished needs": lambda spec: spec.update(shutdownAfterJobFinishes=False),
    "suspend needs": lambda spec: spec.update(shutdownAfterJobFinishes=False),
    "Kueue needs": lambda spec: spec.update(shutdownAfterJobFinishes=False),
    "deletionRules exclude shutdownAfterJobFinishes": delete_by_rules,
    "deletionRules exclude ttlSecondsAfterFinished": lambda spec: delete_by_rules(
        spec, shutdownAfterJobFinishes=False
    ),
    "DeleteNone excludes": lambda spec: spec.update(
        deletionStrategy={
            "onSuccess": {"policy": "DeleteCluster"},
            "onFailure": {"policy": "DeleteNone"},
        }
    ),
    "names no cluster": lambda spec: select(spec, name=""),
    "clusterSelector excludes suspend": select,
    "clusterSelector excludes SidecarMode": lambda spec: select(spec, submissionMode="SidecarMode"),
    "clusterSelector excludes backoffLimit": select,
    "Kueue takes no clusterSelector": select,
    "must be above 0": lambda spec: spec.update(preRunningDeadlineSeconds=0),
    "must not be below 0": lambda spec: spec.update(backoffLimit=-1),
    "runtimeEnvYAML": lambda spec: spec.update(runtimeEnvYAML="pip"),
    "upgradeStrategy": lambda spec: cluster(spec).update(upgradeStrategy={}),
    "token authentication": lambda spec: cluster(spec).update(rayVersion="2.50.0"),
    "enableK8sTokenAuth": lambda spec: cluster(spec)["authOptions"].update(enableK8sTokenAuth=True),
    "needs a feature gate": lambda spec: cluster(spec).update(networkPolicy={}),
    "Kueue takes no autoscaling": grow,
    "Kueue suspends the job": lambda spec: cluster(spec).update(suspend=True),
    "at most 17": many_groups,
    "of the name head": lambda spec: group(spec).update(groupName="head"),
    "out of order": lambda spec: group(spec).update(maxReplicas=0),
    "must be set": lambda spec: group(spec).pop("minReplicas"),
    "of autoscaler v2": lambda spec: group(spec).update(idleTimeoutSeconds=60),
    "restartPolicy": restart,
    "has no container": lambda spec: head(spec)["template"]["spec"].update(containers=[]),
    "is no label": lambda spec: group(spec).update(labels={"moce.dist/expert-group": "g$(N)"}),
    "labels is not": lambda spec: group(spec).update(rayStartParams={"labels": "a=b"}),
    "both say": lambda spec: head(spec).update(rayStartParams={"num-cpus": "1"}),
    "REDIS_PASSWORD is": redis_variable("REDIS_PASSWORD"),
    "RAY_REDIS_ADDRESS is": redis_variable("RAY_REDIS_ADDRESS"),
    "RAY_REDIS_ADDRESS without": lambda spec: set_variable(spec, "RAY_REDIS_ADDRESS"),
    "REDIS_USERNAME": lambda spec: set_variable(spec, "REDIS_USERNAME"),
    "redis-password": redis_parameter,
    "is behind a feature gate": lambda spec: keep_state_in_redis(spec, backend="rocksdb"),
}
NAMES = {
    "9lives": "DNS-1035",
    "moce-": "DNS-1035",
    "moce_job": "DNS-1035",
    "m" * 48: "is too long",
}


@pytest.mark.parametrize("words", PLANTED)
def test_planted_breaches_are_caught(rendered, words):
    (job,) = copy.deepcopy(rendered["jobs/pretrain+kueue"])
    PLANTED[words](job["spec"])
    assert any(words in found for found in operator_rules.errors(job))


@pytest.mark.parametrize("name", NAMES)
def test_names_that_the_operator_refuses_are_caught(rendered, name):
    (job,) = copy.deepcopy(rendered["jobs/pretrain"])
    job["metadata"]["name"] = name
    assert any(NAMES[name] in found for found in operator_rules.errors(job))


def test_every_rule_has_a_plant():
    assert unplanted([*PLANTED, *NAMES.values()], operator_rules) == []
