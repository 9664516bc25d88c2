"""The schema that editors complete a benchmark's YAML from."""

import json
from pathlib import Path

import pytest
import yaml
from benches.settings import BenchConfig, json_schema
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from moce_dist.config import Config

CONFIGS = Path(__file__).parents[3] / "configs"
BENCHES = sorted((CONFIGS / "bench").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator():
    """Validate by the committed files, which refer to each other by relative path."""

    def retrieve(uri):
        content = json.loads(Path(uri.removeprefix("file://")).read_text())
        return Resource.from_contents(content, default_specification=DRAFT202012)

    schema = {"$ref": (CONFIGS / "bench" / "schema.json").as_uri()}
    return Draft202012Validator(schema, registry=Registry(retrieve=retrieve))


def test_committed_schema_is_the_one_of_the_code():
    assert json.loads((CONFIGS / "bench" / "schema.json").read_text()) == json_schema()


def test_schema_has_only_what_is_of_a_benchmark():
    assert list(json_schema()["$defs"]) == ["Measuring"]
    whole, of_jobs = BenchConfig.model_json_schema(), Config.model_json_schema()
    assert whole["properties"].keys() - of_jobs["properties"].keys() == {"bench"}
    for name, field in of_jobs["properties"].items():
        assert whole["properties"][name] == field, "a benchmark changes no field of the jobs"


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.stem)
def test_configurations_are_valid(validator, path):
    validator.validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("tree", "where"),
    [
        ({"sede": 1}, []),
        ({"seed": "one"}, ["seed"]),
        ({"model": {"widht": 64}}, ["model"]),
        ({"transfer": {"suite": [{"task": "dtd", "dta": "dtd"}]}}, ["transfer", "suite", 0]),
        ({"bench": {"round": 2}}, ["bench"]),
        ({"bench": {"rounds": 0}}, ["bench", "rounds"]),
    ],
)
def test_wrong_fields_are_refused(validator, tree, where):
    (error,) = validator.iter_errors(tree)
    assert list(error.absolute_path) == where
