"""Times, sizes and versions that pods live under, and what may be taken from them."""

import copy
import itertools
import re
import tomllib

import pytest
from job_commands import TRAINING, job_config, words_of
from manifests import (
    JOBS,
    K8S,
    ROOT,
    amount,
    cluster_of,
    containers,
    environment,
    operator_pods,
    templates,
)
from plants import complaints, unplanted

LOCKED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
# what storage must take at least, k8s/README.md; a save is 12 bytes a parameter
STORAGE_BYTES_PER_S = 1e9


def strange(document):
    """Yield versions that are not ours: of Ray, of the image."""
    if cluster_of(document)["rayVersion"] != LOCKED["ray"]:
        yield "rayVersion"
    images = {c["image"] for _, template in templates(document) for c in containers(template)}
    if images != {f"moce-dist:{VERSION}"}:
        yield "another image"


def test_ray_is_the_locked_one_and_the_image_of_this_version(rays):
    for name, document in rays.items():
        assert list(strange(document)) == [], name
    for name in ("README.md", "Dockerfile"):
        text = (K8S / name).read_text()
        assert set(re.findall(r"(?:moce-dist:|ARG VERSION=)(\d[\d.]+)", text)) == {VERSION}


def seconds(template, variable):
    (container, *_) = template["spec"]["containers"]
    return int(environment(container)[variable])


def save_s(config):
    """Seconds in which storage takes a checkpoint."""
    width, depth, _ = config.model.shape
    decoder = 12 * config.model.decoder_width**2 * config.model.decoder_depth
    experts = 8 * width**2 * len(config.moe_layers) * config.moe.num_experts
    return 12 * (12 * width**2 * depth + decoder + experts) / STORAGE_BYTES_PER_S


def late(document, save):
    """Yield times that are too short: of a save, of a drain, of a pod's last seconds."""
    drain, stop = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "RAY_JOB_STOP_WAIT_TIME_S"
    pods = dict(templates(document))
    head, worker = pods["head"], pods["experts"]
    grace = {k: pods[k]["spec"]["terminationGracePeriodSeconds"] for k in ("head", "experts")}
    if not grace["experts"] > seconds(worker, drain) > save:
        yield "a worker's drain"
    # the driver outlives the workers' save
    if not grace["head"] > seconds(head, drain) > seconds(worker, drain):
        yield "the head's drain"
    if not grace["head"] > seconds(head, stop) > save:
        yield "the stop of a job"


@pytest.mark.parametrize("job", TRAINING)
def test_a_pod_lives_longer_than_it_drains_and_drains_longer_than_a_save_takes(rays, job):
    save = save_s(job_config(words_of(rays[f"jobs/{job}"])))
    for name in (name for name in rays if name.split("+")[0] == f"jobs/{job}"):
        assert list(late(rays[name], save)) == [], name


def test_storage_that_the_times_assume_is_what_the_readme_asks_for():
    assert f"{STORAGE_BYTES_PER_S / 1e9:.0f} GB/s" in (K8S / "README.md").read_text()


def tight(document):
    """Yield what has no room: Ray's object store, NCCL and loaders, logs and spilled objects."""
    cluster = cluster_of(document)
    for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])):
        spec = group["template"]["spec"]
        sizes = {
            v["name"]: amount(v["emptyDir"].get("sizeLimit", "1000Ti"))
            for v in spec["volumes"]
            if "emptyDir" in v
        }
        resources = spec["containers"][0]["resources"]
        store = int(group["rayStartParams"].get("object-store-memory", 2**60))
        # half of shared memory and more stays for NCCL and loaders
        if not 75 * 2**20 < store <= sizes["shm"] / 2:
            yield "object store"
        if sizes["shm"] > amount(resources["limits"]["memory"]) / 4:
            yield "shared memory"
        if sizes["tmp"] >= amount(resources["requests"].get("ephemeral-storage", 0)):
            yield "ephemeral storage"
        if resources["requests"] != resources["limits"]:
            yield "limits"
    if cluster.get("enableInTreeAutoscaling"):
        head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
        # else the operator lays a volume of its own over it, which has no limit
        logs = {"name": "tmp", "mountPath": "/tmp/ray", "subPath": "ray"}
        for mounts in (head["volumeMounts"], cluster["autoscalerOptions"]["volumeMounts"]):
            if logs not in mounts:
                yield "logs beside the autoscaler"


