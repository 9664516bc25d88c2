"""YAML and --set mean what a reader sees."""

import pytest

from moce_dist.config import load_config, make_config, to_yaml
from moce_dist.settings import ConfigError, flatten, parse_yaml, read_tree


def value(config, path):
    return flatten(config.model_dump())[path]


def from_file(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    return load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        # words, as far as the field makes sense of them
        ("cluster.balance", "off", "off"),
        ("data.hflip", "off", False),
        ("data.hflip", "No", False),
        ("data.hflip", "YES", True),
        ("parallel.use_gpu", "auto", "auto"),
        ("parallel.use_gpu", "off", False),
        ("base_run", "off", "off"),
        ("base_run", "true", "true"),
        ("base_run", "null", None),
        ("base_run", "~", None),
        ("base_run", "", None),
        ("base_run", "'null'", "null"),
        # numbers that are names
        ("base_run", "2026-11-29", "2026-11-29"),
        ("base_run", "2026-11-29 10:00:00", "2026-11-29 10:00:00"),
        ("base_run", "007", "007"),
        ("base_run", "1e3", "1e3"),
        ("base_run", "1_000", "1_000"),
        ("base_run", "12:30", "12:30"),
        ("base_run", "0x1F", "0x1F"),
        ("base_run", ".inf", ".inf"),
        # numbers
        ("seed", "010", 10),
        ("seed", "1_000", 1000),
        ("mae.epochs", "010", 10.0),
        ("mae.epochs", "1_000.5", 1000.5),
        ("mae.base_lr", "1e-4", 1e-4),
        ("mae.base_lr", ".5", 0.5),
        ("mae.base_lr", "1.", 1.0),
        ("parallel.zero_stage", "1", 1),
        ("parallel.min_workers", "null", None),
        ("parallel.min_workers", "1", 1),
        ("mae.betas", "[0, 0.999]", (0.0, 0.999)),
        ("moe.layers", "[1, 3]", (1, 3)),
        ("moe.layers", "null", None),
    ],
)
def test_text_is_what_its_field_makes_of_it(path, text, expected, tmp_path):
    config = load_config(None, [f"{path}={text}"])
    assert value(config, path) == expected and type(value(config, path)) is type(expected)
    *sections, field = path.split(".")
    inner = f"{field}: {text}"
    for section in sections:
        inner = f"{section}:\n  {inner}"
    assert value(from_file(tmp_path, inner), path) == expected
    # what a run writes down is read as the same
    assert make_config(parse_yaml(to_yaml(config), "config.yaml")) == config


@pytest.mark.parametrize(
    ("path", "text", "rule"),
    [
        ("seed", "2026-11-29", "valid integer"),
        ("seed", "1:30", "valid integer"),
        ("seed", "1e3", "valid integer"),
        ("seed", "0x1F", "valid integer"),
        ("seed", "'3'", "valid integer"),
        ("seed", "3 4", "valid integer"),
        ("seed", "9223372036854775808", "valid integer"),
        ("mae.batch_size", "1" + 60 * "0", "valid integer"),
        ("mae.epochs", "1e300", "less than or equal to 1000000"),
        ("mae.epochs", "1:30", "valid number"),
        ("mae.epochs", "off", "valid number"),
        ("mae.epochs", ".inf", "finite number"),
        ("mae.epochs", "1e999", "finite number"),
        ("mae.base_lr", ".NaN", "finite number"),
        ("mae.weight_decay", "+.INF", "finite number"),
        ("transfer.finetune.layer_decay", ".nan", "finite number"),
        ("mae.base_lr", "inf", "valid number"),
        ("mae.betas", "[0.9, 1.0]", "less than 1"),
        ("mae.betas", "[-0.1, 0.9]", "greater than or equal to 0"),
        ("mae.betas", "[0.9]", "field required"),
        ("data.hflip", "maybe", "valid boolean"),
        ("data.hflip", "1", "valid boolean"),
        ("parallel.use_gpu", "maybe", "valid boolean, or input should be 'auto'"),
        ("parallel.zero_stage", "3", "0, 1 or 2"),
        ("moe.layers", "[1, x]", "valid integer"),
        ("data.sauce", "off", "unknown key"),
    ],
)
def test_refused_values_are_shown_as_they_were_written(path, text, rule, tmp_path):
    section, _, field = path.rpartition(".")
    tree = f"{field}: {text}"
    for part in reversed(section.split(".") if section else []):
        tree = f"{part}: {{{tree}}}"
    for read in (lambda: load_config(None, [f"{path}={text}"]), lambda: from_file(tmp_path, tree)):
        with pytest.raises(ConfigError) as caught:
            read()
        message = str(caught.value)
        assert message.startswith(path) and rule in message and message.count(path) == 1
    if "[" not in text:
        with pytest.raises(ConfigError) as caught:
            load_config(None, [f"{path}={text}"])
        assert str(caught.value).startswith(f"{path} = {text}: ")


