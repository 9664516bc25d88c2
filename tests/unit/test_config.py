"""Configuration: what is refused, how it is named, which fields decide what a run learns."""

import jsonschema
import pytest

from moce_dist.config import (
    Config,
    Role,
    identity,
    legal_worker_counts,
    load_config,
    make_config,
    roles,
    to_yaml,
)
from moce_dist.settings import ConfigError, flatten, parse_yaml


def refused(tree):
    with pytest.raises(ConfigError) as caught:
        make_config(tree)
    return str(caught.value)


def test_defaults_are_legal_and_survive_yaml():
    config = make_config({})
    assert config == Config()
    assert make_config(parse_yaml(to_yaml(config), "config.yaml")) == config


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"modle": {}}, "modle = {}: unknown key"),
        ({"model": {"sise": "tiny"}}, "model.sise = 'tiny': unknown key"),
        ({"mae": {"epochs": "many"}}, "mae.epochs = 'many': "),
        ({"mae": {"batch_size": "64"}}, "mae.batch_size = '64': "),
        ({"data": {"hflip": 1}}, "data.hflip = 1: "),
        ({"model": {"size": "giant"}}, "model.size = 'giant': "),
        ({"model": {"mask_ratio": 1.0}}, "model.mask_ratio = 1.0: "),
        ({"transfer": {"finetune": {"epochs": 0}}}, "transfer.finetune.epochs = 0: "),
        ({"mae": 3}, "mae = 3: "),
    ],
)
def test_mistake_is_named_with_path_and_value(tree, message):
    assert refused(tree).startswith(message)


def test_every_mistake_is_reported_at_once():
    message = refused({"seed": -1, "gate": {"noise": "loud", "typo": 1}, "mae": {"epochs": -1}})
    for part in ("seed = -1", "gate.noise = 'loud'", "gate.typo = 1: unknown key", "mae.epochs"):
        assert part in message
    assert "\n" not in message


def test_no_epochs_need_weights_to_take():
    assert refused({"mae": {"epochs": 0}}) == (
        "mae.epochs (0) needs model.init, the weights that are to be taken as they are"
    )
    assert make_config({"mae": {"epochs": 0}, "model": {"init": "a.pth"}}).mae.epochs == 0
    assert make_config({"mae": {"epochs": 0}, "base_run": "old"}).mae.epochs == 0
    assert refused({"moce": {"epochs": 0}}) == "moce.epochs (0) must be greater than 0"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"moe": {"layers": []}}, "moe.layers ([]) must name a block when moe.kind is cluster"),
        (
            {"data": {"image_size": 32}, "model": {"mask_ratio": 0.8}},
            "model.mask_ratio (0.8) must leave one of the 4 patches",
        ),
        (
            {"moe": {"layers": [5, 1]}},
            "moe.layers ([5, 1]) must be distinct blocks below 12, in asc",
        ),
        (
            {
                "gate": {"groups": "shared"},
                "cluster": {"num_clusters": 6},
                "moe": {"num_experts": 4},
                "parallel": {"num_groups": 4, "num_workers": 4},
            },
            "cluster.num_clusters (6) must be a multiple of parallel.num_groups (4) when gate.gr",
        ),
        ({"logging": {"profile_steps": [103, 100]}}, "logging.profile_steps ([103, 100]) must be"),
        ({"logging": {"profile_steps": [-3, 5]}}, "logging.profile_steps ([-3, 5]) must be"),
    ],
)
def test_what_would_fail_only_later_is_refused(tree, message):
    assert message in refused(tree)


def test_rules_of_experts_do_not_bind_a_dense_model():
    dense = {"kind": "dense", "num_experts": 6}
    tree = {"gate": {"assign": "balanced"}, "cluster": {"num_clusters": 10}, "moe": dense}
    make_config({**tree, "parallel": {"num_groups": 4, "num_workers": 4}})
    assert "moe.num_experts" in refused({**tree, "moe": {**dense, "kind": "cluster"}})


