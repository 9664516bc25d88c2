"""Custom resources as an API server checks them: defaults, strict structure, list keys, CEL rules.

Source: Kubernetes' rules for structural schemas. Unknown fields are errors, as with
`kubectl --validate=strict`; rules about `oldSelf` are of updates and say nothing of a new object.
"""

import copy
import gzip
from functools import cache
from pathlib import Path

import celpy
import jsonschema
import yaml
from celpy.adapter import json_to_cel
from manifests import LOADER

CRDS = Path(__file__).parent / "crds"


class Definition:
    """One version of one kind."""

    def __init__(self, scope, version):
        self.scope, self.subresources = scope, version.get("subresources", {})
        self.schema = version["schema"]["openAPIV3Schema"]
        self.schema["properties"]["metadata"] = {
            "type": "object",
            "x-kubernetes-preserve-unknown-fields": True,
        }
        self.validator = jsonschema.Draft202012Validator(close(self.schema))

    def errors(self, document):
        """List everything that an API server would refuse."""
        document = fill(self.schema, copy.deepcopy(document))
        found = [f"{e.json_path}: {e.message}" for e in self.validator.iter_errors(document)]
        return found or [*rule_errors(self.schema, document, "$")]


def read_definitions():
    """Read all definitions: {(apiVersion, kind): Definition}."""
    found = {}
    for path in sorted(CRDS.glob("*.yaml.gz")):
        spec = yaml.load(gzip.decompress(path.read_bytes()), LOADER)["spec"]
        for version in spec["versions"]:
            if version["served"] and not version.get("deprecated"):
                key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
                found[key] = Definition(spec["scope"], version)
    return found


def close(schema):
    """Make a structural schema strict: what it does not name is an error."""
    closed = {k: v for k, v in schema.items() if not k.startswith("x-kubernetes")}
    closed.pop("default", None)
    if schema.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
        closed["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in schema:
        closed["properties"] = {k: close(v) for k, v in schema["properties"].items()}
    if schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    if isinstance(schema.get("additionalProperties"), dict):
        closed["additionalProperties"] = close(schema["additionalProperties"])
    if "items" in schema:
        closed["items"] = close(schema["items"])
    return closed


def fill(schema, value):
    """Drop nulls and apply defaults, as an API server does before it validates."""
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if v is not None}
        others = schema.get("additionalProperties")
        children = schema.get("properties", {})
        for name, child in children.items():
            if "default" in child and name not in value:
                value[name] = copy.deepcopy(child["default"])
        for name in value:
            child = children.get(name, others if isinstance(others, dict) else {})
            value[name] = fill(child, value[name])
    elif isinstance(value, list):
        value = [fill(schema.get("items", {}), child) for child in value]
    return value


@cache
def program(rule):
    """Compile a CEL rule."""
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def rule_errors(schema, value, path):
    """Yield breaches of CEL rules and of the uniqueness of lists."""
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"]:
            holds = program(rule["rule"]).evaluate({"self": json_to_cel(value)})
            if not holds:
                yield f"{path}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        others = schema.get("additionalProperties")
        for name, child in value.items():
            known = schema.get("properties", {}).get(name, others)
            if isinstance(known, dict):
                yield from rule_errors(known, child, f"{path}.{name}")
    elif isinstance(value, list):
        yield from repeated(schema, value, path)
        for number, child in enumerate(value):
            yield from rule_errors(schema.get("items", {}), child, f"{path}[{number}]")


def repeated(schema, value, path):
    """Yield elements of a set or a map list that stand twice."""
    keys = schema.get("x-kubernetes-list-map-keys")
    if schema.get("x-kubernetes-list-type") == "map":
        names = [str([item.get(key) for key in keys]) for item in value]
    elif schema.get("x-kubernetes-list-type") == "set":
        names = [str(item) for item in value]
    else:
        return
    for name in {name for name in names if names.count(name) > 1}:
        yield f"{path}: {name} stands twice"
