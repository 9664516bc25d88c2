"""Sources of a data set: the image files of a folder, or the tars that a pattern names.

A source has the form `KIND:REST`. This module lists files, expands patterns and checks headers, so
that a wrong request is refused before any work. It writes nothing.

Source: class folders as in torchvision.datasets.ImageFolder; brace patterns as in webdataset.
"""

import glob
import io
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal, NamedTuple, get_args

import fsspec
from braceexpand import braceexpand

from moce_dist.data.decoders import ImageError, check_header
from moce_dist.data.listing import Listing, is_hidden, list_images
from moce_dist.data.shards import Fault
from moce_dist.run.environment import check_url, local_path
from moce_dist.run.names import as_text
from moce_dist.settings import ConfigError

logger = logging.getLogger(__name__)

PIPE = "pipe:"
"""Prefix of a shard that a shell command writes."""
_SECRETS = ("signature=", "credential=", "token=", "sig=", "key=")
_COMMAND_SECRETS = (*_SECRETS, "authorization", "password", "--user")

Kind = Literal["folder", "shards", "sample"]
PRETRAIN = "pretrain"
TASKS = ("digits", "silhouettes", "climate")
SEGMENTATION = "climate-ade20k"
TREES, COMPOSITED = "trees-coco", "composited-coco"
SAMPLE_SETS = (PRETRAIN, *TASKS, SEGMENTATION, TREES, COMPOSITED)
"""Names for `sample:NAME`; the chapter `samples` builds these sets."""


class ImageFile(NamedTuple):
    """An image file of a folder."""

    path: Path
    key: str
    """Relative path without extension; dots become underscores, as a key ends at the first dot."""
    label: int | None
    """Index of the class folder; None for a file directly in the root."""
    size: int


class Folder(NamedTuple):
    """The usable image files of a folder tree, sorted by path, and the unusable ones as faults."""

    files: list[ImageFile]
    faults: list[Fault]
    left_out: str
    """Counts of everything else in the tree; see `Listing.rest`."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def parse_source(source: str) -> tuple[Kind, str]:
    """Split `folder:PATH`, `shards:PATTERN` or `sample:NAME`; local paths become absolute.

    Raises:
        ConfigError: it has none of these forms, or there is no such sample set.
    """
    kind, colon, rest = source.partition(":")
    if kind == "sample" and rest not in SAMPLE_SETS:
        raise ConfigError(f"{source}: no such set, must be one of {', '.join(SAMPLE_SETS)}")
    if kind == "index":
        raise ConfigError(f"data.source = {source!r}: is ingested already, train on it as it is")
    for known in get_args(Kind):
        if kind == known and colon and rest:
            return known, _absolute(known, rest)
    raise ConfigError(
        f"data.source = {source!r}: must be folder:PATH, shards:PATTERN or sample:NAME"
    )


def _absolute(kind: Kind, rest: str) -> str:
    if kind == "folder":
        return str(local_path(os.path.expanduser(rest), "data.source = folder:").resolve())
    if kind == "shards":
        parts = (os.path.expanduser(part) for part in _split_commas(rest))
        return ",".join(
            part if _is_url(part) else os.path.abspath(local_path(part, "data.source = shards:"))
            for part in parts
        )
    return rest


def _is_url(name: str) -> bool:
    return "://" in name or name.startswith(PIPE)


def list_folder(root: Path) -> Folder:
    """List the images of a folder tree; class folders are numbered in sorted order.

    Faults are empty files, files that are not regular or cannot be read, folders that cannot be
    listed, and images whose key is already in use.

    Raises:
        ConfigError: the folder is missing, empty, or holds no images.
    """
    if not root.is_dir():
        raise ConfigError(
            f"folder:{root}: {'is not a folder' if root.exists() else 'no such folder'}"
        )
    listing = list_images(root)
    if not listing.files and not listing.unusable:
        rest = f"only {listing.rest()}" if listing.left_out else "is empty"
        raise ConfigError(f"folder:{root}: holds no images ({rest})")
    faults = [Fault(str(path), _key(root, path), why) for path, why in listing.unusable]
    return Folder(list(_usable(listing, faults)), faults, listing.rest())


def _key(root: Path, path: Path) -> str:
    return as_text(path.relative_to(root).with_suffix("")).replace(".", "_")


def _usable(listing: Listing, faults: list[Fault]) -> Iterator[ImageFile]:
    root = listing.root
    relative = [file.path.relative_to(root) for file in listing.files]
    classes = sorted({path.parts[0] for path in relative if len(path.parts) > 1})
    label_of = {name: label for label, name in enumerate(classes)}
    owner: dict[str, Path] = {}
    for (path, size), inner in zip(listing.files, relative, strict=True):
        key = _key(root, path)
        taken = f"key is taken by {as_text(owner[key].name)}" if key in owner else None
        if reason := "file is empty" if not size else taken:
            faults.append(Fault(str(path), key, reason))
            continue
        owner[key] = path
        yield ImageFile(path, key, label_of[inner.parts[0]] if len(inner.parts) > 1 else None, size)


def header_problem(image: IO[bytes] | Path) -> str | None:
    """Return why an image's header cannot be read, None if it can; do not decode the pixels."""
    try:
        check_header(image)
    except ImageError as error:
        return f"header of the image cannot be read: {error}"
    return None


