"""How a configuration is read: YAML, `--set` overrides, strict typing, errors with dotted paths.

The type of a field, not the spelling, decides how unquoted text is read: `off` is a word for
`cluster.balance` and false for `data.hflip`; `007` is a name for `base_run` and seven for `seed`.
Nothing is read as a date or as a base-60 number. For a text field, the value of `--set a.b=` is
taken literally: ` #` begins no comment, and only quotes around the whole value are removed. A
duplicate key is an error.

The fields are defined in config/.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(ValueError):
    """A wrong request; the message lists every mistake as `path = value: rule`."""


class Section(BaseModel):
    """A part of the configuration: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


SectionT = TypeVar("SectionT", bound=Section)


class Unquoted(str):
    """Unquoted text; the type of its field decides what it means."""

    __slots__ = ()


class SetValue(Unquoted):
    """The value of `--set PATH=VALUE`."""

    path = ""


_ANYTHING = (NoneType, bool, int, float, str)
_NULL = ("", "~", "null", "Null", "NULL")
_WORDS = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}
_INTEGER = re.compile(r"[-+]?\d+(_\d+)*", re.ASCII)
_FLOAT = re.compile(
    r"[-+]?(\d+(_\d+)*(\.\d*)?|\.\d+)(e[-+]?\d+)?|[-+]?\.inf|\.nan", re.ASCII | re.IGNORECASE
)
_MOST_DIGITS, _MOST = 40, 2**63
_PLAIN, _MERGE = "!plain", "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """PyYAML's parser; unquoted scalars stay text, whatever they look like."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0]:
            return _MERGE if value == "<<" else _PLAIN
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]

    def plain(self, node: yaml.ScalarNode) -> Unquoted:
        return Unquoted(node.value)

    def sequence(self, node: yaml.SequenceNode) -> list[Any]:
        return self.construct_sequence(node, deep=True)

    def mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"line {line}: a key must be a word")
            if key.value in lines and key.tag != _MERGE:
                raise ConfigError(
                    f"{key.value} stands twice, in line {lines[key.value]} and line {line}"
                )
            lines[key.value] = line
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


_Loader.yaml_constructors = {
    _PLAIN: _Loader.plain,
    "tag:yaml.org,2002:map": _Loader.mapping,
    "tag:yaml.org,2002:seq": _Loader.sequence,
    "tag:yaml.org,2002:str": _Loader.construct_yaml_str,
    None: _Loader.construct_undefined,
}


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML text into dicts, lists, `str` (quoted) and `Unquoted`; `name` is for errors.

    Raises:
        ConfigError: the text is not YAML, or a key is duplicated.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    except yaml.YAMLError as error:
        reason = f"{error}"
        if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):
            reason = f"{error.problem}, line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(
            f"{name}: not valid YAML: {' '.join(reason.split())}; text with ': ', ' #' or brackets "
            "needs quotes around it"
        ) from None


def dump_yaml(tree: dict[str, Any]) -> str:
    """Write nested dicts as YAML, in their order."""
    return yaml.safe_dump(tree, sort_keys=False)


