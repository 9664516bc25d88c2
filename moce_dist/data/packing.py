"""Packing image files into tars: which file goes into which tar, and one task per tar.

The sorted list of files and their sizes determines the plan, so workers write tars in parallel, and
after a kill the finished tars stay. A file that cannot be read is left out of its tar and reported
as a fault. With `data.store_side`, large images are stored smaller, so that every later crop is
faster to decode.

    cat/0.jpg cat/1.jpg dog/2.jpg ...   ->   train-000000.tar   cat/0 dog/2     holdout by the hash
                                             holdout/holdout-000000.tar   cat/1     of the key

A shell command can write a tar too, given as in WebDataset: `pipe:COMMAND`. A pipe can be read only
once and forward, whereas training reads samples by range. So every command runs once, and its tar
is stored beside the index. Commands run only if the configuration allows it. They must take
credentials from the environment (`$TOKEN`), as COMPLETE and messages contain their text.

    pipe:curl -s https://host/{00..01}.tar.gz | gunzip     ->     pipe-000000.tar pipe-000001.tar
"""

import hashlib
import io
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from moce_dist.data.decoders import ImageError
from moce_dist.data.images import open_croppable
from moce_dist.data.listing import ending
from moce_dist.data.resize import Size
from moce_dist.data.shards import HOLDOUT, Fault, Shard, scan_shard
from moce_dist.data.sources import PIPE, ImageFile, read_image_file
from moce_dist.data.writer import ShardWriter, finished_tar, note_finished
from moce_dist.run.files import temporary_name
from moce_dist.run.names import as_text
from moce_dist.settings import ConfigError

_QUALITY, _SPARE = 90, 2
"""For images that are stored smaller: JPEG quality, and least scale of the decoded image."""


class Packing(NamedTuple):
    """Settings that all tars of a folder share."""

    out: Path
    store_side: int | None


class FileTar(NamedTuple):
    """One tar to be written: its folder relative to the output, its name and its files."""

    folder: str
    name: str
    files: list[ImageFile]


def share(name: str) -> float:
    """Map a name to a fixed place in [0, 1); names below the hold-out fraction are held out."""
    digest = hashlib.sha256(as_text(name).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def member_bytes(sizes: Iterable[int]) -> int:
    """Return an upper bound on the bytes of members of these sizes in a tar, with headers."""
    return sum(size + 1024 for size in sizes)


def plan_files(
    files: Iterable[ImageFile], *, holdout_fraction: float, shard_bytes: int
) -> list[FileTar]:
    """Assign the files, in order, to training and hold-out tars of at most about `shard_bytes`."""
    tars: dict[str, list[FileTar]] = {"": [], HOLDOUT: []}
    filled = dict.fromkeys(tars, 0)
    for file in files:
        folder = HOLDOUT if share(file.key) < holdout_fraction else ""
        series = tars[folder]
        size = member_bytes([file.size] if file.label is None else [file.size, 8])
        if not series or filled[folder] + size > shard_bytes:
            series.append(FileTar(folder, f"{folder or 'train'}-{len(series):06d}.tar", []))
            filled[folder] = 0
        series[-1].files.append(file)
        filled[folder] += size
    return [*tars[""], *tars[HOLDOUT]]


def plan_id(tars: Iterable[FileTar]) -> str:
    """Return a sha256 of the plan: tar names, and paths, keys, sizes and labels of the files."""
    digest = hashlib.sha256()
    for tar in tars:
        digest.update(f"{tar.folder}/{tar.name}\n".encode())
        for file in tar.files:
            line = f"{file.path}\0{file.key}\0{file.size}\0{file.label}\n"
            digest.update(as_text(line).encode())
    return digest.hexdigest()


def at_most(content: bytes, side: int) -> bytes | None:
    """Shrink an image to a JPEG whose longer side is `side` pixels; None if it is no larger.

    Raises:
        ImageError: the image cannot be decoded.
    """
    image = open_croppable(content)
    longer = max(image.width, image.height)
    if longer <= side:
        return None
    size = Size(*(max(1, round(s * side / longer)) for s in (image.width, image.height)))
    buffer = io.BytesIO()
    pixels = image.resized(size, "bicubic", _SPARE)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def write_files(packing: Packing, tar: FileTar) -> tuple[Shard, list[Fault]]:
    """Pack the files of one tar, unless an earlier attempt finished it.

    Returns its index entry and faults; without samples there is no file.

    Raises:
        OSError: the tar cannot be written.
    """
    folder = packing.out / tar.folder
    if (found := finished_tar(folder, tar.name)) is not None:
        return found
    faults: list[Fault] = []
    writer: ShardWriter | None = None
    for file in tar.files:
        try:
            content, name = read_image_file(file), ending(file.path.name)
            smaller = at_most(content, packing.store_side) if packing.store_side else None
        except ImageError as error:
            faults.append(Fault(str(file.path), file.key, str(error)))
            continue
        if smaller is not None:
            content, name = smaller, "jpg"
        writer = writer or ShardWriter(folder, tar.name)
        label = {} if file.label is None else {"cls": str(file.label).encode()}
        writer.add(file.key, {name: content, **label})
    if writer is None:
        return Shard(tar.name), faults
    shard = writer.close()
    note_finished(folder, shard, faults)
    return shard, faults


class PipedTar(NamedTuple):
    """A tar to be written: its file name, and `pipe:COMMAND`."""

    name: str
    url: str


def write_piped(out: Path, tar: PipedTar) -> tuple[Shard, list[Fault]]:
    """Run a command, store the tar that it writes and index it, unless done before.

    Raises:
        ConfigError: the command wrote no tar.
        RuntimeError: the command failed; its own messages went to standard error.
        OSError: the tar cannot be written.
    """
    if (found := finished_tar(out, tar.name)) is not None:
        return found
    path = out / tar.name
    temporary = temporary_name(path)
    command = ["bash", "-o", "pipefail", "-c", tar.url.removeprefix(PIPE)]
    # copied through this process: if it is killed, the command gets a broken pipe and ends too
    with (
        temporary.open("wb") as file,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None, "a pipe was asked for"
        shutil.copyfileobj(process.stdout, file, 2**20)
    if process.returncode:
        raise RuntimeError(f"shards:{tar.url}: ended with status {process.returncode}")
    temporary.replace(path)
    try:
        shard, faults = scan_shard(str(path), path=tar.name)
    except ConfigError:
        raise ConfigError(f"shards:{tar.url}: writes no uncompressed tar") from None
    note_finished(out, shard, faults)
    return shard, faults
