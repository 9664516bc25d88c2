"""Build a configuration from YAML files of non-default values and `--set` overrides.

All wrong fields are reported together, and then all broken rules between fields. Each message gives
the dotted path, the value and the rule.
"""

import logging
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from moce_dist.config.sections import Role
from moce_dist.config.tree import Config, cross_field_errors
from moce_dist.settings import ConfigError, Section, dump_yaml, flatten, read_tree, validate

ConfigT = TypeVar("ConfigT", bound=Config)
log = logging.getLogger(__name__)


def checked(config: ConfigT) -> ConfigT:
    """Return `config` if it breaks no rule between fields.

    Raises:
        ConfigError: naming every broken rule.
    """
    if broken := cross_field_errors(config):
        raise ConfigError("; ".join(broken))
    return config


def make_config(tree: dict[str, Any]) -> Config:
    """Build a checked `Config` from nested dicts.

    Raises:
        ConfigError: naming every unknown key, wrong type and broken rule.
    """
    _rename(tree, warn=True)
    return checked(validate(Config, tree))


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file of non-default values, apply `a.b=value` overrides and check the result.

    Raises:
        ConfigError: the file is missing, is not a mapping, or holds a mistake.
    """
    tree = read_tree(path)
    # before the overrides, so that they win under either name
    _rename(tree, warn=True)
    return make_config(read_tree(None, map(_renamed, overrides), under=tree))


def read_resolved(path: Path, overrides: Iterable[str] = (), over: str | None = None) -> Config:
    """Read the configuration of a run and apply a file and overrides on top of it.

    Runs of version 0.1 can be read too. The rules between fields are not checked.

    Raises:
        ConfigError: an override is wrong, or this version does not know a setting of the run.
    """
    saved = read_tree(path)
    # version 0.1 also stored the settings of benchmarks, and used other names
    saved.pop("bench", None)
    _rename(saved)
    # experts had weights of their own, whatever is now the default
    saved.setdefault("moe", {}).setdefault("shared_base", False)
    tree = read_tree(over, under=saved)
    _rename(tree, warn=True)
    tree = read_tree(None, map(_renamed, overrides), under=tree)
    try:
        return validate(Config, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: does not fit this version of moce_dist: {error}") from None


def _rename(tree: dict[str, Any], *, warn: bool = False) -> None:
    """Rename fields of version 0.1 to their current names."""
    for old, new in Config.RENAMED.items():
        section, prefix = old.split(".")
        fields = tree.get(section)
        if not isinstance(fields, dict):
            continue
        for name in [name for name in fields if name.startswith(prefix)]:
            now = name.removeprefix(prefix)
            if warn:
                _tell(f"{section}.{name}", f"{new}{now}")
            target = new.split(".")[1]
            inner = fields.get(target) or {}
            if isinstance(inner, dict):
                fields[target] = inner
                inner[now] = fields.pop(name)


def _renamed(override: str) -> str:
    """Give a field that an override names as version 0.1 did its current name."""
    path, sign, value = override.partition("=")
    for old, new in Config.RENAMED.items():
        if path.startswith(old):
            now = f"{new}{path.removeprefix(old)}"
            _tell(path, now)
            return f"{now}{sign}{value}"
    return override


@cache
def _tell(old: str, new: str) -> None:
    # cached, because a study reads its configuration once per value
    log.warning("%s is now called %s", old, new)


@cache
def roles(config: type[Config] = Config) -> dict[str, Role]:
    """Return the role of every field by dotted path, as its type declares it."""
    return dict(_roles(config, "", Role.IDENTITY))


def _roles(section: type[Section], prefix: str, outer: Role) -> Iterator[tuple[str, Role]]:
    for name, field in section.model_fields.items():
        role = next((each for each in field.metadata if isinstance(each, Role)), outer)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _roles(field.annotation, f"{prefix}{name}.", role)
        else:
            yield f"{prefix}{name}", role


def identity(config: Config) -> dict[str, Any]:
    """Select the fields that decide what a run learns, as {dotted path: value}."""
    role = roles(type(config))
    flat = flatten(config.model_dump(mode="json"))
    return {path: value for path, value in flat.items() if role[path] is not Role.RUNTIME}


def to_yaml(config: Config) -> str:
    """Write the resolved configuration as YAML."""
    return dump_yaml(config.model_dump(mode="json"))
