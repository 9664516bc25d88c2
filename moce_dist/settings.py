"""How a configuration is read: YAML, `--set` overrides, strict typing, errors with dotted paths.

What the fields are stands in config.py.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(ValueError):
    """A request that is wrong; the message lists every mistake as `path = value: rule`."""


class Section(BaseModel):
    """A part of the configuration: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


SectionT = TypeVar("SectionT", bound=Section)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2 floats: `1e-4` is a number, not a string."""


_Loader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML text; `name` is what an error calls it.

    Raises:
        ConfigError: the text is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None


def dump_yaml(tree: dict[str, Any]) -> str:
    """Write nested dicts as YAML, in their order."""
    return yaml.safe_dump(tree, sort_keys=False)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, sign, text = override.partition("=")
    if not sign or not path:
        raise ConfigError(f"--set {override}: must read a.b=value")
    node = tree
    for parent in path.split(".")[:-1]:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {parent} is not a section")
    node[path.split(".")[-1]] = parse_yaml(text, f"--set {path}")


def read_tree(path: str | Path | None, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a YAML file (None: an empty one) as nested dicts and apply `a.b=value` overrides.

    Raises:
        ConfigError: the file is missing or is not a mapping, or an override is malformed.
    """
    tree: Any = {}
    if path is not None:
        try:
            tree = parse_yaml(Path(path).read_text(), str(path)) or {}
        except OSError as error:
            raise ConfigError(f"--config {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"--config {path}: is not a text file") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, is a {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return tree


def validate(section: type[SectionT], tree: dict[str, Any]) -> SectionT:
    """Build a section from nested dicts.

    Raises:
        ConfigError: naming every unknown key and wrong type.
    """
    try:
        return section.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(e) for e in error.errors())) from None
    except TypeError as error:
        raise ConfigError(f"configuration holds a value that is no plain YAML: {error}") from None


def _describe(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{path} = {error['input']!r}: unknown key"
    return f"{path} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as {dotted path: leaf}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return flat