@pytest.mark.parametrize(
    "text",
    ["folder:/photos #2 of May", "folder:/a: b", "folder:/100% {x} 'q'", "folder:/[v1] a, b",
     "folder:/a\\b", "folder:/*&!|>@`", "'a' and 'b'", '"', "- a", "{a: b}", "folder:/x ", "a=b=c"],
)  # fmt: skip
def test_override_of_a_text_field_is_the_text_as_it_was_said(text):
    assert load_config(None, [f"data.source={text}"]).data.source == text
    assert load_config(None, [f"base_run={text}"]).base_run == text


@pytest.mark.parametrize("quoted", ["'folder:/a #2'", '"folder:/a #2"', '"folder:/a\\u0020#2"'])
def test_quotes_around_the_whole_are_taken_off(quoted):
    assert load_config(None, [f"data.source={quoted}"]).data.source == "folder:/a #2"


def test_override_of_a_number_takes_no_comment():
    with pytest.raises(ConfigError, match=r"mae\.epochs = 3 # many: "):
        load_config(None, ["mae.epochs=3 # many"])
    assert load_config(None, ["mae.epochs= 3 "]).mae.epochs == 3


def test_override_of_a_section_and_of_a_field_in_it():
    config = load_config(None, ["mae={epochs: 3, optimizer: sgd}", "mae.warmup_epochs=1"])
    assert (config.mae.epochs, config.mae.warmup_epochs, config.mae.optimizer) == (3, 1, "sgd")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nmae:\n  epochs: 3\n  base_lr: 1\n  epochs: 4\n", "epochs .*line 3 and line 5"),
        ("mae: {epochs: 3}\nseed: 1\nmae: {base_lr: 1}\n", "mae .*line 1 and line 3"),
        ("mae: {epochs: 3, epochs: 3}", "epochs .*line 1 and line 1"),
        ("seed: 1\n'seed': 2\n", "seed .*line 1 and line 2"),
        ("transfer:\n  suite:\n  - task: a\n    task: b\n", "task .*line 3 and line 4"),
    ],
)
def test_key_that_stands_twice_is_refused_with_both_lines(text, message, tmp_path):
    with pytest.raises(ConfigError, match=rf"c\.yaml: {message}"):
        from_file(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data:\n  source: folder:/a: b",
            r"c\.yaml: not valid YAML: .*line 2, column 20; .*quotes",
        ),
        ("data: {source: [a]}", r"data\.source = \['a'\]: .*valid string; .*needs quotes"),
        ("seed: !!python/name:os.system", "not valid YAML: could not determine a constructor"),
        ("x: &x [*x]", "recursive"),
        ("{[1]: 3}", "a key must be a word"),
        ("just words", "must be a mapping of sections, is a text"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
    ],
)
def test_what_is_no_configuration_is_refused(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        from_file(tmp_path, text)


def test_empty_sections_aliases_and_merges(tmp_path):
    text = (
        "mae: &m\n  epochs: 3\n  # more\nmoce:\n  <<: *m\n  warmup_epochs: 1\ndata:\n  # nothing\n"
    )
    config = from_file(tmp_path, text)
    assert (config.mae.epochs, config.moce.epochs, config.moce.warmup_epochs) == (3, 3, 1)
    assert config.data == make_config({}).data


def test_an_override_changes_one_of_the_sections_that_an_alias_repeats(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("mae: &s {epochs: 10, betas: [0.9, 0.99]}\nmoce: *s\n")
    tree = read_tree(path, ["moce.epochs=5"])
    assert (tree["mae"]["epochs"], tree["moce"]["epochs"]) == ("10", "5")
    assert tree["mae"]["betas"] is not tree["moce"]["betas"]