def read_tree(
    path: str | Path | None, overrides: Iterable[str] = (), under: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Read a YAML file (None: an empty one) as nested dicts and apply `a.b=value` overrides.

    Both are applied on top of the tree `under`, which is changed in place.

    Raises:
        ConfigError: a file is missing or is not a mapping, or an override is malformed.
    """
    tree = {} if under is None else under
    if path is not None:
        _lay_over(tree, _read_file(path))
    for override in overrides:
        dotted, sign, text = override.partition("=")
        if not sign or not dotted:
            raise ConfigError(f"--set {override}: must read a.b=value")
        node = tree
        *parents, last = dotted.split(".")
        for parent in parents:
            inner = node.get(parent, {})
            if isinstance(inner, Unquoted):
                if isinstance(inner, SetValue):
                    inner = parse_yaml(inner, f"--set {dotted}")
                inner = {} if inner in _NULL else inner
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {override}: {parent} is not a section")
            node[parent] = node = inner
        node[last] = given = SetValue(text)
        given.path = dotted
    return tree


def _read_file(path: str | Path) -> dict[str, Any]:
    try:
        tree = parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config {path}: is not a text file") from None
    if tree is None or (isinstance(tree, Unquoted) and tree in _NULL):
        return {}
    if not isinstance(tree, dict):
        kind = "list" if isinstance(tree, list) else "text"
        raise ConfigError(f"{path}: must be a mapping of sections, is a {kind}")
    # sections that an alias repeats are one object, and an override is meant for one of them
    return {key: _unshared(value) for key, value in tree.items()}


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _lay_over(tree: dict[str, Any], upper: dict[str, Any]) -> None:
    for key, value in upper.items():
        if isinstance(value, dict) and isinstance(inner := tree.get(key), dict):
            _lay_over(inner, value)
        else:
            tree[key] = value


def validate(section: type[SectionT], tree: dict[str, Any]) -> SectionT:
    """Build a section from nested dicts.

    Raises:
        ConfigError: naming every unknown key and wrong type.
    """
    try:
        return section.model_validate_json(json.dumps(_typed(tree, section)), strict=True)
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(error, tree))) from None
    except TypeError as error:
        raise ConfigError(f"configuration holds a value that is no plain YAML: {error}") from None


def _options(wanted: Any) -> tuple[Any, ...]:
    """Types that a field may have: the members of a union, without annotations."""
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin is Annotated:
        return _options(parts[0])
    if origin in (Union, UnionType):
        return tuple(chain.from_iterable(map(_options, parts)))
    return _ANYTHING if wanted is Any else (wanted,)


def _typed(value: Any, wanted: Any) -> Any:
    """Convert unquoted text anywhere in a value to a type that its field accepts."""
    options = _options(wanted)
    if isinstance(value, SetValue):
        value = _read_set_value(value, options)
    if isinstance(value, Unquoted):
        return next(_readings(value, options))
    if isinstance(value, dict):
        sections = (o for o in options if isinstance(o, type) and issubclass(o, Section))
        section = next(sections, Section)
        fields = {name: field.annotation for name, field in section.model_fields.items()}
        named = next((get_args(o)[1] for o in options if get_origin(o) is dict), Any)
        return {key: _typed(inner, fields.get(key, named)) for key, inner in value.items()}
    if isinstance(value, list):
        items = next((get_args(o) for o in options if get_origin(o) is tuple), (Any,))
        kinds = repeat(items[0]) if items[-1] is ... else chain(items, repeat(Any))
        return [_typed(inner, kind) for inner, kind in zip(value, kinds, strict=False)]
    return value


def _read_set_value(given: SetValue, options: tuple[Any, ...]) -> Any:
    """Read the value of `--set a.b=`; as YAML only quoted text, and fields of lists or sections."""
    is_text = any(option is str or get_origin(option) is Literal for option in options)
    is_quoted = len(given) > 1 and given[0] == given[-1] and given[0] in "\"'"
    if is_text and not is_quoted:
        return Unquoted(given)
    if is_text or not set(options) <= set(_ANYTHING):
        try:
            found = parse_yaml(given, f"--set {given.path}")
        except ConfigError:
            if not is_text:
                raise
            return Unquoted(given)
        return Unquoted(given) if is_text and not isinstance(found, str) else found
    return Unquoted(given.strip())


def _readings(text: Unquoted, options: tuple[Any, ...]) -> Iterator[Any]:
    """Yield the values that unquoted text can have under `options`, the most likely first."""
    yield from (c for o in options if get_origin(o) is Literal for c in get_args(o) if c == text)
    if text in _NULL and NoneType in options:
        yield None
    word = text.lower()
    # where any type is allowed, only the booleans of YAML 1.2
    words = ("true", "false") if options == _ANYTHING else _WORDS
    if bool in options and word in words and text in (word, word.capitalize(), word.upper()):
        yield _WORDS[word]
    numbers = [o for o in options if get_origin(o) is Literal for o in get_args(o)]
    is_integer = int in options or any(type(number) is int for number in numbers)
    is_short = is_integer and len(text) < _MOST_DIGITS
    if is_short and _INTEGER.fullmatch(text) and -_MOST <= int(text) < _MOST:
        yield int(text)
    if float in options and _FLOAT.fullmatch(text):
        yield float(re.sub(r"\.(inf|nan)$", r"\1", word.replace("_", "")))
    if text in _NULL and any(isinstance(o, type) and issubclass(o, Section) for o in options):
        # an empty section
        yield {}
    if str in options:
        yield str(text)
    yield text


def _describe(error: ValidationError, tree: dict[str, Any]) -> list[str]:
    """Describe the errors, one line per field, with the value as the user wrote it."""
    found: dict[str, list[str]] = {}
    for mistake in error.errors():
        node: Any = tree
        path: list[str] = []
        for part in mistake["loc"]:
            inside = range(len(node)) if isinstance(node, list) else node
            is_in = isinstance(node, dict | list) and part in inside
            if not is_in and mistake["type"] != "missing":
                # the rest names a member of a union, or lies inside the text of a --set
                break
            path.append(str(part))
            node = node[part] if is_in else None
        shown = f"{node}" if isinstance(node, Unquoted) else f"{mistake['input']!r}"
        rule = f"{mistake['msg'][0].lower()}{mistake['msg'][1:]}"
        if mistake["type"] == "extra_forbidden":
            rule = "unknown key"
        elif mistake["type"] == "string_type" and isinstance(node, dict | list):
            rule += '; text of such letters needs quotes: "..."'
        found.setdefault(f"{'.'.join(path)} = {shown}", []).append(rule)
    return [f"{field}: {', or '.join(rules)}" for field, rules in found.items()]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as {dotted path: leaf}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return flat
