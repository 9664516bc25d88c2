"""The configuration of `jobs/bench.py`: that of all jobs, and how a benchmark measures.

With jobs/ on the path, python -m benches.settings prints the schema that editors complete from.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field

from moce_dist.config import Config, checked
from moce_dist.settings import Section, read_tree, validate


class Measuring(Section):
    """How `jobs/bench.py` measures."""

    rounds: int = Field(8, ge=1)
    """Measured rounds; every variant runs once a round."""
    warmup_rounds: int = Field(2, ge=0)
    """Rounds that are run and not counted."""
    communication_over_compute: float = Field(4, gt=0)
    """Of a token-routed step, to which `exchange` slows its link; about an H100 on 25 GbE."""
    rows: int = Field(200_000, ge=1)
    """Rows of the features that `cluster` makes."""
    dim: int = Field(384, ge=1)
    """Width of these features."""
    variants: tuple[str, ...] = ()
    """`cluster`: names of the variants that are run; all of them by default."""
    images: int = Field(32, ge=1)
    """`decode`, `stream`: different photographs; a round of `decode` takes each of them once."""
    crops: int = Field(8, ge=1)
    """`decode`: crops of every photograph that are compared with the reference's."""
    samples: int = Field(8192, ge=64)
    """`stream`: samples in the tars."""
    epoch_samples: int = Field(1_000_000, ge=4096)
    """`stream`: samples of the epoch that is resumed in its middle."""
    batches: int = Field(24, ge=1)
    """`stream`: batches that a round takes."""
    reshard_gib: float = Field(10, gt=0)
    """`reshard`: size of the tars that are rewritten, GiB."""
    step_ms: float = Field(25, gt=0)
    """`routing`: time of a step of the variants whose step does not depend on the table's time."""
    index_samples: int = Field(10**8, ge=1)
    """`index`: samples of the index."""
    against: str | None = None
    """`start`: folder of another copy of the project, whose commands run turn about with ours."""
    folder: str | None = None
    """`stream`, `reshard`, `index`: folder on the disk to be measured; else the temporary one."""


class BenchConfig(Config):
    """The whole of a benchmark's request."""

    bench: Measuring = Measuring()


def make_bench_config(tree: dict[str, Any]) -> BenchConfig:
    """Build a checked configuration from nested dicts.

    Raises:
        ConfigError: naming every unknown key, wrong type and broken rule.
    """
    return checked(validate(BenchConfig, tree))


def load_bench_config(path: Path | None, overrides: Iterable[str] = ()) -> BenchConfig:
    """Read a YAML file of differences and apply `a.b=value` overrides.

    Raises:
        ConfigError: the file is missing, is not a mapping, or holds a mistake.
    """
    return make_bench_config(read_tree(path, overrides))


def json_schema() -> dict[str, Any]:
    """Make the JSON schema of a benchmark; it takes the fields of all jobs from their schema."""
    schema, of_jobs = BenchConfig.model_json_schema(), Config.model_json_schema()
    for name in of_jobs["properties"]:
        schema["properties"][name] = {"$ref": f"../schema.json#/properties/{name}"}
    own = schema["$defs"].keys() - of_jobs["$defs"].keys()
    return {**schema, "$defs": {name: schema["$defs"][name] for name in sorted(own)}}


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=1))
