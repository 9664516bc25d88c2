r"""Names are bytes: file and class names as text that every table, log and terminal can hold.

Linux takes any bytes for a name, and Python hands over those that are no UTF-8 as lone surrogates,
which nothing can encode. Paths stay as they are; whatever else is made of a name, a key, a class,
a line of output, goes through here.

    bytes caf\xe9.png    path caf\udce9.png    text caf\xe9.png in letters, on any locale
"""

import json
import os
import re
import sys
from codecs import BOM_UTF8
from io import TextIOWrapper
from pathlib import Path
from typing import Any

_ESCAPED = re.compile(rb"\\x([0-9a-f]{2})")
_LABEL_LENGTH = 200
"""Longest name of a class."""


def as_text(name: str | bytes | os.PathLike[str]) -> str:
    r"""Return a name as text that is valid UTF-8; bytes that are none stand as `\xNN`."""
    if isinstance(name, str) and name.isascii():
        return name
    try:
        raw = os.fsencode(name)
    except UnicodeEncodeError:
        # no name of this file system: text of a file, that may hold half a letter
        raw = str(name).encode("utf-8", "surrogatepass")
    return raw.decode("utf-8", "backslashreplace")


def as_path(text: str | Path) -> Path:
    r"""Return the path that `as_text` made this of, if it or its folder is there; else as it is.

    What a configuration says of a path is such text.
    """
    path = Path(text)
    if r"\x" not in str(text) or path.exists():
        return path
    raw = _ESCAPED.sub(lambda found: bytes.fromhex(found[1].decode()), os.fsencode(text))
    named = Path(os.fsdecode(raw))
    is_there = named.exists() or (named.parent.exists() and not path.parent.exists())
    return named if is_there else path


def read_names(path: Path) -> list[str]:
    """Read the names of a file, one a line, whatever its encoding; empty lines do not count."""
    text = as_text(path.read_bytes().removeprefix(BOM_UTF8))
    return [line.strip() for line in text.splitlines() if line.strip()]


def clean_label(label: Any) -> str | None:
    """Return a class, a number or a short name that can be printed, as text; of others None."""
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        return None
    text = str(label).strip()
    return text if text.isprintable() and 0 < len(text) <= _LABEL_LENGTH else None


def open_output() -> None:
    """Let standard output and error take any text: what they cannot show is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def json_line(value: Any) -> str:
    """Return JSON for standard output, readable where that can show it, in ASCII elsewhere."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return json.dumps(value)
    return text
