r"""Names and messages as text that every table, log and terminal can hold.

A file name on Linux may be any bytes. Python represents bytes that are not UTF-8 as lone
surrogates, which cannot be encoded. Paths keep them; everything else that is made from a name (a
key, a class, a line of output) is converted here.

    bytes caf\xe9.png    path caf\udce9.png    text caf\xe9.png in letters, on any locale
"""

import json
import os
import re
import sys
from codecs import BOM_UTF8
from collections.abc import Sized
from io import TextIOWrapper
from pathlib import Path
from typing import Any

_ESCAPED = re.compile(rb"\\x([0-9a-f]{2})")
_LABEL_LENGTH = 200
"""Longest name of a class."""


def as_text(name: str | bytes | os.PathLike[str]) -> str:
    r"""Return a name as valid UTF-8 text; bytes that are not UTF-8 become `\xNN`."""
    if isinstance(name, str) and name.isascii():
        return name
    try:
        raw = os.fsencode(name)
    except UnicodeEncodeError:
        # not a name of this file system but text from a file, which may hold other surrogates
        raw = str(name).encode("utf-8", "surrogatepass")
    return raw.decode("utf-8", "backslashreplace")


def as_path(text: str | Path) -> Path:
    r"""Return the path that `as_text` made this from, if it or its folder exists; else as it is.

    A path in a configuration is such text.
    """
    path = Path(text)
    if r"\x" not in str(text) or path.exists():
        return path
    raw = _ESCAPED.sub(lambda found: bytes.fromhex(found[1].decode()), os.fsencode(text))
    named = Path(os.fsdecode(raw))
    is_there = named.exists() or (named.parent.exists() and not path.parent.exists())
    return named if is_there else path


def read_names(path: Path) -> list[str]:
    """Read names from a file, one per line, in any encoding; empty lines are skipped."""
    text = as_text(path.read_bytes().removeprefix(BOM_UTF8))
    return [line.strip() for line in text.splitlines() if line.strip()]


def clean_label(label: Any) -> str | None:
    """Return a label as text if it is a number or a short printable name, else None."""
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        return None
    text = str(label).strip()
    return text if text.isprintable() and 0 < len(text) <= _LABEL_LENGTH else None


def one_line(error: object) -> str:
    """Return the text of an error without its line breaks."""
    return " ".join(str(error).split())


def typed(error: BaseException) -> str:
    """Return the text of an error on one line, after the name of its type."""
    return f"{type(error).__name__}: {one_line(error)}"


def and_more(problems: Sized) -> str:
    """Count the problems besides the first one, as ` (and 2 more)`; "" if there are none."""
    return f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""


def open_output() -> None:
    """Let standard output and error take any text: they escape what they cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def json_line(value: Any) -> str:
    """Return JSON for standard output; in ASCII if its encoding cannot show the text."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return json.dumps(value)
    return text
