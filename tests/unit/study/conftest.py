"""A study of two domains on paper: nothing of it is at hand."""

import json
from pathlib import Path

import pytest

from moce_dist.study.plan import Planner, Source, wanted_sources
from moce_dist.study.request import read_study

STUDY = {
    "config": {
        "data": {"source": "folder:pretrain", "image_size": 32, "holdout_fraction": 0.0},
        "model": {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8},
        "moe": {"num_experts": 2, "layers": [1]},
        "cluster": {"num_clusters": 4},
        "mae": {"epochs": 10, "warmup_epochs": 1, "batch_size": 50},
        "moce": {"epochs": 10, "warmup_epochs": 2, "batch_size": 50},
    },
    "data": "/data",
    "images": {"mae": 1000, "moce": 5000},
    "seeds": [0, 1],
    "reference": "mae",
    "arms": {
        "mae": {"backbone": "mae"},
        "moce": {},
        "average": {"backbone": "moce:average"},
        "soft": {"set": {"cluster.balance": "soft"}},
        "four": {"set": {"moe": {"num_experts": 4}}},
        "largest": {"set": {"transfer.select": "largest_cluster"}},
        "own": {"backbone": "mae", "domains": "own_equal_images"},
        "own_steps": {"backbone": "mae", "domains": "own_equal_steps"},
    },
    "tasks": [
        {"task": "imagefolder", "name": "sprites", "domain": "sprites"},
        {"task": "imagefolder", "name": "emoji", "data": "tasks/emoji"},
    ],
    "protocols": ["knn", "logistic10"],
}
SIZES = {"all": 1000, "sprites": 250}


@pytest.fixture
def read(tmp_path):
    """Read a study of these fields, as a user's file."""

    def read(*overrides, **fields):
        path = tmp_path / "study.yaml"
        path.write_text(json.dumps({**STUDY, **fields}))
        return read_study(path, overrides)

    return read


@pytest.fixture
def plan():
    """Plan a study over data sets of `SIZES` images."""

    def plan(study, split="test", **sizes):
        known = SIZES | sizes
        sources = {
            name: Source(name, Path("/data") / name, known[name.rpartition("-")[0]])
            for name in wanted_sources(study)
        }
        return Planner(study, sources, Path("/out"), split).plan()

    return plan
