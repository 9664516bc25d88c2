"""Names that one object says of another exist where an administrator or the operator makes them."""

import copy
from itertools import chain

import pytest
import yaml
from manifests import (
    K8S,
    amount,
    cluster_of,
    containers,
    environment,
    operator_pods,
    templates,
)
from plants import unplanted

# made by hand, as k8s/README.md says, or by the operator
BY_HAND = {"moce-registry", "moce-s3", "moce-redis"}
README = (K8S / "README.md").read_text()
EXAMPLE = yaml.safe_load((K8S / "setup" / "s3" / "secret.example.yaml").read_text())
QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"


def made_by(rendered, names):
    """Collect what setups make: {kind: names}."""
    found = {}
    for document in chain(*(rendered[name] for name in names)):
        found.setdefault(document["kind"], set()).add(document["metadata"]["name"])
    return found


@pytest.fixture(scope="session")
def made(rendered):
    """What all setups make: {kind: names}."""
    return made_by(rendered, [name for name in rendered if name.startswith("setup")])


def missing(document, made):
    """Yield what the pods of a cluster or job refer to and nobody makes."""
    # under autoscaling the operator makes an account for the head
    own = cluster_of(document).get("enableInTreeAutoscaling")
    for name, template in templates(document):
        spec = template["spec"]
        account = spec.get("serviceAccountName", "default")
        if account not in made["ServiceAccount"] and not (name == "head" and own):
            yield f"{name}: service account {account}"
        if account not in made["ServiceAccount"] and not spec.get("imagePullSecrets"):
            yield f"{name}: pull secret"
        if spec["priorityClassName"] not in made["PriorityClass"]:
            yield f"{name}: priority class {spec['priorityClassName']}"
        for volume in spec["volumes"]:
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and claim not in made["PersistentVolumeClaim"]:
                yield f"{name}: claim {claim}"
            secret = volume.get("secret", {}).get("secretName")
            if secret and secret not in BY_HAND:
                yield f"{name}: secret {secret}"
            if "configMap" in volume and volume["configMap"]["name"] not in made["ConfigMap"]:
                yield f"{name}: config map {volume['configMap']['name']}"
        mounted = {m["name"] for c in containers(template) for m in c.get("volumeMounts", [])}
        if mounted != {volume["name"] for volume in spec["volumes"]}:
            yield f"{name}: mounts {sorted(mounted)}"


def misread(document):
    """Yield what is wrong with the place that images are read from: a volume or a bucket."""
    for name, template in templates(document):
        if name == "submitter":
            continue
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        if len(volumes & {"data", "s3"}) != 1:
            yield f"{name}: must read from a volume or a bucket"
        (container,) = template["spec"]["containers"]
        files = sorted(v for k, v in environment(container).items() if k.startswith("AWS_"))
        mounts = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == "s3"]
        if files != sorted(f"{path}/{key}" for path in mounts for key in EXAMPLE["stringData"]):
            yield f"{name}: looks for other keys than the Secret has"


def misplaced(document, is_spot):
    """Yield heads and submitters that may go to a spot node."""
    (_, head), *_ = templates(document)
    if is_spot and not _refuses_spot(head["spec"]):
        yield "a head on a spot node"
    submitter = document["spec"].get("submitterPodTemplate")
    if is_spot and submitter and not _refuses_spot(submitter["spec"]):
        yield "a submitter that may be reclaimed"


def _refuses_spot(spec):
    node = spec.get("affinity", {}).get("nodeAffinity", {})
    terms = node.get("requiredDuringSchedulingIgnoredDuringExecution", {"nodeSelectorTerms": []})
    refused = [
        {rule["key"] for rule in term["matchExpressions"] if rule["operator"] == "NotIn"}
        for term in terms["nodeSelectorTerms"]
    ]
    labels = {"karpenter.sh/capacity-type", "cloud.google.com/gke-spot"}
    # terms are alternatives, so each must refuse
    return bool(refused) and all(labels <= keys for keys in refused)


