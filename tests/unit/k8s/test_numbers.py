"""The manifests agree with the configurations that they run, and their numbers with each other."""

import copy
import importlib.util
import itertools
import json
import re
import shlex
import tempfile
from pathlib import Path

import pytest
import yaml
from manifests import (
    JOBS,
    K8S,
    OVERLAYS,
    ROOT,
    amount,
    cluster_of,
    environment,
    operator_pods,
    templates,
)

from moce_dist.config import load_config, to_yaml
from moce_dist.launch.nodes import GROUP_LABEL, Host, Requirements
from moce_dist.settings import ConfigError
from moce_dist.transfer.request import open_request_run

LOCKED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)
TRAINING = [job for job in JOBS if job.startswith(("pretrain", "quickstart"))]
# what storage must take at least, k8s/README.md; a save is 12 bytes a parameter
STORAGE_BYTES_PER_S = 1e9


def load_script(path):
    """Import a script by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words_of(document):
    """Words of a job's entrypoint, with the image's paths as those of the project."""
    words = shlex.split(document["spec"]["entrypoint"])
    return [re.sub(r"^/app/", f"{ROOT}/", word) for word in words]


def run_config(name):
    """Return the configuration that a run of that name was made with, by the job that makes it."""
    for job in TRAINING:
        entry = yaml.safe_load((K8S / "jobs" / job / "kustomization.yaml").read_text())
        words = shlex.split(re.search(r"python /app/[^\"]+", entry["patches"][0]["patch"])[0])
        if words[words.index("--run") + 1] == name:
            return job_config(words)
    raise AssertionError(f"no job makes {name}")


def job_config(words):
    """Return the configuration that a job's command runs with."""
    words = [re.sub(r"^/app/", f"{ROOT}/", word) for word in words]
    sets = [value for flag, value in itertools.pairwise(words) if flag == "--set"]
    config = words[words.index("--config") + 1] if "--config" in words else None
    if f"{ROOT}/jobs/pretrain.py" in words:
        return load_config(config, sets)
    # the other jobs lay recipe and overrides over the configuration of their run
    with tempfile.TemporaryDirectory() as folder:
        made_with = run_config(words[words.index("--run") + 1])
        Path(folder, "config.yaml").write_text(to_yaml(made_with))
        return open_request_run(Path(folder), config, sets)[1]


def hosts_of(document):
    """Nodes as the driver will see them: label, address and slots of every worker pod."""
    hosts = []
    for number, (labels, template) in enumerate(operator_pods(document)):
        if labels.get("ray.io/node-type") == "worker":
            (container,) = template["spec"]["containers"]
            limits = container["resources"]["limits"]
            slots = int(limits.get("nvidia.com/gpu", limits["cpu"]))
            group = ray_labels(container, labels)[GROUP_LABEL]
            hosts.append(Host(f"node{number}", f"10.0.0.{number}", group, slots))
    return hosts


def ray_labels(container, pod_labels):
    """Labels of a Ray node, as the kubelet and Ray make them of the pod."""
    values = {}
    for entry in container["env"]:
        if "valueFrom" in entry:
            path = entry["valueFrom"]["fieldRef"]["fieldPath"]
            values[entry["name"]] = pod_labels[re.fullmatch(r"metadata.labels\['(.+)'\]", path)[1]]
        else:
            # a variable may name one before it
            values[entry["name"]] = re.sub(
                r"\$\((\w+)\)", lambda match: values[match[1]], entry["value"]
            )
    return json.loads(values["RAY_OVERRIDE_LABELS"])


def test_ray_makes_its_labels_of_the_variable(monkeypatch):
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    monkeypatch.setenv("RAY_OVERRIDE_LABELS", json.dumps({GROUP_LABEL: "g3"}))
    assert ResourceAndLabelSpec._load_env_labels() == {GROUP_LABEL: "g3"}
    spec = ResourceAndLabelSpec(labels={"a": "b"})
    spec._resolve_labels(None)
    assert spec.labels.items() >= {GROUP_LABEL: "g3", "a": "b"}.items()


