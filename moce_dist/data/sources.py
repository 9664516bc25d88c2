"""What a data set is made of: picture files of a folder, or tars that a pattern names.

A source reads `KIND:REST`. Everything here looks, nothing is written: files are listed, patterns
are expanded, headers are checked, so that a wrong request is refused before any work.

Source: class folders as torchvision.datasets.ImageFolder; brace patterns as webdataset has them.
"""

import glob
import io
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal, NamedTuple, get_args

import fsspec
from braceexpand import braceexpand

from moce_dist.data.decoders import ImageError, check_header
from moce_dist.data.shards import IMAGE_EXTENSIONS, Fault
from moce_dist.environment import check_url, local_path
from moce_dist.settings import ConfigError

logger = logging.getLogger(__name__)

PIPE = "pipe:"
"""What a shard begins with that a shell command writes."""
_SECRETS = ("signature=", "credential=", "token=", "sig=", "key=")
_COMMAND_SECRETS = (*_SECRETS, "authorization", "password", "--user")

Kind = Literal["folder", "shards", "sample"]
PRETRAIN = "pretrain"
TASKS = ("digits", "silhouettes", "climate")
SEGMENTATION = "climate-ade20k"
TREES, COMPOSITED = "trees-coco", "composited-coco"
SAMPLE_SETS = (PRETRAIN, *TASKS, SEGMENTATION, TREES, COMPOSITED)
"""What `sample:NAME` may name; `data.samples` and `data.detection` build them."""


class ImageFile(NamedTuple):
    """A picture file of a folder."""

    path: Path
    key: str
    """Relative path without its extension, dots as underscores: a key ends at its first dot."""
    label: int | None
    """Index of the class folder; None for a file directly in the root."""
    size: int


class Folder(NamedTuple):
    """The picture files of a folder tree, sorted by path, and what cannot be used."""

    files: list[ImageFile]
    faults: list[Fault]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def parse_source(source: str) -> tuple[Kind, str]:
    """Split `folder:PATH`, `shards:PATTERN` or `sample:NAME`; local paths become absolute.

    Raises:
        ConfigError: it is none of them, or there is no such sample set.
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
    """List the pictures of a folder tree, class folders in sorted order, each folder once.

    Faults are empty files, what is no regular file, folders that cannot be listed, and pictures
    whose key another one has already.

    Raises:
        ConfigError: the folder is missing, empty, or holds no pictures.
    """
    if not root.is_dir():
        raise ConfigError(
            f"folder:{root}: {'is not a folder' if root.exists() else 'no such folder'}"
        )
    faults: list[Fault] = []
    paths = sorted(path for path in _walk(root, faults) if _is_picture(path))
    if not paths and not any(root.iterdir()):
        raise ConfigError(f"folder:{root}: is empty")
    if not paths:
        kinds = ", ".join(IMAGE_EXTENSIONS)
        raise ConfigError(f"folder:{root}: holds no pictures (files ending in {kinds})")
    return Folder(list(_usable(root, paths, faults)), faults)


def _is_picture(path: Path) -> bool:
    return path.suffix[1:].lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")


def _walk(root: Path, faults: list[Fault]) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()

    def unlisted(error: OSError) -> None:
        faults.append(Fault(str(error.filename), None, f"cannot be listed: {error.strerror}"))

    for folder, folders, names in os.walk(root, followlinks=True, onerror=unlisted):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            logger.warning("%s: leads to a folder that was listed already; left out", folder)
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in names)


def _usable(root: Path, paths: list[Path], faults: list[Fault]) -> Iterator[ImageFile]:
    relative = [path.relative_to(root) for path in paths]
    classes = sorted({path.parts[0] for path in relative if len(path.parts) > 1})
    label_of = {name: label for label, name in enumerate(classes)}
    owner: dict[str, Path] = {}
    for path, inner in zip(paths, relative, strict=True):
        key = inner.with_suffix("").as_posix().replace(".", "_")
        size, reason = _check_file(path)
        if reason is None and key in owner:
            reason = f"key is taken by {owner[key].name}"
        if reason is not None:
            faults.append(Fault(str(path), key, reason))
            continue
        owner[key] = path
        yield ImageFile(path, key, label_of[inner.parts[0]] if len(inner.parts) > 1 else None, size)


def _check_file(path: Path) -> tuple[int, str | None]:
    try:
        status = path.stat()
    except OSError as error:
        return 0, f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return 0, "is not a regular file"
    return status.st_size, None if status.st_size else "file is empty"


def header_problem(picture: IO[bytes] | Path) -> str | None:
    """Tell why an image's header cannot be read, None when it can; pixels are not decoded."""
    try:
        check_header(picture)
    except ImageError as error:
        return f"header of the image cannot be read: {error}"
    return None


def read_picture(file: ImageFile) -> bytes | Fault:
    """Read a picture file; a fault when that fails or its header is damaged."""
    try:
        content = file.path.read_bytes()
    except OSError as error:
        return Fault(str(file.path), file.key, f"cannot be read: {error.strerror}")
    problem = header_problem(io.BytesIO(content))
    return Fault(str(file.path), file.key, problem) if problem else content


def expand_shards(pattern: str, *, allow_pipes: bool = False) -> list[str]:
    """Expand a comma list of brace patterns, globs, paths and URLs into absolute paths and URLs.

    What is there is a path before it is a pattern: a file, and folders that a pattern begins with.
    Commands (`pipe:`) have their braces expanded, nothing is run.

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
    """Split a list at commas outside of braces, unless all of it is a file."""
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
    """Split a local pattern into the folders that are there, letter for letter, and the rest."""
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
    ]