def unqueued(document, objects):
    """Yield what keeps a job that is to wait in a queue from ever being admitted."""
    group = objects["ClusterQueue", "moce"]["spec"]["resourceGroups"][0]
    quota = {r["name"]: amount(r["nominalQuota"]) for r in group["flavors"][0]["resources"]}
    labels = document["metadata"].get("labels", {})
    if ("LocalQueue", labels.get(QUEUE)) not in objects:
        yield f"no such queue: {labels.get(QUEUE)}"
    if ("WorkloadPriorityClass", labels.get(PRIORITY)) not in objects:
        yield f"no such priority: {labels.get(PRIORITY)}"
    needed = {}
    for _, template in operator_pods(document):
        for container in template["spec"]["containers"]:
            for resource, quantity in container["resources"]["requests"].items():
                needed[resource] = needed.get(resource, 0) + amount(quantity)
    for resource in needed.keys() - quota.keys():
        yield f"{resource} is not covered"
    for resource in needed.keys() & quota.keys():
        if needed[resource] > quota[resource]:
            yield f"{resource} is beyond the quota"


def test_everything_that_pods_refer_to_is_made_by_a_setup(rays, files, made):
    for name, document in (rays | files).items():
        assert list(missing(document, made)) == [], name


def test_images_come_from_a_volume_or_from_a_bucket(rays, files):
    assert any("s3" in name for name in rays)
    for name, document in (rays | files).items():
        assert list(misread(document)) == [], name
        volumes = {v["name"] for _, t in templates(document) for v in t["spec"]["volumes"]}
        assert ("s3" in volumes) == ("s3" in name), name


def writable(document):
    """Return the volumes of claims that some container may write to, by their mount path."""
    found = set()
    for _, template in templates(document):
        claims = {
            v["name"]: v["persistentVolumeClaim"].get("readOnly", False)
            for v in template["spec"]["volumes"]
            if "persistentVolumeClaim" in v
        }
        for container in containers(template):
            for mount in container.get("volumeMounts", []):
                is_fixed = claims.get(mount["name"], True) or mount.get("readOnly", False)
                found |= set() if is_fixed else {mount["mountPath"]}
    return found


def test_images_are_written_by_the_pod_for_files_alone(rays, files):
    assert writable(files["files"]) == {"/data", "/runs"}
    assert writable(files["files+s3"]) == {"/runs"}
    for name, document in rays.items():
        assert writable(document) == {"/runs"}, name


def test_without_the_volume_of_images_all_but_those_with_a_bucket_miss_it(rays, rendered):
    setups = [name for name in rendered if name.startswith("setup") and name != "setup/data"]
    without = made_by(rendered, setups)
    for name, document in rays.items():
        claims = {found.partition(": ")[2] for found in missing(document, without)}
        assert claims == (set() if "s3" in name else {"claim moce-data"}), name


def test_heads_stay_off_spot_nodes(rays):
    assert any("spot" in name for name in rays)
    for name, document in rays.items():
        assert list(misplaced(document, "spot" in name)) == [], name


def test_queues_exist_and_cover_what_jobs_ask_for(rays, rendered):
    objects = {(d["kind"], d["metadata"]["name"]): d for d in rendered["setup/kueue"]}
    queue = objects["ClusterQueue", "moce"]["spec"]
    assert [len(group["flavors"]) for group in queue["resourceGroups"]] == [1]
    (namespace,) = [d for d in rendered["setup"] if d["kind"] == "Namespace"]
    assert queue["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": namespace["metadata"]["name"]
    }
    queued = {name: document for name, document in rays.items() if "kueue" in name}
    assert len(queued) > 10
    for name, document in queued.items():
        assert list(unqueued(document, objects)) == [], name


def unsuspended(name, document):
    """Yield a job whose start is not where it should be decided."""
    if document["kind"] == "RayJob" and document["spec"].get("suspend", False) != ("kueue" in name):
        yield "a job starts suspended in a queue, and nowhere else"