@pytest.mark.parametrize("job", TRAINING)
def test_ranks_groups_and_labels_are_the_configurations(rays, job):
    document = rays[f"jobs/{job}"]
    config, hosts = job_config(words_of(document)), hosts_of(document)
    parallel = config.parallel
    assert sum(host.slots for host in hosts) == parallel.num_workers
    assert {host.group for host in hosts} == {f"g{n}" for n in range(parallel.num_groups)}
    resource = "GPU" if "nvidia.com/gpu" in json.dumps(document) else "CPU"
    seats = Requirements(job, parallel, config.moce.batch_size, resource).best_seats(hosts)
    each = parallel.num_workers // parallel.num_groups
    expected = [f"g{n}" for n in range(parallel.num_groups) for _ in range(each)]
    assert seats == expected


@pytest.mark.parametrize("job", [job for job in TRAINING if job != "quickstart"])
def test_a_run_goes_on_without_one_node_and_at_its_fewest_ranks(rays, job):
    document = rays[f"jobs/{job}"]
    config, hosts = job_config(words_of(document)), hosts_of(document)
    assert config.parallel.fewest_workers < config.parallel.num_workers
    wanted = Requirements(job, config.parallel, config.moce.batch_size, "GPU")
    assert len(wanted.best_seats(hosts[1:])) >= config.parallel.fewest_workers
    enough = config.parallel.fewest_workers // hosts[0].slots
    assert len(wanted.best_seats(hosts[:enough])) == config.parallel.fewest_workers
    assert wanted.best_seats(hosts[: enough - 1]) is None


def test_512_gpus_are_what_the_dry_run_says(rays, capsys):
    pretrain = load_script(ROOT / "jobs" / "pretrain.py")
    document = rays["jobs/pretrain-512"]
    pretrain.main([*words_of(document)[3:], "--dry-run"])
    printed = capsys.readouterr().out
    ranks, places, groups = map(
        int, re.search(r"ranks +(\d+) .* in (\d+) places, (\d+) groups", printed).groups()
    )
    (group,) = cluster_of(document)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    nodes = group["replicas"] * group["numOfHosts"]
    assert (group["replicas"], nodes * int(limits["nvidia.com/gpu"])) == (places, ranks)
    assert (nodes, ranks, places, groups) == (64, 512, 64, 64)
    assert {host.group for host in hosts_of(document)} == {f"g{n}" for n in range(64)}


@pytest.mark.parametrize("job", [job for job in JOBS if job != "report"])
def test_a_job_has_no_more_workers_than_its_cluster_has_room_for(rays, job):
    document = rays[f"jobs/{job}"]
    workers = job_config(words_of(document)).parallel.num_workers
    assert sum(host.slots for host in hosts_of(document)) == workers


@pytest.mark.parametrize("job", JOBS)
def test_entrypoint_is_a_command_that_its_job_takes(rays, job, capsys, tmp_path):
    words = words_of(rays[f"jobs/{job}"])
    assert words[:2] == ["python", str(K8S / "run.py")]
    script = load_script(ROOT / words[2].removeprefix(f"{ROOT}/"))
    place = words.index("--run") + 1
    run = words[place]
    assert run.startswith("/runs/")
    words[place] = str(tmp_path)
    if not words[2].endswith("pretrain.py"):
        (tmp_path / "config.yaml").write_text(to_yaml(run_config(run)))
    if words[2].endswith("transfer.py"):
        # a request that is right gets as far as the weights, which are not here
        with pytest.raises(ConfigError, match=r"is missing; jobs/pretrain.py --run"):
            script.main([*words[3:], "--dry-run"])
    else:
        script.main([*words[3:], "--dry-run"])
        assert str(tmp_path) in capsys.readouterr().out


def test_runs_that_jobs_read_are_made_by_a_job(rays):
    made = {words_of(rays[f"jobs/{job}"])[5 + 1] for job in TRAINING}
    for job in JOBS:
        words = words_of(rays[f"jobs/{job}"])
        assert words[words.index("--run") + 1] in made


