"""The manifests agree with the configurations that they run, and their numbers with each other."""

import copy
import json
import re
import shlex
from pathlib import Path

import pytest
from in_process import load_script
from job_commands import TRAINING, job_config, run_config, words_of
from manifests import (
    JOBS,
    K8S,
    OVERLAYS,
    ROOT,
    cluster_of,
    operator_pods,
)
from plants import complaints

from moce_dist.config import to_yaml
from moce_dist.launch.nodes import GROUP_LABEL, Host, Requirements
from moce_dist.settings import ConfigError


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


ON_GPUS = [job for job in JOBS if job not in ("quickstart", "report")]


def crammed(limits, processes, cores):
    """Yield what a pod has too few cores for, or a node, of which the kubelet keeps some."""
    if int(limits["cpu"]) < int(limits["nvidia.com/gpu"]) * processes:
        yield "loader processes without a core"
    if int(limits["cpu"]) > cores - max(2, cores // 16):
        yield "a pod that no node has room for"


def hardware_cores(document):
    """Return what a worker's pod asks for, and the cores that a Hardware line gives its node.

    The line is that of the job's configuration; of vit_base's where that says nothing of cores.
    """
    (group,) = cluster_of(document)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    words = [word for word in words_of(document) if word.endswith(".yaml")]
    texts = [Path(word).read_text() for word in (*words, ROOT / "configs/pretrain/vit_base.yaml")]
    found = re.search(r"# Hardware: .*?(\d+) cores", "".join(texts))
    return limits, int(found[1])


@pytest.mark.parametrize("job", ON_GPUS)
def test_a_node_has_a_core_for_every_loader_process_and_room_for_its_pod(rays, job):
    document = rays[f"jobs/{job}"]
    limits, cores = hardware_cores(document)
    processes = job_config(words_of(document)).data.loader_processes
    assert list(crammed(limits, processes, cores)) == []
    planted = [
        *crammed({**limits, "cpu": "1"}, processes, cores),
        *crammed({**limits, "cpu": str(cores)}, processes, cores),
    ]
    assert planted == [*complaints(crammed)]


def unlike(document, ranks, places, groups):
    """Yield what a cluster has other than the dry run of its job says."""
    (group,) = cluster_of(document)["workerGroupSpecs"]
    hosts = hosts_of(document)
    if sum(host.slots for host in hosts) != ranks:
        yield "GPUs for the ranks"
    if group["replicas"] != places:
        yield "replicas for the places"
    if {host.group for host in hosts} != {f"g{n}" for n in range(groups)}:
        yield "labels for the groups"


def test_512_gpus_are_what_the_dry_run_says(rays, capsys):
    pretrain = load_script(ROOT / "jobs" / "pretrain.py")
    document = copy.deepcopy(rays["jobs/pretrain-512"])
    pretrain.main([*words_of(document)[3:], "--dry-run"])
    printed = capsys.readouterr().out
    said = re.search(r"ranks +(\d+) .* in (\d+) places, (\d+) groups", printed).groups()
    ranks, places, groups = map(int, said)
    assert (len(hosts_of(document)), ranks, places, groups) == (64, 512, 64, 64)
    assert list(unlike(document, ranks, places, groups)) == []
    # a node more than the configuration has groups
    cluster_of(document)["workerGroupSpecs"][0]["replicas"] += 1
    assert list(unlike(document, ranks, places, groups)) == [*complaints(unlike)]


@pytest.mark.parametrize("job", [job for job in JOBS if job != "report"])
def test_a_job_has_no_more_workers_than_its_cluster_has_room_for(rays, job):
    document = rays[f"jobs/{job}"]
    workers = job_config(words_of(document)).parallel.num_workers
    assert sum(host.slots for host in hosts_of(document)) == workers


def test_a_suite_has_a_gpu_for_every_task_and_less_than_a_node_too_many(rays):
    document = rays["jobs/transfer-suite"]
    hosts, tasks = hosts_of(document), len(job_config(words_of(document)).transfer.suite)
    assert tasks <= sum(host.slots for host in hosts) < tasks + hosts[0].slots


def request(document, folder):
    """Return the script of a job and its arguments, for an empty run in a folder."""
    words = words_of(document)
    assert words[:2] == ["python", str(K8S / "run.py")]
    script = load_script(ROOT / words[2].removeprefix(f"{ROOT}/"))
    place = words.index("--run") + 1
    run = words[place]
    assert run.startswith("/runs/")
    words[place] = str(folder)
    if not words[2].endswith("pretrain.py"):
        (folder / "config.yaml").write_text(to_yaml(run_config(run)))
    return script, [*words[3:], "--dry-run"]


@pytest.mark.parametrize("job", JOBS)
def test_entrypoint_is_a_command_that_its_job_takes(rays, job, capsys, tmp_path):
    script, words = request(rays[f"jobs/{job}"], tmp_path)
    if job.startswith("transfer"):
        # a request that is right gets as far as the weights, which are not here
        with pytest.raises(ConfigError, match=r"is missing; jobs/pretrain.py --run"):
            script.main(words)
    else:
        script.main(words)
        assert str(tmp_path) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("right", "wrong", "error"),
    [
        ("k8s/run.py", "run.py", AssertionError),
        ("jobs/pretrain.py", "jobs/pretrains.py", OSError),
        ("--config", "--configs", ConfigError),
        ("vit_base.yaml", "vit_bas.yaml", ConfigError),
        ("--run /runs/", "--run /tmp/", AssertionError),
        ("parallel.min_workers", "parallel.min_worker", ConfigError),
        ("num_groups=4", "num_groups=5", ConfigError),
    ],
)
def test_planted_words_of_an_entrypoint_are_caught(rays, right, wrong, error, tmp_path):
    document = copy.deepcopy(rays["jobs/pretrain"])
    words = document["spec"]["entrypoint"]
    assert words.count(right) == 1
    document["spec"]["entrypoint"] = words.replace(right, wrong)
    with pytest.raises(error):
        script, words = request(document, tmp_path)
        script.main(words)


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
    with pytest.raises(ValueError, match=r"^--cpus 3: 1 ranks of a place must fill whole nodes"):
        size.main(["--config", "configs/quickstart.yaml", "--cpus", "3"])


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
    env = group["template"]["spec"]["containers"][0]["env"]
    (entry,) = [entry for entry in env if entry["name"] == "RAY_OVERRIDE_LABELS"]
    entry["value"] = json.dumps({GROUP_LABEL: "g"})
    assert wanted.best_seats(hosts_of(document)) is None
