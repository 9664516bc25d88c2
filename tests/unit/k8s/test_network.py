"""Who may reach whom under the network policies, asked as a network plugin would decide."""

import copy
import ipaddress
from itertools import chain

import pytest
from manifests import operator_pods

OURS = {"kubernetes.io/metadata.name": "moce"}
OPERATOR = ({"app.kubernetes.io/name": "kuberay-operator"}, {"kubernetes.io/metadata.name": "ops"})
PROMETHEUS = (
    {"app.kubernetes.io/name": "prometheus"},
    {"kubernetes.io/metadata.name": "monitoring"},
)
STRANGER = ({"app": "shell"}, OURS)
FOREIGNER = ({"app": "shell"}, {"kubernetes.io/metadata.name": "default"})
KUBE_DNS = ({"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"})
REDIS = ({"app.kubernetes.io/name": "redis"}, OURS)


def policies_of(rendered, *setups):
    documents = chain(*(rendered[name] for name in setups))
    return [d["spec"] for d in documents if d["kind"] == "NetworkPolicy"]


@pytest.fixture(scope="session")
def pods(rays):
    """(labels, namespace labels) of the pods of a job, by their kind."""
    made = [labels for labels, _ in operator_pods(rays["jobs/pretrain"])]
    names = ("head", *["worker"] * (len(made) - 2), "submitter")
    return {name: (labels, OURS) for name, labels in zip(names, made, strict=True)}


def matches(selector, labels):
    assert set(selector) <= {"matchLabels", "matchExpressions"}
    rules = selector.get("matchExpressions", [])
    assert all(rule["operator"] == "In" for rule in rules)
    is_in = all(labels.get(rule["key"]) in rule["values"] for rule in rules)
    return is_in and selector.get("matchLabels", {}).items() <= labels.items()


def is_peer(rule, other):
    """Tell whether a peer of a rule is a pod (labels, namespace labels) or an address."""
    if "ipBlock" in rule:
        block = ipaddress.ip_network(rule["ipBlock"]["cidr"])
        return isinstance(other, str) and ipaddress.ip_address(other) in block
    if isinstance(other, str):
        return False
    labels, namespace = other
    is_there = (
        matches(rule["namespaceSelector"], namespace)
        if "namespaceSelector" in rule
        else namespace == OURS
    )
    return is_there and matches(rule.get("podSelector", {}), labels)


def is_open(policies, direction, pod, other, port, protocol):
    """Tell whether policies let traffic of a pod in one direction."""
    if isinstance(pod, str) or pod[1] != OURS:
        return True
    mine = [
        p for p in policies if matches(p["podSelector"], pod[0]) and direction in p["policyTypes"]
    ]
    peers = {"Ingress": "from", "Egress": "to"}[direction]
    rules = [rule for policy in mine for rule in policy.get(direction.lower(), [])]
    return not mine or any(
        (peers not in rule or any(is_peer(peer, other) for peer in rule[peers]))
        and ("ports" not in rule or {"port": port, "protocol": protocol} in rule["ports"])
        for rule in rules
    )


def may(policies, source, target, port, protocol="TCP"):
    """Tell whether a source reaches a port of a target."""
    return is_open(policies, "Egress", source, target, port, protocol) and is_open(
        policies, "Ingress", target, source, port, protocol
    )


def test_a_job_reaches_what_it_needs(rendered, pods):
    policies = policies_of(rendered, "setup")
    head, worker, submitter = pods["head"], pods["worker"], pods["submitter"]
    for port in (6379, 10001, 8265, 29500):
        assert may(policies, worker, head, port) and may(policies, head, worker, port)
        assert may(policies, worker, worker, port)
    assert may(policies, submitter, head, 8265) and may(policies, OPERATOR, head, 8265)
    assert may(policies, worker, "203.0.113.7", 443) and may(policies, head, REDIS, 6379)


def test_what_clears_a_redis_after_the_cluster_reaches_it(rendered):
    # the head's pod with another type of node
    cleanup = ({"ray.io/node-type": "redis-cleanup", "ray.io/is-ray-node": "yes"}, OURS)
    policies = policies_of(rendered, "setup")
    assert may(policies, cleanup, REDIS, 6379) and not may(policies, STRANGER, REDIS, 6379)


