"""Names that one object says of another exist where an administrator or the operator makes them."""

import copy
from itertools import chain

import pytest
import yaml
from manifests import K8S, amount, cluster_of, containers, operator_pods, templates

# made by hand, as k8s/README.md says, or by the operator
BY_HAND = {"moce-registry", "moce-s3", "moce-redis"}
README = (K8S / "README.md").read_text()


@pytest.fixture(scope="session")
def made(rendered):
    """What the setups make: {kind: names}."""
    found = {}
    for document in chain(*(docs for name, docs in rendered.items() if name.startswith("setup"))):
        found.setdefault(document["kind"], set()).add(document["metadata"]["name"])
    return found


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


def test_everything_that_pods_refer_to_is_made_by_a_setup(rays, made):
    for name, document in rays.items():
        assert list(missing(document, made)) == [], name


def claim(spec):
    return spec["volumes"][0]["persistentVolumeClaim"]


PLANTED = {
    "claim moce-other": lambda spec: claim(spec).update(claimName="moce-other"),
    "account default": lambda spec: spec.pop("serviceAccountName"),
    "class urgent": lambda spec: spec.update(priorityClassName="urgent"),
    "secret key": lambda spec: spec["volumes"].append(
        {"name": "key", "secret": {"secretName": "key"}}
    ),
    "mounts": lambda spec: spec["volumes"].append({"name": "other", "emptyDir": {}}),
}


@pytest.mark.parametrize("words", PLANTED)
def test_planted_names_are_caught(rendered, made, words):
    (job,) = copy.deepcopy(rendered["jobs/pretrain"])
    PLANTED[words](job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"])
    assert any(words in found for found in missing(job, made))


def test_a_head_under_the_operators_account_names_the_registry_itself(rendered, made):
    grown = next(n for n in rendered if n.startswith("jobs/pretrain") and "autoscaling" in n)
    (job,) = copy.deepcopy(rendered[grown])
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {entry["name"] for entry in head["imagePullSecrets"]} <= BY_HAND
    head.pop("imagePullSecrets")
    assert list(missing(job, made)) == ["head: pull secret"]


def test_heads_stay_off_spot_nodes(rays):
    spots = [document for name, document in rays.items() if "spot" in name]
    assert spots
    for document in spots:
        (_, head), *_ = templates(document)
        affinity = head["spec"]["affinity"]["nodeAffinity"]
        (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        refused = {rule["key"] for rule in term["matchExpressions"] if rule["operator"] == "NotIn"}
        assert {"karpenter.sh/capacity-type", "cloud.google.com/gke-spot"} <= refused


def test_secrets_made_by_hand_are_explained(rendered, made):
    (account,) = [d for d in rendered["setup"] if d["kind"] == "ServiceAccount"]
    assert {entry["name"] for entry in account["imagePullSecrets"]} <= BY_HAND
    assert all(name in README for name in BY_HAND)
    example = yaml.safe_load((K8S / "setup" / "s3" / "secret.example.yaml").read_text())
    assert example["metadata"]["name"] in BY_HAND
    assert "Secret" not in made


def test_keys_of_the_s3_secret_are_what_the_pods_look_for(rays):
    example = yaml.safe_load((K8S / "setup" / "s3" / "secret.example.yaml").read_text())
    (container,) = cluster_of(rays["jobs/pretrain-s3"])["headGroupSpec"]["template"]["spec"][
        "containers"
    ]
    (mount,) = [m for m in container["volumeMounts"] if m["name"] == "s3"]
    values = [e["value"] for e in container["env"] if e["name"].startswith("AWS_")]
    assert sorted(values) == sorted(f"{mount['mountPath']}/{key}" for key in example["stringData"])


def test_with_s3_no_pod_has_a_volume_for_data(rays):
    assert any("s3" in name for name in rays)
    for name, document in rays.items():
        volumes = [v["name"] for _, t in templates(document) for v in t["spec"]["volumes"]]
        assert ("data" in volumes) != ("s3" in volumes), name


def test_queues_exist_and_cover_what_jobs_ask_for(rays, rendered):
    objects = {(d["kind"], d["metadata"]["name"]): d for d in rendered["setup/kueue"]}
    (group,) = objects["ClusterQueue", "moce"]["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    quota = {entry["name"]: amount(entry["nominalQuota"]) for entry in flavor["resources"]}
    queued = {name: document for name, document in rays.items() if "kueue" in name}
    assert len(queued) > 10
    for name, document in queued.items():
        labels = document["metadata"]["labels"]
        assert ("LocalQueue", labels["kueue.x-k8s.io/queue-name"]) in objects
        assert ("WorkloadPriorityClass", labels["kueue.x-k8s.io/priority-class"]) in objects
        needed = {}
        for _, template in operator_pods(document):
            for container in template["spec"]["containers"]:
                for resource, quantity in container["resources"]["requests"].items():
                    needed[resource] = needed.get(resource, 0) + amount(quantity)
        assert all(needed[resource] <= quota.get(resource, 0) for resource in needed), name
    namespace = objects["ClusterQueue", "moce"]["spec"]["namespaceSelector"]["matchLabels"]
    assert namespace == {"kubernetes.io/metadata.name": "moce"}


def test_jobs_in_a_queue_start_suspended(rays):
    for name, document in rays.items():
        if document["kind"] == "RayJob":
            assert document["spec"].get("suspend", False) == ("kueue" in name), name