def test_an_override_wins_over_an_old_name_in_the_file(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text("transfer: {segment_channels: 512, segment_steps: 7}")
    for override in ("transfer.segmentation.channels=64", "transfer.segment_channels=64"):
        found = load_config(file, [override]).transfer.segmentation
        assert (found.channels, found.steps) == (64, 7)
    whole = load_config(file, ["transfer.segmentation={channels: 64}"]).transfer.segmentation
    assert whole.channels == 64


def test_an_old_name_beside_an_empty_section_is_read(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text("transfer:\n  segmentation:\n  segment_channels: 64\n")
    assert load_config(file, []).transfer.segmentation.channels == 64
    file.write_text("transfer:\n  segmentation: 3\n  segment_channels: 64\n")
    with pytest.raises(ConfigError, match=r"transfer\.segment"):
        load_config(file, [])


def test_broken_rules_between_fields_are_reported_at_once():
    tree = {
        "data": {"image_size": 100},
        "model": {"size": "tiny", "num_heads": 5, "decoder_width": 100},
        "moe": {"layers": [3, 3, 12], "num_experts": 6},
        "parallel": {"num_groups": 4, "num_workers": 4},
    }
    message = refused(tree)
    assert "data.image_size (100) must be a multiple of model.patch_size (16)" in message
    assert "model.width (192) must be a multiple of model.num_heads (5)" in message
    assert "model.decoder_width (100)" in message
    assert "moe.layers ([3, 3, 12]) must be distinct blocks below 12" in message
    assert "moe.num_experts (6) must be a multiple of parallel.num_groups (4)" in message


def test_illegal_ranks_are_refused_with_the_legal_ones_named():
    tree = {
        "mae": {"batch_size": 64},
        "moce": {"batch_size": 64},
        "parallel": {"num_groups": 4, "num_workers": 3},
    }
    assert refused(tree) == (
        "parallel.num_workers (3) must be a multiple or a divisor of parallel.num_groups (4); "
        "legal here: [1, 2, 4, 8, 16]"
    )


def test_batch_must_divide_over_ranks_groups_and_micro_batches():
    tree = {
        "mae": {"batch_size": 64},
        "moce": {"batch_size": 60},
        "parallel": {"num_groups": 4, "num_workers": 4, "micro_batches": 2},
    }
    message = refused(tree)
    assert message.startswith("moce.batch_size (60) must be a multiple of")
    assert "(8)" in message and "mae.batch_size" not in message


@pytest.mark.parametrize("name", ["", "dino", "timm:", "folder/weights.npz"])
def test_encoder_is_our_own_a_timm_name_or_a_file_of_weights(name):
    message = refused({"cluster": {"encoder": name}})
    assert message.startswith(f"cluster.encoder = {name!r}: string should match pattern '^(mae|")
    for legal in ("mae", "timm:vit_base_patch14_dinov2", "a/b.pth", "b.safetensors"):
        assert make_config({"cluster": {"encoder": legal}}).cluster.encoder == legal


def test_bounds_of_elastic_workers_must_be_in_order():
    message = refused({"parallel": {"num_workers": 2, "min_workers": 4}})
    assert message == "parallel.min_workers (4) must not be more than parallel.num_workers (2)"


def test_requests_are_given_up_before_the_loader_is():
    message = refused({"data": {"read_deadline_s": 50, "stall_timeout_s": 50}})
    assert message == "data.read_deadline_s (50) must be below 50, data.stall_timeout_s"


def test_balanced_gate_needs_clusters_that_divide():
    message = refused(
        {
            "gate": {"assign": "balanced"},
            "cluster": {"num_clusters": 10},
            "moe": {"num_experts": 4},
        }
    )
    assert "cluster.num_clusters (10) must be a multiple of moe.num_experts (4)" in message


def test_legal_worker_counts_are_multiples_or_divisors_that_divide_the_batch():
    assert legal_worker_counts(4, 48, 1, 16) == [1, 2, 4, 8, 12, 16]
    assert legal_worker_counts(4, 48, 2, 16) == [1, 2, 4, 8, 12]
    assert legal_worker_counts(3, 7, 1, 12) == []


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", "1.0e-4", ".1e-3", "0.0001"])
def test_exponents_are_numbers_in_yaml_and_in_overrides(text, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"mae: {{base_lr: {text}}}")
    assert load_config(file).mae.base_lr == 1e-4
    assert load_config(None, [f"mae.base_lr={text}"]).mae.base_lr == 1e-4


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("seed: 3\nmae: {epochs: 2}\n")
    config = load_config(file, ["mae.epochs=5", "data.source=sample:digits", "moe.layers=[1, 3]"])
    assert (config.seed, config.mae.epochs, config.data.source) == (3, 5, "sample:digits")
    assert config.moe_layers == (1, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mae.epochs", "--set mae.epochs: must read a.b=value"),
        ("=3", "--set =3: must read a.b=value"),
        ("seed.x.y=3", "seed"),
        ("moe.layers=[1", "--set moe.layers: not valid YAML"),
        ("mae.epoch=3", "mae.epoch = 3: unknown key"),
    ],
)
def test_bad_override_is_named(override, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "must be a mapping of sections, is a list"),
        ("a: [", "not valid YAML"),
        ("when: 2026-01-01", "when = 2026-01-01: unknown key"),
    ],
)
def test_file_that_is_no_configuration_is_refused(text, message, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00seed")
    with pytest.raises(ConfigError, match=r"binary\.yaml"):
        load_config(binary)


def test_empty_file_is_the_defaults(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("# nothing\n")
    assert load_config(file) == Config()


def test_every_field_has_a_role_and_runtime_fields_are_no_part_of_the_identity():
    assert roles().keys() == flatten(Config().model_dump(mode="json")).keys()
    mine = identity(Config())
    assert mine.keys() == {path for path, role in roles().items() if role is not Role.RUNTIME}
    sections = ("run.", "checkpoint.", "logging.", "transfer.", "hardware.")
    assert not any(path.startswith(sections) for path in mine)
    assert "parallel.num_workers" not in mine and "transfer.finetune.epochs" not in mine
    for path in ("seed", "data.source", "mae.batch_size", "cluster.encoder", "gate.noise"):
        assert path in mine


def test_identity_ignores_ranks_and_sees_the_seed():
    base = identity(make_config({}))
    assert identity(make_config({"parallel": {"num_workers": 4}})) == base
    assert identity(make_config({"seed": 1})) != base


def test_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Config().mae.epochs = 3


@pytest.mark.parametrize(
    ("depth", "layers"), [(4, (1, 3)), (12, (1, 3, 5, 7, 9, 11)), (3, (0, 2)), (1, (0,))]
)
def test_every_second_block_carries_experts_the_last_included(depth, layers):
    assert make_config({"model": {"depth": depth}}).moe_layers == layers


def test_json_schema_is_valid_and_covers_every_field():
    schema = Config.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate({"mae": {"base_lr": 1e-4}, "data": {"source": "sample:quickstart"}})
    assert list(validator.iter_errors({"mae": {"epoch": 3}}))

    def documented(node, path=""):
        node = schema["$defs"][node["$ref"].split("/")[-1]] if "$ref" in node else node
        if "properties" not in node:
            return {path}
        return {
            leaf
            for name, child in node["properties"].items()
            for leaf in documented(child, f"{path}.{name}" if path else name)
        }

    assert documented(schema) == set(flatten(Config().model_dump(mode="json")))


def test_every_field_has_a_doc_line():
    def undocumented(model, prefix=""):
        for name, field in model.model_fields.items():
            nested = getattr(field.annotation, "model_fields", None)
            if nested is not None:
                yield from undocumented(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                yield f"{prefix}{name}"

    assert list(undocumented(Config)) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("transfer.segment_crop", "transfer.segmentation.crop"),
        ("transfer.detect_batch_size", "transfer.detection.batch_size"),
    ],
)
def test_an_old_name_is_taken_and_said_to_be_old(old, new, tmp_path, caplog):
    file = tmp_path / "config.yaml"
    file.write_text(f"transfer: {{{old.partition('.')[2]}: 64}}")
    for config in (load_config(None, [f"{old}=64"]), load_config(file)):
        assert flatten(config.model_dump())[new] == 64
    assert f"{old} is now called {new}" in caplog.text
    with pytest.raises(ConfigError, match=rf"{new} = x: input should be"):
        load_config(None, [f"{old}=x"])
    with pytest.raises(ConfigError, match=r"transfer\.segmentation\.none = 1: unknown key"):
        load_config(None, ["transfer.segment_none=1"])


def test_a_field_that_is_named_with_its_default_changes_no_other():
    usual = Config()
    for path, value in flatten(usual.model_dump(mode="json")).items():
        *parents, last = path.split(".")
        tree = {last: value}
        for parent in reversed(parents):
            tree = {parent: tree}
        assert make_config(tree) == usual, path