def test_the_autoscaler_reaches_the_api_server(rendered, pods):
    policies = policies_of(rendered, "setup", "setup/autoscaling")
    assert may(policies, pods["head"], "10.0.0.1", 6443)
    assert not may(policies, pods["worker"], "10.0.0.1", 6443)
    assert not may(policies_of(rendered, "setup"), pods["head"], "10.0.0.1", 6443)


@pytest.mark.parametrize("resolver", [KUBE_DNS, "169.254.20.10", "169.254.169.254", "10.96.0.10"])
def test_names_are_resolved_wherever_the_resolver_is(rendered, pods, resolver):
    for pod in pods.values():
        for protocol in ("UDP", "TCP"):
            assert may(policies_of(rendered, "setup"), pod, resolver, 53, protocol)


def test_nobody_else_reaches_a_job(rendered, pods):
    policies = policies_of(rendered, "setup")
    for other in (STRANGER, FOREIGNER, pods["submitter"], "203.0.113.7"):
        for port in (6379, 10001, 52365, 8080):
            assert not may(policies, other, pods["head"], port)
            assert not may(policies, other, pods["worker"], port)
    assert not may(policies, STRANGER, pods["head"], 8265)
    assert not may(policies, FOREIGNER, pods["head"], 8265)
    assert not may(policies, pods["worker"], "203.0.113.7", 22)
    assert not may(policies, STRANGER, "203.0.113.7", 443)


def test_the_pod_for_files_fetches_by_https_and_nobody_reaches_it(rendered, pods, files):
    policies = policies_of(rendered, "setup")
    pod = (files["files"]["metadata"]["labels"], OURS)
    assert may(policies, pod, "203.0.113.7", 443) and may(policies, pod, KUBE_DNS, 53, "UDP")
    for port in (22, 80, 6443):
        assert not may(policies, pod, "203.0.113.7", port)
    for port in (6379, 8265, 10001):
        assert not may(policies, pod, pods["head"], port)
    for other in (*pods.values(), STRANGER, FOREIGNER, "203.0.113.7"):
        assert not may(policies, other, pod, 8080)
    # without its label it is like any other
    assert not may(policies, ({"app": "files"}, OURS), "203.0.113.7", 443)


def test_scraping_and_buckets_are_opened_by_their_setups_alone(rendered, pods):
    closed = policies_of(rendered, "setup")
    scraped = policies_of(rendered, "setup", "setup/monitoring")
    stored = policies_of(rendered, "setup", "setup/s3")
    for node in (pods["head"], pods["worker"]):
        assert may(scraped, PROMETHEUS, node, 8080) and not may(closed, PROMETHEUS, node, 8080)
        assert not may(scraped, FOREIGNER, node, 8080)
        for address, port in (
            ("169.254.169.254", 80),
            ("169.254.169.252", 988),
            ("169.254.170.23", 80),
            ("10.1.2.3", 9000),
        ):
            assert may(stored, node, address, port) and not may(closed, node, address, port)
    assert not may(stored, pods["submitter"], "169.254.169.254", 80)


def test_planted_hole_and_planted_wall_are_seen(rendered, pods):
    policies = copy.deepcopy(policies_of(rendered, "setup"))
    (head,) = [p for p in policies if "ingress" in p and "head" in str(p["podSelector"])]
    head["ingress"].append({"ports": [{"port": 6379, "protocol": "TCP"}]})
    assert may(policies, FOREIGNER, pods["head"], 6379)
    head["ingress"][0]["from"].pop(0)
    assert not may(policies, pods["submitter"], pods["head"], 8265)


def test_monitor_finds_the_ports_that_policies_open(rendered, rays):
    (monitor,) = [d for d in rendered["setup/monitoring"] if d["kind"] == "PodMonitor"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for labels, template in operator_pods(rays["jobs/pretrain"]):
        if matches(monitor["spec"]["selector"], labels):
            ports = template["spec"]["containers"][0]["ports"]
            assert {"name": endpoint["port"], "containerPort": 8080} in ports