@pytest.mark.parametrize("name", [name for name in OVERLAYS if name != "head"])
def test_overlay_is_what_its_own_command_prints(name, capsys, monkeypatch):
    text = (K8S / "overlays" / name / "kustomization.yaml").read_text()
    command = re.match(r"# python k8s/size.py (.+)\n", text)[1]
    monkeypatch.chdir(ROOT)
    load_script(K8S / "size.py").main(shlex.split(command))
    assert capsys.readouterr().out == text


def test_a_group_of_several_nodes_is_one_replica_of_several_hosts(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    size = load_script(K8S / "size.py")
    size.main(["--config", "configs/pretrain/vit_base.yaml", "--gpus", "4"])
    assert "/numOfHosts, value: 2}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="8 ranks of a place must fill whole nodes"):
        size.main(["--config", "configs/pretrain/vit_base.yaml", "--gpus", "3"])


def test_ray_is_the_locked_one(rays):
    for name, document in rays.items():
        assert cluster_of(document)["rayVersion"] == LOCKED["ray"], name


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


def test_shared_memory_and_disks_hold_what_is_put_there(rays):
    for name, document in rays.items():
        assert list(tight(document)) == [], name


def env_of(group, variable):
    env = group["template"]["spec"]["containers"][0]["env"]
    return next(entry for entry in env if entry["name"] == variable)


DRAIN, STOP = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "RAY_JOB_STOP_WAIT_TIME_S"
PLANTED = {
    "a worker's drain": lambda head, group: env_of(group, DRAIN).update(value="150"),
    "the head's drain": lambda head, group: head["template"]["spec"].update(
        terminationGracePeriodSeconds=30
    ),
    "the stop of a job": lambda head, group: env_of(head, STOP).update(value="3"),
    "object store": lambda head, group: group["rayStartParams"].pop("object-store-memory"),
    "shared memory": lambda head, group: group["template"]["spec"]["volumes"][2].update(
        emptyDir={"medium": "Memory", "sizeLimit": "400Gi"}
    ),
    "ephemeral storage": lambda head, group: head["template"]["spec"]["volumes"][1].update(
        emptyDir={}
    ),
}


@pytest.mark.parametrize("words", PLANTED)
def test_planted_times_and_sizes_are_caught(rays, words):
    document = copy.deepcopy(rays["jobs/pretrain"])
    cluster = cluster_of(document)
    PLANTED[words](cluster["headGroupSpec"], cluster["workerGroupSpecs"][0])
    assert words in [*late(document, save=5), *tight(document)]


def test_planted_numbers_of_nodes_and_labels_are_caught(rays):
    document = copy.deepcopy(rays["jobs/pretrain"])
    parallel = job_config(words_of(document)).parallel
    wanted = Requirements("moce", parallel.model_copy(update={"min_workers": None}), 4096, "GPU")
    assert len(wanted.best_seats(hosts_of(document))) == 32
    (group,) = cluster_of(document)["workerGroupSpecs"]
    group["replicas"] = 3
    assert wanted.best_seats(hosts_of(document)) is None
    # without the operator's feature the number is missing, so all pods have one label
    group["replicas"] = 4
    env_of(group, "RAY_OVERRIDE_LABELS")["value"] = json.dumps({GROUP_LABEL: "g"})
    assert wanted.best_seats(hosts_of(document)) is None


def test_the_network_cards_of_a_node_are_asked_for(rays):
    for name, document in rays.items():
        if "fast-network" in name:
            (group,) = cluster_of(document)["workerGroupSpecs"]
            (container,) = group["template"]["spec"]["containers"]
            assert amount(container["resources"]["limits"]["rdma/rdma_shared_device_a"]) == 1
            names = environment(container)
            assert names["NCCL_NET"] == "IB" and names["NCCL_SOCKET_IFNAME"]
            affinity = group["template"]["spec"]["affinity"]["podAffinity"]
            assert "requiredDuringSchedulingIgnoredDuringExecution" in affinity
            images = {
                c["image"]
                for c in [container, *group["template"]["spec"].get("initContainers", [])]
            }
            assert images == {"moce-dist:0.2.0"}
