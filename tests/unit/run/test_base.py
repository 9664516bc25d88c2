"""A run that goes on from another one: what must be the same, and what is refused."""

import pytest

from moce_dist.config import Config, Role, identity, make_config, roles
from moce_dist.run.artefacts import mark_complete
from moce_dist.run.directory import base_control, base_of, check_base, open_run, unlike
from moce_dist.settings import ConfigError

TREE = {
    "data": {"source": "folder:/old", "image_size": 32},
    "model": {"size": "tiny", "patch_size": 8},
    "moe": {"num_experts": 4},
    "cluster": {"num_clusters": 8},
    "parallel": {"num_groups": 2},
}


def changed(**sections):
    tree = {name: dict(section) for name, section in TREE.items()}
    tree["data"]["source"] = "folder:/new"
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return make_config(tree)


@pytest.fixture
def base(tmp_path):
    """A run that looks finished."""
    run = open_run(tmp_path / "base", make_config(TREE))
    for name in ("mae", "clusters", "moce"):
        (run.root / name).mkdir()
        mark_complete(run.root / name, {}, [])
    return run


def test_without_a_base_there_is_nothing_to_check(tmp_path):
    assert check_base(changed(), tmp_path) is None and base_of(changed()) is None


def test_what_was_free_may_change(base, tmp_path):
    config = changed(
        base_run=str(base.root),
        seed=3,
        model={"mask_ratio": 0.5},
        cluster={"with_prices": False, "iterations": 1, "balance": "off"},
        gate={"noise": 0.0},
        moce={"epochs": 3},
        parallel={"num_groups": 4},
    )
    assert check_base(config, tmp_path / "run") == base


def test_what_weights_and_clusters_mean_is_refused_with_all_fields(base, tmp_path):
    config = changed(
        base_run=str(base.root),
        model={"patch_size": 4, "decoder_depth": 2},
        moe={"num_experts": 8, "layers": [1]},
        cluster={"num_clusters": 16},
        gate={"combine": "prob"},
    )
    with pytest.raises(ConfigError) as caught:
        check_base(config, tmp_path / "run")
    message = str(caught.value)
    assert message.startswith(f"base_run {base.root}: its weights and clusters need its settings")
    for part in (
        "model.patch_size: 8 -> 4", "model.decoder_depth: 8 -> 2", "moe.num_experts: 4 -> 8",
        "moe.layers: None -> [1]", "cluster.num_clusters: 8 -> 16",
        "gate.combine: 'straight_through' -> 'prob'",
    ):  # fmt: skip
        assert part in message
    assert "data.source" not in message and "\n" not in message


def test_groups_matter_where_the_gate_keeps_to_them():
    shared = {"groups": "shared"}
    mine = changed(gate=shared, parallel={"num_groups": 4})
    assert unlike(mine, changed(gate=shared)) == ["parallel.num_groups: 2 -> 4"]
    assert unlike(changed(gate=shared), changed()) == ["gate.groups: 'free' -> 'shared'"]


def test_a_gate_that_does_not_learn_takes_no_learnt_weights():
    fixed = {"assign": "fixed"}
    assert unlike(changed(gate=fixed), changed()) == ["gate.assign: 'argmax' -> 'fixed'"]
    assert unlike(changed(gate=fixed), changed(gate=fixed)) == []


@pytest.mark.parametrize("name", ["mae", "clusters", "moce"])
def test_an_unfinished_base_is_refused(base, tmp_path, name):
    (base.root / name / "COMPLETE").unlink()
    with pytest.raises(ConfigError, match=f"base_run {base.root}: is not finished, {name} is not"):
        check_base(changed(base_run=str(base.root)), tmp_path / "run")


def test_a_control_of_the_base_counts_when_it_is_finished(base):
    assert base_control(None) is base_control(base) is None
    base.stage("control").mkdir()
    assert base_control(base) is None
    mark_complete(base.stage("control"), {}, [])
    assert base_control(base) == base.root / "control"


def test_other_requests_that_cannot_be_are_refused(base, tmp_path):
    named = str(base.root)
    with pytest.raises(ConfigError, match=r"base_run .*nothing: is not a run directory"):
        check_base(changed(base_run=str(tmp_path / "nothing")), tmp_path / "run")
    with pytest.raises(ConfigError, match="is this run itself"):
        check_base(changed(base_run=named), base.root)
    with pytest.raises(ConfigError, match=r"model\.init \(a\.pth\) must be null with base_run"):
        check_base(changed(base_run=named, model={"init": "a.pth"}), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"moe\.kind \(dense\) must be cluster"):
        check_base(changed(base_run=named, moe={"kind": "dense"}), tmp_path / "run")


def test_a_relative_base_lies_in_the_root_of_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("old", "runs/old"):
        assert base_of(changed(base_run=name)).root == tmp_path / "runs" / "old"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match=r"base_run runs/old: a submitted job needs"):
        base_of(changed(base_run="old"))


def test_the_base_is_part_of_the_identity():
    assert identity(changed(base_run="a")) != identity(changed(base_run="b"))


def test_what_may_change_is_part_of_the_identity_too():
    fields = identity(Config())
    free = {path for path, role in roles().items() if role is Role.CONTINUED}
    assert {"seed", "data.source", "moce.epochs", "model.init", "cluster.balance"} <= free
    assert free < fields.keys()
