"""What KubeRay's operator and Kueue's webhook refuse although the schema allows it.

Source: KubeRay 1.7.0, controllers/ray/utils/validation.go; Kueue 0.19.2, rayjob_webhook.go.
"""

import re

import yaml
from manifests import cluster_of

MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
LABEL = re.compile(r"(?:[a-z0-9.-]{1,253}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
SIZED = {"num-cpus", "num-gpus", "memory", "resources"}
# alpha: off unless whoever installs the operator turns it on
GATED = {"networkPolicy", "tlsOptions", "historyServerOptions"}
QUEUE = "kueue.x-k8s.io/queue-name"


def errors(document):
    """Yield everything that operator or webhook would refuse."""
    kind, name = document["kind"], document["metadata"]["name"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"name {name}: is no DNS-1035 label"
    if len(name) > {"RayJob": 47, "RayCluster": 53}[kind]:
        yield f"name {name}: is too long"
    yield from cluster_errors(document)
    if kind == "RayJob":
        yield from job_errors(document)
    if QUEUE in document["metadata"].get("labels", {}):
        yield from kueue_errors(document)


def cluster_errors(document):
    cluster = cluster_of(document)
    groups = cluster.get("workerGroupSpecs", [])
    head = cluster["headGroupSpec"]
    for name, group in (("head", head), *((g["groupName"], g) for g in groups)):
        yield from group_errors(name, group)
    is_growing = cluster.get("enableInTreeAutoscaling", False)
    for group in groups:
        yield from replica_errors(group, is_growing)
    if is_growing and cluster.get("autoscalerOptions", {}).get("version") == "v2":
        for group in (head, *groups):
            if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
                yield "restartPolicy must be Never or unset under autoscaler v2"
    version = tuple(map(int, cluster.get("rayVersion", "0.0").split(".")[:2]))
    auth = cluster.get("authOptions", {})
    if auth.get("mode") == "token" and version < (2, 52):
        yield f"rayVersion {cluster.get('rayVersion')}: token authentication needs 2.52"
    for field in sorted(GATED & set(cluster)):
        yield f"{field}: needs a feature gate that is off"
    yield from redis_errors(cluster)


def group_errors(name, group):
    parameters = group.get("rayStartParams", {})
    if not group["template"]["spec"].get("containers"):
        yield f"{name}: has no container"
    if group.get("resources") and SIZED & set(parameters):
        yield f"{name}: resources and rayStartParams both say {sorted(SIZED & set(parameters))}"
    if "labels" in parameters:
        yield f"{name}: rayStartParams.labels is not supported"
    for key, value in group.get("labels", {}).items():
        if not LABEL.fullmatch(key) or (value and not LABEL.fullmatch(value)):
            yield f"{name}: {key}={value} is no label"


def replica_errors(group, is_growing):
    name = group["groupName"]
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    if not is_growing and (least is None or most is None):
        yield f"{name}: minReplicas and maxReplicas must be set without autoscaling"
    elif not 0 <= least <= group.get("replicas", least) <= most:
        yield f"{name}: replicas out of order"
    if not is_growing and ("idleTimeoutSeconds" in group or "priority" in group):
        yield f"{name}: idleTimeoutSeconds and priority are of autoscaler v2"


def redis_errors(cluster):
    head = cluster["headGroupSpec"]
    parameters = head.get("rayStartParams", {})
    containers = head["template"]["spec"].get("containers", [])[:1]
    names = {entry["name"] for container in containers for entry in container.get("env", [])}
    if "gcsFaultToleranceOptions" in cluster:
        options = cluster["gcsFaultToleranceOptions"]
        if "REDIS_PASSWORD" in names:
            yield "REDIS_PASSWORD is the operator's"
        if "RAY_REDIS_ADDRESS" in names:
            yield "RAY_REDIS_ADDRESS is the operator's"
        if "redis-password" in parameters:
            yield "redis-password is the operator's"
        if options.get("backend", "redis") != "redis":
            yield f"backend {options['backend']} is behind a feature gate that is off"
    elif "RAY_REDIS_ADDRESS" in names:
        yield "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
    if "REDIS_USERNAME" in names or "redis-username" in parameters:
        yield "REDIS_USERNAME is the operator's"


def job_errors(document):
    spec, cluster = document["spec"], cluster_of(document)
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in MODES:
        yield f"submissionMode {mode}: is unknown"
    if mode == "SidecarMode" and ("submitterPodTemplate" in spec or "submitterConfig" in spec):
        yield "SidecarMode takes neither submitterPodTemplate nor submitterConfig"
    if mode == "InteractiveMode" and spec.get("backoffLimit"):
        yield "InteractiveMode is not tried again"
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend needs shutdownAfterJobFinishes"
    yield from deletion_errors(spec)
    yield from selector_errors(spec)
    if "upgradeStrategy" in cluster:
        yield "upgradeStrategy is not for jobs"
    if cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth is not for jobs"
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(field, 1) <= 0:
            yield f"{field}: must be above 0"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit: must not be below 0"
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML: is no mapping"


def deletion_errors(spec):
    strategy = spec.get("deletionStrategy", {})
    if "deletionRules" in strategy and spec.get("shutdownAfterJobFinishes"):
        yield "deletionRules exclude shutdownAfterJobFinishes"
    if "deletionRules" in strategy and spec.get("ttlSecondsAfterFinished"):
        yield "deletionRules exclude ttlSecondsAfterFinished"
    policies = {strategy.get(when, {}).get("policy") for when in ("onSuccess", "onFailure")}
    if "DeleteNone" in policies and spec.get("shutdownAfterJobFinishes"):
        yield "DeleteNone excludes shutdownAfterJobFinishes"


def selector_errors(spec):
    if "clusterSelector" not in spec:
        return
    if not spec["clusterSelector"].get("ray.io/cluster"):
        yield "clusterSelector names no cluster"
    if spec.get("suspend"):
        yield "clusterSelector excludes suspend"
    if spec.get("submissionMode") == "SidecarMode":
        yield "clusterSelector excludes SidecarMode"
    if spec.get("backoffLimit", 0) > 0:
        yield "clusterSelector excludes backoffLimit"


def kueue_errors(document):
    spec, cluster = document["spec"], cluster_of(document)
    if len(cluster.get("workerGroupSpecs", [])) > 17:
        yield "Kueue takes at most 17 worker groups"
    if cluster.get("enableInTreeAutoscaling"):
        yield "Kueue takes no autoscaling"
    if cluster.get("suspend") and document["kind"] == "RayJob":
        yield "rayClusterSpec.suspend: Kueue suspends the job"
    if any(group["groupName"] == "head" for group in cluster.get("workerGroupSpecs", [])):
        yield "Kueue takes no worker group of the name head"
    if document["kind"] == "RayJob" and not spec.get("shutdownAfterJobFinishes"):
        yield "Kueue needs shutdownAfterJobFinishes"
    if spec.get("clusterSelector"):
        yield "Kueue takes no clusterSelector"