def read_image_file(file: ImageFile) -> bytes:
    """Read an image file.

    Raises:
        ImageError: that fails, or the header is damaged.
    """
    try:
        content = file.path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}") from None
    if problem := header_problem(io.BytesIO(content)):
        raise ImageError(problem)
    return content


def expand_shards(pattern: str, *, allow_pipes: bool = False) -> list[str]:
    """Expand a comma list of brace patterns, globs, paths and URLs into absolute paths and URLs.

    An existing file, or existing folders at the start of a pattern, are taken literally, even if
    they contain pattern letters. Braces in commands (`pipe:`) are expanded; nothing is run.

    Raises:
        ConfigError: unbalanced braces, a command that is not allowed, a pattern without a match, a
            shard named twice.
    """
    urls = [url for part in _split_commas(pattern) for url in _expand(part, allow_pipes)]
    for url, count in Counter(urls).items():
        if count > 1:
            raise ConfigError(f"shards:{pattern}: names {url} {count} times")
    return urls


def _split_commas(pattern: str) -> Iterator[str]:
    """Split a list at commas outside of braces, unless the whole text is an existing file."""
    if os.path.isfile(os.path.expanduser(pattern)):
        yield pattern
        return
    depth, start = 0, 0
    for position, letter in enumerate(pattern):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth <= 0:
            yield pattern[start:position]
            start = position + 1
    yield pattern[start:]


def _expand(part: str, allow_pipes: bool) -> Iterator[str]:
    if _has_credentials(part):
        # the URL would end up in the index, the ledger and the report
        what = "a command" if part.startswith(PIPE) else f"a URL of {part.partition('://')[0]}"
        raise ConfigError(
            f"shards: {what} carries credentials; give them by the environment or the files that "
            "its library reads"
        )
    if part.startswith(PIPE) and not allow_pipes:
        raise ConfigError(f"shards:{part}: commands run only with data.allow_pipes=true")
    if not part.removeprefix(PIPE).strip():
        raise ConfigError(f"shards:{part}: names nothing")
    if "://" in part and not part.startswith(PIPE):
        check_url(part)
    folder, pattern = ("", part) if _is_url(part) else _existing(part)
    try:
        names = list(braceexpand(pattern)) if pattern else [""]
    except ValueError:
        raise ConfigError(f"shards:{part}: braces are not balanced") from None
    for name in names:
        path = folder + name
        is_pattern = not part.startswith(PIPE) and any(letter in name for letter in "*?[")
        is_file = not _is_url(part) and os.path.isfile(path)
        found = _glob(glob.escape(folder) + name) if is_pattern and not is_file else [path]
        if not found or not (_is_url(part) or all(map(os.path.isfile, found))):
            raise ConfigError(f"shards:{path}: no such file")
        yield from found


def _existing(part: str) -> tuple[str, str]:
    """Split a local pattern into a literal path, which exists, and the rest."""
    if os.path.isfile(part):
        return part, ""
    ends = (n for n in range(len(part), 0, -1) if part[n - 1] == "/" and os.path.isdir(part[:n]))
    end = next(ends, 0)
    return part[:end], part[end:]


def _has_credentials(name: str) -> bool:
    if name.startswith(PIPE):
        return any(mark in name.lower() for mark in _COMMAND_SECRETS)
    scheme, _, rest = name.partition("://")
    if not rest or scheme == "file":
        return False
    host, query = rest.partition("/")[0], rest.partition("?")[2]
    return "@" in host or any(mark in query.lower() for mark in _SECRETS)


def _glob(pattern: str) -> list[str]:
    filesystem, path = fsspec.core.url_to_fs(pattern)
    return [
        filesystem.unstrip_protocol(name) if "://" in pattern else name
        for name in sorted(filesystem.glob(path))
        if not is_hidden(name.rpartition("/")[2])
    ]