def test_jobs_in_a_queue_start_suspended(rays):
    for name, document in rays.items():
        assert list(unsuspended(name, document)) == [], name


def claim(spec):
    return spec["volumes"][0]["persistentVolumeClaim"]


def resources(spec):
    return spec["containers"][0]["resources"]


# in the worker's pod of a job with every component, or in the job itself
PLANTED = {
    ": claim": lambda spec: claim(spec).update(claimName="moce-other"),
    ": service account": lambda spec: spec.pop("serviceAccountName"),
    ": pull secret": lambda spec: spec.pop("serviceAccountName"),
    ": priority class": lambda spec: spec.update(priorityClassName="urgent"),
    ": secret": lambda spec: spec["volumes"].append(
        {"name": "key", "secret": {"secretName": "key"}}
    ),
    ": config map": lambda spec: spec["volumes"].append(
        {"name": "other", "configMap": {"name": "other"}}
    ),
    ": mounts": lambda spec: spec["volumes"].append({"name": "other", "emptyDir": {}}),
    "a volume or a bucket": lambda spec: spec["volumes"].append({"name": "data", "emptyDir": {}}),
    "other keys": lambda spec: spec["containers"][0]["env"].pop(),
    "is not covered": lambda spec: resources(spec)["requests"].update({"example.org/tpu": 1}),
    "is beyond the quota": lambda spec: resources(spec)["requests"].update(memory="9000Gi"),
}
PLANTED_IN_JOBS = {
    "such queue": lambda job: job["metadata"]["labels"].update({QUEUE: "other"}),
    "such priority": lambda job: job["metadata"]["labels"].update({PRIORITY: "other"}),
    "starts suspended": lambda job: job["spec"].pop("suspend"),
    "a spot node": lambda job: cluster_of(job)["headGroupSpec"]["template"]["spec"]["affinity"][
        "nodeAffinity"
    ]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"].append(
        {"matchExpressions": []}
    ),
    "may be reclaimed": lambda job: job["spec"]["submitterPodTemplate"]["spec"].pop("affinity"),
}


@pytest.mark.parametrize("words", [*PLANTED, *PLANTED_IN_JOBS])
def test_planted_names_are_caught(rendered, made, words):
    name = "jobs/pretrain-s3+spot+kueue"
    objects = {(d["kind"], d["metadata"]["name"]): d for d in rendered["setup/kueue"]}
    (job,) = copy.deepcopy(rendered[name])
    if words in PLANTED:
        PLANTED[words](dict(templates(job))["experts"]["spec"])
    else:
        PLANTED_IN_JOBS[words](job)
    found = [
        *missing(job, made),
        *misread(job),
        *misplaced(job, is_spot=True),
        *unqueued(job, objects),
        *unsuspended(name, job),
    ]
    assert any(words in complaint for complaint in found)


def test_every_complaint_has_a_plant():
    plants = [*PLANTED, *PLANTED_IN_JOBS]
    assert unplanted(plants, missing, misread, misplaced, unqueued, unsuspended) == []


def test_a_head_under_the_operators_account_names_the_registry_itself(rendered, made):
    grown = next(n for n in rendered if n.startswith("jobs/pretrain") and "autoscaling" in n)
    (job,) = copy.deepcopy(rendered[grown])
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {entry["name"] for entry in head["imagePullSecrets"]} <= BY_HAND
    head.pop("imagePullSecrets")
    assert list(missing(job, made)) == ["head: pull secret"]


def test_secrets_made_by_hand_are_explained(rendered, made):
    (account,) = [d for d in rendered["setup"] if d["kind"] == "ServiceAccount"]
    assert {entry["name"] for entry in account["imagePullSecrets"]} <= BY_HAND
    assert all(name in README for name in BY_HAND)
    assert EXAMPLE["metadata"]["name"] in BY_HAND
    assert "Secret" not in made