def test_shared_memory_and_disks_hold_what_is_put_there(rays):
    for name, document in rays.items():
        assert list(tight(document)) == [], name


def overfull(document, config):
    """Yield a pod whose shared memory is too small for the batches that its loaders read ahead.

    The driver's part of a transfer is that of a worker where workers have a GPU and the head none.
    """
    cluster = cluster_of(document)
    (workers,) = cluster["workerGroupSpecs"]
    slots = int(limits_of(workers).get("nvidia.com/gpu", 0))
    encodes = workers if slots else cluster["headGroupSpec"]
    volumes = encodes["template"]["spec"]["volumes"]
    (shm,) = [amount(v["emptyDir"]["sizeLimit"]) for v in volumes if v["name"] == "shm"]
    pixels = config.cluster.batch_size * 3 * config.data.image_size**2
    ahead = config.data.loader_processes * config.data.prefetch_batches
    store = int(encodes["rayStartParams"]["object-store-memory"])
    if max(1, slots) * ahead * 4 * pixels + store > shm:
        yield "batches beyond shared memory"


def limits_of(group):
    return group["template"]["spec"]["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize("job", [job for job in JOBS if job.startswith("transfer")])
def test_shared_memory_holds_what_a_transfer_reads_ahead(rays, job):
    config = job_config(words_of(rays[f"jobs/{job}"]))
    for name in (name for name in rays if name.split("+")[0] == f"jobs/{job}"):
        assert list(overfull(rays[name], config)) == [], name
    # a head of this size could not do it
    document = copy.deepcopy(rays[f"jobs/{job}"])
    limits_of(group(cluster_of(document))).pop("nvidia.com/gpu")
    assert list(overfull(document, config)) == [*complaints(overfull)]


def slow(document):
    """Yield what keeps NCCL off the network cards of its nodes."""
    (group,) = cluster_of(document)["workerGroupSpecs"]
    spec = group["template"]["spec"]
    (container,) = spec["containers"]
    if container["resources"]["limits"].get("rdma/rdma_shared_device_a") != "1":
        yield "no network card"
    names = environment(container)
    if names.get("NCCL_NET") != "IB" or not names.get("NCCL_SOCKET_IFNAME"):
        yield "NCCL may take TCP"
    if "requiredDuringSchedulingIgnoredDuringExecution" not in spec["affinity"]["podAffinity"]:
        yield "workers in several networks"


def test_the_network_cards_of_a_node_are_asked_for(rays):
    assert any("fast-network" in name for name in rays)
    for name, document in rays.items():
        if "fast-network" in name:
            assert list(slow(document)) == [], name


def crowded(document):
    """Yield what would bring workers to a cluster that has none."""
    (group,) = cluster_of(document)["workerGroupSpecs"]
    if [group[field] for field in ("replicas", "minReplicas", "maxReplicas")] != [0, 0, 0]:
        yield "workers beside the head"


def test_a_cluster_of_a_head_alone_gets_no_workers_by_any_component(rays):
    alone = ("overlays/head", "jobs/report")
    for name, document in rays.items():
        is_alone = name.split("+")[0] in alone
        assert (list(crowded(document)) == []) == is_alone, name
        pods = {labels.get("ray.io/node-type") for labels, _ in operator_pods(document)}
        assert ("worker" in pods) != is_alone, name


def head(cluster):
    return cluster["headGroupSpec"]["template"]["spec"]


def group(cluster):
    return cluster["workerGroupSpecs"][0]


def worker(cluster):
    return group(cluster)["template"]["spec"]


def env_of(pod, variable):
    return next(entry for entry in pod["containers"][0]["env"] if entry["name"] == variable)


DRAIN, STOP = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "RAY_JOB_STOP_WAIT_TIME_S"
PLANTED = {
    "a worker's drain": lambda cluster: env_of(worker(cluster), DRAIN).update(value="150"),
    "the head's drain": lambda cluster: head(cluster).update(terminationGracePeriodSeconds=30),
    "the stop of a job": lambda cluster: env_of(head(cluster), STOP).update(value="3"),
    "object store": lambda cluster: group(cluster)["rayStartParams"].pop("object-store-memory"),
    "shared memory": lambda cluster: worker(cluster)["volumes"][2].update(
        emptyDir={"medium": "Memory", "sizeLimit": "400Gi"}
    ),
    "ephemeral storage": lambda cluster: head(cluster)["volumes"][1].update(emptyDir={}),
    "limits": lambda cluster: worker(cluster)["containers"][0]["resources"]["requests"].update(
        cpu="1"
    ),
    "logs beside the autoscaler": lambda cluster: head(cluster)["containers"][0][
        "volumeMounts"
    ].pop(),
    "rayVersion": lambda cluster: cluster.update(rayVersion="2.59.0"),
    "another image": lambda cluster: worker(cluster)["initContainers"][0].update(image="moce-dist"),
    "no network card": lambda cluster: worker(cluster)["containers"][0]["resources"]["limits"].pop(
        "rdma/rdma_shared_device_a"
    ),
    "NCCL may take TCP": lambda cluster: env_of(worker(cluster), "NCCL_NET").update(value=""),
    "workers in several networks": lambda cluster: worker(cluster).update(
        affinity={"podAffinity": {}}
    ),
    "workers beside the head": lambda cluster: group(cluster).update(maxReplicas=1),
}


def said(document):
    checks = (tight, strange, slow, crowded)
    return [*late(document, save=5), *itertools.chain(*(check(document) for check in checks))]


@pytest.mark.parametrize("words", PLANTED)
def test_planted_times_and_sizes_are_caught(rays, words):
    job = "report" if words == "workers beside the head" else "pretrain"
    document = copy.deepcopy(rays[f"jobs/{job}+fast-network+autoscaling"])
    assert words not in said(document)
    PLANTED[words](cluster_of(document))
    assert words in said(document)


def test_every_complaint_has_a_plant():
    assert unplanted(PLANTED, late, tight, strange, slow, crowded) == []


def losing(budget, pods):
    """Yield why a budget would let a pod be evicted; the labels of all pods of a cluster."""
    spec = budget["spec"]
    # pods whose owner has no subresource `scale`: kubernetes.io, "Arbitrary workloads"
    if set(spec) != {"minAvailable", "selector"} or not isinstance(spec["minAvailable"], int):
        yield "the budget must be a whole number of minAvailable"
    elif spec["minAvailable"] <= len(pods):
        yield "a cluster has more pods"
    if not all(spec["selector"]["matchLabels"].items() <= labels.items() for labels in pods):
        yield "a pod is not selected"


def test_a_disruption_budget_keeps_every_pod_of_a_cluster(rays, rendered, definitions):
    assert "scale" not in definitions["ray.io/v1", "RayCluster"].subresources
    pods = [labels for labels, _ in operator_pods(rays["overlays/gpu-512"])]
    budget, _ = rendered["setup/disruption"]
    assert list(losing(budget, pods)) == []
    plants = {
        "a whole number": {"minAvailable": "100%"},
        "has more pods": {"minAvailable": len(pods)},
        "is not selected": {"selector": {"matchLabels": {"ray.io/node-type": "worker"}}},
    }
    for words, change in plants.items():
        broken = copy.deepcopy(budget)
        broken["spec"].update(change)
        assert any(words in found for found in losing(broken, pods))
    assert unplanted(plants, losing) == []
